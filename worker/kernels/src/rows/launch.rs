//! Calls that move, sum and fill rows.

use super::{Groups, SOURCE, pack::pack};
use crate::{
    Buffer, Dtype, Element, Float, Gpu, GpuError, ShapeError,
    gpu::{
        launch::{Arg, Grid},
        source::Kernel,
    },
};

/// Rows of a table by their ids: `out[i] = table[ids[i]]`. `table` is `[vocabulary, width]`, `out` `[ids.len(), width]`. An id
/// that the table does not have gives a row of zeros.
pub fn embed<T: Float>(
    gpu: &Gpu,
    width: usize,
    table: &Buffer<T>,
    ids: &Buffer<u32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "embed";
    let vocabulary = whole_rows(NAME, "table", table, width)?;
    ShapeError::at_least(NAME, "out", out.len(), ids.len() * width)?;
    move_rows(
        gpu,
        NAME,
        width,
        ids.len(),
        (table, vocabulary, ids.pointer()),
        (out, ids.len(), 0),
    )
}

/// Rows of a matrix: `out[i] = from[at[i]]`. `out` is `[at.len(), width]`. An index that is negative or too large gives a row
/// of zeros.
pub fn gather_rows<T: Float>(
    gpu: &Gpu,
    width: usize,
    from: &Buffer<T>,
    at: &Buffer<i32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "gather_rows";
    let rows = whole_rows(NAME, "from", from, width)?;
    ShapeError::at_least(NAME, "out", out.len(), at.len() * width)?;
    move_rows(
        gpu,
        NAME,
        width,
        at.len(),
        (from, rows, at.pointer()),
        (out, at.len(), 0),
    )
}

/// The inverse: `out[at[i]] = features[i]`, other rows stay: image features over the rows of their placeholders, or gradients
/// of gathered rows. `features` is `[at.len(), width]`. Indices are distinct; a negative or too large one is left out.
pub fn place<T: Float>(
    gpu: &Gpu,
    width: usize,
    features: &Buffer<T>,
    at: &Buffer<i32>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    const NAME: &str = "place";
    let rows = whole_rows(NAME, "out", out, width)?;
    ShapeError::at_least(NAME, "features", features.len(), at.len() * width)?;
    move_rows(
        gpu,
        NAME,
        width,
        at.len(),
        (features, at.len(), 0),
        (out, rows, at.pointer()),
    )
}

/// [`Groups`] on the card.
#[derive(Clone, Debug)]
pub struct DeviceGroups {
    ids: Buffer<u32>,
    starts: Buffer<u32>,
    order: Buffer<u32>,
    many: usize,
}

impl DeviceGroups {
    /// Copies them to the card.
    pub fn upload(gpu: &Gpu, groups: &Groups) -> Result<Self, GpuError> {
        Ok(Self {
            ids: gpu.upload(&groups.ids)?,
            starts: gpu.upload(&groups.starts)?,
            order: gpu.upload(&groups.order)?,
            many: groups.many(),
        })
    }

    /// As [`Self::upload`], to the beginnings of buffers that are there: for distinct ids, one more, and all ids.
    pub fn write(gpu: &Gpu, [ids, starts, order]: [&Buffer<u32>; 3], groups: &Groups) -> Result<Self, GpuError> {
        let put = |buffer: &Buffer<u32>, values: &[u32]| {
            gpu.write(buffer, values)?;
            buffer.slice(0..values.len())
        };
        Ok(Self {
            ids: put(ids, &groups.ids)?,
            starts: put(starts, &groups.starts)?,
            order: put(order, &groups.order)?,
            many: groups.many(),
        })
    }
}

/// Gradient of [`embed`]: `dtable[id] += Σ dy[i]` over the tokens `i` of each id, in the order of the group, summed in f32.
/// `dy` is `[tokens, width]`, `dtable` `[vocabulary, width]`, in f32 or as the weights are; ids and tokens beyond them are left
/// out. Equal inputs give equal bits.
pub fn embedding_gradient<T: Float, G: Float>(
    gpu: &Gpu,
    width: usize,
    groups: &DeviceGroups,
    dy: &Buffer<T>,
    dtable: &Buffer<G>,
) -> Result<(), GpuError> {
    const NAME: &str = "embedding_gradient";
    let vocabulary = whole_rows(NAME, "dtable", dtable, width)?;
    let tokens = whole_rows(NAME, "dy", dy, width)?;
    let DeviceGroups {
        ids,
        starts,
        order,
        many,
    } = groups;
    let mut pack = pack::<T>(width, &[dy.pointer()]).min(16 / size_of::<G>());
    if !dtable.pointer().is_multiple_of(16) {
        pack = pack.min(self::pack::<G>(width, &[dtable.pointer()]));
    }
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE))
        .define("PACK", pack)
        .define("GRADIENT", format_number(G::DTYPE));
    let packs = width / pack;
    let blocks = many * packs.div_ceil(32) + (ids.len() - many) * packs.div_ceil(THREADS as usize);
    gpu.launch(
        &kernel,
        Grid::new(blocks, THREADS),
        &[
            dy.into(),
            ids.into(),
            starts.into(),
            order.into(),
            dtable.into(),
            packs.into(),
            vocabulary.into(),
            tokens.into(),
            (*many).into(),
        ],
    )
}

