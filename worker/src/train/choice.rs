//! Which actor a run takes, and the weights that it begins with.
//!
//! On a GPU it is the packed one, where that does all that the job asks for; else the one of tensors, on whatever device there is.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flotilla_api::{
    algorithm::Module,
    role::{ModelSource, Precision, Train},
};
use flotilla_artifacts::{
    checkpoint::{newest, verify},
    layout::RunDir,
};
use flotilla_model::{
    Config, LoadOptions, Vision, Vlm,
    weights::{ElementType, scan},
};

use super::{
    actor::{Actor, Moments},
    autograd::Autograd,
    checkpoint::{self, Position},
    error::TrainError,
    inputs::{Inputs, method},
};
use crate::device::{Opened, Place, threads};

/// By what a run's model is computed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// Candle's tensors, in f32.
    Autograd,
    /// Packed weights on the GPU of this number.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only a build with CUDA takes it"))]
    Packed {
        /// The GPU.
        number: usize,
        /// f32 or bf16.
        dtype: DType,
    },
}

impl Way {
    /// The way of a run on a device: packed where the kernels do all that the job asks for.
    ///
    /// # Errors
    /// The job asks for a precision that nothing trains in.
    pub fn new(
        place: Place,
        config: &Config,
        freeze: &[Module],
        (wanted, stored): (Option<Precision>, DType),
    ) -> Result<Self, TrainError> {
        let dtype = match wanted {
            None => stored,
            Some(Precision::F32) => DType::F32,
            Some(Precision::Bf16) => DType::BF16,
            Some(Precision::F16) => {
                let what = "f16 is not trained in: gradients below 6e-8 would be lost; take bf16 on a GPU, or f32";
                return Err(TrainError::Invalid(what.into()));
            }
        };
        let packed = is_packed(config, freeze);
        match place {
            Place::Cuda(number) if cfg!(feature = "cuda") && packed => Ok(Self::Packed { number, dtype }),
            _ if wanted == Some(Precision::Bf16) => Err(TrainError::Invalid(format!(
                "bf16 is trained in on a GPU only{}: this run is on {place}; take f32",
                if packed {
                    ""
                } else {
                    ", and for this model with the vision tower frozen"
                }
            ))),
            _ => Ok(Self::Autograd),
        }
    }

    fn options(self, opened: &Opened) -> LoadOptions {
        match self {
            Self::Autograd => LoadOptions {
                device: opened.device.clone(),
                ..LoadOptions::default()
            },
            // From there the weights are packed for the card.
            Self::Packed { dtype, .. } => LoadOptions {
                device: Device::Cpu,
                dtype,
            },
        }
    }
}

/// Whether the packed form has a backward pass for all that is trained.
fn is_packed(config: &Config, freeze: &[Module]) -> bool {
    match config.vision {
        Vision::Qwen25Vl(_) => true,
        Vision::LlavaOneVision(_) => freeze.contains(&Module::Vision),
    }
}

/// The precision that a checkpoint is stored in, as far as it is trained in: bf16 for files in 16 bits, else f32.
pub fn stored_dtype(dir: &Path, config: &Config) -> Result<DType, TrainError> {
    let found = scan(dir, config.names())?;
    let short = |dtype: &ElementType| matches!(dtype, ElementType::Float(DType::BF16 | DType::F16));
    let (mut shorts, mut all) = (0, 0);
    for tensor in &found.tensors {
        all += tensor.bytes;
        shorts += if short(&tensor.dtype) { tensor.bytes } else { 0 };
    }
    Ok(if 2 * shorts > all { DType::BF16 } else { DType::F32 })
}

/// A checkpoint that a run goes on from.
#[derive(Clone, Debug)]
pub struct Resumed {
    dir: PathBuf,
    /// Where the run stood.
    pub position: Position,
}

/// The weights that a process begins with.
#[derive(Debug)]
pub struct Start {
    opened: Opened,
    way: Way,
    /// The weights that are trained.
    pub model: Vlm,
    /// The run's initial weights, frozen; None where nothing refers to them.
    reference: Option<Vlm>,
    /// The newest checkpoint of the run.
    pub resumed: Option<Resumed>,
}

impl Start {
    /// Reads the newest checkpoint of the run, else the base model in `base_dir`; and that as the reference, if there is one.
    /// Files are verified by their digests.
    pub fn load(opened: Opened, spec: &Train, base_dir: &Path, run: &RunDir) -> Result<Self, TrainError> {
        let config = Config::load(base_dir)?;
        let (freeze, _) = method(spec)?;
        let stored = match spec.model.random_seed {
            Some(_) => DType::F32,
            None => {
                verify(base_dir, spec.model.digest.as_deref())?;
                stored_dtype(base_dir, &config)?
            }
        };
        let way = Way::new(opened.place, &config, freeze, (spec.dtype, stored))?;
        let options = way.options(&opened);
        let resumed = match newest(&run.checkpoints())? {
            Some(newest) => {
                verify(&newest.path, Some(&newest.digest))?;
                let position = checkpoint::read_position(&newest.path)?;
                Some(Resumed {
                    dir: newest.path,
                    position,
                })
            }
            None => None,
        };
        let refers = spec
            .algorithm
            .grpo
            .as_ref()
            .is_some_and(|grpo| grpo.kl_coefficient > 0.0);
        let base = match refers || resumed.is_none() {
            true => Some(load_base(base_dir, &spec.model, config, &options)?),
            false => None,
        };
        let model = match (&resumed, &base) {
            (Some(resumed), _) => Vlm::load(&resumed.dir, &options)?,
            // The packed form copies the weights to the card: these stay as they are.
            (None, Some(base)) if matches!(way, Way::Packed { .. }) => base.clone(),
            (None, Some(base)) => base.deep_copy()?,
            (None, None) => return Err(TrainError::Invalid("no weights to begin with".into())),
        };
        Ok(Self {
            opened,
            way,
            model,
            reference: base.filter(|_| refers),
            resumed,
        })
    }

