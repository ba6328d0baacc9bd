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
    fn of(rows: usize) -> Self {
        if rows <= 8 {
            Self {
                tiles: 1,
                warps: 4,
                stages: 3,
                resident: 4,
            }
        } else {
            Self {
                tiles: 2,
                warps: 4,
                stages: 3,
                resident: 4,
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
    for epilogue in [Epilogue::Plain, Epilogue::Swiglu] {
        for rows in [1, MOST_ROWS] {
            builds.push(("bf16", Block::of(rows).defines(epilogue)));
        }
        builds.push(("float", Block::of(1).defines(epilogue)));
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
    let block = Block::of(rows);
    let mut kernel = Kernel::new(&SOURCE, name, Some(T::DTYPE));
    for (name, value) in block.defines(epilogue) {
        kernel = kernel.define(name, value);
    }
    let tile = match (T::DTYPE, epilogue) {
        (Dtype::F32, _) => block.warps,
        (Dtype::Bf16, Epilogue::Plain) => 16,
        (Dtype::Bf16, Epilogue::Swiglu) => 8,
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