/// Numbers of scratch that [`column_sums`] needs. Their values need not be kept.
pub fn column_sums_scratch(rows: usize, width: usize) -> usize {
    column_parts(rows, width) * width
}

/// Adds the sums of the columns of `x` `[rows, width]` to `sums` `[width]`. Equal inputs give equal bits, on any card.
pub fn column_sums<T: Float>(
    gpu: &Gpu,
    rows: usize,
    width: usize,
    x: &Buffer<T>,
    sums: &Buffer<f32>,
    scratch: &Buffer<f32>,
) -> Result<(), GpuError> {
    const NAME: &str = "column_sums";
    let parts = column_parts(rows, width);
    ShapeError::at_least(NAME, "x", x.len(), rows * width)?;
    ShapeError::length(NAME, "sums", sums.len(), width)?;
    ShapeError::at_least(NAME, "scratch", scratch.len(), parts * width)?;
    if parts == 0 {
        return Ok(());
    }
    let pack = pack::<T>(width, &[x.pointer()]);
    let kernel = Kernel::new(&SOURCE, "column_parts", Some(T::DTYPE)).define("PACK", pack);
    let grid = Grid::of(((width / pack).div_ceil(32), parts, 1), THREADS);
    let part = rows.div_ceil(parts);
    gpu.launch(
        &kernel,
        grid,
        &[x.into(), scratch.into(), rows.into(), width.into(), part.into()],
    )?;
    add_partials(gpu, parts, width, scratch, sums)
}

/// Adds the sums of the columns of `partials` `[parts, width]` to `sums` `[width]`, in the order of the parts.
pub(crate) fn add_partials(
    gpu: &Gpu,
    parts: usize,
    width: usize,
    partials: &Buffer<f32>,
    sums: &Buffer<f32>,
) -> Result<(), GpuError> {
    let kernel = Kernel::new(&SOURCE, "add_partials", None);
    let grid = Grid::new(width.div_ceil(32), 1024);
    gpu.launch(
        &kernel,
        grid,
        &[partials.into(), sums.into(), parts.into(), width.into()],
    )
}

/// The same numbers in another format, rounded to nearest. `to` is at least as long as `from`.
pub fn cast<A: Float, B: Float>(gpu: &Gpu, from: &Buffer<A>, to: &Buffer<B>) -> Result<(), GpuError> {
    const NAME: &str = "cast";
    ShapeError::at_least(NAME, "to", to.len(), from.len())?;
    // Stores of 16 bytes side by side: wider loads would leave gaps between them.
    let mut pack = pack::<A>(0, &[from.pointer()]).min(16 / size_of::<B>());
    if !to.pointer().is_multiple_of(16) {
        pack = pack.min(self::pack::<B>(0, &[to.pointer()]));
    }
    let kernel = Kernel::new(&SOURCE, NAME, Some(A::DTYPE))
        .define("PACK", pack)
        .define("TARGET", format_number(B::DTYPE));
    flat(gpu, &kernel, from.len(), pack, &[from.into(), to.into()])
}

/// `a += b`, rounded once; `b` may be in another format. `b` is as long as `a`.
pub fn add<A: Float, B: Float>(gpu: &Gpu, a: &Buffer<A>, b: &Buffer<B>) -> Result<(), GpuError> {
    const NAME: &str = "add";
    ShapeError::length(NAME, "b", b.len(), a.len())?;
    let mut pack = pack::<A>(0, &[a.pointer()]);
    if !b.pointer().is_multiple_of(16) {
        pack = pack.min(self::pack::<B>(0, &[b.pointer()]));
    }
    let kernel = Kernel::new(&SOURCE, NAME, Some(A::DTYPE))
        .define("PACK", pack)
        .define("ADDEND", format_number(B::DTYPE));
    flat(gpu, &kernel, a.len(), pack, &[a.into(), b.into()])
}

/// `x *= factor`, rounded once.
pub fn scale<T: Float>(gpu: &Gpu, x: &Buffer<T>, factor: f32) -> Result<(), GpuError> {
    let pack = pack::<T>(0, &[x.pointer()]);
    let kernel = Kernel::new(&SOURCE, "scale", Some(T::DTYPE)).define("PACK", pack);
    flat(gpu, &kernel, x.len(), pack, &[x.into(), factor.into()])
}

/// Random numbers of a normal distribution with mean 0. The number at an index depends on the seed and the index alone.
pub fn fill_normal<T: Float>(gpu: &Gpu, out: &Buffer<T>, deviation: f32, seed: u64) -> Result<(), GpuError> {
    fill(gpu, "fill_normal", out, &[out.into(), deviation.into(), seed.into()])
}

