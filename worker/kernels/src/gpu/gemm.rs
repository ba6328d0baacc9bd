//! Matrix products by cuBLASLt, planned once per shape: the library names candidates, and the fastest of them is kept.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{PoisonError, atomic::Ordering},
};

use cudarc::{
    cublas::sys::cublasOperation_t,
    cublaslt::{result, sys},
};

use super::{Buffer, Gpu, GpuError, choices::Choices};
use crate::{
    element::{Dtype, Float},
    shape::ShapeError,
};

/// Scratch memory of the library, in bytes: what its Hopper kernels ask for.
const WORKSPACE: usize = 64 << 20;
/// Plans that are kept; after that many the next begins anew.
const MOST_PLANS: usize = 4096;
/// Candidates that are timed when a shape is met first.
const CANDIDATES: usize = 8;

/// `out[m, n] = alpha * a[m, k] · b[k, n] + beta * out`, all row-major, computed and summed in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemm {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// `a` is stored as `[k, m]`.
    pub transpose_a: bool,
    /// `b` is stored as `[n, k]`, as the weights of a linear layer are.
    pub transpose_b: bool,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what `out` holds: 0 overwrites it, 1 adds to it.
    pub beta: f32,
    /// Elements between two rows of `a`, `b` and `out` as they are stored, where they are parts of wider matrices.
    pub strides: Option<(usize, usize, usize)>,
    /// Takes the library's first choice and times nothing: for shapes that hardly come twice, such as those of pictures.
    pub untimed: bool,
}

impl Gemm {
    /// A linear layer: `out[rows, outputs] = x[rows, inputs] · weight[outputs, inputs]ᵀ`.
    pub fn linear(rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            m: rows,
            n: outputs,
            k: inputs,
            transpose_a: false,
            transpose_b: true,
            alpha: 1.0,
            beta: 0.0,
            strides: None,
            untimed: false,
        }
    }

    /// The gradient of its input: `dx[rows, inputs] = dy[rows, outputs] · weight[outputs, inputs]`.
    pub fn input_gradient(rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            m: rows,
            n: inputs,
            k: outputs,
            transpose_b: false,
            ..Self::linear(rows, outputs, inputs)
        }
    }

    /// The gradient of its weight: `dw[outputs, inputs] = dy[rows, outputs]ᵀ · x[rows, inputs]`.
    pub fn weight_gradient(rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            m: outputs,
            n: inputs,
            k: rows,
            transpose_a: true,
            transpose_b: false,
            ..Self::linear(rows, outputs, inputs)
        }
    }

    /// Adds to what the result holds.
    pub fn accumulate(self) -> Self {
        Self { beta: 1.0, ..self }
    }

    /// Rows of wider matrices: elements between two rows of `a`, `b` and `out` as stored.
    pub fn strided(self, a: usize, b: usize, out: usize) -> Self {
        Self {
            strides: Some((a, b, out)),
            ..self
        }
    }

    /// See [`Self::untimed`].
    pub fn once(self) -> Self {
        Self { untimed: true, ..self }
    }

    /// Floating-point operations.
    pub fn operations(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// Rows and columns of `a` and `b` as they are stored.
    fn stored(&self) -> ((usize, usize), (usize, usize)) {
        let a = if self.transpose_a {
            (self.k, self.m)
        } else {
            (self.m, self.k)
        };
        let b = if self.transpose_b {
            (self.n, self.k)
        } else {
            (self.k, self.n)
        };
        (a, b)
    }

    fn row_strides(&self) -> (usize, usize, usize) {
        let (a, b) = self.stored();
        self.strides.unwrap_or((a.1, b.1, self.n))
    }
}

