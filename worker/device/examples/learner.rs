//! The learner alone on a GPU: `learner check [NAME…]`; `learner bench [KEY=VALUE…]` measures training steps from random
//! weights (`model`, `layers`, `sequences`, `length`, `micro` tokens per micro-batch, `keep` as `none`, `fit` or `all`,
//! `states` as `f32`, `bf16` or `8bit`, `gradients` as `bf16` or `f32`, `updates`, and for training the tower too: `pictures`
//! of `side` patches each way, `patches` that go through it together); `learner parts [KEY=VALUE…]` measures the
//! operations of a step one by one; `learner group gpus=N [KEY=VALUE…]` compares and measures N GPUs that share the batch;
//! `learner plan [KEY=VALUE…]` needs no GPU.

use std::{collections::HashMap, error::Error, process::ExitCode};

use flotilla_device::{
    TextShape, VisionShape,
    learner::{Keep, Plan, Settings, Shapes, check, measure, measure::Pictures, parts},
};
use flotilla_kernels::{Dtype, Gpu, bench, check::Draw, optimizer::StateKind};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest = arguments.collect::<Vec<_>>();
    match command.as_str() {
        "check" => run_checks(&rest),
        "bench" => run_bench(&Options::new(&rest)),
        #[cfg(feature = "nccl")]
        "group" => group::run(&Options::new(&rest)),
        "parts" => run_parts(&Options::new(&rest)),
        "plan" => {
            let options = Options::new(&rest);
            let card = options.number("card", 80) * 1_000_000_000;
            let (shape, pictures, settings) = options.settings(card)?;
            let shapes = shapes(&shape, pictures.as_ref());
            println!("{settings:?}\n{}", Plan::new(shapes, Dtype::Bf16, &settings, 0, card));
            Ok(ExitCode::SUCCESS)
        }
        _ => Err("learner check [NAME…] | bench [KEY=VALUE…] | parts [KEY=VALUE…] | plan [KEY=VALUE…]".into()),
    }
}

/// What is trained.
fn shapes<'a>(text: &'a TextShape, pictures: Option<&'a Pictures>) -> Shapes<'a> {
    let vision = pictures.map(|pictures| &pictures.shape);
    Shapes { text, vision }
}