/// Random numbers from `low` (included) to `high` (excluded, unless rounding to `T` reaches it). The number at an index depends
/// on the seed and the index alone.
pub fn fill_uniform<T: Float>(gpu: &Gpu, out: &Buffer<T>, (low, high): (f32, f32), seed: u64) -> Result<(), GpuError> {
    fill(
        gpu,
        "fill_uniform",
        out,
        &[out.into(), low.into(), high.into(), seed.into()],
    )
}

/// Copies blocks of a layer's pool before they are written to by one of their sharers: for each pair `(from, to)` of `pairs`
/// `[n, 2]`, keys and values of block `from` go to block `to`. `block_elements` is `kv_heads * block_size * head_dim`. No
/// block may be both a source and a target. A pair with a block that the pool does not have, or of a block with itself,
/// copies nothing: `pairs` may be padded for a graph.
pub fn copy_blocks<T: Float>(
    gpu: &Gpu,
    keys: &Buffer<T>,
    values: &Buffer<T>,
    pairs: &Buffer<u32>,
    block_elements: usize,
) -> Result<(), GpuError> {
    const NAME: &str = "copy_blocks";
    let blocks = whole_rows(NAME, "keys", keys, block_elements)?;
    ShapeError::length(NAME, "values", values.len(), keys.len())?;
    let count = pairs.len() / 2;
    ShapeError::unless(NAME, pairs.len().is_multiple_of(2) && count < 1 << 16, || {
        format!("pairs has {} elements", pairs.len())
    })?;
    let pack = pack::<T>(block_elements, &[keys.pointer(), values.pointer()]);
    let kernel = Kernel::new(&SOURCE, NAME, Some(T::DTYPE)).define("PACK", pack);
    let packs = block_elements / pack;
    let grid = Grid::of((packs.div_ceil(4 * THREADS as usize), count, 2), THREADS);
    gpu.launch(
        &kernel,
        grid,
        &[keys.into(), values.into(), pairs.into(), packs.into(), blocks.into()],
    )
}

/// Rows of partial sums: of at least 32 rows each, and about 512 blocks in all, which fit on a card at once.
fn column_parts(rows: usize, width: usize) -> usize {
    let most = 512 / width.div_ceil(256).clamp(1, 512);
    rows.div_ceil(32).min(most)
}

/// Threads of a block, as in the source.
const THREADS: u32 = 256;

/// As the source numbers formats.
fn format_number(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 0,
        Dtype::Bf16 => 1,
    }
}

/// Rows of a buffer that has whole ones.
fn whole_rows<T: Element>(
    kernel: &'static str,
    operand: &str,
    buffer: &Buffer<T>,
    width: usize,
) -> Result<usize, ShapeError> {
    let length = buffer.len();
    let rows = length.checked_div(width).unwrap_or_default();
    ShapeError::unless(kernel, rows * width == length && rows < 1 << 31, || {
        format!("{operand} has {length} elements, not rows of {width}")
    })?;
    Ok(rows)
}

/// Moves `count` rows: buffers, their rows and the addresses of lists of row indices, 0 for the natural order.
fn move_rows<T: Float>(
    gpu: &Gpu,
    name: &'static str,
    width: usize,
    count: usize,
    (from, from_rows, source_at): (&Buffer<T>, usize, u64),
    (to, to_rows, target_at): (&Buffer<T>, usize, u64),
) -> Result<(), GpuError> {
    let pack = pack::<T>(width, &[from.pointer(), to.pointer()]);
    let packs = width / pack;
    let total = count * packs;
    ShapeError::unless(name, total < 1 << 31, || format!("{total} packs are too many"))?;
    let kernel = Kernel::new(&SOURCE, "move_rows", Some(T::DTYPE)).define("PACK", pack);
    gpu.launch(
        &kernel,
        Grid::new(total.div_ceil(4 * THREADS as usize), THREADS),
        &[
            from.into(),
            from_rows.into(),
            Arg::Pointer(source_at),
            to.into(),
            to_rows.into(),
            Arg::Pointer(target_at),
            packs.into(),
            total.into(),
        ],
    )
}

/// A kernel over a vector; its length is the last argument.
fn flat(gpu: &Gpu, kernel: &Kernel, length: usize, pack: usize, args: &[Arg]) -> Result<(), GpuError> {
    let grid = Grid::new(length.div_ceil(4 * THREADS as usize * pack), THREADS);
    gpu.launch(kernel, grid, &[args, &[Arg::U64(length as u64)]].concat())
}

fn fill<T: Float>(gpu: &Gpu, name: &'static str, out: &Buffer<T>, args: &[Arg]) -> Result<(), GpuError> {
    let kernel = Kernel::new(&SOURCE, name, Some(T::DTYPE)).define("PACK", pack::<T>(0, &[out.pointer()]));
    let grid = Grid::new(out.len().div_ceil(8 * THREADS as usize), THREADS);
    gpu.launch(&kernel, grid, &[args, &[Arg::U64(out.len() as u64)]].concat())
}
