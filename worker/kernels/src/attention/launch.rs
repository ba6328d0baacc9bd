use super::{Attention, HOPPER, SIMPLE, TENSOR};
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
};

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
    /// Tokens of a block: a power of two, at least 8.
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
    let best = Cores::best(segments.query_tokens, segments.queries.len());
    forward_on(best, gpu, attention, q, k, v, segments, out, lse)
}

/// [`forward`] on these cores at best.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn forward_on<T: Float>(
    best: Cores,
    gpu: &Gpu,
    attention: &Attention,
    q: Rows<'_, T>,
    k: Rows<'_, T>,
    v: Rows<'_, T>,
    segments: &Segments<'_>,
    out: &Buffer<T>,
    lse: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    let mut call = Call::of_rows("attention", attention, segments, [("q", q), ("k", k), ("v", v)])?;
    call.limit(gpu, best);
    ShapeError::length("attention", "out", out.len(), segments.query_tokens * attention.width())?;
    if let Some(lse) = lse {
        ShapeError::length("attention", "lse", lse.len(), segments.query_tokens * attention.heads)?;
    }
    let keys = Keys::Rows {
        k,
        v,
        offsets: segments.keys,
    };
    attend(gpu, &call, q, segments.queries, &keys, out, lse)
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
    let best = Cores::best(tokens, offsets.len());
    prefill_on(best, gpu, attention, q, tokens, offsets, pool, out)
}

/// [`prefill`] on these cores at best.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn prefill_on<T: Float>(
    best: Cores,
    gpu: &Gpu,
    attention: &Attention,
    q: Rows<'_, T>,
    tokens: usize,
    offsets: &Buffer<u32>,
    pool: &Pool<'_, T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    let name = "attention over a pool";
    attention.check(name)?;
    let sequences = pool.kv_lengths.len();
    ShapeError::unless(
        name,
        sequences > 0 && pool.block_size.is_power_of_two() && pool.block_size >= 8,
        || format!("{sequences} sequences, blocks of {} tokens", pool.block_size),
    )?;
    ShapeError::length(name, "offsets", offsets.len(), sequences + 1)?;
    let block = attention.kv_heads * pool.block_size * attention.head_dim;
    ShapeError::unless(name, pool.keys.len().is_multiple_of(block), || {
        format!("{} keys in blocks of {block}", pool.keys.len())
    })?;
    ShapeError::length(name, "values", pool.values.len(), pool.keys.len())?;
    ShapeError::unless(name, pool.tables.len().is_multiple_of(sequences), || {
        format!("{} table entries of {sequences} sequences", pool.tables.len())
    })?;
    ShapeError::length(name, "out", out.len(), tokens * attention.width())?;
    rows(name, "q", q, tokens, attention.width())?;
    let vectors = aligned(q) && [pool.keys, pool.values].map(pointer_aligned) == [true; 2];
    let mut call = Call {
        attention: *attention,
        segments: sequences,
        query_tokens: tokens,
        cores: attention.cores::<T>(vectors),
    };
    call.limit(gpu, best);
    attend(gpu, &call, q, offsets, &Keys::Pool(*pool), out, None)
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
    let best = Cores::best(segments.query_tokens, segments.queries.len());
    backward_on(best, gpu, attention, q, k, v, segments, saved, gradients, scratch)
}

