//! What this machine has for models: which device and why, how fast it is, and whether the GPU's kernels compute what they
//! should.

mod lines;
mod parity;

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;
use flotilla_model::ModelError;
use serde::Serialize;

#[cfg(any(test, feature = "cuda"))]
use self::lines::gpu_lines;
use self::lines::{check_lines, machine_lines};
use super::bench;
#[cfg(feature = "cuda")]
use crate::train::parallel::map_parts;
use crate::{
    device::{self, DeviceArguments, Fault, Wanted},
    error::WorkerError,
};

/// Repetitions of a measurement; the fastest counts.
const ROUNDS: usize = 3;

/// Arguments of `doctor`.
#[derive(Args, Clone, Debug, Default)]
pub struct DoctorArguments {
    /// Where models would run.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// Directory of a checkpoint that is computed on the device and on the CPU in f32 and compared; may be repeated. For small
    /// models: the CPU takes its time, and its memory.
    #[arg(long = "model", value_name = "DIR")]
    pub models: Vec<PathBuf>,
    /// Measure nothing and check no kernels.
    #[arg(long)]
    pub quick: bool,
    /// Seed of the inputs on which kernels are checked; a new one each time by default.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub version: &'static str,
    /// What was compiled in besides the CPU: cuda, cudnn, nccl.
    pub features: Vec<&'static str>,
    /// Where models would run.
    pub device: DeviceReport,
    /// The machine without its GPUs.
    pub cpu: CpuReport,
    /// What the NVIDIA driver shows, or why there is nothing to show.
    pub driver: DriverReport,
    /// Version of NCCL, by which several GPUs share a model, or why it cannot be used; none in a build without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nccl: Option<String>,
    /// The GPU that models would run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuReport>,
    /// Checkpoints on the device beside the CPU in f32.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelReport>,
}

/// Where models would run.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// What was asked for.
    pub wanted: String,
    /// What it is; none where the GPU that was asked for cannot be used.
    pub chosen: Option<String>,
    /// Why.
    pub reason: String,
}

/// The machine without its GPUs.
#[derive(Clone, Debug, Serialize)]
pub struct CpuReport {
    /// Cores that this process may use.
    pub cores: usize,
    /// Instruction sets for vectors that matrix products choose between.
    pub vectors: Vec<&'static str>,
    /// Bytes per second that all cores together read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_second: Option<f64>,
    /// Operations per second of an f32 matrix product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f32_flops: Option<f64>,
}

/// What the NVIDIA driver shows.
#[derive(Clone, Debug, Serialize)]
pub struct DriverReport {
    /// The newest CUDA version that it runs, as 13.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuda: Option<String>,
    /// Names and compute capabilities of its GPUs, in the order of their numbers.
    pub cards: Vec<String>,
    /// CUDA libraries that the loader does not find.
    pub missing_libraries: Vec<&'static str>,
    /// Why there is no driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// A GPU.
#[derive(Clone, Debug, Serialize)]
pub struct GpuReport {
    /// The vendor's name.
    pub name: String,
    /// Compute capability, as 9.0.
    pub capability: String,
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of memory.
    pub memory: usize,
    /// Bytes that nobody has taken.
    pub free: usize,
    /// Bytes of level 2 cache.
    pub cache: usize,
    /// Version of NVRTC.
    pub nvrtc: String,
    /// Version of cuBLASLt.
    pub cublas: String,
    /// Bytes per second of a large copy, read and written bytes both counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_bytes_per_second: Option<f64>,
    /// Operations per second of a large product of bf16 matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16_flops: Option<f64>,
    /// Seed of the inputs of the checks.
    pub seed: u64,
    /// Each kernel against its reference on the CPU.
    pub checks: Vec<CheckReport>,
}

/// A checkpoint on the device beside the CPU in f32.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// Its directory.
    pub model: String,
    /// What was compared.
    pub checks: Vec<CheckReport>,
}

/// One comparison with what the CPU computes.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// What is compared: for a kernel its name, format and what is special about the inputs.
    pub name: String,
    /// Whether it is near enough.
    pub ok: bool,
    /// Its distance and the most that it may be, or what went wrong.
    pub detail: String,
}

