//! Named variables in the order of their names: loaded from safetensors, drawn from a seed, saved, copied.
//!
//! | file | what it is |
//! |---|---|
//! | `names.rs` | the hub's names of tensors from the names of every release |
//! | `file.rs` | one memory-mapped safetensors file |
//! | `index.rs` | which shard holds which tensor |
//! | `dtype.rs` | types of elements on disk |
//! | `scan.rs` | what a directory holds, and how that differs from what is asked for |
//! | `source.rs` | tensors one by one, from memory or from the files |
//! | `write.rs` | weights to one file or to shards |

mod dtype;
mod file;
mod index;
mod names;
mod scan;
mod source;
#[cfg(test)]
mod tests;
mod write;

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use self::{
    dtype::ElementType,
    names::{Ignored, Names},
    scan::{Scan, TensorInfo, compare, scan},
    source::{Portion, StoredWeights, TensorSource},
};
use self::{file::Entry, scan::Checkpoint};
use crate::{ModelError, Result};

/// The file that holds all tensors of a small checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

pub use crate::parameter::{Init, Parameter};

/// Variables by name. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Weights {
    vars: BTreeMap<String, Var>,
}

impl Weights {
    /// Reads `dir/model.safetensors`, or the shards that `dir/model.safetensors.index.json` names, as elements of `dtype`.
    /// The files are mapped and converted tensor by tensor, so that the memory taken is that of the variables.
    ///
    /// # Errors
    /// The tensors are not exactly `parameters` under the rules of `names`: one error lists every difference, every tensor
    /// that is named twice and every file that is not whole, before anything is converted.
    pub fn load(dir: &Path, parameters: &[Parameter], names: &Names, dtype: DType, device: &Device) -> Result<Self> {
        let checkpoint = open(dir, parameters, names)?;
        let data = checkpoint.data();
        let mut vars = BTreeMap::new();
        for parameter in parameters {
            let tensor = match data.get(parameter.name.as_str()) {
                Some((entry, bytes)) => read(entry, bytes, device)?.to_dtype(dtype)?,
                None => {
                    let value = scan::constant(parameter, names).unwrap_or_default();
                    Tensor::full(value, parameter.shape.as_slice(), device)?.to_dtype(dtype)?
                }
            };
            vars.insert(parameter.name.clone(), Var::from_tensor(&tensor)?);
        }
        Ok(Self { vars })
    }

    /// Draws every parameter by ChaCha8 from `seed`, in the order of the names: the same seed gives the same bytes.
    pub fn random(parameters: &[Parameter], seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let mut sorted = parameters.iter().collect::<Vec<_>>();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut vars = BTreeMap::new();
        for parameter in sorted {
            let count = parameter.shape.iter().product();
            let values = match parameter.init {
                Init::Zeros => vec![0f32; count],
                Init::Ones => vec![1f32; count],
                Init::Normal(std) => (0..count).map(|_| (normal(&mut rng) * std) as f32).collect(),
            };
            let tensor = Tensor::from_vec(values, parameter.shape.as_slice(), device)?.to_dtype(dtype)?;
            vars.insert(parameter.name.clone(), Var::from_tensor(&tensor)?);
        }
        Ok(Self { vars })
    }

    /// These variables.
    pub(crate) fn from_vars(vars: BTreeMap<String, Var>) -> Self {
        Self { vars }
    }

    /// The variable of that name.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.vars.get(name)
    }

    /// All variables, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// Writes one safetensors file with the hub's names; the bytes depend on the values only.
    pub fn save(&self, path: &Path) -> Result<()> {
        write::write_file(path, &self.named(), None)
    }

    /// [`Self::save`] with elements of another floating-point type.
    ///
    /// # Errors
    /// `dtype` is not f64, f32, f16 or bf16, or it is f16 and a value is too large for it.
    pub fn save_as(&self, path: &Path, dtype: DType) -> Result<()> {
        write::write_file(path, &self.named(), Some(dtype))
    }

    /// Writes shards of at most `max_shard_bytes` each (a larger tensor has one of its own) and their index into `dir`, or
    /// [`SINGLE_FILE`] if all fits into one, with elements of `dtype` or those that the variables have. Weight files that an
    /// earlier save left there are removed. The bytes depend on the values only.
    ///
    /// # Errors
    /// As of [`Self::save_as`].
    pub fn save_sharded(&self, dir: &Path, max_shard_bytes: u64, dtype: Option<DType>) -> Result<()> {
        write::write_sharded(dir, &self.named(), max_shard_bytes, dtype)
    }

    /// The file that [`Self::save`] writes, in memory.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        write::to_bytes(&self.named(), None)
    }

    fn named(&self) -> Vec<write::Named<'_>> {
        self.iter().collect()
    }

    /// Bytes of all values.
    pub fn size_in_bytes(&self) -> usize {
        let size = |var: &Var| var.elem_count() * var.dtype().size_in_bytes();
        self.vars.values().map(size).sum()
    }

    /// Variables of their own storage with the same values.
    pub fn deep_copy(&self) -> Result<Self> {
        let copy = |(name, var): (&String, &Var)| Ok((name.clone(), Var::from_tensor(&var.as_detached_tensor())?));
        Ok(Self {
            vars: self.vars.iter().map(copy).collect::<Result<_>>()?,
        })
    }

    /// Copies the values of `other` into these variables; every holder of them sees the new values.
    pub fn assign(&self, other: &Self) -> Result<()> {
        for (name, var) in &self.vars {
            let source = other
                .get(name)
                .ok_or_else(|| ModelError::Input(format!("the weights to assign lack {name}")))?;
            var.set(&source.as_detached_tensor())?;
        }
        Ok(())
    }
}

/// The mapped files of a directory, whose tensors are exactly `parameters` under the rules of `names`.
fn open(dir: &Path, parameters: &[Parameter], names: &Names) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(dir, names)?;
    let problems = compare(parameters, names, &checkpoint.scan);
    if problems.is_empty() {
        return Ok(checkpoint);
    }
    Err(ModelError::Weights {
        path: dir.to_owned(),
        problems: Box::new(problems),
    })
}

/// A standard normal draw (Box-Muller, first branch).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// The tensor of an entry, in the type that it has on disk.
fn read(entry: &Entry, bytes: &[u8], device: &Device) -> Result<Tensor> {
    match entry.dtype {
        ElementType::Float(dtype) => Ok(Tensor::from_raw_buffer(bytes, dtype, &entry.shape, device)?),
        ElementType::Other(ref other) => Err(ModelError::Input(format!(
            "{} has elements of {other}, which are not read",
            entry.name
        ))),
    }
}
