//! A model of several GPUs.

use std::{error::Error, path::Path};

use flotilla_device::{
    Capacity, DevicePool, TextModel, TextShape, TextWeights, VisionShape,
    check::text_in_group,
    measure::prefill_operations,
    parallel::{Collective, Nccl, Shard, Tcp, reference::HostModel},
    plan::{Plan, Serving},
    step::{Mail, Piece, Step},
};
use flotilla_kernels::{Buffer, Float, Gpu, bench};
use flotilla_model::Config;
use half::bf16;

use super::gpu::same_everywhere;

const BLOCK: usize = 16;

/// A sequence that grows.
struct Sequence {
    ids: Vec<u32>,
    /// Tokens whose keys and values are stored.
    stored: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// With room for `most` tokens in blocks of its own, the first of which is `first`.
    fn new(ids: Vec<u32>, first: usize, most: usize) -> Self {
        let blocks = (first..first + most.div_ceil(BLOCK)).map(|block| u32::try_from(block).unwrap_or_default());
        Self {
            ids,
            stored: 0,
            blocks: blocks.collect(),
        }
    }

    fn token(&self, index: usize) -> [u32; 3] {
        [u32::try_from(self.stored + index).unwrap_or_default(); 3]
    }
}

/// Computes what is not stored of each sequence, and says where the logits of each are. Features `[rows, hidden]` stand in the
/// place of the first of these tokens of the sequences that have some.
fn step<T: Float>(
    model: &mut TextModel<T>,
    pool: &DevicePool<T>,
    sequences: &[Sequence],
    features: &[Option<Buffer<T>>],
) -> Result<Vec<usize>, Box<dyn Error>> {
    let positions = sequences
        .iter()
        .map(|one| (0..one.ids.len() - one.stored).map(|at| one.token(at)).collect());
    let positions = positions.collect::<Vec<Vec<_>>>();
    let pieces = sequences.iter().zip(&positions).map(|(one, positions)| Piece {
        ids: &one.ids[one.stored..],
        positions,
        stored: one.stored,
        blocks: &one.blocks[..one.ids.len().div_ceil(BLOCK)],
        wanted: true,
        draw: None,
        from: None,
    });
    let pieces = pieces.collect::<Vec<_>>();
    let step = Step::new(&pieces, None);
    model.fits(step.size)?;
    let hidden = model.shape().hidden;
    let placed = features.iter().zip(&step.rows).filter_map(|(features, first)| {
        let features = features.as_ref()?;
        let rows = *first..first + features.len() / hidden;
        let rows = rows.map(|row| i32::try_from(row).unwrap_or(-1)).collect::<Vec<_>>();
        Some((rows, features.clone()))
    });
    let placed = placed.collect::<Vec<_>>();
    let words = step.words(&pieces, BLOCK, &Mail::new(step.size));
    model.step(pool, step.size, &words, &placed)?;
    Ok(step.places())
}

/// Logits after the last token of each sequence, which is then stored.
fn logits<T: Float>(
    model: &mut TextModel<T>,
    pool: &DevicePool<T>,
    sequences: &mut [Sequence],
    features: &[Option<Buffer<T>>],
) -> Result<Vec<f32>, Box<dyn Error>> {
    let places = step(model, pool, sequences, features)?;
    model.wait()?;
    let rows = model.vocabulary();
    let all = model.gpu().download(model.logits())?;
    sequences.iter_mut().for_each(|one| one.stored = one.ids.len());
    Ok(places
        .iter()
        .flat_map(|place| &all[place * rows..(place + 1) * rows])
        .copied()
        .collect())
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let apart = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (apart / square(&mut b.iter().copied())).sqrt()
}