fn run_checks(names: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    println!("{:?}, seed {seed}", gpu.card()?);
    let asked = |name: &str| names.is_empty() || names.iter().any(|part| name.contains(part.as_str()));
    let mut failed = 0;
    for check in check::checks().into_iter().filter(|check| asked(check.name)) {
        let begin = std::time::Instant::now();
        let (holds, detail) = match (check.run)(&gpu, &mut Draw::new(seed)) {
            Ok(distance) => {
                let detail = format!("{:.2e} of {:.0e}", distance.relative, distance.bound);
                (distance.holds(), detail)
            }
            Err(error) => (false, error.to_string()),
        };
        failed += usize::from(!holds);
        let verdict = if holds { "ok" } else { "FAILED" };
        println!(
            "{verdict:<7} {:<55} {detail} ({:.1} s)",
            check.name,
            begin.elapsed().as_secs_f64()
        );
    }
    println!("{failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let card = gpu.card()?;
    println!("{card:?}");
    let ceilings = bench::ceilings(&gpu)?;
    let (shape, pictures, settings) = options.settings(card.free)?;
    println!("{settings:?}");
    let workload = measure::Workload {
        shape,
        settings,
        pictures,
        lengths: vec![options.number("length", 2048); options.number("sequences", 8)],
        updates: options.number("updates", 3),
    };
    let measured = match settings.gradients {
        Dtype::Bf16 => measure::measure::<half::bf16>(&gpu, &workload, card.free, |_| Ok(()))?,
        Dtype::F32 => measure::measure::<f32>(&gpu, &workload, card.free, |_| Ok(()))?,
    };
    println!("{measured}");
    if let Some(pictures) = &workload.pictures {
        let rate = pictures.operations() / measured.tower;
        println!(
            "tower              {} pictures of {} patches: {:.1} ms, {:.2} TFLOP, {:.0} TFLOP/s, {:.1} % of {:.0} measured",
            pictures.count,
            pictures.side * pictures.side,
            1e3 * measured.tower,
            pictures.operations() / 1e12,
            rate / 1e12,
            100.0 * rate / ceilings.arithmetic,
            ceilings.arithmetic / 1e12
        );
    }
    println!(
        "utilisation        {:.1} % of {:.0} TFLOP/s measured, {:.1} % of {:.0} TFLOP/s by the data sheet",
        100.0 * measured.utilisation(ceilings.arithmetic),
        ceilings.arithmetic / 1e12,
        100.0 * measured.utilisation(measure::DATASHEET),
        measure::DATASHEET / 1e12
    );
    Ok(ExitCode::SUCCESS)
}

fn run_parts(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let card = gpu.card()?;
    println!("{card:?}");
    let (shape, _, settings) = options.settings(card.free)?;
    let length = options.number("length", 2048);
    let mut sum = 0.0;
    let products_only = options.word("only", "") == "products";
    for part in parts::parts(&gpu, &shape, &settings, (settings.rows(), length), products_only)? {
        sum += part.seconds * part.count as f64;
        println!("{part}");
    }
    println!("together {sum:.3} s for {} tokens", settings.rows());
    Ok(ExitCode::SUCCESS)
}

/// Several GPUs, a thread for each.
#[cfg(feature = "nccl")]
mod group {
    use std::{error::Error, process::ExitCode, thread};

    use flotilla_device::learner::{check, measure};
    use flotilla_kernels::{
        Gpu,
        gpu::nccl::{Communicator, UniqueId},
    };

    use super::Options;

    type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

    pub fn run(options: &Options) -> std::result::Result<ExitCode, Box<dyn Error>> {
        let gpus = options.number("gpus", 2);
        let same = on_all(gpus, |gpu, group| Ok(check::share_of_a_group(&gpu, group)?))?;
        for (rank, (bits, distance)) in same.iter().enumerate() {
            let equal = bits == &same[0].0;
            println!("rank {rank}: the bits of rank 0: {equal}; from one GPU with all micro-batches: {distance:.2e}");
        }
        let (shape, pictures, settings) = options.settings(Gpu::new(0)?.card()?.free)?;
        let workload = measure::Workload {
            shape,
            settings,
            pictures,
            lengths: vec![options.number("length", 2048); options.number("sequences", 8)],
            updates: options.number("updates", 3),
        };
        let measured = on_all(gpus, |gpu, group| {
            let free = gpu.card()?.free;
            Ok(measure::measure::<half::bf16>(&gpu, &workload, free, |learner| {
                learner.reduce(group)
            })?)
        })?;
        println!("of each of {gpus} GPUs: {}", measured[0]);
        let slowest = measured.iter().map(|one| one.step).fold(0.0, f64::max);
        println!(
            "{} tokens/s together, {:.1} % of {:.0} TFLOP/s by the data sheet on each",
            (measured[0].tokens * gpus) as f64 / slowest,
            100.0 * measured[0].utilisation(measure::DATASHEET),
            measure::DATASHEET / 1e12
        );
        Ok(ExitCode::SUCCESS)
    }

    fn on_all<T: Send>(
        gpus: usize,
        work: impl Fn(Gpu, &Communicator) -> Result<T> + Sync,
    ) -> std::result::Result<Vec<T>, Box<dyn Error>> {
        let id = UniqueId::new()?;
        let id = id.to_bytes();
        thread::scope(|scope| {
            let ranks = (0..gpus).map(|rank| {
                let work = &work;
                scope.spawn(move || {
                    let gpu = Gpu::new(rank)?;
                    let group = Communicator::new(&gpu, &UniqueId::from_bytes(id), rank, gpus)?;
                    work(gpu, &group)
                })
            });
            let ranks = ranks.collect::<Vec<_>>();
            let results = ranks
                .into_iter()
                .map(|rank| rank.join().map_err(|_| "a rank panicked")?);
            results
                .map(|result: Result<T>| result.map_err(|error| error.to_string().into()))
                .collect()
        })
    }
}

/// `KEY=VALUE` arguments.
struct Options(HashMap<String, String>);

impl Options {
    fn new(arguments: &[String]) -> Self {
        let pairs = arguments.iter().filter_map(|argument| argument.split_once('='));
        Self(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    fn number(&self, key: &str, default: usize) -> usize {
        self.0.get(key).and_then(|value| value.parse().ok()).unwrap_or(default)
    }

    fn word(&self, key: &str, default: &'static str) -> &str {
        self.0.get(key).map_or(default, String::as_str)
    }

    /// Sizes of the language model, the pictures that a tower is trained with, and how.
    #[allow(clippy::type_complexity, reason = "three things that depend on one another")]
    fn settings(&self, card: usize) -> Result<(TextShape, Option<Pictures>, Settings), Box<dyn Error>> {
        let name = self.word("model", "qwen2.5-vl-7b");
        let mut shape = TextShape::named(name).ok_or("no such model")?;
        shape.layers = self.number("layers", shape.layers);
        let settings = Settings {
            gradients: match self.word("gradients", "bf16") {
                "f32" => Dtype::F32,
                _ => Dtype::Bf16,
            },
            states: match self.word("states", "8bit") {
                "f32" => StateKind::F32,
                "bf16" => StateKind::Bf16,
                _ => StateKind::Bit8,
            },
            logit_rows: self.number("logits", 4096),
            ..Settings::new(self.number("micro", 8192))
        };
        let settings = Settings {
            patches: self.number("patches", settings.patches),
            ..settings
        };
        let pictures = match (VisionShape::named(name), self.number("pictures", 0)) {
            (_, 0) => None,
            (Some(VisionShape::Qwen(shape)), count) => Some(Pictures {
                shape,
                side: self.number("side", 74),
                count,
            }),
            _ => return Err("no tower of this model is trained on the card".into()),
        };
        let settings = match self.word("keep", "fit") {
            "none" => settings,
            "all" => Settings {
                keep: Keep::all(&shape),
                ..settings
            },
            _ => {
                let shapes = shapes(&shape, pictures.as_ref());
                Plan::fit(shapes, Dtype::Bf16, &settings, 0, card).ok_or("does not fit")?
            }
        };
        Ok((shape, pictures, settings))
    }
}
