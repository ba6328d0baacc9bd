//! Sums of several GPUs.

use std::time::Instant;

use flotilla_device::parallel::{Collective, Nccl, Tcp, Wire};
use flotilla_kernels::{Buffer, Float, Gpu, GpuError, check::Draw, gpu::nccl};
use half::bf16;

use super::{Outcome, model};

/// Checks sums of a few lengths against the host, in a graph too, then measures lengths of decode steps and large ones.
pub fn run(control: Tcp) -> Outcome {
    let gpu = Gpu::new(control.rank())?;
    let (rank, size) = (control.rank(), control.size());
    let mut group = Nccl::new(&gpu, control)?;
    if rank == 0 {
        println!("{size} times {}, NCCL {}", gpu.card()?.name, nccl::version()?);
    }
    for length in [1, 7, 3584, 8192, 8192 * 256, 10_000_019] {
        check::<f32>(&gpu, &mut group, length, 1e-6)?;
        // Of bf16, every addition on the way is rounded.
        check::<bf16>(&gpu, &mut group, length, 4e-3 * (size - 1) as f64)?;
    }
    gathered(&gpu, &mut group)?;
    recorded(&gpu, &mut group)?;
    if rank == 0 {
        println!("checks passed: sums of f32 and bf16, parts, one rank's numbers, sums in a graph");
        println!(
            "{:<34} {:>10} {:>10} {:>12} {:>12}",
            "all-reduce of bf16", "MB", "time us", "graph us", "bus GB/s"
        );
    }
    let rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192];
    let sizes = rows.map(|rows| (format!("{rows} rows of 8192"), rows * 8192));
    for (name, length) in sizes.into_iter().chain([("512 MiB".to_owned(), 256 << 20)]) {
        measure(&gpu, &mut group, &name, length)?;
    }
    group = model::check::<f32>(&gpu, group)?;
    group = model::check::<bf16>(&gpu, group)?;
    group = model::measure(&gpu, group)?;
    group.barrier()?;
    one_leaves(&gpu, group)
}

/// The last rank ends; the others, which wait for it on their GPUs, must say so soon.
fn one_leaves(gpu: &Gpu, mut group: Nccl) -> Outcome {
    let (rank, last) = (group.rank(), group.size() - 1);
    if rank == last {
        return Ok(());
    }
    let values = gpu.upload(&[1f32; 8192])?;
    let begin = Instant::now();
    let waited = group.all_reduce_sum(&values).and_then(|()| group.wait());
    let seconds = begin.elapsed().as_secs_f64();
    match waited {
        Err(error) if error.to_string().contains(&format!("rank {last}")) && seconds < 5.0 => {
            println!("after {seconds:.3} s: {error}");
            Ok(())
        }
        Err(error) => Err(format!("after {seconds:.3} s another error: {error}").into()),
        Ok(()) => Err("a sum without all ranks ended".into()),
    }
}

/// Numbers of a rank, which every other can draw too.
fn draw<T: Float>(rank: usize, length: usize) -> Vec<T> {
    let mut draw = Draw::new(1 + rank as u64);
    let values = (0..length).map(|_| T::from_f32(rand::Rng::random_range(draw.random(), -1.0..1.0)));
    values.collect()
}

fn check<T: Float + Wire>(gpu: &Gpu, group: &mut Nccl, length: usize, bound: f64) -> Outcome {
    let values = gpu.upload(&draw::<T>(group.rank(), length))?;
    group.all_reduce_sum(&values)?;
    group.wait()?;
    let sums = gpu.download(&values)?;
    let all = (0..group.size())
        .map(|rank| draw::<T>(rank, length))
        .collect::<Vec<_>>();
    let (mut apart, mut total) = (0f64, 0f64);
    for (at, sum) in sums.iter().enumerate() {
        let expected = all.iter().map(|one| f64::from(one[at].to_f32())).sum::<f64>();
        apart += (f64::from(sum.to_f32()) - expected).powi(2);
        total += expected.powi(2);
    }
    let distance = (apart / total).sqrt();
    let name = T::DTYPE.name();
    if distance.is_nan() || distance > bound {
        return Err(format!("{length} numbers of {name}: {distance:.1e}, at most {bound:.0e}").into());
    }
    same_everywhere(group, &sums)
}

