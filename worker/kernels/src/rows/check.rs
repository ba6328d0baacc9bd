//! Parity and speed, and what the checks of other families share.

use half::bf16;

use super::{
    DeviceGroups, Groups, add, cast, copy_blocks, embed, embedding_gradient, fill_normal, fill_uniform, gather_rows,
    place, reference, scale,
};
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
};

/// As numbers of `T`.
fn rounded<T: Float>(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| T::from_f32(*value).to_f32()).collect()
}

/// Before the first distance of a check.
pub(crate) const NONE: Distance = Distance {
    relative: 0.0,
    bound: 1.0,
};

/// Of the output of a kernel that computes in f32 and rounds once: apart from a few roundings the other way, it is the rounded
/// reference. A second rounding of its numbers is 2.8e-3 apart.
pub(crate) fn near<T: Float>(out: &[T], reference: &[f32]) -> Result<Distance, CheckError> {
    let bound = match T::DTYPE {
        Dtype::F32 => 3e-6,
        // One rounding the other way among few numbers is more.
        Dtype::Bf16 => 5e-4f64.max(8e-3 / (reference.len().max(1) as f64).sqrt()),
    };
    Distance::within(out, &rounded::<T>(reference), bound)
}

/// Random numbers for a benchmark.
pub(crate) fn random_bf16(gpu: &Gpu, length: usize) -> Result<Buffer<bf16>, GpuError> {
    let buffer = gpu.alloc(length)?;
    fill_normal(gpu, &buffer, 1.0, length as u64)?;
    Ok(buffer)
}

/// Repetitions of a launch in a graph: without the host's share, as in decoding.
pub(crate) fn in_a_graph(gpu: &Gpu, times: usize, mut one: Prepared) -> Result<Prepared, GpuError> {
    (one.run)()?;
    let mut graph = gpu.record(|| (0..times).try_for_each(|_| (one.run)()))?;
    let (gpu, bytes) = (gpu.clone(), one.bytes * times as f64);
    Ok(Prepared {
        run: Box::new(move || {
            // The launches' buffers live as long as the graph.
            let _ = &one;
            gpu.replay(&mut graph)
        }),
        bytes,
        operations: 0.0,
    })
}

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "rows moved f32",
            run: check_moves::<f32>,
        },
        Check {
            name: "rows moved bf16",
            run: check_moves::<bf16>,
        },
        Check {
            name: "embedding_gradient f32 into f32",
            run: check_embedding_gradient::<f32, f32>,
        },
        Check {
            name: "embedding_gradient bf16 into f32",
            run: check_embedding_gradient::<bf16, f32>,
        },
        Check {
            name: "embedding_gradient bf16 into bf16",
            run: check_embedding_gradient::<bf16, bf16>,
        },
        Check {
            name: "cast",
            run: check_cast,
        },
        Check {
            name: "add and scale f32",
            run: check_sums::<f32, f32>,
        },
        Check {
            name: "add and scale bf16",
            run: check_sums::<bf16, bf16>,
        },
        Check {
            name: "add bf16 to f32 and scale",
            run: check_sums::<f32, bf16>,
        },
        Check {
            name: "fill f32",
            run: check_fill::<f32>,
        },
        Check {
            name: "fill bf16",
            run: check_fill::<bf16>,
        },
        Check {
            name: "copy_blocks f32",
            run: check_copy_blocks::<f32>,
        },
        Check {
            name: "copy_blocks bf16",
            run: check_copy_blocks::<bf16>,
        },
    ]
}

/// Widths of models and odd ones.
fn widths(draw: &mut Draw) -> [usize; 5] {
    [
        3584,
        1152,
        4 * draw.between(1, 50),
        2 * draw.between(1, 50),
        2 * draw.between(1, 50) + 1,
    ]
}