/// Examines and prints as it goes. An error if a check fails or the GPU that was asked for cannot be used.
pub fn run(arguments: &DoctorArguments) -> Result<(), WorkerError> {
    let (report, verdict) = examine(arguments, &mut |lines| {
        if !arguments.json {
            print!("{lines}");
        }
    })?;
    if arguments.json {
        let json = serde_json::to_string_pretty(&report);
        println!(
            "{}",
            json.map_err(|error| WorkerError::permanent("failed to write the report", error))?
        );
    }
    verdict
}

/// The report, and the error that it means; `tell` is given the report for people, part by part.
pub fn examine(
    arguments: &DoctorArguments,
    tell: &mut dyn FnMut(&str),
) -> Result<(Report, Result<(), WorkerError>), WorkerError> {
    let wanted = arguments.device.device;
    let opened = wanted.try_open();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        features: features(),
        device: match &opened {
            Ok(opened) => DeviceReport {
                wanted: wanted.to_string(),
                chosen: Some(opened.place.to_string()),
                reason: opened.reason.clone(),
            },
            Err(fault) => DeviceReport {
                wanted: wanted.to_string(),
                chosen: None,
                reason: fault.to_string(),
            },
        },
        cpu: cpu(arguments.quick).map_err(|error| WorkerError::permanent("failed to measure the CPU", error))?,
        driver: driver(device::look()),
        nccl: nccl(),
        gpu: None,
        models: Vec::new(),
    };
    tell(&machine_lines(&report));
    if let Ok(opened) = &opened {
        report.gpu = gpu(opened.place, arguments, tell)?;
        for directory in &arguments.models {
            tell(&format!("model    {}, beside the CPU in f32\n", directory.display()));
            let checks = parity::check(directory, &opened.device)?;
            tell(&check_lines(&checks));
            report.models.push(ModelReport {
                model: directory.display().to_string(),
                checks,
            });
        }
    }
    let verdict = verdict(wanted, opened.err(), &report);
    Ok((report, verdict))
}

fn verdict(wanted: Wanted, fault: Option<Fault>, report: &Report) -> Result<(), WorkerError> {
    if let Some(fault) = fault {
        return Err(WorkerError::permanent(format!("models cannot run on {wanted}"), fault));
    }
    let of_models = report.models.iter().flat_map(|model| &model.checks);
    let checks = report.gpu.iter().flat_map(|gpu| &gpu.checks).chain(of_models);
    let failed = checks
        .filter(|check| !check.ok)
        .map(|check| format!("{} ({})", check.name, check.detail))
        .collect::<Vec<_>>();
    if failed.is_empty() {
        return Ok(());
    }
    Err(WorkerError::Retryable {
        what: format!(
            "{} checks failed, do not use this device with this build: {}",
            failed.len(),
            failed.join("; ")
        ),
        source: None,
    })
}

#[cfg(not(feature = "nccl"))]
fn nccl() -> Option<String> {
    None
}

#[cfg(feature = "nccl")]
fn nccl() -> Option<String> {
    Some(match flotilla_kernels::gpu::nccl::version() {
        Ok(version) => format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
        Err(error) => format!("none: {error}"),
    })
}

fn features() -> Vec<&'static str> {
    let compiled = [
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("nccl", cfg!(feature = "nccl")),
    ];
    compiled
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

fn cpu(quick: bool) -> Result<CpuReport, ModelError> {
    let measured = |measure: &dyn Fn() -> Result<f64, ModelError>| if quick { Ok(None) } else { measure().map(Some) };
    Ok(CpuReport {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        vectors: vectors(),
        read_bytes_per_second: measured(&|| bench::memory_bandwidth(&Device::Cpu, ROUNDS))?,
        f32_flops: measured(&|| bench::matrix_rate(&Device::Cpu, DType::F32, ROUNDS))?,
    })
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> Vec<&'static str> {
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    found
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> Vec<&'static str> {
    if cfg!(target_arch = "aarch64") {
        vec!["neon"]
    } else {
        Vec::new()
    }
}