/// [`backward`] on these cores at best.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn backward_on<T: Float>(
    best: Cores,
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
    let name = "attention backward";
    let mut call = Call::of_rows(name, attention, segments, [("q", q), ("k", k), ("v", v)])?;
    let (queries, keys, width) = (segments.query_tokens, segments.key_tokens, attention.width());
    let key_width = attention.kv_heads * attention.head_dim;
    ShapeError::length(name, "out", saved.out.len(), queries * width)?;
    ShapeError::length(name, "dout", saved.dout.len(), queries * width)?;
    ShapeError::length(name, "lse", saved.lse.len(), queries * attention.heads)?;
    rows(name, "dq", gradients.dq, queries, width)?;
    rows(name, "dk", gradients.dk, keys, key_width)?;
    rows(name, "dv", gradients.dv, keys, key_width)?;
    ShapeError::at_least(name, "scratch", scratch.len(), backward_scratch(attention, queries))?;
    let written = [gradients.dq, gradients.dk, gradients.dv];
    let vectors = [saved.out, saved.dout].map(pointer_aligned) == [true; 2]
        && (attention.head_dim * T::DTYPE.bytes()).is_multiple_of(16);
    call.limit(gpu, best);
    if !(vectors && written.map(aligned) == [true; 3]) {
        call.cores = Cores::Plain;
    }

    let sums = call.kernel::<T>(&SIMPLE, "sums_of_products", false);
    let args = [
        scratch.into(),
        saved.dout.into(),
        saved.out.into(),
        queries.into(),
        attention.heads.into(),
        usize::from(vectors).into(),
    ];
    gpu.launch(&sums, Grid::new((queries * attention.heads).div_ceil(16), 256), &args)?;

    let inputs: [Arg; 8] = [
        saved.dout.into(),
        saved.lse.into(),
        scratch.into(),
        q.data.into(),
        q.stride.into(),
        segments.queries.into(),
        call.segments.into(),
        queries.into(),
    ];
    let of_keys = Keys::Rows {
        k,
        v,
        offsets: segments.keys,
    }
    .args();
    let heads: [Arg; 3] = [
        attention.heads.into(),
        attention.kv_heads.into(),
        attention.scale.into(),
    ];

    let (source, names) = match call.cores {
        Cores::Hopper => (&HOPPER, ["backward_key_hopper", "backward_query_hopper"]),
        Cores::Tensor => (&TENSOR, ["backward_key_tensor", "backward_query_tensor"]),
        Cores::Plain => (&SIMPLE, ["backward_key_simple", "backward_query_simple"]),
    };
    let grid = |heads: usize, tokens: usize| match call.cores {
        Cores::Hopper => {
            let tiles = call.tiles(tokens, HOPPER_ROWS) * heads;
            // Two tiles, three stages of two steps of half as many rows, and numbers of queries of each stage or tile.
            let shared = 5 * attention.head_dim.div_ceil(64) * HOPPER_ROWS * 128 + 3 * HOPPER_ROWS * 4;
            Grid::new(tiles.min(gpu.processors()), 384).shared(shared)
        }
        Cores::Tensor => {
            let tiles = call.tiles(tokens, BACKWARD_ROWS);
            Grid::of((heads, tiles, 1), 256).shared(call.shared_bytes(2 * BACKWARD_ROWS + 4 * BACKWARD_STEP) + 1024)
        }
        Cores::Plain => Grid::of((heads, tokens.div_ceil(4), 1), 128),
    };
    let kernel = |name| {
        let kernel = call.kernel::<T>(source, name, false);
        match call.cores {
            Cores::Plain => kernel,
            _ => kernel.define("BACKWARD", 1),
        }
    };

    let outputs: [Arg; 4] = [
        gradients.dk.data.into(),
        gradients.dk.stride.into(),
        gradients.dv.data.into(),
        gradients.dv.stride.into(),
    ];
    let key_args = [&outputs[..], &inputs, &of_keys, &[keys.into()], &heads].concat();
    gpu.launch(&kernel(names[0]), grid(attention.kv_heads, keys), &key_args)?;

    let outputs: [Arg; 2] = [gradients.dq.data.into(), gradients.dq.stride.into()];
    let query_args = [&outputs[..], &inputs, &of_keys, &heads].concat();
    gpu.launch(&kernel(names[1]), grid(attention.heads, queries), &query_args)
}

