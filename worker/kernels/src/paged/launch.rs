use super::{Decode, HOPPER, SOURCE};
use crate::{
    Buffer, Gpu, GpuError, ShapeError,
    element::{Dtype, Float},
    gpu::{
        launch::{Arg, Grid},
        source::{Kernel, Source},
    },
};

/// Warps of a block on the line of rows, and such blocks of a multiprocessor: so many that their registers suffice.
const ROW_WARPS: usize = 4;
const ROW_BLOCKS: usize = 3;
/// The same of prefixes.
const PREFIX_WARPS: usize = 4;
const PREFIX_BLOCKS: usize = 2;
/// Tokens of a prefix that a block has in shared memory, and those where it does prefixes and rows together.
const CHUNK: usize = 64;
const LONG_CHUNK: usize = 128;
/// Matrices of a long chunk in the shared memory of such a block: queries, three of keys, three of values.
const TILES: usize = 7;
/// Tiles of 8 columns that the warps of a block hold together over a prefix.
const WIDE_TILES: usize = 4 * PREFIX_WARPS;
/// Integers of a section, of a row's record, of a share, and of the header of a plan.
const SECTION: usize = 8;
const RECORD: usize = 12;
const SHARE: usize = 12;
const HEADER: usize = 4;

/// What one layer reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a, T> {
    /// Queries, `[rows, heads, head_dim]`.
    pub q: &'a Buffer<T>,
    /// Keys of the layer, `[blocks, kv_heads, block_size, head_dim]`. Those of the new tokens are already in it. What lies
    /// beyond a sequence's length may be anything, NaN as well.
    pub keys: &'a Buffer<T>,
    /// Values of the layer, as the keys.
    pub values: &'a Buffer<T>,
    /// Which blocks hold a sequence, in order: `[rows, max_blocks]`. Entries beyond its length are not read.
    pub tables: &'a Buffer<u32>,
    /// The result, `[rows, heads, head_dim]`; zeros for unused rows.
    pub out: &'a Buffer<T>,
    /// `ln Σ exp(scale * score)` of every query head, `[rows, heads]`; minus infinity for unused rows.
    pub lse: Option<&'a Buffer<f32>>,
}

/// Work lists and partial results of a step. One is enough for all layers, and for all smaller batches of the same heads as
/// well.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Written by [`plan`], read by [`attend`].
    plan: Buffer<i32>,
    /// Sums, maxima and unscaled outputs of parts of a context.
    partials: Buffer<f32>,
}

impl Scratch {
    /// Scratch memory for batches up to this one. It must be kept as long as a graph that uses it.
    pub fn new(gpu: &Gpu, largest: &Decode) -> Result<Self, GpuError> {
        largest.check()?;
        // A step of the same batch without groups is divided among more blocks.
        let layouts = [*largest, Decode { groups: 0, ..*largest }].map(|decode| Layout::new(gpu, &decode));
        let most = |size: fn(&Layout) -> usize| layouts.iter().map(size).max().unwrap_or_default();
        Ok(Self {
            plan: gpu.zeros(most(Layout::plan))?,
            partials: gpu.alloc(most(Layout::partials))?,
        })
    }

    fn check(&self, layout: &Layout) -> Result<(), ShapeError> {
        ShapeError::at_least("paged attention", "the plan", self.plan.len(), layout.plan())?;
        ShapeError::at_least(
            "paged attention",
            "partial results",
            self.partials.len(),
            layout.partials(),
        )
    }
}

/// Whether prefixes and rows are one launch: three teams of a block, one block to a multiprocessor.
fn together(gpu: &Gpu, decode: &Decode) -> bool {
    gpu.is_hopper() && decode.groups > 0 && matches!(decode.head_dim, 64 | 128)
}

/// What work costs a block where prefixes and rows are done together, in hundredths of a microsecond: beginning a row and KV head,
/// 16 tokens of one (while all blocks share the memory), and 128 tokens of a prefix for at most 64 query heads and for more.
const SECTION_COST: usize = 70;
const ROW_COST: usize = 36;
const NARROW_COST: usize = 200;
const WIDE_COST: usize = 260;