/// Prompts and then tokens one by one, by this group, by this GPU alone, and by the reference of the host. The group must be
/// as near to the reference as one GPU is, and all ranks must have the same bits.
pub fn check<T: Float>(gpu: &Gpu, group: Nccl) -> Result<Nccl, Box<dyn Error>> {
    let shape = TextShape {
        hidden: 512,
        layers: 3,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        intermediate: 1024,
        vocabulary: 2048,
        eps: 1e-6,
        theta: 1e6,
        sections: [32, 0, 0],
        tied: false,
    };
    let capacity = Capacity {
        tokens: 256,
        sequences: 4,
        blocks: 8,
        block_size: BLOCK,
    };
    let (rank, size) = (group.rank(), group.size());
    let host = HostModel::random(&shape, 9);
    let shard = Shard::new(&shape, rank, size)?;
    let part = TextWeights::<T>::of_host(gpu, &host.shard(&shard))?;
    let mut model = TextModel::in_group(gpu, part, capacity, shard.clone(), group)?;
    let mut alone = TextModel::new(gpu, TextWeights::<T>::of_host(gpu, &host)?, capacity)?;
    let pools = (
        DevicePool::new(gpu, &shard.local(), 64, BLOCK)?,
        DevicePool::new(gpu, &shape, 64, BLOCK)?,
    );
    let id = |seed: usize, at: usize| u32::try_from((seed * 7919 + at * 104_729 + 13) % shape.vocabulary);
    let prompts = [40, 7, 17].into_iter().enumerate().map(|(index, length)| {
        let ids = (0..length).map(|at| id(index, at)).collect::<Result<Vec<_>, _>>();
        Ok::<_, std::num::TryFromIntError>(Sequence::new(ids?, 8 * index, 8 * BLOCK))
    });
    let mut sequences = prompts.collect::<Result<Vec<_>, _>>()?;
    let (mut worst, mut worst_alone) = (0f64, 0f64);
    // Steps of one size are computed, recorded, and replayed twice.
    for round in 0..5 {
        let stored = sequences.iter().map(|one| one.stored).collect::<Vec<_>>();
        let ours = logits(&mut model, &pools.0, &mut sequences, &[])?;
        sequences
            .iter_mut()
            .zip(stored)
            .for_each(|(one, stored)| one.stored = stored);
        let theirs = logits(&mut alone, &pools.1, &mut sequences, &[])?;
        let last = sequences.iter().flat_map(|one| {
            let all = host.logits(&one.ids, 1);
            all[all.len() - shape.vocabulary..].to_vec()
        });
        let reference = last.collect::<Vec<_>>();
        worst = worst.max(distance(&ours, &reference));
        worst_alone = worst_alone.max(distance(&theirs, &reference));
        let group = model.group().ok_or("the model is in no group")?;
        same_everywhere(group, &ours)?;
        for (index, one) in sequences.iter_mut().enumerate() {
            one.ids.push(id(index + 50, round)?);
        }
    }
    led(&mut model, &pools.0, sequences, &host)?;
    let name = T::DTYPE.name();
    let holds = worst <= 1.5 * worst_alone + 1e-6 && worst < 0.05;
    if rank == 0 || !holds {
        println!(
            "{} a model of {size} GPUs in {name}: {worst:.1e} from the reference of the host; of one GPU: {worst_alone:.1e}",
            if holds { "ok     " } else { "FAILED " }
        );
    }
    if !holds {
        return Err(format!("rank {rank}: too far from the reference").into());
    }
    model.into_group().ok_or_else(|| "the model is in no group".into())
}

/// Rank 0 computes on, and the others follow: what it then has must be what all had when each drove its own steps. A block is
/// copied on the way, and features that the leader alone has stand in the place of other tokens' embeddings.
fn led<T: Float>(
    model: &mut TextModel<T>,
    pool: &DevicePool<T>,
    mut sequences: Vec<Sequence>,
    host: &HostModel,
) -> Result<(), Box<dyn Error>> {
    let last = sequences.iter_mut().map(|one| (one.stored, one.ids.last().copied()));
    let last = last.collect::<Vec<_>>();
    let driven = logits(model, pool, &mut sequences, &[])?;
    if model.group().ok_or("the model is in no group")?.rank() > 0 {
        // Into a pool of its own: what was computed before is not there.
        return Ok(model.follow()?);
    }
    model.lead();
    model.forget_graphs();
    let (gpu, hidden) = (model.gpu().clone(), model.shape().hidden);
    let fresh = DevicePool::new(&gpu, model.shape(), 64, BLOCK)?;
    // The prompts anew, the first five tokens of the first as features, then the last tokens as before.
    for (one, (stored, _)) in sequences.iter_mut().zip(&last) {
        one.stored = 0;
        one.ids.truncate(*stored);
    }
    let mut features = Vec::new();
    for id in &mut sequences[0].ids[..5] {
        let row = &host.embedding[*id as usize * hidden..][..hidden];
        features.extend(row.iter().map(|value| T::from_f32(*value)));
        *id = 0;
    }
    logits(model, &fresh, &mut sequences, &[Some(gpu.upload(&features)?)])?;
    model.copy(&fresh, &[(sequences[0].blocks[0], 60)])?;
    sequences[0].blocks[0] = 60;
    for (one, (_, last)) in sequences.iter_mut().zip(last) {
        one.ids.extend(last);
    }
    let led = logits(model, &fresh, &mut sequences, &[])?;
    model.end()?;
    let (apart, name) = (distance(&led, &driven), T::DTYPE.name());
    // The prompts were computed in another division into steps.
    if apart <= if T::DTYPE.bytes() == 4 { 1e-5 } else { 2e-2 } {
        println!("ok      steps of a leader in {name}: {apart:.1e} from those that every rank drives");
        Ok(())
    } else {
        Err(format!("steps of a leader in {name}: {apart:.1e} from those that every rank drives").into())
    }
}