/// Rows of a block of the backward kernels, and of a step of theirs.
const BACKWARD_ROWS: usize = 128;
const BACKWARD_STEP: usize = 64;
/// Four rows for each of the 65,535 blocks of a grid's second dimension.
const MOST_TOKENS: usize = 4 * 65_535;
/// Rows of queries of a block of the Hopper kernels, and keys of a step of theirs.
const HOPPER_ROWS: usize = 128;
/// Keys of a step of the forward kernel.
const FORWARD_KEYS: usize = 64;

impl Attention {
    /// Numbers of one token's queries.
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn check(&self, kernel: &'static str) -> Result<(), ShapeError> {
        let grouped = self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        let sized = (1..=256).contains(&self.head_dim) && self.scale > 0.0;
        ShapeError::unless(kernel, grouped && sized, || format!("{self:?}"))
    }

    /// The best cores for this format and width. `vectors`: whether 16 bytes can be read at once.
    fn cores<T: Float>(&self, vectors: bool) -> Cores {
        if T::DTYPE != Dtype::Bf16 || !vectors || !self.head_dim.is_multiple_of(8) || self.head_dim > 128 {
            Cores::Plain
        } else if [64, 80, 128].contains(&self.head_dim.next_multiple_of(16)) {
            Cores::Hopper
        } else {
            Cores::Tensor
        }
    }
}

fn pointer_aligned<T: Float>(buffer: &Buffer<T>) -> bool {
    buffer.pointer().is_multiple_of(16)
}

fn aligned<T: Float>(rows: Rows<'_, T>) -> bool {
    pointer_aligned(rows.data) && (rows.stride * T::DTYPE.bytes()).is_multiple_of(16)
}

fn rows<T: Float>(
    kernel: &'static str,
    operand: &str,
    rows: Rows<'_, T>,
    tokens: usize,
    width: usize,
) -> Result<(), ShapeError> {
    ShapeError::unless(kernel, rows.stride >= width, || {
        format!("rows of {operand} have {width} elements and are {} apart", rows.stride)
    })?;
    let wanted = tokens.checked_sub(1).map_or(0, |before| before * rows.stride + width);
    ShapeError::unless(kernel, tokens <= MOST_TOKENS, || {
        format!("{tokens} tokens of {operand}")
    })?;
    ShapeError::at_least(kernel, operand, rows.data.len(), wanted)
}

/// Where keys and values are.
enum Keys<'a, T> {
    Rows {
        k: Rows<'a, T>,
        v: Rows<'a, T>,
        offsets: &'a Buffer<u32>,
    },
    Pool(Pool<'a, T>),
}

