use half::bf16;

use super::{
    Attention, Gradients, Pool, Rows, Saved, Segments, backward, backward_scratch, forward, prefill,
    shapes::{Lengths, last, shape},
};
use crate::{
    Buffer, Gpu, GpuError,
    bench::{Case, Prepared},
    check::Draw,
};

/// Operations of two products of `head_dim` for each pair of query and key that sees it.
#[allow(clippy::cast_precision_loss, reason = "counts")]
fn operations(attention: &Attention, pairs: &[(usize, usize)]) -> f64 {
    let seen = |(queries, keys): &(usize, usize)| {
        if attention.causal {
            let before = (keys - queries) as f64;
            *queries as f64 * (before + (*queries as f64 + 1.0) / 2.0)
        } else {
            *queries as f64 * *keys as f64
        }
    };
    pairs.iter().map(seen).sum::<f64>() * 4.0 * (attention.heads * attention.head_dim) as f64
}

/// Sets of inputs that are used in turn, larger than the cache together.
const SETS: usize = 3;

#[allow(clippy::cast_precision_loss, reason = "counts")]
fn forward_case(
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    pairs: &[(usize, usize)],
) -> Result<Prepared, GpuError> {
    let lengths = Lengths::of(pairs);
    let (width, key_width) = (
        attention.heads * attention.head_dim,
        attention.kv_heads * attention.head_dim,
    );
    let (tokens, stride) = (last(&lengths.queries), width + 2 * key_width);
    let sets = (0..SETS)
        .map(|_| Ok((noise(gpu, draw, tokens * stride)?, gpu.alloc::<bf16>(tokens * width)?)))
        .collect::<Result<Vec<_>, GpuError>>()?;
    let offsets = gpu.upload(&lengths.queries)?;
    let (gpu, mut turn) = (gpu.clone(), 0);
    Ok(Prepared {
        operations: operations(&attention, pairs),
        bytes: 2.0 * (tokens * (stride + width)) as f64,
        run: Box::new(move || {
            turn += 1;
            let (packed, out) = &sets[turn % SETS];
            let part = |column: usize| packed.slice(column..packed.len());
            let (q, k, v) = (part(0)?, part(width)?, part(width + key_width)?);
            let [q, k, v] = [&q, &k, &v].map(|data| Rows::new(data, stride));
            let segments = Segments {
                queries: &offsets,
                keys: &offsets,
                query_tokens: tokens,
                key_tokens: tokens,
            };
            forward(&gpu, &attention, q, k, v, &segments, out, None)
        }),
    })
}

/// Random numbers: a million of them, repeated, since drawing takes longer than anything else here.
fn noise(gpu: &Gpu, draw: &mut Draw, length: usize) -> Result<Buffer<bf16>, GpuError> {
    let period = (1 << 20) + 8 * draw.below(1000);
    let some = draw.normal::<bf16>(period, 1.0);
    let all = some.iter().copied().cycle().take(length).collect::<Vec<_>>();
    gpu.upload(&all)
}

#[allow(clippy::cast_precision_loss, reason = "counts")]
fn prefill_case(
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    pairs: &[(usize, usize)],
) -> Result<Prepared, GpuError> {
    let lengths = Lengths::of(pairs);
    let block_size = 16;
    let width = attention.heads * attention.head_dim;
    let tokens = last(&lengths.queries);
    let block = attention.kv_heads * block_size * attention.head_dim;
    let max_blocks = pairs.iter().map(|pair| pair.1.div_ceil(block_size)).max().unwrap_or(0);
    let blocks = max_blocks * pairs.len();
    let sets = (0..SETS)
        .map(|_| {
            let pools = (noise(gpu, draw, blocks * block)?, noise(gpu, draw, blocks * block)?);
            let q = noise(gpu, draw, tokens * width)?;
            Ok((
                q,
                pools,
                gpu.upload(&draw.order(blocks))?,
                gpu.alloc::<bf16>(tokens * width)?,
            ))
        })
        .collect::<Result<Vec<_>, GpuError>>()?;
    let offsets = gpu.upload(&lengths.queries)?;
    let kv_lengths = pairs.iter().map(|pair| i32::try_from(pair.1).unwrap_or(i32::MAX));
    let kv_lengths = gpu.upload(&kv_lengths.collect::<Vec<_>>())?;
    let (gpu, mut turn) = (gpu.clone(), 0);
    Ok(Prepared {
        operations: operations(&attention, pairs),
        bytes: 4.0 * (tokens * width + blocks * block) as f64,
        run: Box::new(move || {
            turn += 1;
            let (q, (keys, values), tables, out) = &sets[turn % SETS];
            let pool = Pool {
                keys,
                values,
                tables,
                block_size,
                kv_lengths: &kv_lengths,
            };
            prefill(&gpu, &attention, Rows::new(q, width), tokens, &offsets, &pool, out)
        }),
    })
}

