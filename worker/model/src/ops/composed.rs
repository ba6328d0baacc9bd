//! The operations as compositions of candle operations that all have a backward.

use candle_core::{D, DType, Result, Tensor};

use super::{Heads, PagedSpan, Segments};
use crate::rope::Rotary;

/// See [`super::Kernels::rms_norm`]. The mean square is taken in f32 at least.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(wide)?;
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&inverse)?.to_dtype(dtype)?.broadcast_mul(weight)
}

/// See [`super::Kernels::layer_norm`]. Mean and variance are taken in f32 at least.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(wide)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let x = x.broadcast_mul(&inverse)?.broadcast_mul(&weight.to_dtype(wide)?)?;
    x.broadcast_add(&bias.to_dtype(wide)?)?.to_dtype(dtype)
}

/// See [`super::Kernels::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// See [`super::Kernels::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()?.mul(up)
}

/// See [`super::Kernels::rotate`].
pub fn rotate(qkv: &Tensor, heads: Heads, rotary: &Rotary) -> Result<Tensor> {
    let rows = qkv.dim(0)?;
    let turned = heads.heads + heads.kv_heads;
    let half = heads.head_dim / 2;
    let x = qkv
        .narrow(1, 0, turned * heads.head_dim)?
        .reshape((rows, turned, heads.head_dim))?;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (rotary.cos.unsqueeze(1)?, rotary.sin.unsqueeze(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let x = Tensor::cat(&[first, second], 2)?.reshape((rows, turned * heads.head_dim))?;
    let values = qkv.narrow(1, turned * heads.head_dim, heads.kv_size())?;
    Tensor::cat(&[x, values], 1)
}

/// See [`super::Kernels::attention`].
pub fn attention(qkv: &Tensor, heads: Heads, segments: &Segments) -> Result<Tensor> {
    let rows = qkv.dim(0)?;
    if let Some((count, width)) = rectangle(segments, rows) {
        // Right padding comes after every real token, so that causality alone keeps it out.
        return attend(qkv, heads, count, width, segments.causal);
    }
    let mut outputs = Vec::new();
    let mut place = vec![0u32; rows];
    let mut filled = 0u32;
    for (length, starts) in segments.by_length() {
        let picked = starts
            .iter()
            .flat_map(|start| *start as u32..(start + length) as u32)
            .collect::<Vec<_>>();
        for row in &picked {
            place[*row as usize] = filled;
            filled += 1;
        }
        let picked = Tensor::from_vec(picked, starts.len() * length, qkv.device())?;
        let part = qkv.index_select(&picked, 0)?;
        outputs.push(attend(&part, heads, starts.len(), length, segments.causal)?);
    }
    Tensor::cat(&outputs, 0)?.index_select(&Tensor::from_vec(place, rows, qkv.device())?, 0)
}

/// The rectangle that the segments are: runs of one length without gaps, or causal runs that start at equal distances.
fn rectangle(segments: &Segments, rows: usize) -> Option<(usize, usize)> {
    let count = segments.runs.len();
    let width = rows.checked_div(count)?;
    let regular =
        segments.runs.iter().enumerate().all(|(i, (start, length))| {
            *start == i * width && (*length == width || (segments.causal && *length < width))
        });
    (width * count == rows && regular).then_some((count, width))
}

/// Queries whose scores are held at once: a long segment's scores would not fit in memory.
const QUERIES: usize = 512;

fn attend(qkv: &Tensor, heads: Heads, count: usize, width: usize, causal: bool) -> Result<Tensor> {
    let Heads {
        heads: query_heads,
        kv_heads,
        head_dim,
    } = heads;
    let group = query_heads / kv_heads;
    let split = |offset: usize, n: usize| {
        qkv.narrow(1, offset, n * head_dim)?
            .reshape((count, width, n, head_dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let q = split(0, query_heads)?.reshape((count * kv_heads, group, width, head_dim))?;
    let k = split(heads.q_size(), kv_heads)?.reshape((count * kv_heads, width, head_dim))?;
    let v = split(heads.q_size() + heads.kv_size(), kv_heads)?.reshape((count * kv_heads, width, head_dim))?;
    let mixed = mix(&q, &k, &v, causal.then_some(0))?;
    join(&mixed, count)
}

/// Softmax attention of queries `[n, group, width, head_dim]` over `[n, seen, head_dim]`, to the shape of the queries.
/// `stored` keys come before that of the first query where a query does not see what comes after it.
fn mix(q: &Tensor, k: &Tensor, v: &Tensor, stored: Option<usize>) -> Result<Tensor> {
    let (n, group, width, head_dim) = q.dims4()?;
    let mut parts = Vec::with_capacity(width.div_ceil(QUERIES));
    for first in (0..width).step_by(QUERIES) {
        let queries = QUERIES.min(width - first);
        let seen = stored.map_or(k.dim(1)?, |stored| stored + first + queries);
        let part = q.narrow(2, first, queries)?.reshape((n, group * queries, head_dim))?;
        let (k, v) = (k.narrow(1, 0, seen)?, v.narrow(1, 0, seen)?);
        let mut scores = (part.matmul(&k.t()?)? * (head_dim as f64).sqrt().recip())?;
        if let Some(stored) = stored {
            let last = stored + first;
            let row = |i: usize| (0..seen).map(move |j| if j > last + i { f32::NEG_INFINITY } else { 0.0 });
            let mask = (0..queries).flat_map(row).collect::<Vec<_>>();
            let mask = Tensor::from_vec(mask, (1, 1, queries, seen), q.device())?.to_dtype(q.dtype())?;
            scores = scores.reshape((n, group, queries, seen))?.broadcast_add(&mask)?;
            scores = scores.reshape((n, group * queries, seen))?;
        }
        let part = softmax(&scores)?.matmul(&v.contiguous()?)?;
        parts.push(part.reshape((n, group, queries, head_dim))?);
    }
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Tensor::cat(&parts, 2),
    }
}

/// `[count * kv_heads, group, width, head_dim]` to `[count * width, heads * head_dim]`.
fn join(mixed: &Tensor, count: usize) -> Result<Tensor> {
    let (n, group, width, head_dim) = mixed.dims4()?;
    let heads = n / count * group;
    mixed
        .reshape((count, heads, width, head_dim))?
        .transpose(1, 2)?
        .reshape((count * width, heads * head_dim))
}

/// Keys or values of sequences with these blocks, `[sequences * kv_heads, tokens, head_dim]`: of `tokens` tokens each, what a
/// sequence lacks being anything finite.
fn gather(blocks: &Tensor, tables: &[&[u32]], tokens: usize, heads: Heads) -> Result<Tensor> {
    let (_, block_size, size) = blocks.dims3()?;
    let count = tokens.div_ceil(block_size);
    let table = tables.iter().flat_map(|table| {
        let own = table.iter().copied().take(count);
        own.chain(std::iter::repeat(0)).take(count)
    });
    let table = Tensor::from_vec(table.collect::<Vec<_>>(), tables.len() * count, blocks.device())?;
    blocks
        .index_select(&table, 0)?
        .reshape((tables.len(), count * block_size, size))?
        .narrow(1, 0, tokens)?
        .reshape((tables.len(), tokens, heads.kv_heads, heads.head_dim))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((tables.len() * heads.kv_heads, tokens, heads.head_dim))
}

/// See [`super::Kernels::paged_attention`]: spans of one row.
pub fn next_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    spans: &[PagedSpan<'_>],
    heads: Heads,
) -> Result<Tensor> {
    let (rows, group) = (spans.len(), heads.heads / heads.kv_heads);
    let longest = spans.iter().map(PagedSpan::seen).max().unwrap_or(0);
    let tables = spans.iter().map(|span| span.blocks).collect::<Vec<_>>();
    let q = qkv
        .narrow(1, 0, heads.q_size())?
        .contiguous()?
        .reshape((rows * heads.kv_heads, group, heads.head_dim))?;
    let (k, v) = (
        gather(keys, &tables, longest, heads)?,
        gather(values, &tables, longest, heads)?,
    );
    let row = |span: &PagedSpan<'_>| {
        let seen = span.seen();
        (0..longest).map(move |j| if j >= seen { f32::NEG_INFINITY } else { 0.0 })
    };
    let mask = spans.iter().flat_map(row).collect::<Vec<_>>();
    let mask = Tensor::from_vec(mask, (rows, 1, 1, longest), qkv.device())?.to_dtype(qkv.dtype())?;
    let scores = (q.matmul(&k.t()?)? * (heads.head_dim as f64).sqrt().recip())?
        .reshape((rows, heads.kv_heads, group, longest))?
        .broadcast_add(&mask)?
        .reshape((rows * heads.kv_heads, group, longest))?;
    softmax(&scores)?.matmul(&v)?.reshape((rows, heads.q_size()))
}

/// See [`super::Kernels::paged_attention`]: spans of any length.
pub fn chunk_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    spans: &[PagedSpan<'_>],
    heads: Heads,
) -> Result<Tensor> {
    let group = heads.heads / heads.kv_heads;
    let mut start = 0;
    let mut mixed = Vec::with_capacity(spans.len());
    for span in spans {
        let q = qkv
            .narrow(0, start, span.length)?
            .narrow(1, 0, heads.q_size())?
            .reshape((span.length, heads.heads, heads.head_dim))?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((heads.kv_heads, group, span.length, heads.head_dim))?;
        let k = gather(keys, &[span.blocks], span.seen(), heads)?;
        let v = gather(values, &[span.blocks], span.seen(), heads)?;
        mixed.push(join(&mix(&q, &k, &v, Some(span.stored))?, 1)?);
        start += span.length;
    }
    Tensor::cat(&mixed, 0)
}

/// See [`super::Kernels::store`].
pub fn store(qkv: &Tensor, keys: &Tensor, values: &Tensor, slots: &[u32], heads: Heads) -> Result<()> {
    let (rows, size) = (slots.len(), heads.kv_size());
    let slots = Tensor::from_slice(slots, (rows, 1), qkv.device())?
        .broadcast_as((rows, size))?
        .contiguous()?;
    for (blocks, offset) in [(keys, heads.q_size()), (values, heads.q_size() + size)] {
        let source = qkv.narrow(1, offset, size)?.contiguous()?;
        blocks.reshape(((), size))?.scatter_set(&slots, &source, 0)?;
    }
    Ok(())
}

/// See [`super::Kernels::copy_blocks`].
pub fn copy_blocks(blocks: &Tensor, pairs: &[(u32, u32)]) -> Result<()> {
    let (_, block_size, size) = blocks.dims3()?;
    let (from, to): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
    let flat = blocks.reshape(((), block_size * size))?;
    let source = flat.index_select(&Tensor::from_vec(from, pairs.len(), blocks.device())?, 0)?;
    let to = Tensor::from_vec(to, (pairs.len(), 1), blocks.device())?;
    let to = to.broadcast_as((pairs.len(), block_size * size))?.contiguous()?;
    flat.scatter_set(&to, &source, 0)
}

/// Softmax over the last dimension, in f32 at least.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(wide)?;
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?.to_dtype(dtype)
}

/// See [`super::Kernels::log_probs`].
pub fn log_probs(logits: &Tensor, targets: &[u32], temperature: f64) -> Result<Tensor> {
    let dtype = logits.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let scaled = (logits.to_dtype(wide)? / temperature)?;
    let shifted = scaled.broadcast_sub(&scaled.max_keepdim(D::Minus1)?.detach())?;
    let total = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    (shifted.gather(&index, 1)? - total)?.squeeze(1)
}