/// Where things lie in the scratch memory of a batch.
struct Layout {
    /// Blocks of threads among which rows are divided, and prefixes.
    shares: usize,
    tile_shares: usize,
    rows: usize,
    /// The most tiles of columns that share a prefix.
    tiles: usize,
    kv_heads: usize,
    /// Floats of a partial result of 8 columns.
    slot: usize,
}

impl Layout {
    fn new(gpu: &Gpu, decode: &Decode) -> Self {
        let grouped = decode.groups > 0;
        let prefix_blocks = if together(gpu, decode) { 1 } else { PREFIX_BLOCKS };
        let columns = decode.rows * decode.heads_per_kv();
        Self {
            shares: ROW_BLOCKS * gpu.processors(),
            tile_shares: if grouped { prefix_blocks * gpu.processors() } else { 0 },
            rows: decode.rows,
            tiles: if grouped {
                decode.groups + columns / (8 * WIDE_TILES) + 1
            } else {
                0
            },
            kv_heads: decode.kv_heads,
            slot: 8 * decode.head_dim + 16,
        }
    }

    /// Integers of a plan.
    fn plan(&self) -> usize {
        HEADER + (SECTION + RECORD) * self.rows + SECTION * self.tiles + SHARE * (self.shares + self.tile_shares)
    }

    /// Floats of the partial results of rows: one for every meeting of a share and a section's KV head.
    fn narrow(&self) -> usize {
        (self.shares + self.rows * self.kv_heads) * self.slot
    }

    fn partials(&self) -> usize {
        self.narrow() + (self.tile_shares + self.tiles * self.kv_heads) * WIDE_TILES * self.slot
    }
}

/// The parts of a plan.
struct Plan {
    header: Buffer<i32>,
    sections: Buffer<i32>,
    tile_sections: Buffer<i32>,
    records: Buffer<i32>,
    shares: Buffer<i32>,
    tile_shares: Buffer<i32>,
}

impl Plan {
    fn new(scratch: &Scratch, layout: &Layout) -> Result<Self, GpuError> {
        scratch.check(layout)?;
        let mut from = 0;
        let mut take = |length: usize| {
            let part = scratch.plan.slice(from..from + length);
            from += length;
            part
        };
        Ok(Self {
            header: take(HEADER)?,
            sections: take(SECTION * layout.rows)?,
            tile_sections: take(SECTION * layout.tiles)?,
            records: take(RECORD * layout.rows)?,
            shares: take(SHARE * layout.shares)?,
            tile_shares: take(SHARE * layout.tile_shares)?,
        })
    }
}

/// Warps that merge the parts of a row and query head, and heads of a block: few rows are cut into many parts, many rows into few.
fn merge_warps(decode: &Decode) -> (usize, usize) {
    if decode.rows * decode.kv_heads > 64 {
        (1, decode.heads_per_kv())
    } else {
        (8, 1)
    }
}

