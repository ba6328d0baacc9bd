//! CUDA sources, compiled by NVRTC for the card that is there.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, c_char},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule},
    nvrtc::{Ptx, result, sys},
};
use sha2::{Digest, Sha256};

use super::{Gpu, GpuError, kept};
use crate::element::Dtype;

const PRELUDE: &str = include_str!("prelude.cu");

/// A file of CUDA C++ with `extern "C"` kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// In messages, and of the compiled file in a cache.
    pub name: &'static str,
    /// Its text, after the prelude.
    pub text: &'static str,
}

/// A kernel of a source, compiled for one kind of number and with some constants.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub source: &'static Source,
    pub name: &'static str,
    /// What `elem` is.
    pub dtype: Option<Dtype>,
    /// Other constants: `-DNAME=value`.
    pub defines: Vec<(&'static str, u32)>,
}

impl Kernel {
    pub fn new(source: &'static Source, name: &'static str, dtype: Option<Dtype>) -> Self {
        Self {
            source,
            name,
            dtype,
            defines: Vec::new(),
        }
    }

    pub fn define(mut self, name: &'static str, value: usize) -> Self {
        self.defines.push((name, u32::try_from(value).unwrap_or(u32::MAX)));
        self
    }

    fn options(&self, architecture: &str) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
            "--extra-device-vectorization".to_owned(),
        ];
        match self.dtype {
            Some(Dtype::F32) => options.push("-DELEM=float".to_owned()),
            Some(Dtype::Bf16) => options.push("-DELEM=bf16".to_owned()),
            None => {}
        }
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }
}

type ModuleKey = (&'static str, Vec<String>);

/// Modules and functions that have been loaded.
#[derive(Debug, Default)]
pub(super) struct Library {
    modules: Mutex<HashMap<ModuleKey, Arc<CudaModule>>>,
    functions: Mutex<HashMap<FunctionKey, CudaFunction>>,
}

type FunctionKey = (&'static str, Option<Dtype>, Vec<(&'static str, u32)>);

/// Machine code of a source for an architecture such as `sm_90a`. Needs NVRTC, but no GPU.
pub fn compile(source: &Source, architecture: &str, defines: &[String]) -> Result<Vec<u8>, GpuError> {
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    options.extend(defines.iter().map(|define| format!("-D{define}")));
    build(source, &options)
}

fn build(source: &Source, options: &[String]) -> Result<Vec<u8>, GpuError> {
    let failed = |log: String| GpuError::Compile {
        kernel: source.name,
        log,
    };
    let text = format!("{PRELUDE}\n#line 1 \"{}.cu\"\n{}", source.name, source.text);
    let text = CString::new(text).map_err(|error| failed(error.to_string()))?;
    let name = CString::new(format!("{}.cu", source.name)).map_err(|error| failed(error.to_string()))?;
    let program = result::create_program(&text, Some(&name)).map_err(|error| failed(format!("{error:?}")))?;
    // SAFETY: the program is alive until `destroy_program` below, the last use of it.
    let code = unsafe {
        let code = match result::compile_program(program, options) {
            Ok(()) => machine_code(program).map_err(|error| format!("no machine code: {error:?}")),
            Err(error) => Err(match result::get_program_log(program) {
                Ok(log) => text_of(&log),
                Err(_) => format!("{error:?}"),
            }),
        };
        let _ = result::destroy_program(program);
        code
    };
    code.map_err(failed)
}

fn text_of(log: &[c_char]) -> String {
    // SAFETY: a program log ends with a zero byte.
    unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned()
}

/// # Safety
/// The program must be alive and compiled for a real architecture (`sm_…`).
unsafe fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut bytes = 0usize;
    // SAFETY: by the caller; the buffer is as long as NVRTC says.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut code = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
        Ok(code)
    }
}

/// Where machine code is kept between runs: in a folder that only its owner may write, or nowhere.
fn cache_file(source: &Source, options: &[String]) -> Option<PathBuf> {
    let folder = kept::folder()?;
    let mut hash = Sha256::new();
    hash.update(PRELUDE);
    hash.update(source.text);
    for option in options {
        hash.update(option);
        hash.update([0]);
    }
    let digest = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    Some(folder.join(format!("{}-{digest}.cubin", source.name)))
}

fn build_cached(source: &Source, options: &[String]) -> Result<Vec<u8>, GpuError> {
    let file = cache_file(source, options);
    if let Some(file) = &file
        && let Ok(code) = std::fs::read(file)
    {
        return Ok(code);
    }
    let code = build(source, options)?;
    if let Some(file) = file {
        // A cache that cannot be written costs seconds at the next start and nothing else.
        let part = file.with_extension(format!("{}.part", std::process::id()));
        if std::fs::write(&part, &code).is_ok() {
            let _ = std::fs::rename(&part, &file);
        }
    }
    Ok(code)
}

impl Library {
    fn function(
        &self,
        context: &Arc<CudaContext>,
        kernel: &Kernel,
        architecture: &str,
    ) -> Result<CudaFunction, GpuError> {
        let wanted = (kernel.name, kernel.dtype, kernel.defines.clone());
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&wanted) {
            return Ok(function.clone());
        }
        let options = kernel.options(architecture);
        let key = (kernel.source.name, options.clone());
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(&key) {
            Some(module) => module.clone(),
            None => {
                let code = build_cached(kernel.source, &options)?;
                let loaded = context.load_module(Ptx::from_binary(code));
                let module = loaded.map_err(GpuError::driver("load a kernel"))?;
                modules.insert(key, module.clone());
                module
            }
        };
        let function = module.load_function(kernel.name).map_err(|source| GpuError::Driver {
            action: kernel.name,
            source,
        })?;
        functions.insert(wanted, function.clone());
        Ok(function)
    }
}

impl Gpu {
    /// A kernel, compiled at its first use.
    pub(super) fn function(&self, kernel: &Kernel) -> Result<CudaFunction, GpuError> {
        self.library.function(&self.context, kernel, &self.architecture)
    }
}
