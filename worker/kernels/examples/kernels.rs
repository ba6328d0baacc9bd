//! Kernels alone on a GPU: `kernels check [NAME…]` compares them with their references, `kernels bench [NAME…]` measures
//! them against their floors; `kernels compile` compiles every source for Hopper and needs NVRTC, but no GPU.

use std::{error::Error, process::ExitCode};

use flotilla_kernels::{
    Gpu,
    bench::{self, Case},
    check::{self, Check, Draw},
    gpu::source,
};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let names = arguments.collect::<Vec<_>>();
    let asked = |name: &str| names.is_empty() || names.iter().any(|part| name.contains(part.as_str()));
    match command.as_str() {
        "compile" => compile(asked),
        "check" => run_checks(check::all().into_iter().filter(|one| asked(one.name))),
        "bench" => run_cases(bench::all().into_iter().filter(|one| asked(one.name))),
        _ => Err("kernels compile | check [NAME…] | bench [NAME…]".into()),
    }
}

fn compile(asked: impl Fn(&str) -> bool) -> Result<ExitCode, Box<dyn Error>> {
    for (one, defines) in flotilla_kernels::sources() {
        if asked(one.name) {
            let code = source::compile(one, "sm_90a", &defines)?;
            println!("{:<28} {:<60} {:>8} bytes", one.name, defines.join(" "), code.len());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_checks(checks: impl Iterator<Item = Check>) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let seed = seed();
    println!("{:?}, seed {seed}", gpu.card()?);
    let mut failed = 0;
    for check in checks {
        let result = (check.run)(&gpu, &mut Draw::new(seed));
        let (verdict, detail) = match &result {
            Ok(distance) if distance.holds() => ("ok", format!("{:.2e} of {:.0e}", distance.relative, distance.bound)),
            Ok(distance) => ("FAILED", format!("{:.2e} of {:.0e}", distance.relative, distance.bound)),
            Err(error) => ("FAILED", error.to_string()),
        };
        failed += usize::from(verdict != "ok");
        println!("{verdict:<7} {:<60} {detail}", check.name);
    }
    println!("{failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_cases(cases: impl Iterator<Item = Case>) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let ceilings = bench::ceilings(&gpu)?;
    println!("{:?}", gpu.card()?);
    println!(
        "ceilings: {:.0} GB/s, {:.0} TFLOP/s",
        ceilings.bandwidth / 1e9,
        ceilings.arithmetic / 1e12
    );
    println!(
        "{:<60} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "kernel", "time us", "floor us", "of floor", "GB/s", "TFLOP/s"
    );
    for case in cases {
        match case.measure(&gpu, &ceilings, seed()) {
            Ok(measured) => println!(
                "{:<60} {:>10.1} {:>10.1} {:>7.0}% {:>8.0} {:>8.0}",
                measured.name,
                measured.seconds * 1e6,
                measured.floor * 1e6,
                100.0 * measured.floor / measured.seconds,
                measured.bandwidth / 1e9,
                measured.arithmetic / 1e12
            ),
            Err(error) => println!("{:<60} FAILED {error}", case.name),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let clock = now.map_or(0, |since| since.as_secs());
    std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(clock)
}