fn driver(found: Result<device::Machine, Fault>) -> DriverReport {
    match found {
        Ok(machine) => {
            let cards = machine.cards.iter().enumerate().map(|(number, card)| {
                let (major, minor) = card.capability;
                format!("cuda:{number} {}, compute capability {major}.{minor}", card.name)
            });
            DriverReport {
                cuda: Some(format!("{}.{}", machine.driver / 1000, machine.driver % 1000 / 10)),
                cards: cards.collect(),
                missing_libraries: machine.missing,
                fault: None,
            }
        }
        Err(fault) => DriverReport {
            cuda: None,
            cards: Vec::new(),
            missing_libraries: Vec::new(),
            fault: Some(fault.to_string()),
        },
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: device::Place, _: &DoctorArguments, _: &mut dyn FnMut(&str)) -> Result<Option<GpuReport>, WorkerError> {
    Ok(None)
}

#[cfg(feature = "cuda")]
fn gpu(
    place: device::Place,
    arguments: &DoctorArguments,
    tell: &mut dyn FnMut(&str),
) -> Result<Option<GpuReport>, WorkerError> {
    use flotilla_kernels::{Gpu, bench::ceilings};

    let device::Place::Cuda(number) = place else {
        return Ok(None);
    };
    let failed = |error| WorkerError::permanent(format!("failed to examine cuda:{number}"), error);
    let gpu = Gpu::new(number).map_err(failed)?;
    let card = gpu.card().map_err(failed)?;
    let measured = if arguments.quick {
        None
    } else {
        Some(ceilings(&gpu).map_err(failed)?)
    };
    let mut report = GpuReport {
        capability: format!("{}.{}", card.capability.0, card.capability.1),
        processors: card.processors,
        memory: card.memory,
        free: card.free,
        cache: card.cache,
        nvrtc: format!("{}.{}", card.nvrtc.0, card.nvrtc.1),
        cublas: format!("{}.{}.{}", card.blas / 10_000, card.blas / 100 % 100, card.blas % 100),
        name: card.name,
        copy_bytes_per_second: measured.map(|measured| measured.bandwidth),
        bf16_flops: measured.map(|measured| measured.arithmetic),
        seed: arguments.seed.unwrap_or_else(rand::random),
        checks: Vec::new(),
    };
    tell(&gpu_lines(&report));
    if !arguments.quick {
        tell(&format!(
            "kernels  beside their references on the CPU, seed {}; the first time each is compiled\n",
            report.seed
        ));
        report.checks = kernels(number, report.seed).map_err(failed)?;
        tell(&check_lines(&report.checks));
    }
    Ok(Some(report))
}

/// Every kernel beside its reference, on all cores: compiling and the references take the time, not the GPU.
#[cfg(feature = "cuda")]
fn kernels(number: usize, seed: u64) -> Result<Vec<CheckReport>, flotilla_kernels::GpuError> {
    use flotilla_kernels::{Gpu, check};

    /// Checks that follow each other often share a source, which each handle of the GPU compiles once.
    const TOGETHER: usize = 4;
    let examine = |gpu: &Gpu, one: &check::Check| {
        let (ok, detail) = match (one.run)(gpu, &mut check::Draw::new(seed)) {
            Ok(distance) => (
                distance.holds(),
                format!("{:.2e} of {:.0e}", distance.relative, distance.bound),
            ),
            Err(error) => (false, error.to_string()),
        };
        CheckReport {
            name: one.name.to_owned(),
            ok,
            detail,
        }
    };
    let checks = check::all();
    let parts = checks.chunks(TOGETHER).collect::<Vec<_>>();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done = map_parts(threads, &parts, |part| {
        let examined = |gpu| part.iter().map(|one| examine(&gpu, one)).collect::<Vec<_>>();
        Gpu::new(number).map(examined)
    })?;
    Ok(done.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    #[cfg(not(feature = "cuda"))]
    use flotilla_api::names::exit;

    use super::*;

    fn check(ok: bool) -> CheckReport {
        CheckReport {
            name: "rms_norm bf16".to_owned(),
            ok,
            detail: "1.00e-3 of 4e-3".to_owned(),
        }
    }

    fn report(checks: Vec<CheckReport>) -> Report {
        Report {
            version: "0.1.0",
            features: vec!["cuda"],
            device: DeviceReport {
                wanted: "auto".to_owned(),
                chosen: Some("cuda:0".to_owned()),
                reason: "a card, the first GPU that can be used".to_owned(),
            },
            cpu: CpuReport {
                cores: 16,
                vectors: vec!["avx2", "fma"],
                read_bytes_per_second: None,
                f32_flops: None,
            },
            driver: driver(Ok(device::Machine {
                driver: 13_000,
                cards: vec![device::Card {
                    name: "a card".to_owned(),
                    capability: (9, 0),
                    memory: 80 << 30,
                }],
                missing: Vec::new(),
            })),
            nccl: None,
            gpu: Some(GpuReport {
                name: "a card".to_owned(),
                capability: "9.0".to_owned(),
                processors: 132,
                memory: 80 << 30,
                free: 79 << 30,
                cache: 50 << 20,
                nvrtc: "13.0".to_owned(),
                cublas: "13.1.0".to_owned(),
                copy_bytes_per_second: Some(3e12),
                bf16_flops: Some(8e14),
                seed: 7,
                checks,
            }),
            models: Vec::new(),
        }
    }

    #[test]
    fn without_a_gpu_the_report_says_why_and_what_to_do() {
        let arguments = DoctorArguments {
            device: DeviceArguments { device: Wanted::Cpu },
            quick: true,
            ..DoctorArguments::default()
        };
        let mut text = String::new();
        let (report, verdict) = examine(&arguments, &mut |lines| text.push_str(lines)).expect("a report");
        assert!(verdict.is_ok());
        assert_eq!(report.device.chosen.as_deref(), Some("cpu"));
        assert!(text.contains("device   cpu: asked for (cpu was asked for)"), "{text}");
        if cfg!(not(feature = "cuda")) {
            assert!(
                text.contains("driver   none: this flotilla-worker was built without CUDA"),
                "{text}"
            );
            assert!(text.contains("make build-cuda"), "{text}");
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_gpu_that_was_asked_for_and_is_not_there_is_an_error_with_a_report() {
        let arguments = DoctorArguments {
            device: DeviceArguments {
                device: Wanted::Cuda(None),
            },
            quick: true,
            ..DoctorArguments::default()
        };
        let (report, verdict) = examine(&arguments, &mut |_| {}).expect("a report");
        assert!(report.device.chosen.is_none());
        assert_eq!(verdict.expect_err("no GPU").exit_code(), exit::PERMANENT);
    }

    #[test]
    fn a_check_that_fails_is_in_the_table_and_in_the_exit_code() {
        let good = report(vec![check(true)]);
        assert!(verdict(Wanted::Auto, None, &good).is_ok());
        let bad = report(vec![check(true), check(false)]);
        let error = verdict(Wanted::Auto, None, &bad).expect_err("a failed check");
        assert_eq!(error.exit_code(), 1);
        let message = error.to_string();
        assert!(
            message.contains("1 checks failed") && message.ends_with("rms_norm bf16 (1.00e-3 of 4e-3)"),
            "{message}"
        );
        let gpu = bad.gpu.expect("a GPU");
        let text = gpu_lines(&gpu) + &check_lines(&gpu.checks);
        assert!(text.contains("FAILED   rms_norm bf16"), "{text}");
        assert!(text.contains("1 of 2 hold"), "{text}");
        assert!(
            text.contains("copies 3.00 TB/s, bf16 matrix products 800 TFLOP/s"),
            "{text}"
        );
    }

    #[test]
    fn the_report_is_one_json_document() {
        let json = serde_json::to_value(report(vec![check(true)])).expect("json");
        assert_eq!(json["gpu"]["checks"][0]["ok"], true);
        assert_eq!(json["driver"]["cuda"], "13.0");
        assert!(json["cpu"].get("f32_flops").is_none());
    }
}
