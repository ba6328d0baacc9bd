use super::{ROWS, SOURCE};
use crate::{
    Buffer, Gpu, GpuError, ShapeError,
    element::{Dtype, Float},
    gpu::{launch::Grid, source::Kernel},
    skinny::{Epilogue, Skinny},
};

/// Inputs of a chunk.
const CHUNK: usize = 64;
/// Shared memory that a block has for chunks, in bytes.
const MEMORY: usize = 225 << 10;
/// The most chunks in it.
const MOST_STAGES: usize = 8;
/// The most matrices of sums that a layer is left in.
pub const MOST_PARTS: usize = 4;
/// Rows of the weight that a product of the tensor cores is compiled for.
const WIDTHS: [usize; 9] = [16, 32, 48, 64, 80, 96, 112, 128, 144];

/// How outputs and inputs are divided among blocks of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tile {
    /// Parts of a tile: 2 with SwiGLU, else 1 or 2.
    pub parts: usize,
    /// Rows of the weight of each.
    pub width: usize,
    /// Blocks that divide the inputs of a tile among themselves.
    pub splits: usize,
}

impl Tile {
    /// Of all that fill the card once, the one whose blocks read the least. Inputs are divided where the sums may be left in parts.
    fn of(layer: Skinny, processors: usize, in_parts: bool) -> Option<Self> {
        let parts = match layer.epilogue {
            Epilogue::Plain => 1..=2,
            Epilogue::Swiglu => 2..=2,
        };
        // Of eight, the next kernel would read too much.
        let splits: &[usize] = if in_parts { &[2, 4] } else { &[1] };
        let all = parts.flat_map(|parts| WIDTHS.map(|width| (parts, width)));
        let all = all.flat_map(|(parts, width)| splits.iter().map(move |&splits| Self { parts, width, splits }));
        let fit = all.filter(|tile| tile.blocks(layer) <= processors && tile.splits <= layer.inputs.div_ceil(CHUNK));
        fit.min_by_key(|tile| tile.bytes(layer))
    }

    /// Outputs of a tile.
    fn outputs(&self, epilogue: Epilogue) -> usize {
        match epilogue {
            Epilogue::Plain => self.parts * self.width,
            Epilogue::Swiglu => self.width,
        }
    }

    /// Blocks of threads.
    fn blocks(&self, layer: Skinny) -> usize {
        layer.outputs.div_ceil(self.outputs(layer.epilogue)) * self.splits
    }

    /// Bytes that a block reads and writes, those of x from the cache.
    fn bytes(&self, layer: Skinny) -> usize {
        let (rows, columns) = (64 * Self::row_blocks(layer), self.parts * self.width);
        2 * layer.inputs.div_ceil(self.splits) * (rows + columns) + 4 * rows * columns
    }

    fn row_blocks(layer: Skinny) -> usize {
        layer.rows.div_ceil(64)
    }

    fn stage(&self, layer: Skinny) -> usize {
        (64 * Self::row_blocks(layer) + self.parts * self.width) * 2 * CHUNK
    }

    fn stages(&self, layer: Skinny) -> usize {
        (MEMORY / self.stage(layer)).min(MOST_STAGES)
    }

    /// Bytes of shared memory: chunks, and then sums.
    fn memory(&self, layer: Skinny) -> usize {
        let sums = self.parts * self.width;
        let stride = sums + (40 - sums % 32) % 32;
        (self.stages(layer) * self.stage(layer)).max(64 * Self::row_blocks(layer) * stride * size_of::<f32>())
    }

