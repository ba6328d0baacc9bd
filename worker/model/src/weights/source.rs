//! Tensors one by one: of weights in memory, or read from the files of a checkpoint when they are asked for. A model that is
//! packed for a card is so never in memory as a whole.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    ops::Range,
    path::Path,
};

use candle_core::{DType, Device, Tensor};

use super::{
    Names, Parameter, Weights,
    dtype::ElementType,
    file::Entry,
    open, read,
    scan::{self, Checkpoint},
};
use crate::{ModelError, Result};

/// What is asked for of a tensor.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Portion {
    /// All of it.
    Whole,
    /// Some rows of a matrix, or numbers of a vector.
    Rows(Range<usize>),
    /// Some columns of a matrix.
    Columns(Range<usize>),
}

/// Where tensors come from.
pub trait TensorSource: fmt::Debug + Send + Sync {
    /// A portion of the tensor of this hub name, on the host; None if there is none of that name. Its elements have whatever
    /// type the source has them in.
    ///
    /// # Errors
    /// The tensor has fewer rows or columns.
    fn tensor(&self, name: &str, portion: &Portion) -> Result<Option<Tensor>>;
}

impl TensorSource for Weights {
    fn tensor(&self, name: &str, portion: &Portion) -> Result<Option<Tensor>> {
        let Some(variable) = self.get(name) else {
            return Ok(None);
        };
        let whole = variable.as_detached_tensor();
        Ok(Some(match portion {
            Portion::Whole => whole,
            Portion::Rows(range) => whole.narrow(0, range.start, range.len())?,
            Portion::Columns(range) => whole.narrow(1, range.start, range.len())?,
        }))
    }
}

/// The tensors of a checkpoint, left in its files. Only what is asked for is read, so that ranks which each take a share of
/// the rows read no more than that.
#[derive(Debug)]
pub struct StoredWeights {
    checkpoint: Checkpoint,
    /// File and entry of each tensor by its hub name.
    places: HashMap<String, (usize, usize)>,
    /// Shape and value of parameters that no file has and need not have.
    constants: BTreeMap<String, (Vec<usize>, f64)>,
}

impl StoredWeights {
    /// Maps the weight files of `dir`.
    ///
    /// # Errors
    /// As of [`Weights::load`].
    pub fn open(dir: &Path, parameters: &[Parameter], names: &Names) -> Result<Self> {
        let checkpoint = open(dir, parameters, names)?;
        let places = checkpoint.places();
        let absent = parameters
            .iter()
            .filter(|parameter| !places.contains_key(&parameter.name));
        let constants = absent.map(|parameter| {
            let value = scan::constant(parameter, names).unwrap_or_default();
            (parameter.name.clone(), (parameter.shape.clone(), value))
        });
        Ok(Self {
            constants: constants.collect(),
            places,
            checkpoint,
        })
    }
}

impl TensorSource for StoredWeights {
    fn tensor(&self, name: &str, portion: &Portion) -> Result<Option<Tensor>> {
        if let Some((entry, bytes)) = self.places.get(name).and_then(|place| self.checkpoint.entry(*place)) {
            return portion_of(entry, bytes, portion).map(Some);
        }
        let Some((shape, value)) = self.constants.get(name) else {
            return Ok(None);
        };
        let mut shape = shape.clone();
        match portion {
            Portion::Whole => {}
            Portion::Rows(range) => *axis(name, &mut shape, 0, range)? = range.len(),
            Portion::Columns(range) => *axis(name, &mut shape, 1, range)? = range.len(),
        }
        let full = Tensor::full(*value, shape, &Device::Cpu)?;
        Ok(Some(full.to_dtype(DType::F32)?))
    }
}

/// One size of a shape, if so many rows or columns are there.
fn axis<'a>(name: &str, shape: &'a mut [usize], axis: usize, range: &Range<usize>) -> Result<&'a mut usize> {
    let fault = || {
        let what = if axis == 0 { "rows" } else { "columns" };
        ModelError::Input(format!("{name} has no {what} {}..{}", range.start, range.end))
    };
    match shape.get_mut(axis) {
        Some(size) if range.start <= range.end && range.end <= *size => Ok(size),
        _ => Err(fault()),
    }
}

/// A portion of a tensor of a file.
fn portion_of(entry: &Entry, bytes: &[u8], portion: &Portion) -> Result<Tensor> {
    let mut shape = entry.shape.clone();
    let part = |shape: Vec<usize>, bytes: &[u8]| {
        let entry = Entry { shape, ..entry.clone() };
        read(&entry, bytes, &Device::Cpu)
    };
    match portion {
        Portion::Whole => part(shape, bytes),
        Portion::Rows(range) => {
            let size = axis(&entry.name, &mut shape, 0, range)?;
            let row = bytes.len() / (*size).max(1);
            *size = range.len();
            part(shape, &bytes[range.start * row..range.end * row])
        }
        Portion::Columns(range) => {
            let rows = shape.first().copied().unwrap_or(0);
            let size = axis(&entry.name, &mut shape, 1, range)?;
            let ElementType::Float(dtype) = &entry.dtype else {
                return part(shape, bytes);
            };
            let width = dtype.size_in_bytes();
            let stride = *size * width;
            *size = range.len();
            if shape.len() > 2 || bytes.len() != rows * stride {
                return Err(ModelError::Input(format!("{} is no matrix", entry.name)));
            }
            let mut columns = Vec::with_capacity(rows * range.len() * width);
            for row in bytes.chunks_exact(stride.max(1)) {
                columns.extend_from_slice(&row[range.start * width..range.end * width]);
            }
            part(shape, &columns)
        }
    }
}