/// The largest model whose part fits with room for tokens, and the plan of its memory.
fn largest(gpu: &Gpu, size: usize) -> Result<(&'static str, TextShape, Plan), Box<dyn Error>> {
    let (_, memory) = gpu.memory()?;
    let serving = Serving {
        step_tokens: 2048,
        sequences: 64,
        ..Serving::default()
    };
    let fits = ["qwen2.5-vl-72b", "qwen2.5-vl-7b"].into_iter().find_map(|name| {
        let text = TextShape::named(name)?;
        let plan = serving
            .plan(&text, VisionShape::named(name).as_ref(), memory, size)
            .ok()?;
        (plan.kv_tokens() > 40_000).then_some((name, text, plan))
    });
    fits.ok_or_else(|| "no model fits".into())
}

/// Steps of a large model with random weights: the largest whose part fits.
pub fn measure(gpu: &Gpu, group: Nccl) -> Result<Nccl, Box<dyn Error>> {
    let size = group.size();
    let (name, shape, plan) = largest(gpu, size)?;
    let shard = Shard::new(&shape, group.rank(), size)?;
    let local = shard.local();
    let before = gpu.allocated_bytes();
    let weights = TextWeights::<bf16>::random(gpu, &local, 3)?;
    let taken = gpu.allocated_bytes() - before;
    let rank = group.rank();
    if rank == 0 {
        println!(
            "{name} on {size} GPUs: {:.1} GB of weights each, {:.1} planned",
            taken as f64 / 1e9,
            plan.weights as f64 / 1e9
        );
    }
    let copied = 512 << 20;
    let (from, to) = (gpu.alloc::<u8>(copied)?, gpu.alloc::<u8>(copied)?);
    let bandwidth = 2.0 * copied as f64 / bench::median(gpu, || gpu.copy(&from, &to))?;
    drop((from, to));
    let context = 512;
    let capacity = Capacity {
        tokens: 2048,
        sequences: 64,
        blocks: 256,
        block_size: BLOCK,
    };
    let blocks = (context + 2 * BLOCK) / BLOCK;
    let pool = DevicePool::<bf16>::new(gpu, &local, 64 * blocks, BLOCK)?;
    let mut model = TextModel::in_group(gpu, weights, capacity, shard, group)?;
    let clock = gpu.clock()?;
    let mut timed = |sequences: &[Sequence], times: u32| -> Result<f64, Box<dyn Error>> {
        // Computed, recorded, replayed.
        for _ in 0..3 {
            step(&mut model, &pool, sequences, &[])?;
        }
        model.group().ok_or("the model is in no group")?.barrier()?;
        let repeated = || (0..times).try_for_each(|_| step(&mut model, &pool, sequences, &[]).map(drop));
        Ok(gpu.time(&clock, repeated)? / f64::from(times))
    };
    for count in [1, 8, 32, 64] {
        let sequences = (0..count).map(|index| Sequence {
            stored: context,
            ..Sequence::new(vec![7; context + 1], index * blocks, context + 1)
        });
        let seconds = timed(&sequences.collect::<Vec<_>>(), 20)?;
        let bytes = 2.0 * (local.read_parameters() + count * context * local.kv_values()) as f64;
        let floor = bytes / bandwidth;
        if rank == 0 {
            println!(
                "decode, {count:>2} sequences of {context} tokens: {:.2} ms, {:.0} tokens/s; {:.1} GB at {:.0} GB/s take {:.2} ms ({:.0} %)",
                seconds * 1e3,
                count as f64 / seconds,
                bytes / 1e9,
                bandwidth / 1e9,
                floor * 1e3,
                100.0 * floor / seconds
            );
        }
    }
    let prompt = [Sequence::new((0..2048).collect(), 0, 2048)];
    let seconds = timed(&prompt, 3)?;
    if rank == 0 {
        let operations = prefill_operations(&shape, 1, 0, 2048) / size as f64;
        println!(
            "prefill of 2048 tokens: {:.1} ms, {:.0} tokens/s, {:.0} TFLOP/s a GPU, attention included",
            seconds * 1e3,
            2048.0 / seconds,
            operations / seconds / 1e12
        );
    }
    model.into_group().ok_or_else(|| "the model is in no group".into())
}

/// The engine over a group of GPUs beside the host, in f32: the same tokens. Prefixes are shared, prompts come in chunks, and
/// rank 0 alone schedules.
pub fn engine(control: Tcp, dir: &str) -> Result<(), Box<dyn Error>> {
    let config = Config::load(Path::new(dir))?;
    let (gpu, size) = (Gpu::new(control.rank())?, control.size());
    let group = Nccl::new(&gpu, control)?;
    let Some(found) = text_in_group::<f32>(&gpu, &config, 1, group)? else {
        return Ok(());
    };
    let holds = found.equal == found.samples && found.most < 1e-3;
    println!(
        "{} the engine over {size} GPUs, {dir}: {found:?}",
        if holds { "ok     " } else { "FAILED " }
    );
    if holds {
        Ok(())
    } else {
        Err("the answers differ from the host's".into())
    }
}
