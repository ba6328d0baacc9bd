//! The model on a GPU alone: `device check DIR…` compares it with the host's, `device bench [SHAPE] [KEY=VALUE…]` measures it, `device parts
//! [ROWS]` measures the matrix products of a decode step, `device tower [SHAPE [SQUARES]]` SigLIP and its parts.

use std::{collections::HashMap, error::Error, path::Path, process::ExitCode};

use flotilla_device::{
    TextShape, VisionShape, check,
    measure::{self, BestOf, Ceiling, Grpo, Lengths, Options, Peers, Table, Tower, peer},
    siglip,
};
use flotilla_kernels::{Gemm, Gpu, bench::ceilings};
use flotilla_model::{Config, Vision};
use half::bf16;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest = arguments.collect::<Vec<_>>();
    match command.as_str() {
        "check" => compare(&rest),
        "parts" => parts(rest.first().and_then(|rows| rows.parse().ok()).unwrap_or(256)),
        "bench" => bench(&rest),
        "tower" => tower(
            rest.first().map_or("llava-onevision-7b", String::as_str),
            rest.get(1).and_then(|squares| squares.parse().ok()).unwrap_or(10),
        ),
        _ => Err(
            "device check DIR… | device parts [ROWS] | device bench [SHAPE] [KEY=VALUE…] | device tower [SHAPE [SQUARES]]"
                .into(),
        ),
    }
}

fn compare(models: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    if models.is_empty() {
        return Err("device check DIR…: of which models?".into());
    }
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
        if matches!(config.vision, Vision::LlavaOneVision(_)) {
            let exact = siglip::check::answers::<f32>(&gpu, &config, 1)?;
            let rounded = siglip::check::answers::<bf16>(&gpu, &config, 1)?;
            let holds = exact.equal == exact.samples && exact.most < 1e-3 && rounded.mean < 0.02;
            failed += usize::from(!holds);
            println!(
                "{} with pictures and videos\n  f32  {exact:?}\n  bf16 {rounded:?}",
                if holds { "ok     " } else { "FAILED " }
            );
            for (tower, config) in [
                ("as it is", config.clone()),
                ("full size", siglip::check::full_size(&config)?),
            ] {
                failed += features(
                    &format!("f32, tower {tower}"),
                    1e-5,
                    siglip::check::features::<f32>(&gpu, &config, 1)?,
                );
                failed += features(
                    &format!("bf16, tower {tower}"),
                    2e-2,
                    siglip::check::features::<bf16>(&gpu, &config, 1)?,
                );
            }
        }
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Prints how far features are from the host's, and counts those that are too far.
fn features(what: &str, bound: f64, apart: Vec<siglip::check::Apart>) -> usize {
    let mut failed = 0;
    for one in apart {
        let holds = one.relative <= bound;
        failed += usize::from(!holds);
        println!(
            "{} features in {what}, {} squares at once: {:.2e} of {bound:.0e}, {:?}",
            if holds { "ok     " } else { "FAILED " },
            one.at_once,
            one.relative,
            one.layout
        );
    }
    failed
}

/// Pictures and a video, then the parts of a pass over squares of pixels.
fn tower(name: &str, squares: usize) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let Some(VisionShape::Siglip(shape)) = VisionShape::named(name) else {
        return Err(format!("{name} has no SigLIP").into());
    };
    for line in siglip::measure::lines(&gpu, &Ceiling::from(ceilings(&gpu)?), &shape)? {
        println!(
            "{:<40} {:>8.2} ms, floor {:>8.2} ms",
            line.what, line.milliseconds, line.floor
        );
    }
    let parts = siglip::measure::parts(&gpu, &shape, squares)?;
    let all = parts.iter().map(|part| part.seconds).sum::<f64>();
    println!("{name}, {squares} squares: {:.2} ms together", all * 1e3);
    for part in parts {
        println!(
            "{:<24} {:>9.3} ms {:>5.1} % {:>6.0} TFLOP/s",
            part.name,
            part.seconds * 1e3,
            100.0 * part.seconds / all,
            part.operations / part.seconds / 1e12
        );
    }
    Ok(ExitCode::SUCCESS)
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

/// `device bench [SHAPE] [KEY=VALUE…]`: `parts`, `grpo` (lengths), `best-of`, `peer` (a file of peer_bench.py), `json` (a file to
/// write), `rows` (sequences sampled at once), `vision` (`trained` or `frozen`), and `reference`, `pictures`, `keep` or `margins`
/// as `no`.
fn bench(arguments: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let named = arguments.iter().filter_map(|argument| argument.split_once('='));
    let named = named.collect::<HashMap<_, _>>();
    let name = arguments.iter().find(|argument| !argument.contains('='));
    let is_wanted = |key: &str| named.get(key) != Some(&"no");
    let default = Options::default();
    let steps = match named.get("grpo") {
        Some(lengths) => lengths.split(',').map(str::parse).collect::<Result<Vec<_>, _>>()?,
        None => vec![Lengths::default()],
    };
    let rows = named.get("rows").map(|rows| rows.parse()).transpose()?;
    let tower = named.get("vision").map(|tower| tower.parse::<Tower>()).transpose()?;
    let step = |lengths| Grpo {
        reference: is_wanted("reference"),
        pictures: is_wanted("pictures"),
        tower: tower.unwrap_or_default(),
        keep: is_wanted("keep"),
        rows: rows.unwrap_or(Grpo::new(lengths).rows),
        lengths,
    };
    let options = Options {
        parts: match named.get("parts") {
            Some(parts) => parts.split(',').map(str::parse).collect::<Result<_, _>>()?,
            None => default.parts,
        },
        grpo: steps.into_iter().map(step).collect(),
        best_of: BestOf {
            margins: is_wanted("margins"),
            ..named.get("best-of").map_or(Ok(default.best_of), |best| best.parse())?
        },
    };
    let peers = match named.get("peer") {
        Some(file) => peer::read(&std::fs::read_to_string(file)?)?,
        None => Peers::default(),
    };
    let mut table = Table::new(peers);
    let name = name.map_or("qwen2.5-vl-7b", String::as_str);
    measure::run(&Gpu::new(0)?, name, &options, &mut |report| {
        println!("{}", table.take(&report));
    })?;
    if let Some(file) = named.get("json") {
        std::fs::write(file, format!("{:#}", table.document()))?;
    }
    Ok(ExitCode::SUCCESS)
}