    /// The actor, its optimiser as the checkpoint had it.
    pub fn actor<'a>(self, spec: &Train, inputs: &'a Inputs) -> Result<Box<dyn Actor + 'a>, TrainError> {
        let (freeze, optimizer) = method(spec)?;
        let moments = self.resumed.as_ref().map(|resumed| resumed.position.moments);
        match self.way {
            Way::Autograd => {
                let threads = threads(&self.opened.device, spec.threads as usize);
                if let Some(moments) = moments.filter(|moments| *moments != Moments::ByParameter) {
                    return Err(foreign(moments, "candle's tensors"));
                }
                let shown = inputs.shown();
                let pictures = (&inputs.gallery, &shown);
                let mut actor = Autograd::new(self.model, self.reference, pictures, (freeze, optimizer), threads)?;
                if let Some(resumed) = &self.resumed {
                    actor.restore(&checkpoint::trainer(&resumed.dir), resumed.position.updates)?;
                }
                Ok(Box::new(actor))
            }
            #[cfg(feature = "cuda")]
            Way::Packed { number, dtype } => {
                let resumed = self
                    .resumed
                    .as_ref()
                    .map(|resumed| (checkpoint::trainer(&resumed.dir), &resumed.position));
                super::packed::actor(number, dtype, (self.model, self.reference), resumed, spec, inputs)
            }
            #[cfg(not(feature = "cuda"))]
            Way::Packed { .. } => Err(TrainError::Invalid(crate::device::Fault::Unbuilt.to_string())),
        }
    }
}

/// A checkpoint's optimiser state that this process cannot go on with.
pub fn foreign(moments: Moments, by: &str) -> TrainError {
    let wrote = match moments {
        Moments::ByParameter => "by candle's tensors (on a CPU, or with LLaVA-OneVision's vision tower trained)",
        Moments::PackedF32 => "by the packed learner in f32",
        Moments::PackedBf16 => "by the packed learner in bf16",
        Moments::Packed8Bit => "by the packed learner in 8 bits",
    };
    TrainError::Invalid(format!(
        "the newest checkpoint's optimiser state was written {wrote}, and this process trains by {by}: resume on the kind of \
         device that the run began on (FLOTILLA_DEVICE), or begin a new run from the checkpoint as its model"
    ))
}

/// The model that the run begins with.
fn load_base(dir: &Path, source: &ModelSource, config: Config, options: &LoadOptions) -> Result<Vlm, TrainError> {
    match source.random_seed {
        Some(seed) => Ok(Vlm::random(config, seed, options)?),
        None => Ok(Vlm::load(dir, options)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = include_str!("../../../manifests/samples/critic-digits/base/config.json");
        Config::from_json(&serde_json::from_str(text).expect("JSON")).expect("the sample's configuration")
    }

    fn way(place: Place, freeze: &[Module], wanted: Option<Precision>) -> Result<Way, TrainError> {
        Way::new(place, &config(), freeze, (wanted, DType::F32))
    }

    #[test]
    fn the_cpu_trains_in_f32_by_tensors() {
        assert_eq!(way(Place::Cpu, &[], None).expect("a way"), Way::Autograd);
        assert_eq!(
            way(Place::Cpu, &[], Some(Precision::F32)).expect("a way"),
            Way::Autograd
        );
        let refused = way(Place::Cpu, &[Module::Vision], Some(Precision::Bf16)).expect_err("no bf16");
        assert!(refused.to_string().contains("on cpu; take f32"), "{refused}");
    }

    #[test]
    fn nothing_trains_in_f16() {
        for place in [Place::Cpu, Place::Cuda(0)] {
            assert!(way(place, &[Module::Vision], Some(Precision::F16)).is_err());
        }
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn a_gpu_trains_packed_in_the_precision_of_the_checkpoint() {
        let stored = |dtype| Way::new(Place::Cuda(3), &config(), &[Module::Vision], (None, dtype)).expect("a way");
        for dtype in [DType::F32, DType::BF16] {
            assert_eq!(stored(dtype), Way::Packed { number: 3, dtype });
        }
        let whole = Way::new(Place::Cuda(0), &config(), &[], (None, DType::F32)).expect("a way");
        assert!(
            matches!(whole, Way::Packed { .. }),
            "the tower of Qwen2.5-VL is trained on the card"
        );
    }

    #[test]
    fn moments_of_another_learner_are_refused_with_what_to_do() {
        let error = foreign(Moments::Packed8Bit, "candle's tensors").to_string();
        assert!(
            error.contains("in 8 bits") && error.contains("FLOTILLA_DEVICE"),
            "{error}"
        );
    }
}
