use super::{Epilogue, MOST_ROWS, SOURCE, Skinny};
use crate::{
    Buffer, Gpu, GpuError, ShapeError,
    element::{Dtype, Float},
    gpu::{launch::Grid, source::Kernel},
};

/// What is added to the sums.
#[derive(Clone, Copy, Debug)]
pub struct Added<'a, T> {
    /// `[weight rows]`, before the epilogue.
    pub bias: Option<&'a Buffer<T>>,
    /// `[rows, outputs]`, after the epilogue. May be the result itself, which is then added to.
    pub residual: Option<&'a Buffer<T>>,
}

impl<T> Added<'_, T> {
    /// Nothing.
    pub const NOTHING: Self = Self {
        bias: None,
        residual: None,
    };
}

/// How a block of threads is made up.
#[derive(Clone, Copy)]
struct Block {
    /// Tiles of 8 rows of `x`.
    tiles: usize,
    warps: usize,
    /// Chunks of inputs that a warp has in flight.
    stages: usize,
    /// Blocks of a multiprocessor.
    resident: usize,
}

impl Block {
    /// Eight warps to a tile of outputs, two blocks to a multiprocessor; four warps and four blocks where all tiles are then
    /// at work at once and would not be otherwise.
    fn of(skinny: Skinny, processors: usize) -> Self {
        let tiles = skinny.rows.div_ceil(8);
        let at_once = skinny.outputs.div_ceil(skinny.tile()).div_ceil(processors);
        if (3..=4).contains(&at_once) {
            Self {
                tiles,
                warps: 4,
                stages: 3,
                resident: 4,
            }
        } else {
            Self {
                tiles,
                warps: 8,
                stages: 2,
                resident: 2,
            }
        }
    }

    fn defines(&self, epilogue: Epilogue) -> [(&'static str, usize); 5] {
        [
            ("TILES", self.tiles),
            ("WARPS", self.warps),
            ("STAGES", self.stages),
            ("RESIDENT", self.resident),
            ("SWIGLU", usize::from(epilogue == Epilogue::Swiglu)),
        ]
    }
}

/// What the source is compiled for.
pub fn builds() -> Vec<(&'static str, [(&'static str, usize); 5])> {
    let mut builds = Vec::new();
    for outputs in [16, 64] {
        for rows in [1, MOST_ROWS] {
            let plain = Skinny::plain(rows, outputs, 8);
            let swiglu = Skinny::swiglu(rows, outputs / 2, 8);
            for skinny in [plain, swiglu] {
                let defines = Block::of(skinny, 1).defines(skinny.epilogue);
                builds.extend([("bf16", defines), ("float", defines)]);
            }
        }
    }
    builds
}

/// `out[rows, outputs] = epilogue(x[rows, inputs] · weight[weight_rows, inputs]ᵀ + bias) + residual`, summed in f32.
pub fn linear<T: Float>(
    gpu: &Gpu,
    skinny: Skinny,
    x: &Buffer<T>,
    weight: &Buffer<T>,
    added: Added<'_, T>,
    out: &Buffer<T>,
) -> Result<(), GpuError> {
    let name = "skinny_linear";
    let Skinny {
        rows,
        outputs,
        inputs,
        epilogue,
    } = skinny;
    ShapeError::unless(name, (1..=MOST_ROWS).contains(&rows), || {
        format!("{rows} rows: 1 to {MOST_ROWS}")
    })?;
    ShapeError::unless(name, inputs > 0 && inputs.is_multiple_of(8), || {
        format!("{inputs} inputs: a multiple of 8")
    })?;
    ShapeError::unless(name, inputs < 1 << 30 && skinny.weight_rows() < 1 << 30, || {
        format!("{outputs} x {inputs} weights")
    })?;
    ShapeError::length(name, "x", x.len(), rows * inputs)?;
    ShapeError::length(name, "weight", weight.len(), skinny.weight_rows() * inputs)?;
    ShapeError::length(name, "out", out.len(), rows * outputs)?;
    if let Some(bias) = added.bias {
        ShapeError::length(name, "bias", bias.len(), skinny.weight_rows())?;
    }
    if let Some(residual) = added.residual {
        ShapeError::length(name, "residual", residual.len(), rows * outputs)?;
    }
    ShapeError::unless(
        name,
        x.pointer().is_multiple_of(16) && weight.pointer().is_multiple_of(16),
        || "x and weight must be aligned to 16 bytes".to_owned(),
    )?;
    let block = Block::of(skinny, gpu.processors());
    let mut kernel = Kernel::new(&SOURCE, name, Some(T::DTYPE));
    for (name, value) in block.defines(epilogue) {
        kernel = kernel.define(name, value);
    }
    let tile = match T::DTYPE {
        Dtype::F32 => block.warps,
        Dtype::Bf16 => skinny.tile(),
    };
    let blocks = outputs.div_ceil(tile).min(block.resident * gpu.processors());
    gpu.launch(
        &kernel,
        Grid::new(blocks, 32 * block.warps as u32),
        &[
            x.into(),
            weight.into(),
            added.bias.into(),
            added.residual.into(),
            out.into(),
            rows.into(),
            outputs.into(),
            inputs.into(),
        ],
    )
}
