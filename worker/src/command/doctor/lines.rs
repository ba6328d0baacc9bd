//! The report for people.

use std::fmt::Write as _;

#[cfg(any(test, feature = "cuda"))]
use super::GpuReport;
use super::{CheckReport, Report};
use crate::command::bytes;

/// Lines on everything but GPUs. Writing to a string does not fail.
pub(super) fn machine_lines(report: &Report) -> String {
    let mut out = String::new();
    let built = if report.features.is_empty() {
        "CPU only".to_owned()
    } else {
        report.features.join(", ")
    };
    let _ = writeln!(out, "flotilla-worker {}, built with {built}", report.version);
    let device = &report.device;
    let chosen = device.chosen.as_deref().unwrap_or("none");
    let _ = writeln!(
        out,
        "device   {chosen}: {} ({} was asked for)",
        device.reason, device.wanted
    );
    let cpu = &report.cpu;
    let _ = write!(out, "cpu      {} cores, {}", cpu.cores, cpu.vectors.join(" "));
    if let (Some(read), Some(flops)) = (cpu.read_bytes_per_second, cpu.f32_flops) {
        let (read, flops) = (bytes(read as u64), flops / 1e9);
        let _ = write!(out, "; reads {read}/s, f32 matrix products {flops:.0} GFLOP/s");
    }
    out.push('\n');
    let driver = &report.driver;
    let _ = match &driver.fault {
        Some(fault) if *fault == device.reason => writeln!(out, "driver   none"),
        Some(fault) => writeln!(out, "driver   none: {fault}"),
        None => writeln!(
            out,
            "driver   runs CUDA up to {}",
            driver.cuda.as_deref().unwrap_or("?")
        ),
    };
    for card in &driver.cards {
        let _ = writeln!(out, "         {card}");
    }
    if !driver.missing_libraries.is_empty() {
        let _ = writeln!(out, "         not found: {}", driver.missing_libraries.join(", "));
    }
    if let Some(nccl) = &report.nccl {
        let _ = writeln!(out, "nccl     {nccl}");
    }
    out
}

/// Lines on a GPU.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn gpu_lines(gpu: &GpuReport) -> String {
    let mut out = String::new();
    let [free, memory, cache] = [gpu.free, gpu.memory, gpu.cache].map(|count| bytes(count as u64));
    let _ = writeln!(
        out,
        "gpu      {}, {} multiprocessors, {free} of {memory} free, {cache} of L2",
        gpu.name, gpu.processors
    );
    let _ = writeln!(out, "         NVRTC {}, cuBLASLt {}", gpu.nvrtc, gpu.cublas);
    if let (Some(copied), Some(flops)) = (gpu.copy_bytes_per_second, gpu.bf16_flops) {
        let (copied, flops) = (copied / 1e12, flops / 1e12);
        let _ = writeln!(
            out,
            "         copies {copied:.2} TB/s, bf16 matrix products {flops:.0} TFLOP/s"
        );
    }
    out
}

/// A line for each check, and how many hold.
pub(super) fn check_lines(checks: &[CheckReport]) -> String {
    let mut out = String::new();
    for check in checks {
        let verdict = if check.ok { "ok" } else { "FAILED" };
        let _ = writeln!(out, "{verdict:<8} {:<60} {}", check.name, check.detail);
    }
    let held = checks.iter().filter(|check| check.ok).count();
    let _ = writeln!(out, "         {held} of {} hold", checks.len());
    out
}
