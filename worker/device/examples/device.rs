//! The model on a GPU alone: `device check DIR…` compares it with the host's, `device bench [SHAPE]` measures it, `device parts
//! [ROWS]` measures the matrix products of a decode step.

use std::{error::Error, path::Path, process::ExitCode};

use flotilla_device::{Sharing, TextShape, VisionShape, check, measure};
use flotilla_kernels::{Gemm, Gpu, bench::ceilings};
use flotilla_model::Config;
use half::bf16;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest = arguments.collect::<Vec<_>>();
    match command.as_str() {
        "check" => compare(&rest),
        "parts" => parts(rest.first().and_then(|rows| rows.parse().ok()).unwrap_or(256)),
        "bench" => bench(rest.first().map_or("qwen2.5-vl-7b", String::as_str)),
        _ => Err("device check DIR… | device parts [ROWS] | device bench [SHAPE]".into()),
    }
}

fn compare(models: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let mut failed = 0;
    for dir in models {
        let config = Config::load(Path::new(dir))?;
        let exact = check::text::<f32>(&gpu, &config, 1)?;
        let rounded = check::text::<bf16>(&gpu, &config, 1)?;
        let holds = exact.equal == exact.samples && exact.most < 1e-3 && rounded.mean < 0.02;
        failed += usize::from(!holds);
        println!(
            "{} {dir}\n  f32  {exact:?}\n  bf16 {rounded:?}",
            if holds { "ok     " } else { "FAILED " }
        );
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn parts(rows: usize) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let shape = TextShape::named("qwen2.5-vl-7b").ok_or("no such shape")?;
    for (name, outputs, inputs, count) in [
        ("qkv", shape.packed_width(), shape.hidden, shape.layers),
        ("output", shape.hidden, shape.query_width(), shape.layers),
        ("gate and up", 2 * shape.intermediate, shape.hidden, shape.layers),
        ("down", shape.hidden, shape.intermediate, shape.layers),
        ("head", shape.vocabulary, shape.hidden, 1),
    ] {
        // Several weights, so that none stays in the cache.
        let weights = (0..count.min(6))
            .map(|_| gpu.alloc::<bf16>(outputs * inputs))
            .collect::<Result<Vec<_>, _>>()?;
        for (seed, weight) in weights.iter().enumerate() {
            flotilla_kernels::rows::fill_normal(&gpu, weight, 0.02, seed as u64)?;
        }
        let x = gpu.alloc::<bf16>(rows * inputs)?;
        flotilla_kernels::rows::fill_normal(&gpu, &x, 1.0, 99)?;
        let out = gpu.alloc::<f32>(rows * outputs)?;
        let rounded = out.cast::<bf16>()?.slice(0..rows * outputs)?;
        let product = Gemm::linear(rows, outputs, inputs);
        let mut next = 0;
        let seconds = flotilla_kernels::bench::median(&gpu, || {
            next = (next + 1) % weights.len();
            match count {
                1 => gpu.gemm(product, &x, &weights[next], &out),
                _ => gpu.gemm(product, &x, &weights[next], &rounded),
            }
        })?;
        let (bytes, rate) = (
            2.0 * (outputs * inputs) as f64 / seconds,
            product.operations() / seconds,
        );
        println!(
            "{name:<14} {:>8.1} us x {count:>2} = {:>6.2} ms  {:>6.0} GB/s {:>5.0} TFLOP/s",
            seconds * 1e6,
            seconds * 1e3 * count as f64,
            bytes / 1e9,
            rate / 1e12
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn bench(name: &str) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let shape = TextShape::named(name).ok_or_else(|| format!("no shape {name}"))?;
    let ceilings = ceilings(&gpu)?;
    println!("{} {ceilings:?}", gpu.card()?.name);
    let print = |line: Result<measure::Line, flotilla_device::DeviceError>| match line {
        Ok(line) => println!(
            "{:<50} {:>9.1} {}/s {:>9.2} ms ({:>5.2} host), floor {:>8.2} ms ({}), {:>3.0} %",
            line.what,
            line.rate,
            line.unit,
            line.milliseconds,
            line.host.unwrap_or_default(),
            line.floor,
            line.bound,
            100.0 * line.share()
        ),
        Err(error) => println!("FAILED {error}"),
    };
    let bench = measure::Bench::new(&gpu, &shape, ceilings)?;
    let spec = measure::Grpo {
        prompts: 8,
        group: 8,
        prompt_tokens: 1536,
        new_tokens: 512,
        reference: std::env::var_os("REFERENCE").is_some(),
    };
    match bench.grpo(spec) {
        Ok(step) => println!("{:.0} tokens/s {step:?}\n{}", step.tokens_per_second(), step.plan),
        Err(error) => println!("FAILED grpo {error}"),
    }
    for rows in [1, 8, 32, 128, 256] {
        print(bench.decode(rows, 1024));
    }
    for (groups, n) in [(1, 8), (1, 128), (16, 8)] {
        for sharing in [Sharing::WhereItPays, Sharing::Always, Sharing::Never] {
            print(bench.groups(groups, n, 1536, sharing));
        }
        print(bench.alone(groups * n, 1536));
    }
    print(bench.prefill(1, 4096));
    print(bench.prefill(8, 2048));
    drop(bench);
    if let Some(VisionShape::Qwen(shape)) = VisionShape::named(name) {
        print(measure::vision(&gpu, &ceilings, &shape, 1, 74));
        print(measure::vision(&gpu, &ceilings, &shape, 4, 74));
    }
    Ok(ExitCode::SUCCESS)
}