/// Whether all ranks have the bits of rank 0.
pub fn same_everywhere<T: Wire + Float>(group: &mut Nccl, values: &[T]) -> Outcome {
    let rank = group.rank();
    let mut first = values.to_vec();
    group.control().broadcast(&mut first, 0)?;
    let differs = first.iter().zip(values).position(|(one, other)| one != other);
    match differs {
        None => Ok(()),
        Some(at) => Err(format!("rank {rank} has {:?} at {at}, rank 0 {:?}", values[at], first[at]).into()),
    }
}

fn gathered(gpu: &Gpu, group: &mut Nccl) -> Outcome {
    let (rank, size, length) = (group.rank(), group.size(), 1001);
    let number = |rank: usize| u32::try_from(rank + 5);
    let (part, whole) = (gpu.upload(&vec![number(rank)?; length])?, gpu.poisoned(size * length)?);
    group.all_gather(&part, &whole)?;
    group.broadcast(&part, size - 1)?;
    group.wait()?;
    let (whole, heard) = (gpu.download(&whole)?, gpu.download(&part)?);
    for (rank, part) in whole.chunks_exact(length).enumerate() {
        let number = number(rank)?;
        if part.iter().any(|value| *value != number) {
            return Err(format!("the part of rank {rank} is wrong").into());
        }
    }
    let last = number(size - 1)?;
    if heard.iter().any(|value| *value != last) {
        return Err("the numbers of the last rank did not come".into());
    }
    Ok(())
}

/// Sums of a sum, recorded once and repeated.
fn recorded(gpu: &Gpu, group: &mut Nccl) -> Outcome {
    let length = 8192;
    let values = gpu.upload(&vec![1f32; length])?;
    group.all_reduce_sum(&values)?;
    let mut graph = gpu.record(|| group.all_reduce_sum(&values))?;
    for _ in 0..3 {
        gpu.replay(&mut graph)?;
    }
    group.wait()?;
    let expected = (group.size() as f32).powi(4);
    let sums = gpu.download(&values)?;
    drop(graph);
    match sums.iter().find(|sum| **sum != expected) {
        None => Ok(()),
        Some(sum) => Err(format!("a sum in a graph is {sum}, not {expected}").into()),
    }
}

/// The mean time of a sum among many in a row, launched one by one and from a graph, and the bandwidth of each link
/// that a ring would need: 2 (n - 1) / n times the bytes in the time.
fn measure(gpu: &Gpu, group: &mut Nccl, name: &str, length: usize) -> Outcome {
    let values: Buffer<bf16> = gpu.zeros(length)?;
    let (bytes, size) = ((2 * length) as f64, group.size() as f64);
    let times = if length > 1 << 24 { 20 } else { 100 };
    let clock = gpu.clock()?;
    for _ in 0..20 {
        group.all_reduce_sum(&values)?;
    }
    group.barrier()?;
    let launched = gpu.time(&clock, || (0..times).try_for_each(|_| group.all_reduce_sum(&values)))?;
    group.barrier()?;
    let mut graph = gpu.record(|| (0..times).try_for_each(|_| group.all_reduce_sum(&values)))?;
    gpu.replay(&mut graph)?;
    group.barrier()?;
    let replayed = gpu.time::<GpuError>(&clock, || gpu.replay(&mut graph))?;
    group.barrier()?;
    drop(graph);
    let (launched, replayed) = (launched / f64::from(times), replayed / f64::from(times));
    let bus = 2.0 * (size - 1.0) / size * bytes / replayed;
    if group.rank() == 0 {
        let (mega, launched, replayed) = (bytes / 1e6, launched * 1e6, replayed * 1e6);
        println!(
            "{name:<34} {mega:>10.3} {launched:>10.1} {replayed:>12.1} {:>12.1}",
            bus / 1e9
        );
    }
    Ok(())
}