/// What is done to a product, after `alpha` and `beta` and still in f32, before it is rounded and stored.
#[derive(Clone, Copy, Debug)]
pub enum Finish<'a, T> {
    /// Nothing.
    Plain,
    /// A bias is added: `[n]`, a number for each column of the result.
    Bias(&'a Buffer<T>),
    /// A bias is added, and GELU by `tanh` taken of the sum.
    BiasGelu(&'a Buffer<T>),
}

impl<T> Finish<'_, T> {
    fn kind(&self) -> sys::cublasLtEpilogue_t {
        match self {
            Self::Plain => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            Self::Bias(_) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            Self::BiasGelu(_) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
        }
    }

    fn bias(&self) -> Option<&Buffer<T>> {
        match self {
            Self::Plain => None,
            Self::Bias(bias) | Self::BiasGelu(bias) => Some(bias),
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Key {
    shape: (usize, usize, usize),
    transposed: (bool, bool),
    strides: (usize, usize, usize),
    dtypes: (Dtype, Dtype),
    adds: bool,
    finish: sys::cublasLtEpilogue_t,
    untimed: bool,
}

/// What the library needs for one shape.
#[derive(Debug)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// In the order of the library, which is column-major: ours with `a` and `b` swapped.
    b: sys::cublasLtMatrixLayout_t,
    a: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    /// A plan is kept for its shape: layers of one shape have their own biases.
    fn set_bias<T: Float>(&self, bias: Option<&Buffer<T>>) -> Result<(), GpuError> {
        let Some(bias) = bias else { return Ok(()) };
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        // SAFETY: the attribute is a pointer of the card. Numbers of a bias are in the format of the result.
        unsafe { set(self.operation, attribute, bias.pointer()) }
    }
}

/// The library with its plans and its scratch memory.
#[derive(Debug)]
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
    workspace: Option<Buffer<u8>>,
    choices: Choices,
}

// SAFETY: handles and descriptors are plain host memory of the library; a mutex gives them to one thread at a time.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        self.forget();
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn data_type(dtype: Dtype) -> sys::cudaDataType {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn blas_error(action: impl Into<String>) -> impl FnOnce(result::CublasError) -> GpuError {
    let action = action.into();
    move |error| GpuError::Blas {
        action,
        status: format!("{:?}", error.0),
    }
}

impl Blas {
    pub fn new(choices: Choices) -> Result<Self, GpuError> {
        Ok(Self {
            handle: result::create_handle().map_err(blas_error("start"))?,
            plans: HashMap::new(),
            workspace: None,
            choices,
        })
    }

    fn forget(&mut self) {
        for plan in self.plans.drain().map(|(_, plan)| plan) {
            // SAFETY: made by `plan`, used by nobody any more: the library has read them when a launch returns.
            unsafe {
                let _ = result::destroy_matrix_layout(plan.a);
                let _ = result::destroy_matrix_layout(plan.b);
                let _ = result::destroy_matrix_layout(plan.out);
                let _ = result::destroy_matmul_desc(plan.operation);
            }
        }
    }
}

/// A matrix `[rows, columns]` of ours is the library's `[columns, rows]`.
fn layout(dtype: Dtype, rows: usize, columns: usize, stride: usize) -> Result<sys::cublasLtMatrixLayout_t, GpuError> {
    let made = result::create_matrix_layout(data_type(dtype), columns as u64, rows as u64, stride as i64);
    made.map_err(blas_error("describe a matrix"))
}

/// # Safety
/// `value` must be of the attribute's type.
unsafe fn set<T>(
    operation: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<(), GpuError> {
    let pointer = (&raw const value).cast::<c_void>();
    // SAFETY: by the caller; the library copies the value.
    let set = unsafe { result::set_matmul_desc_attribute(operation, attribute, pointer, size_of::<T>()) };
    set.map_err(blas_error("describe a product"))
}

fn candidates(handle: sys::cublasLtHandle_t, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, GpuError> {
    let preference = result::create_matmul_pref().map_err(blas_error("state a preference"))?;
    let workspace = WORKSPACE;
    let mut found = Vec::<sys::cublasLtMatmulHeuristicResult_t>::with_capacity(CANDIDATES);
    let mut count = 0;
    // SAFETY: all descriptors are alive, the list has room for what is asked, and its length is set to what was written.
    unsafe {
        let set = result::set_matmul_pref_attribute(
            preference,
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        );
        let asked = set.and_then(|()| {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                plan.operation,
                plan.b,
                plan.a,
                plan.out,
                plan.out,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
            .result()
        });
        let _ = result::destroy_matmul_pref(preference);
        asked.map_err(blas_error("find an algorithm"))?;
        found.set_len(usize::try_from(count).unwrap_or_default().min(CANDIDATES));
    }
    let works = found
        .iter()
        .filter(|one| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
    Ok(works.map(|one| one.algo).collect())
}

impl Gpu {
    /// A matrix product. The first of a shape allocates scratch memory, plans, and times the candidates, writing `out` as it
    /// goes: it must not be inside a [recording](Self::record).
    pub fn gemm<A: Float, O: Float>(
        &self,
        gemm: Gemm,
        a: &Buffer<A>,
        b: &Buffer<A>,
        out: &Buffer<O>,
    ) -> Result<(), GpuError> {
        self.gemm_finished(gemm, a, b, out, Finish::Plain)
    }

    /// As [`Self::gemm`], with `bias` `[n]` added to every row of the result in the same pass.
    pub fn gemm_with_bias<A: Float, O: Float>(
        &self,
        gemm: Gemm,
        a: &Buffer<A>,
        b: &Buffer<A>,
        bias: &Buffer<O>,
        out: &Buffer<O>,
    ) -> Result<(), GpuError> {
        self.gemm_finished(gemm, a, b, out, Finish::Bias(bias))
    }

    /// As [`Self::gemm`], with a bias or an activation in the same pass over the result. Some of the library's algorithms round a
    /// part of the sum to the result's format on the way: there are two roundings then, as with a pass of its own.
    pub fn gemm_finished<A: Float, O: Float>(
        &self,
        gemm: Gemm,
        a: &Buffer<A>,
        b: &Buffer<A>,
        out: &Buffer<O>,
        finish: Finish<'_, O>,
    ) -> Result<(), GpuError> {
        let (a_stored, b_stored) = gemm.stored();
        let strides = gemm.row_strides();
        for (name, length, (rows, columns), stride) in [
            ("a", a.len(), a_stored, strides.0),
            ("b", b.len(), b_stored, strides.1),
            ("out", out.len(), (gemm.m, gemm.n), strides.2),
        ] {
            ShapeError::unless("gemm", stride >= columns, || {
                format!("{name}: rows of {columns} elements, {stride} apart")
            })?;
            ShapeError::at_least("gemm", name, length, rows.saturating_sub(1) * stride + columns)?;
        }
        if let Some(bias) = finish.bias() {
            ShapeError::length("gemm", "bias", bias.len(), gemm.n)?;
        }
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        ShapeError::unless("gemm", gemm.k > 0, || "nothing to sum over".to_owned())?;
        let key = Key {
            shape: (gemm.m, gemm.n, gemm.k),
            transposed: (gemm.transpose_a, gemm.transpose_b),
            strides,
            dtypes: (A::DTYPE, O::DTYPE),
            adds: gemm.beta != 0.0,
            finish: finish.kind(),
            untimed: gemm.untimed,
        };
        self.bind()?;
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let workspace = match &blas.workspace {
            Some(workspace) => workspace.clone(),
            None => blas.workspace.insert(self.alloc(WORKSPACE)?).clone(),
        };
        let handle = blas.handle;
        if let Some(plan) = blas.plans.get(&key) {
            plan.set_bias(finish.bias())?;
            return self.product(handle, plan, &plan.algorithm, gemm, (a, b, out), &workspace);
        }
        if blas.plans.len() >= MOST_PLANS {
            blas.forget();
        }
        let memory = (&workspace, &mut blas.choices);
        let plan = self.plan(handle, &key, gemm, (a, b, out), finish, memory)?;
        // Timing has overwritten the result, and a sum must be added once: `plan` times sums into scratch memory.
        let done = self.product(handle, &plan, &plan.algorithm, gemm, (a, b, out), &workspace);
        blas.plans.insert(key, plan);
        done
    }

    fn plan<A: Float, O: Float>(
        &self,
        handle: sys::cublasLtHandle_t,
        key: &Key,
        gemm: Gemm,
        operands: (&Buffer<A>, &Buffer<A>, &Buffer<O>),
        finish: Finish<'_, O>,
        (workspace, choices): (&Buffer<u8>, &mut Choices),
    ) -> Result<Plan, GpuError> {
        let (a_stored, b_stored) = gemm.stored();
        let operation = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(blas_error("describe a product"))?;
        let transpose = |transposed: bool| {
            if transposed {
                cublasOperation_t::CUBLAS_OP_T
            } else {
                cublasOperation_t::CUBLAS_OP_N
            }
        };
        // SAFETY: two attributes are a `cublasOperation_t`, the third is a `cublasLtEpilogue_t`.
        unsafe {
            use sys::cublasLtMatmulDescAttributes_t::{
                CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
            };
            set(operation, CUBLASLT_MATMUL_DESC_TRANSA, transpose(gemm.transpose_b))?;
            set(operation, CUBLASLT_MATMUL_DESC_TRANSB, transpose(gemm.transpose_a))?;
            set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, finish.kind())?;
        }
        let mut plan = Plan {
            operation,
            a: layout(A::DTYPE, a_stored.0, a_stored.1, key.strides.0)?,
            b: layout(A::DTYPE, b_stored.0, b_stored.1, key.strides.1)?,
            out: layout(O::DTYPE, gemm.m, gemm.n, key.strides.2)?,
            // SAFETY: plain numbers, replaced below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        plan.set_bias(finish.bias())?;
        let candidates = candidates(handle, &plan)?;
        let first = candidates.first().ok_or_else(|| GpuError::Blas {
            action: format!("find an algorithm for {gemm:?}"),
            status: "none".to_owned(),
        })?;
        plan.algorithm = *first;
        let timed = candidates.len() > 1 && !gemm.untimed;
        if timed && (choices.are_kept() || !self.fixed.load(Ordering::Relaxed)) {
            let product = format!("{key:?}");
            let known = choices.get(&product).filter(|number| *number < candidates.len());
            let chosen = match known {
                Some(number) => number,
                None => {
                    let number = self.fastest(handle, &plan, gemm, operands, &candidates, workspace)?;
                    choices.put(product, number).min(candidates.len() - 1)
                }
            };
            plan.algorithm = candidates[chosen];
        }
        Ok(plan)
    }

    /// The number of the candidate that takes the least time.
    fn fastest<A: Float, O: Float>(
        &self,
        handle: sys::cublasLtHandle_t,
        plan: &Plan,
        gemm: Gemm,
        operands: (&Buffer<A>, &Buffer<A>, &Buffer<O>),
        candidates: &[sys::cublasLtMatmulAlgo_t],
        workspace: &Buffer<u8>,
    ) -> Result<usize, GpuError> {
        let scratch = if gemm.beta == 0.0 {
            operands.2.clone()
        } else {
            self.alloc(operands.2.len())?
        };
        let clock = self.clock()?;
        let (mut best, mut chosen) = (f64::INFINITY, 0);
        for (number, candidate) in candidates.iter().enumerate() {
            let buffers = (operands.0, operands.1, &scratch);
            let run = || self.product(handle, plan, candidate, gemm, buffers, workspace);
            if run().is_err() {
                continue;
            }
            let seconds = self.time(&clock, || (0..3).try_for_each(|_| run()))?;
            if seconds < best {
                (best, chosen) = (seconds, number);
            }
        }
        Ok(chosen)
    }

    fn product<A: Float, O: Float>(
        &self,
        handle: sys::cublasLtHandle_t,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        gemm: Gemm,
        (a, b, out): (&Buffer<A>, &Buffer<A>, &Buffer<O>),
        workspace: &Buffer<u8>,
    ) -> Result<(), GpuError> {
        // SAFETY: the descriptors are alive, `gemm` has checked that the buffers are as long as they say, and the scratch
        // memory is as large as the algorithms were told.
        let done = unsafe {
            result::matmul(
                handle,
                plan.operation,
                (&raw const gemm.alpha).cast(),
                (&raw const gemm.beta).cast(),
                b.pointer() as *const c_void,
                plan.b,
                a.pointer() as *const c_void,
                plan.a,
                out.pointer() as *const c_void,
                plan.out,
                out.pointer() as *mut c_void,
                plan.out,
                &raw const *algorithm,
                workspace.pointer() as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        };
        done.map_err(|error| blas_error(format!("multiply {gemm:?}"))(error))
    }
}