fn check_moves<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for width in widths(draw) {
        let (rows, count) = (draw.between(20, 60), draw.between(1, 20));
        let table = draw.normal::<T>(rows * width, 1.0);
        let on_card = gpu.upload(&table)?;

        let mut at = (0..count).map(|_| draw.below(rows) as i32).collect::<Vec<_>>();
        at.extend([-1, rows as i32, rows as i32 - 1, i32::MIN, i32::MAX]);
        let out = gpu.poisoned::<T>(at.len() * width)?;
        gather_rows(gpu, width, &on_card, &gpu.upload(&at)?, &out)?;
        let expected = reference::gather_rows(&table, &at, width);
        Distance::equal(&gpu.download(&out)?, &expected)?;

        let ids = at.iter().map(|at| *at as u32).collect::<Vec<_>>();
        let out = gpu.poisoned::<T>(at.len() * width)?;
        embed(gpu, width, &on_card, &gpu.upload(&ids)?, &out)?;
        Distance::equal(&gpu.download(&out)?, &expected)?;

        let mut at = draw.order(rows)[..count]
            .iter()
            .map(|at| *at as i32)
            .collect::<Vec<_>>();
        at.extend([-1, rows as i32]);
        let features = draw.normal::<T>(at.len() * width, 1.0);
        place(gpu, width, &gpu.upload(&features)?, &gpu.upload(&at)?, &on_card)?;
        let mut expected = table;
        reference::place(&features, &at, &mut expected, width);
        Distance::equal(&gpu.download(&on_card)?, &expected)?;
    }
    Ok(Distance::EQUAL)
}

fn check_embedding_gradient<T: Float, G: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for width in widths(draw) {
        let (vocabulary, tokens) = (draw.between(5, 40), draw.between(200, 500));
        // Some ids have many tokens.
        let ids = (0..tokens).map(|_| draw.below(vocabulary).min(draw.below(vocabulary)) as u32);
        let ids = ids.collect::<Vec<_>>();
        // Placeholders of images give no gradient.
        let groups = Groups::of(&ids, |id| id != 3);
        let (dy, before) = (
            draw.normal::<T>(tokens * width, 1.0),
            draw.normal::<G>(vocabulary * width, 1.0),
        );
        let mut expected = widen(&before);
        reference::embedding_gradient(&groups, &widen(&dy), &mut expected, width);
        let (dy, groups) = (gpu.upload(&dy)?, DeviceGroups::upload(gpu, &groups)?);
        let once = || {
            let dtable = gpu.upload(&before)?;
            embedding_gradient(gpu, width, &groups, &dy, &dtable)?;
            gpu.download(&dtable)
        };
        let out = once()?;
        worst = worst.worst(near(&out, &expected)?);
        Distance::equal(&once()?, &out)?;
    }
    Ok(worst)
}

/// Lengths with and without a rest; one has the longest of every pack.
fn lengths(draw: &mut Draw) -> [usize; 4] {
    [1, 8 * draw.between(0, 5) + 7, 8192, 8192 + draw.between(1, 9000)]
}

fn check_cast(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for length in lengths(draw) {
        let mut wide = draw.normal::<f32>(length + 1, 1.0);
        wide[0] = [0.0, -0.0, f32::INFINITY, f32::MAX, 1e-40, 1.003_906_2][draw.below(6)];
        // As a whole, and from an odd address.
        for skip in 0..2 {
            let from = gpu.upload(&wide)?.slice(skip..length + skip)?;
            let expected = wide[skip..length + skip].iter().map(|x| bf16::from_f32(*x));
            let expected = expected.collect::<Vec<_>>();
            let narrow = gpu.poisoned::<bf16>(length + 1)?.slice(skip..length + skip)?;
            cast(gpu, &from, &narrow)?;
            Distance::equal(&gpu.download(&narrow)?, &expected)?;
            let back = gpu.poisoned::<f32>(length + 1)?.slice(skip..length + skip)?;
            cast(gpu, &narrow, &back)?;
            Distance::equal(&gpu.download(&back)?, &widen(&expected))?;
            let same = gpu.poisoned::<f32>(length)?;
            cast(gpu, &from, &same)?;
            Distance::equal(&gpu.download(&same)?, &wide[skip..length + skip])?;
        }
    }
    Ok(Distance::EQUAL)
}

fn check_sums<A: Float, B: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for length in lengths(draw) {
        // As a whole, and what is added from an odd address.
        for skip in 0..2 {
            let (a, b) = (draw.normal::<A>(length, 1.0), draw.normal::<B>(length + 1, 1.0));
            let on_card = gpu.upload(&a)?;
            let addend = gpu.upload(&b)?.slice(skip..length + skip)?;
            add(gpu, &on_card, &addend)?;
            let sums = a.iter().zip(&b[skip..]);
            let sums = sums.map(|(a, b)| A::from_f32(a.to_f32() + b.to_f32()));
            let sums = sums.collect::<Vec<_>>();
            Distance::equal(&gpu.download(&on_card)?, &sums)?;
            scale(gpu, &on_card, 0.3)?;
            let scaled = sums.iter().map(|x| A::from_f32(x.to_f32() * 0.3)).collect::<Vec<_>>();
            Distance::equal(&gpu.download(&on_card)?, &scaled)?;
        }
    }
    Ok(Distance::EQUAL)
}

