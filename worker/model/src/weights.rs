//! Named variables in the order of their names: loaded from safetensors, drawn from a seed, saved, copied.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{ModelError, Result, error::WeightProblems};

/// The file that holds all tensors of a small checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// How a parameter is drawn for training from scratch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones (scales of normalizations).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// A parameter that a configuration asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Name as on the hub, for example `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Shape as on the hub.
    pub shape: Vec<usize>,
    /// How to draw it.
    pub init: Init,
}

/// Variables by name. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Weights {
    vars: BTreeMap<String, Var>,
}

impl Weights {
    /// Reads `dir/model.safetensors`, or the shards that `dir/model.safetensors.index.json` names, and checks that the
    /// tensors are exactly `parameters`. Names of later library versions (`model.language_model.`, `model.visual.`)
    /// are accepted; so is an output head in a checkpoint whose head is tied (it is ignored).
    pub fn load(dir: &Path, parameters: &[Parameter], dtype: DType, device: &Device) -> Result<Self> {
        let mut found = BTreeMap::new();
        for file in weight_files(dir)? {
            let bytes = std::fs::read(&file).map_err(ModelError::file(&file))?;
            let tensors = safetensors::SafeTensors::deserialize(&bytes).map_err(|error| ModelError::Parse {
                path: file.clone(),
                reason: error.to_string(),
            })?;
            for (name, view) in tensors.iter() {
                let tensor = candle_core::safetensors::Load::load(&view, device)?;
                found.insert(canonical_name(name), tensor);
            }
        }
        Self::from_tensors(dir, found, parameters, dtype)
    }

    fn from_tensors(
        path: &Path,
        mut found: BTreeMap<String, Tensor>,
        parameters: &[Parameter],
        dtype: DType,
    ) -> Result<Self> {
        let mut problems = WeightProblems::default();
        let mut vars = BTreeMap::new();
        for parameter in parameters {
            match found.remove(&parameter.name) {
                None => problems.missing.push(parameter.name.clone()),
                Some(tensor) if tensor.dims() != parameter.shape => {
                    let shapes = (parameter.shape.clone(), tensor.dims().to_vec());
                    problems.misshaped.push((parameter.name.clone(), shapes.0, shapes.1));
                }
                Some(tensor) => {
                    let var = Var::from_tensor(&tensor.to_dtype(dtype)?.contiguous()?)?;
                    vars.insert(parameter.name.clone(), var);
                }
            }
        }
        problems.extra = found.into_keys().filter(|name| !is_derived(name)).collect();
        if problems.is_empty() {
            return Ok(Self { vars });
        }
        Err(ModelError::Weights {
            path: path.to_owned(),
            problems,
        })
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
        let tensors = self.vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor()));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| ModelError::Parse {
            path: path.to_owned(),
            reason: format!("cannot write: {error}"),
        })
    }

    /// The file that [`Self::save`] writes, in memory.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let tensors = self.vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor()));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(tensors, Some(metadata))
            .map_err(|error| ModelError::Input(format!("the weights cannot be written: {error}")))
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

/// A standard normal draw (Box-Muller, first branch).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// Files that hold the tensors: those that the index names, else the single file.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index = dir.join(INDEX_FILE);
    if !index.exists() {
        return Ok(vec![dir.join(SINGLE_FILE)]);
    }
    let bytes = std::fs::read(&index).map_err(ModelError::file(&index))?;
    let parsed: Index = serde_json::from_slice(&bytes).map_err(|error| ModelError::Parse {
        path: index.clone(),
        reason: error.to_string(),
    })?;
    let mut names = parsed.weight_map.into_values().collect::<Vec<_>>();
    names.sort();
    names.dedup();
    if let Some(name) = names
        .iter()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        let reason = format!("shard name {name:?} leaves the directory");
        return Err(ModelError::Parse { path: index, reason });
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// The hub's name of a tensor that may carry the name of a later library version.
fn canonical_name(name: &str) -> String {
    for (later, hub) in [("model.visual.", "visual."), ("model.language_model.", "model.")] {
        if let Some(rest) = name.strip_prefix(later) {
            return format!("{hub}{rest}");
        }
    }
    name.to_owned()
}