    fn defines(&self, layer: Skinny) -> [(&'static str, usize); 6] {
        [
            ("ROW_BLOCKS", Self::row_blocks(layer)),
            ("PARTS", self.parts),
            ("WIDTH", self.width),
            ("SPLITS", self.splits),
            ("STAGES", self.stages(layer)),
            ("SWIGLU", usize::from(layer.epilogue == Epilogue::Swiglu)),
        ]
    }
}

/// What the source is compiled for.
pub fn builds() -> Vec<[(&'static str, usize); 6]> {
    let layers = [
        (Skinny::plain(128, 3584, 3584), true),
        (Skinny::plain(64, 3584, 18_944), true),
        (Skinny::plain(128, 3584, 18_944), true),
        (Skinny::plain(128, 18_944, 3584), false),
        (Skinny::swiglu(128, 18_944, 3584), false),
        (Skinny::swiglu(64, 11_008, 2048), false),
    ];
    let build = |(layer, in_parts)| Tile::of(layer, 132, in_parts).map(|tile: Tile| tile.defines(layer));
    layers.into_iter().filter_map(build).collect()
}

fn tile(gpu: &Gpu, dtype: Dtype, layer: Skinny, in_parts: bool) -> Option<Tile> {
    let serves = gpu.is_hopper()
        && dtype == Dtype::Bf16
        && ROWS.contains(&layer.rows)
        && layer.inputs.is_multiple_of(8)
        && layer.outputs.is_multiple_of(8);
    Tile::of(layer, gpu.processors(), in_parts).filter(|_| serves)
}

fn refused(gpu: &Gpu, layer: Skinny) -> ShapeError {
    ShapeError {
        kernel: NAME,
        fault: format!("{layer:?} on {} multiprocessors", gpu.processors()),
    }
}

/// Whether [`linear`] computes this layer on this card: bf16 on a Hopper, and a weight that all multiprocessors together read once.
pub fn serves(gpu: &Gpu, dtype: Dtype, layer: Skinny) -> bool {
    tile(gpu, dtype, layer, false).is_some()
}

/// Whether [`parts`] and what adds them up are faster than the library and a plain norm: with few rows, or where a block's part of the
/// weight is large beside what it takes to begin and to end.
pub fn pays(layer: Skinny, count: usize) -> bool {
    layer.rows <= 32 || layer.inputs / count >= 4096
}

/// How many matrices [`parts`] writes for this layer, at most [`MOST_PARTS`]; none where it does not compute it.
pub fn count(gpu: &Gpu, dtype: Dtype, layer: Skinny) -> Option<usize> {
    let tile = tile(gpu, dtype, layer, true).filter(|_| layer.epilogue == Epilogue::Plain);
    tile.map(|tile| tile.splits)
}

/// `out[rows, outputs] = epilogue(x[rows, inputs] · weight[weight_rows, inputs]ᵀ)`, summed in f32 in an order that depends on the shape and
/// the card alone. [`serves`] says which layers are computed; others are an error.
pub fn linear<T: Float>(
    gpu: &Gpu,
    layer: Skinny,
    x: &Buffer<T>,
    weight: &Buffer<T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    let tile = tile(gpu, T::DTYPE, layer, false).ok_or_else(|| refused(gpu, layer))?;
    tiled(gpu, layer, tile, (x, weight), Some(out), None)
}

/// As [`linear`] without an activation, where outputs are too few for all multiprocessors: each sums products of a part of the inputs.
/// `sums` `[count, rows, outputs]` has [`count`] matrices that are to be added up.
pub fn parts<T: Float>(
    gpu: &Gpu,
    layer: Skinny,
    x: &Buffer<T>,
    weight: &Buffer<T>,
    sums: &Buffer<f32>,
) -> Result<(), GpuError> {
    let tile = tile(gpu, T::DTYPE, layer, true).filter(|_| layer.epilogue == Epilogue::Plain);
    tiled(
        gpu,
        layer,
        tile.ok_or_else(|| refused(gpu, layer))?,
        (x, weight),
        None,
        Some(sums),
    )
}

const NAME: &str = "streamed_linear";

/// As [`linear`] or [`parts`], divided in this way.
fn tiled<T: Float>(
    gpu: &Gpu,
    layer: Skinny,
    tile: Tile,
    (x, weight): (&Buffer<T>, &Buffer<T>),
    out: Option<&Buffer<T>>,
    sums: Option<&Buffer<f32>>,
) -> Result<(), GpuError> {
    let Skinny {
        rows, outputs, inputs, ..
    } = layer;
    ShapeError::length(NAME, "x", x.len(), rows * inputs)?;
    ShapeError::length(NAME, "weight", weight.len(), layer.weight_rows() * inputs)?;
    if let Some(out) = out {
        ShapeError::length(NAME, "out", out.len(), rows * outputs)?;
    }
    if let Some(sums) = sums {
        ShapeError::at_least(NAME, "sums", sums.len(), tile.splits * rows * outputs)?;
    }
    let to = out.map_or_else(|| sums.map_or(0, Buffer::pointer), Buffer::pointer);
    ShapeError::unless(NAME, to.is_multiple_of(16), || {
        "the result must be aligned to 16 bytes".to_owned()
    })?;
    let defines = tile.defines(layer).into_iter();
    let kernel = defines.fold(Kernel::new(&SOURCE, NAME, None), |kernel, (name, value)| {
        kernel.define(name, value)
    });
    let weight_map = gpu.tensor_map(weight, (layer.weight_rows(), inputs), tile.width)?;
    let x_map = gpu.tensor_map(x, (rows, inputs), 64 * Tile::row_blocks(layer))?;
    let threads = 128 * Tile::row_blocks(layer);
    gpu.launch(
        &kernel,
        Grid::new(tile.blocks(layer), u32::try_from(threads).unwrap_or(u32::MAX))
            .shared(tile.memory(layer))
            .early(),
        &[
            weight_map.into(),
            x_map.into(),
            out.into(),
            sums.into(),
            rows.into(),
            outputs.into(),
            inputs.div_ceil(CHUNK).into(),
        ],
    )
}