fn check_fill<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for length in lengths(draw) {
        let seed = draw.below(usize::MAX) as u64;
        for skip in 0..2 {
            let out = gpu.poisoned::<T>(length + 1)?.slice(skip..length + skip)?;
            let numbers = 0..length as u64;
            fill_normal(gpu, &out, 0.02, seed)?;
            let expected = numbers.clone().map(|i| reference::normal(i, seed) * 0.02);
            worst = worst.worst(near(&gpu.download(&out)?, &expected.collect::<Vec<_>>())?);
            fill_uniform(gpu, &out, (-0.5, 2.5), seed)?;
            let expected = numbers.map(|i| -0.5 + 3.0 * reference::uniform(i, seed));
            worst = worst.worst(near(&gpu.download(&out)?, &expected.collect::<Vec<_>>())?);
        }
    }
    Ok(worst)
}

fn check_copy_blocks<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for elements in [8192, 4 * 8 * 72, 2 * 8 * 80 + 1, draw.between(1, 3000)] {
        let (blocks, count) = (12, draw.between(1, 5));
        let pool = draw.normal::<T>(2 * blocks * elements, 1.0);
        let (mut keys, mut values) = (pool[..blocks * elements].to_vec(), pool[blocks * elements..].to_vec());
        let (on_card, others) = (gpu.upload(&keys)?, gpu.upload(&values)?);
        let order = draw.order(blocks);
        let mut pairs = order[..2 * count].to_vec();
        for pair in pairs.chunks_exact(2) {
            let (from, to) = (pair[0] as usize * elements, pair[1] as usize * elements);
            keys.copy_within(from..from + elements, to);
            values.copy_within(from..from + elements, to);
        }
        // Padding.
        pairs.extend([0, 0, u32::MAX, u32::MAX, 0, blocks as u32]);
        copy_blocks(gpu, &on_card, &others, &gpu.upload(&pairs)?, elements)?;
        Distance::equal(&gpu.download(&on_card)?, &keys)?;
        Distance::equal(&gpu.download(&others)?, &values)?;
    }
    Ok(Distance::EQUAL)
}

const WIDTH: usize = 3584;
const VOCABULARY: usize = 152_064;
/// Numbers of a vector that no cache holds.
const LONG: usize = 1 << 28;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "embed 16384x3584",
            prepare: |gpu, draw| embeds(gpu, draw, 16_384),
        },
        Case {
            name: "embed decode 1x3584, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, embeds(gpu, draw, 1)?),
        },
        Case {
            name: "embed decode 256x3584, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, embeds(gpu, draw, 256)?),
        },
        Case {
            name: "place 16384x3584",
            prepare: places,
        },
        Case {
            name: "gather_rows 16384x3584",
            prepare: gathers,
        },
        Case {
            name: "embedding_gradient 16384 tokens, 4000 ids, into f32",
            prepare: embedding_gradients,
        },
        Case {
            name: "cast bf16 to f32, 2^28",
            prepare: |gpu, _| casts::<bf16, f32>(gpu),
        },
        Case {
            name: "cast f32 to bf16, 2^28",
            prepare: |gpu, _| casts::<f32, bf16>(gpu),
        },
        Case {
            name: "add bf16, 2^28",
            prepare: adds::<bf16>,
        },
        Case {
            name: "add bf16 to f32, 2^28",
            prepare: adds::<f32>,
        },
        Case {
            name: "scale bf16, 2^28",
            prepare: scales,
        },
        Case {
            name: "fill_normal bf16, 2^30",
            prepare: |gpu, _| fills(gpu, true),
        },
        Case {
            name: "fill_uniform bf16, 2^30",
            prepare: |gpu, _| fills(gpu, false),
        },
        Case {
            name: "copy_blocks 4096 blocks of 8192 bf16",
            prepare: |gpu, draw| block_copies(gpu, draw, 4096),
        },
        Case {
            name: "copy_blocks decode 8 blocks of 8192 bf16, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, block_copies(gpu, draw, 8)?),
        },
    ]
}

fn embeds(gpu: &Gpu, draw: &mut Draw, tokens: usize) -> Result<Prepared, GpuError> {
    let table = random_bf16(gpu, VOCABULARY * WIDTH)?;
    let ids = draw.order(VOCABULARY)[..tokens].to_vec();
    let (ids, out) = (gpu.upload(&ids)?, random_bf16(gpu, tokens * WIDTH)?);
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || embed(&gpu, WIDTH, &table, &ids, &out)),
        bytes: (2 * tokens * WIDTH * 2) as f64,
        operations: 0.0,
    })
}