/// Whether a tensor may be present although nothing asks for it: a tied head, or a table made from the configuration.
fn is_derived(name: &str) -> bool {
    name == "lm_head.weight" || name.ends_with(".inv_freq")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<Parameter> {
        let parameter = |name: &str, shape: &[usize], init| Parameter {
            name: name.into(),
            shape: shape.into(),
            init,
        };
        vec![
            parameter("model.norm.weight", &[4], Init::Ones),
            parameter("visual.a.weight", &[2, 3], Init::Normal(0.5)),
        ]
    }

    #[test]
    fn saved_weights_load_to_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let drawn = Weights::random(&parameters(), 7, DType::F32, &Device::Cpu).unwrap();
        drawn.save(&dir.path().join(SINGLE_FILE)).unwrap();
        let loaded = Weights::load(dir.path(), &parameters(), DType::F32, &Device::Cpu).unwrap();
        let again = dir.path().join("again.safetensors");
        loaded.save(&again).unwrap();
        assert_eq!(
            std::fs::read(dir.path().join(SINGLE_FILE)).unwrap(),
            std::fs::read(again).unwrap()
        );
    }

    #[test]
    fn shards_with_later_names_load() {
        let dir = tempfile::tempdir().unwrap();
        let one = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
        let two = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let save = |file: &str, name: &str, tensor: &Tensor| {
            let tensors = HashMap::from([(name.to_owned(), tensor.clone())]);
            candle_core::safetensors::save(&tensors, dir.path().join(file)).unwrap();
        };
        save("a.safetensors", "model.language_model.norm.weight", &one);
        save("b.safetensors", "model.visual.a.weight", &two);
        let index = r#"{"weight_map":{"model.language_model.norm.weight":"a.safetensors","model.visual.a.weight":"b.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX_FILE), index).unwrap();
        let loaded = Weights::load(dir.path(), &parameters(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            loaded.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            ["model.norm.weight", "visual.a.weight"]
        );
    }

    #[test]
    fn a_shard_outside_the_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join(INDEX_FILE),
            r#"{"weight_map":{"a":"../b.safetensors"}}"#,
        )
        .unwrap();
        let error = Weights::load(dir.path(), &parameters(), DType::F32, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("leaves the directory"), "{error}");
    }

    #[test]
    fn differences_are_named() {
        let found = BTreeMap::from([
            (
                "model.norm.weight".to_owned(),
                Tensor::ones(5, DType::F32, &Device::Cpu).unwrap(),
            ),
            ("other".to_owned(), Tensor::ones(1, DType::F32, &Device::Cpu).unwrap()),
        ]);
        let error = Weights::from_tensors(Path::new("d"), found, &parameters(), DType::F32).unwrap_err();
        assert_eq!(
            error.to_string(),
            "weights in d do not fit the configuration: 1 missing (visual.a.weight); 1 unexpected (other); \
             1 mis-shaped (model.norm.weight is [5], expected [4])"
        );
    }

    #[test]
    fn the_seed_alone_decides_the_draw() {
        let draw = |seed| {
            let weights = Weights::random(&parameters(), seed, DType::F32, &Device::Cpu).unwrap();
            weights
                .get("visual.a.weight")
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn a_deep_copy_does_not_follow_its_source() {
        let source = Weights::random(&parameters(), 7, DType::F32, &Device::Cpu).unwrap();
        let copy = source.deep_copy().unwrap();
        let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        source.get("model.norm.weight").unwrap().set(&zeros).unwrap();
        assert_eq!(
            copy.get("model.norm.weight").unwrap().to_vec1::<f32>().unwrap(),
            [1.0; 4]
        );
        copy.assign(&source).unwrap();
        assert_eq!(
            copy.get("model.norm.weight").unwrap().to_vec1::<f32>().unwrap(),
            [0.0; 4]
        );
    }
}