/// Five products where forward has two: scores again, changes of weights, and the three gradients.
#[allow(clippy::cast_precision_loss, reason = "counts")]
fn backward_case(
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    pairs: &[(usize, usize)],
) -> Result<Prepared, GpuError> {
    let lengths = Lengths::of(pairs);
    let (width, key_width) = (
        attention.heads * attention.head_dim,
        attention.kv_heads * attention.head_dim,
    );
    let (tokens, stride) = (last(&lengths.queries), width + 2 * key_width);
    let packed = noise(gpu, draw, tokens * stride)?;
    let dpacked = gpu.alloc::<bf16>(tokens * stride)?;
    let (dout, out) = (noise(gpu, draw, tokens * width)?, gpu.alloc::<bf16>(tokens * width)?);
    let lse = gpu.alloc::<f32>(tokens * attention.heads)?;
    let scratch = gpu.alloc::<f32>(backward_scratch(&attention, tokens))?;
    let offsets = gpu.upload(&lengths.queries)?;
    let parts = |buffer: &Buffer<bf16>| {
        let part = |column: usize| buffer.slice(column..buffer.len());
        Ok::<_, GpuError>([part(0)?, part(width)?, part(width + key_width)?])
    };
    let (inputs, outputs) = (parts(&packed)?, parts(&dpacked)?);
    let (gpu, mut first) = (gpu.clone(), true);
    Ok(Prepared {
        operations: 2.5 * operations(&attention, pairs),
        bytes: 2.0 * (tokens * (2 * stride + 2 * width)) as f64,
        run: Box::new(move || {
            let [q, k, v] = inputs.each_ref().map(|data| Rows::new(data, stride));
            let [dq, dk, dv] = outputs.each_ref().map(|data| Rows::new(data, stride));
            let segments = Segments {
                queries: &offsets,
                keys: &offsets,
                query_tokens: tokens,
                key_tokens: tokens,
            };
            if std::mem::take(&mut first) {
                forward(&gpu, &attention, q, k, v, &segments, &out, Some(&lse))?;
            }
            let saved = Saved {
                out: &out,
                lse: &lse,
                dout: &dout,
            };
            backward(
                &gpu,
                &attention,
                q,
                k,
                v,
                &segments,
                &saved,
                &Gradients { dq, dk, dv },
                &scratch,
            )
        }),
    })
}

/// Speed beside the floor.
pub(super) fn cases() -> Vec<Case> {
    macro_rules! case {
        ($name:literal, $prepare:ident, $attention:expr, $pairs:expr) => {
            Case {
                name: $name,
                prepare: |gpu, draw| $prepare(gpu, draw, $attention, &$pairs),
            }
        };
    }
    vec![
        case!(
            "attention forward 1x4096 causal 28/4 d128",
            forward_case,
            shape(28, 4, 128, true),
            [(4096, 4096)]
        ),
        case!(
            "attention forward 8x2048 causal 28/4 d128",
            forward_case,
            shape(28, 4, 128, true),
            [(2048, 2048); 8]
        ),
        case!(
            "attention forward 1x16384 causal 28/4 d128",
            forward_case,
            shape(28, 4, 128, true),
            [(16384, 16384)]
        ),
        case!(
            "attention forward 64x64 windows 16/16 d80",
            forward_case,
            shape(16, 16, 80, false),
            [(64, 64); 64]
        ),
        case!(
            "attention forward 1x4096 full 16/16 d80",
            forward_case,
            shape(16, 16, 80, false),
            [(4096, 4096)]
        ),
        case!(
            "attention forward 5x729 full 16/16 d72",
            forward_case,
            shape(16, 16, 72, false),
            [(729, 729); 5]
        ),
        case!(
            "attention prefill 512 of 4608 28/4 d128",
            prefill_case,
            shape(28, 4, 128, true),
            [(512, 4608)]
        ),
        case!(
            "attention prefill 8x2048 28/4 d128",
            prefill_case,
            shape(28, 4, 128, true),
            [(2048, 2048); 8]
        ),
        case!(
            "attention backward 8x2048 causal 28/4 d128",
            backward_case,
            shape(28, 4, 128, true),
            [(2048, 2048); 8]
        ),
        case!(
            "attention backward 1x4096 causal 28/4 d128",
            backward_case,
            shape(28, 4, 128, true),
            [(4096, 4096)]
        ),
        case!(
            "attention backward 8x2048 causal 14/2 d64",
            backward_case,
            shape(14, 2, 64, true),
            [(2048, 2048); 8]
        ),
    ]
}