fn places(gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
    let rows = 16_384;
    let (features, out) = (random_bf16(gpu, rows * WIDTH)?, random_bf16(gpu, 2 * rows * WIDTH)?);
    let at = draw.order(2 * rows)[..rows]
        .iter()
        .map(|at| *at as i32)
        .collect::<Vec<_>>();
    let at = gpu.upload(&at)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || place(&gpu, WIDTH, &features, &at, &out)),
        bytes: (2 * rows * WIDTH * 2) as f64,
        operations: 0.0,
    })
}

fn gathers(gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
    let rows = 16_384;
    let (from, out) = (random_bf16(gpu, 2 * rows * WIDTH)?, random_bf16(gpu, rows * WIDTH)?);
    let at = draw.order(2 * rows)[..rows]
        .iter()
        .map(|at| *at as i32)
        .collect::<Vec<_>>();
    let at = gpu.upload(&at)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || gather_rows(&gpu, WIDTH, &from, &at, &out)),
        bytes: (2 * rows * WIDTH * 2) as f64,
        operations: 0.0,
    })
}

/// Ids as in text: the n-th most frequent as often as 1/n.
fn embedding_gradients(gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
    let tokens = 16_384;
    let harmonic = (1..=4000).map(|n| 1.0 / f64::from(n)).sum::<f64>();
    let ids = (0..tokens).map(|_| {
        let mut at = draw.below(1 << 30) as f64 / f64::from(1 << 30) * harmonic;
        (1..=4000u32)
            .find(|n| {
                at -= 1.0 / f64::from(*n);
                at <= 0.0
            })
            .unwrap_or(1)
    });
    let groups = Groups::of(&ids.collect::<Vec<_>>(), |_| true);
    let bytes = 2 * tokens * WIDTH + 2 * 4 * groups.ids.len() * WIDTH;
    let groups = DeviceGroups::upload(gpu, &groups)?;
    let (dy, dtable) = (random_bf16(gpu, tokens * WIDTH)?, gpu.zeros::<f32>(VOCABULARY * WIDTH)?);
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || embedding_gradient(&gpu, WIDTH, &groups, &dy, &dtable)),
        bytes: bytes as f64,
        operations: 0.0,
    })
}

fn casts<A: Float, B: Float>(gpu: &Gpu) -> Result<Prepared, GpuError> {
    let (from, to) = (gpu.alloc::<A>(LONG)?, gpu.alloc::<B>(LONG)?);
    fill_normal(gpu, &from, 1.0, 1)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || cast(&gpu, &from, &to)),
        bytes: (LONG * (A::DTYPE.bytes() + B::DTYPE.bytes())) as f64,
        operations: 0.0,
    })
}

fn adds<A: Float>(gpu: &Gpu, _: &mut Draw) -> Result<Prepared, GpuError> {
    let (a, b) = (gpu.alloc::<A>(LONG)?, random_bf16(gpu, LONG)?);
    fill_normal(gpu, &a, 1.0, 1)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || add(&gpu, &a, &b)),
        bytes: (LONG * (2 * A::DTYPE.bytes() + 2)) as f64,
        operations: 0.0,
    })
}

fn scales(gpu: &Gpu, _: &mut Draw) -> Result<Prepared, GpuError> {
    let x = random_bf16(gpu, LONG)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || scale(&gpu, &x, 1.0)),
        bytes: (2 * LONG * 2) as f64,
        operations: 0.0,
    })
}

fn fills(gpu: &Gpu, normal: bool) -> Result<Prepared, GpuError> {
    let out = gpu.alloc::<bf16>(1 << 30)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || {
            if normal {
                fill_normal(&gpu, &out, 0.02, 1)
            } else {
                fill_uniform(&gpu, &out, (-1.0, 1.0), 1)
            }
        }),
        bytes: (2usize << 30) as f64,
        operations: 0.0,
    })
}

fn block_copies(gpu: &Gpu, draw: &mut Draw, count: usize) -> Result<Prepared, GpuError> {
    let (blocks, elements) = (2 * count, 8192);
    let (keys, values) = (
        random_bf16(gpu, blocks * elements)?,
        random_bf16(gpu, blocks * elements)?,
    );
    let pairs = gpu.upload(&draw.order(blocks))?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || copy_blocks(&gpu, &keys, &values, &pairs, elements)),
        bytes: (2 * 2 * count * elements * 2) as f64,
        operations: 0.0,
    })
}
