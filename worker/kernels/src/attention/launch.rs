use crate::{Buffer, Float, Gpu, GpuError};

/// Heads and the rule of who sees whom.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Heads of the queries: a multiple of `kv_heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of one head, at most 256. Tensor cores are used for bf16 and multiples of 8 up to 128.
    pub head_dim: usize,
    /// Factor of the scores, as `1 / sqrt(head_dim)`; above zero.
    pub scale: f32,
    /// Whether query `i` of a segment sees keys up to `keys - queries + i` alone (the last query sees all), or all keys of its
    /// segment.
    pub causal: bool,
}

/// Rows of heads, one per token: a matrix of its own, or columns of a wider one (the part of a packed `qkv` that begins with the
/// slice's first element).
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// From the first number of the first token on.
    pub data: &'a Buffer<T>,
    /// Elements between two tokens.
    pub stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Rows `stride` elements apart.
    pub fn new(data: &'a Buffer<T>, stride: usize) -> Self {
        Self { data, stride }
    }
}

/// Sequences (or windows of a picture) behind one another, each of which sees itself alone. Offsets are on the device, so that
/// they may change between two replays of a graph; the numbers of tokens are bounds that do not.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    /// Where the queries of each segment begin, and where the last end: `[segments + 1]`, ascending, from 0 to at most
    /// `query_tokens`. Rows after the end are neither read nor written.
    pub queries: &'a Buffer<u32>,
    /// The same of keys and values; the same buffer where every token is query and key.
    pub keys: &'a Buffer<u32>,
    /// Rows of the queries: `q`, `out`, and columns of `lse`.
    pub query_tokens: usize,
    /// Rows of keys and values.
    pub key_tokens: usize,
}

/// Keys and values of one layer in blocks, in any order.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a, T> {
    /// `[blocks, kv_heads, block_size, head_dim]`.
    pub keys: &'a Buffer<T>,
    /// As `keys`.
    pub values: &'a Buffer<T>,
    /// Blocks of each sequence: `[sequences, max_blocks]`. Entries after a sequence's last block are not read.
    pub tables: &'a Buffer<u32>,
    /// Tokens of a block: a power of two.
    pub block_size: usize,
    /// Tokens that each sequence has in the pool, `[sequences]`, those of the chunk included.
    pub kv_lengths: &'a Buffer<i32>,
}

/// What [`backward`] reads besides the inputs of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, T> {
    /// What `forward` wrote: `[query_tokens, heads, head_dim]`.
    pub out: &'a Buffer<T>,
    /// What `forward` wrote: `[heads, query_tokens]`.
    pub lse: &'a Buffer<f32>,
    /// The gradient of `out`, in its shape.
    pub dout: &'a Buffer<T>,
}

/// What [`backward`] writes: the rows of every segment, also those whose gradient is zero.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<'a, T> {
    /// `[query_tokens, heads, head_dim]`.
    pub dq: Rows<'a, T>,
    /// `[key_tokens, kv_heads, head_dim]`: summed over the query heads of a key head.
    pub dk: Rows<'a, T>,
    /// As `dk`.
    pub dv: Rows<'a, T>,
}

/// `out = softmax(scale · q · kᵀ) · v` in each segment.
///
/// `q` is `[query_tokens, heads, head_dim]`, `k` and `v` are `[key_tokens, kv_heads, head_dim]`, `out` is `[query_tokens, heads,
/// head_dim]` without gaps. `lse`, `[heads, query_tokens]`, gets the logarithm of the sum of the exponentials of a query's scaled
/// scores, which `backward` needs. A query that sees no key gets zeros and `-inf`.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn forward<T: Float>(
    gpu: &Gpu,
    attention: &Attention,
    q: Rows<'_, T>,
    k: Rows<'_, T>,
    v: Rows<'_, T>,
    segments: &Segments<'_>,
    out: &Buffer<T>,
    lse: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    let _ = (gpu, attention, q, k, v, segments, out, lse);
    Ok(())
}

/// As [`forward`], for chunks of prompts whose keys and values, those of the chunk included, are in a pool.
///
/// `q` is `[tokens, heads, head_dim]`: the chunks of all sequences behind one another. `offsets`, `[sequences + 1]`, tells where
/// each begins, and where the last ends. The last query of a chunk is the last token of its sequence in the pool. `tokens` is an
/// upper bound: rows after the last offset are neither read nor written.
pub fn prefill<T: Float>(
    gpu: &Gpu,
    attention: &Attention,
    q: Rows<'_, T>,
    tokens: usize,
    offsets: &Buffer<u32>,
    pool: &Pool<'_, T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    let _ = (gpu, attention, q, tokens, offsets, pool, out);
    Ok(())
}

/// Numbers of f32 that [`backward`] needs as scratch.
pub fn backward_scratch(attention: &Attention, query_tokens: usize) -> usize {
    attention.heads * query_tokens
}

/// Gradients of [`forward`] by its inputs, from that of its output. Sums have one order: equal inputs give equal bits.
///
/// `scratch` holds [`backward_scratch`] numbers: for each query the sum of `dout · out`.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn backward<T: Float>(
    gpu: &Gpu,
    attention: &Attention,
    q: Rows<'_, T>,
    k: Rows<'_, T>,
    v: Rows<'_, T>,
    segments: &Segments<'_>,
    saved: &Saved<'_, T>,
    gradients: &Gradients<'_, T>,
    scratch: &Buffer<f32>,
) -> Result<(), GpuError> {
    let _ = (gpu, attention, q, k, v, segments, saved, gradients, scratch);
    Ok(())
}