/// The constants of a build.
type Defines = [(&'static str, usize); 7];

fn defines(decode: &Decode, together: bool) -> Defines {
    [
        ("HEAD_DIM", decode.head_dim),
        ("BLOCK_SIZE", decode.block_size),
        ("PER_KV", decode.heads_per_kv()),
        ("GROUPED", usize::from(decode.groups > 0)),
        ("TOGETHER", usize::from(together)),
        ("MERGE_WARPS", merge_warps(decode).0),
        ("MERGE_HEADS", merge_warps(decode).1),
    ]
}

/// Sources of a format: those of Hopper compute bf16 alone.
fn source(dtype: Dtype, together: bool) -> &'static Source {
    if together && dtype == Dtype::Bf16 {
        &HOPPER
    } else {
        &SOURCE
    }
}

/// What the sources are compiled for: number format and constants of some models.
pub fn builds() -> Vec<(&'static Source, &'static str, Defines)> {
    let builds = [
        ("bf16", 1, 7, 128, 16, 0, false),
        ("bf16", 100, 7, 128, 16, 0, false),
        ("bf16", 100, 7, 128, 16, 1, false),
        ("bf16", 100, 7, 128, 16, 1, true),
        ("bf16", 1, 8, 128, 64, 1, true),
        ("bf16", 1, 8, 128, 16, 1, false),
        ("bf16", 100, 7, 64, 16, 0, false),
        ("bf16", 1, 7, 64, 32, 1, false),
        ("bf16", 1, 7, 64, 8, 1, true),
        ("bf16", 100, 1, 80, 8, 1, false),
        ("float", 1, 7, 128, 16, 1, false),
        ("float", 1, 7, 128, 16, 1, true),
        ("float", 100, 1, 80, 8, 0, false),
    ];
    let build = |(elem, rows, heads, head_dim, block_size, groups, together)| {
        let decode = Decode {
            rows,
            heads,
            kv_heads: 1,
            head_dim,
            block_size,
            max_blocks: 1,
            groups,
            scale: 1.0,
        };
        let dtype = if elem == "bf16" { Dtype::Bf16 } else { Dtype::F32 };
        (source(dtype, together), elem, defines(&decode, together))
    };
    builds.map(build).to_vec()
}

fn kernel(gpu: &Gpu, name: &'static str, dtype: Dtype, decode: &Decode) -> Kernel {
    let together = together(gpu, decode);
    let kernel = Kernel::new(source(dtype, together), name, Some(dtype));
    let defines = defines(decode, together).into_iter();
    defines.fold(kernel, |kernel, (name, value)| kernel.define(name, value))
}

/// Divides the work of a step evenly over the card; once per step, before the first layer's [`attend`].
///
/// `lengths` `[rows]`: tokens of each sequence in the cache, the new one included; 0 for an unused row.
///
/// `groups` `[groups, 3]`, where [`Decode::groups`] is not 0: first row, number of rows, and tokens that these rows share, a
/// multiple of `block_size`. The blocks that hold them are the first entries of the first row's table, which are read once for
/// the whole group. The rows of a group follow one another, no row is in two groups, and every used row of a group is at least
/// as long as its prefix. A group of no rows or no tokens is none. Rows in no group attend alone.
pub fn plan(
    gpu: &Gpu,
    decode: &Decode,
    lengths: &Buffer<i32>,
    groups: Option<&Buffer<i32>>,
    scratch: &Scratch,
) -> Result<(), GpuError> {
    decode.check()?;
    let layout = Layout::new(gpu, decode);
    let plan = Plan::new(scratch, &layout)?;
    let name = "paged_plan";
    ShapeError::length(name, "lengths", lengths.len(), decode.rows)?;
    ShapeError::length(name, "groups", groups.map_or(0, Buffer::len), 3 * decode.groups)?;
    gpu.launch(
        // It reads no numbers: one build for every format.
        &kernel(gpu, name, Dtype::Bf16, decode),
        Grid::new(1, 1024),
        &[
            lengths.into(),
            groups.into(),
            decode.rows.into(),
            decode.kv_heads.into(),
            decode.groups.into(),
            layout.tiles.into(),
            layout.shares.into(),
            layout.tile_shares.into(),
            SECTION_COST.into(),
            ROW_COST.into(),
            NARROW_COST.into(),
            WIDE_COST.into(),
            (&plan.header).into(),
            (&plan.sections).into(),
            (&plan.tile_sections).into(),
            (&plan.records).into(),
            (&plan.shares).into(),
            (&plan.tile_shares).into(),
        ],
    )
}

/// `out = softmax(scale * q · keysᵀ) · values` for every query head over the whole sequence of its row, for one layer, by the
/// work list that [`plan`] made for the same `decode`.
pub fn attend<T: Float>(
    gpu: &Gpu,
    decode: &Decode,
    operands: &Operands<'_, T>,
    scratch: &Scratch,
) -> Result<(), GpuError> {
    decode.check()?;
    let layout = Layout::new(gpu, decode);
    let plan = Plan::new(scratch, &layout)?;
    let Operands {
        q,
        keys,
        values,
        tables,
        out,
        lse,
    } = *operands;
    let name = "paged attention";
    let heads = decode.rows * decode.heads;
    ShapeError::length(name, "q", q.len(), heads * decode.head_dim)?;
    ShapeError::length(name, "out", out.len(), heads * decode.head_dim)?;
    ShapeError::length(name, "tables", tables.len(), decode.rows * decode.max_blocks)?;
    ShapeError::length(name, "values", values.len(), keys.len())?;
    ShapeError::unless(name, keys.len().is_multiple_of(decode.block_elements()), || {
        format!(
            "a pool of {} elements in blocks of {}",
            keys.len(),
            decode.block_elements()
        )
    })?;
    if let Some(lse) = lse {
        ShapeError::length(name, "lse", lse.len(), heads)?;
    }
    let narrow = layout.narrow();
    let wide = scratch.partials.slice(narrow..layout.partials())?;
    let numbers = [
        decode.heads.into(),
        decode.kv_heads.into(),
        decode.max_blocks.into(),
        decode.scale.into(),
    ];
    let read = [q.into(), keys.into(), values.into(), tables.into()];
    let written = [out.into(), lse.into(), (&scratch.partials).into()];
    let launch = |name, grid, args: &[&[Arg]]| gpu.launch(&kernel(gpu, name, T::DTYPE, decode), grid, &args.concat());
    let row_memory = row_memory(T::DTYPE, decode.head_dim);
    if T::DTYPE == Dtype::Bf16 && together(gpu, decode) {
        let memory = (TILES * decode.head_dim * LONG_CHUNK * 2).max(ROW_BLOCKS * row_memory);
        let grid = Grid::new(layout.tile_shares, (32 * ROW_WARPS * ROW_BLOCKS) as u32)
            .shared(memory)
            .early();
        let lines = [
            (&wide).into(),
            (&plan.header).into(),
            (&plan.sections).into(),
            (&plan.tile_sections).into(),
            (&plan.shares).into(),
            (&plan.tile_shares).into(),
        ];
        launch("paged_together", grid, &[&read, &written, &lines, &numbers])?;
    } else {
        if decode.groups > 0 {
            let memory = prefix_memory(T::DTYPE, decode.head_dim);
            let grid = Grid::new(layout.tile_shares, 32 * PREFIX_WARPS as u32).shared(memory);
            let line = [(&wide).into(), (&plan.tile_sections).into(), (&plan.tile_shares).into()];
            launch("paged_prefixes", grid, &[&read, &line, &numbers])?;
        }
        let grid = Grid::new(layout.shares, 32 * ROW_WARPS as u32)
            .shared(row_memory)
            .early();
        let line = [(&plan.sections).into(), (&plan.shares).into()];
        launch("paged_rows", grid, &[&read, &written, &line, &numbers])?;
    }
    let (warps, heads) = merge_warps(decode);
    gpu.launch(
        &kernel(gpu, "paged_merge", T::DTYPE, decode),
        Grid::of((decode.heads / heads, decode.rows, 1), (32 * warps * heads) as u32).early(),
        &[
            out.into(),
            lse.into(),
            (&scratch.partials).into(),
            (&wide).into(),
            (&plan.header).into(),
            (&plan.records).into(),
            decode.heads.into(),
            decode.kv_heads.into(),
        ],
    )
}

/// Bytes of shared memory of a block on the line of rows: the outputs of its warps, their maxima and sums, queries.
fn row_memory(dtype: Dtype, head_dim: usize) -> usize {
    let outputs = ROW_WARPS * 8 * (head_dim.next_multiple_of(64) + 2) * size_of::<f32>();
    let queries = match dtype {
        Dtype::F32 => 8 * head_dim * 4,
        Dtype::Bf16 => 8 * head_dim.next_multiple_of(32) * 2,
    };
    outputs + queries
}

/// Bytes of shared memory of a block over a prefix: queries, and two chunks of keys and values.
fn prefix_memory(dtype: Dtype, head_dim: usize) -> usize {
    let columns = 8 * WIDE_TILES;
    match dtype {
        Dtype::F32 => columns * head_dim * 4,
        Dtype::Bf16 => (columns + 2 * 2 * CHUNK) * head_dim.next_multiple_of(64) * 2,
    }
}