impl<T: Float> Keys<'_, T> {
    /// As `KEY_OPERANDS` of the sources.
    fn args(&self) -> Vec<Arg> {
        match self {
            Self::Rows { k, v, offsets } => vec![
                k.data.into(),
                v.data.into(),
                k.stride.into(),
                v.stride.into(),
                (*offsets).into(),
            ],
            Self::Pool(pool) => vec![
                pool.keys.into(),
                pool.values.into(),
                pool.tables.into(),
                pool.kv_lengths.into(),
                (pool.tables.len() / pool.kv_lengths.len()).into(),
                pool.block_size.ilog2().into(),
            ],
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Cores {
    /// One warp per row.
    Plain,
    /// `mma.sync`: every card.
    Tensor,
    /// `wgmma`.
    Hopper,
}

impl Cores {
    /// Segments that are short on average waste a part of Hopper's tiles of 128 queries.
    fn best(tokens: usize, offsets: usize) -> Self {
        if tokens > 96 * offsets.saturating_sub(1) {
            Self::Hopper
        } else {
            Self::Tensor
        }
    }
}

/// A checked call.
struct Call {
    attention: Attention,
    segments: usize,
    query_tokens: usize,
    cores: Cores,
}

impl Call {
    fn of_rows<T: Float>(
        name: &'static str,
        attention: &Attention,
        segments: &Segments<'_>,
        [q, k, v]: [(&str, Rows<'_, T>); 3],
    ) -> Result<Self, ShapeError> {
        attention.check(name)?;
        let count = segments.queries.len().saturating_sub(1);
        ShapeError::unless(name, count > 0, || "no segments".to_owned())?;
        ShapeError::length(name, "offsets of the keys", segments.keys.len(), count + 1)?;
        let key_width = attention.kv_heads * attention.head_dim;
        rows(name, q.0, q.1, segments.query_tokens, attention.width())?;
        rows(name, k.0, k.1, segments.key_tokens, key_width)?;
        rows(name, v.0, v.1, segments.key_tokens, key_width)?;
        Ok(Self {
            attention: *attention,
            segments: count,
            query_tokens: segments.query_tokens,
            cores: attention.cores::<T>([q.1, k.1, v.1].map(aligned) == [true; 3]),
        })
    }

    fn kernel<T: Float>(&self, source: &'static crate::gpu::source::Source, name: &'static str, paged: bool) -> Kernel {
        Kernel::new(source, name, Some(T::DTYPE))
            .define("HEAD_DIM", self.attention.head_dim)
            .define("CAUSAL", usize::from(self.attention.causal))
            .define("PAGED", usize::from(paged))
    }

    fn limit(&mut self, gpu: &Gpu, best: Cores) {
        let here = if gpu.is_hopper() { Cores::Hopper } else { Cores::Tensor };
        self.cores = self.cores.min(best).min(here);
    }

    /// The most tiles that this many tokens in segments can make.
    fn tiles(&self, tokens: usize, rows: usize) -> usize {
        (tokens + self.segments.min(tokens) * (rows - 1)) / rows
    }

    /// Of this many rows in the layout of the tensor-core kernels.
    fn shared_bytes(&self, rows: usize) -> usize {
        rows * (self.attention.head_dim.next_multiple_of(16) + 8) * 2
    }
}

fn attend<T: Float>(
    gpu: &Gpu,
    call: &Call,
    q: Rows<'_, T>,
    offsets: &Buffer<u32>,
    keys: &Keys<'_, T>,
    out: &Buffer<T>,
    lse: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    let attention = &call.attention;
    let paged = matches!(keys, Keys::Pool(_));
    let first: [Arg; 7] = [
        out.into(),
        lse.into(),
        q.data.into(),
        q.stride.into(),
        offsets.into(),
        call.segments.into(),
        call.query_tokens.into(),
    ];
    let last: [Arg; 3] = [
        attention.heads.into(),
        attention.kv_heads.into(),
        attention.scale.into(),
    ];
    let args = [&first[..], &keys.args(), &last].concat();
    let cores = if pointer_aligned(out) { call.cores } else { Cores::Plain };
    match cores {
        Cores::Hopper => {
            let kernel = call.kernel::<T>(&HOPPER, "forward_hopper", paged).define("FORWARD", 1);
            let tiles = call.tiles(call.query_tokens, HOPPER_ROWS) * attention.heads;
            let panels = attention.head_dim.div_ceil(64);
            let grid = Grid::new(tiles.min(gpu.processors()), 384).shared(6 * panels * HOPPER_ROWS * 128);
            gpu.launch(&kernel, grid, &args)
        }
        Cores::Tensor => {
            // Short segments fill tiles of 64 rows better.
            let warp_tiles = if call.query_tokens > 96 * call.segments { 2 } else { 1 };
            let rows = 64 * warp_tiles;
            let kernel = call.kernel::<T>(&TENSOR, "forward_tensor", paged);
            let kernel = kernel.define("FORWARD", 1).define("WARP_TILES", warp_tiles);
            let grid = Grid::of((attention.heads, call.tiles(call.query_tokens, rows), 1), 128);
            let grid = grid.shared(call.shared_bytes(rows + 2 * FORWARD_KEYS));
            gpu.launch(&kernel, grid, &args)
        }
        Cores::Plain => {
            let kernel = call.kernel::<T>(&SIMPLE, "forward_simple", paged);
            let grid = Grid::of((attention.heads, call.query_tokens.div_ceil(4), 1), 128);
            gpu.launch(&kernel, grid, &args)
        }
    }
}
