//! Which GPUs share a model, and everything that keeps them from it: said before anything is loaded, and before the model is
//! fetched where it does not take the model to know.

use std::{fmt, path::Path};

use candle_core::DType;
use flotilla_api::role::Serve;
use flotilla_device::{
    TextShape, VisionShape,
    parallel::{Shard, ShardError},
    plan::Serving,
};
use flotilla_engine::Limits;
use flotilla_kernels::Dtype;
use flotilla_model::{Config, Vision};

use crate::{
    device::{self, CAPABILITY, Fault, Machine, Place, Wanted},
    error::WorkerError,
    runner::{default_dtype, dtype_of},
};

/// The most GPUs that share a model: those of one machine.
pub const MOST: u32 = 8;

/// What keeps GPUs from sharing a model.
#[derive(Debug, thiserror::Error)]
pub enum GroupFault {
    /// The model would run on the CPU.
    #[error(
        "{size} GPUs are to share the model, but it would run on the CPU ({reason}): take a device with {size} GPUs, or 1 for \
         the CPU, which has the whole model"
    )]
    Cpu {
        /// GPUs that were asked for.
        size: usize,
        /// Why the CPU.
        reason: String,
    },
    /// The feature `nccl` is not compiled in.
    #[error(
        "this flotilla-worker was built without NCCL, by which GPUs share a model: build it with `make build-cuda`, or take the \
         CUDA image"
    )]
    Unbuilt,
    /// No GPU can be used.
    #[error(transparent)]
    Device(#[from] Fault),
    /// The library is not found.
    #[error(
        "{0}: install NCCL 2.19 or newer for CUDA 13 (NVIDIA's package, or `pip install nvidia-nccl-cu13`) and put its folder \
         into LD_LIBRARY_PATH"
    )]
    NoLibrary(String),
    /// The library is found, and lacks what a group needs.
    #[error("{} is loaded, by which GPUs cannot share a model: install NCCL 2.19 or newer for CUDA 13", nccl(.0))]
    OldLibrary(i32),
    /// Fewer GPUs than were asked for.
    #[error(
        "{size} GPUs are to share the model, from cuda:{first} on, and this process sees {count}: give the pod the limit \
         `nvidia.com/gpu: {size}`, the container `--gpus`, or look at CUDA_VISIBLE_DEVICES"
    )]
    TooFew {
        /// GPUs that were asked for.
        size: usize,
        /// The first of them.
        first: usize,
        /// GPUs that are there.
        count: usize,
    },
    /// A format that is not computed in parts.
    #[error("{0} is not computed by several GPUs: take bf16 or f32")]
    Format(&'static str),
    /// The model cannot be cut so.
    #[error("{fault}; {}", possible(.sizes))]
    Uneven {
        /// Why.
        fault: ShardError,
        /// Into how many parts it can be cut.
        sizes: Vec<usize>,
    },
    /// The model does not fit.
    #[error(
        "the model does not fit: {} needs {} before any keys and values, and the smallest has {}; {}",
        each_of(.size), gigabytes(.needed), gigabytes(.memory), would_do(.enough.as_ref())
    )]
    TooLarge {
        /// GPUs that share it.
        size: usize,
        /// Bytes on each.
        needed: usize,
        /// Bytes of the smallest.
        memory: usize,
        /// How many such GPUs would hold it.
        enough: Option<usize>,
    },
}

fn nccl(version: &i32) -> String {
    format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn each_of(size: &usize) -> String {
    match size {
        1 => "the GPU".to_owned(),
        size => format!("each of {size} GPUs"),
    }
}

fn gigabytes(bytes: &usize) -> String {
    format!("{:.1} GB", *bytes as f64 / 1e9)
}

fn possible(sizes: &[usize]) -> String {
    if sizes.is_empty() {
        return "no other number of GPUs can share it either".to_owned();
    }
    let sizes = sizes.iter().map(usize::to_string).collect::<Vec<_>>();
    format!("numbers of GPUs that can share it: {}", sizes.join(", "))
}

fn would_do(enough: Option<&usize>) -> String {
    match enough {
        Some(enough) => format!("{enough} of them would hold it (tensorParallel)"),
        None => format!("{MOST} of them would not hold it either"),
    }
}

/// The GPUs that share a model, by rank.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Places {
    numbers: Vec<usize>,
    /// Bytes of the smallest.
    memory: usize,
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.numbers.iter().map(|number| Place::Cuda(*number).to_string());
        f.write_str(&names.collect::<Vec<_>>().join(", "))
    }
}

impl Places {
    /// The GPUs for a role, or none where one device has the whole model.
    ///
    /// # Errors
    /// Whatever would keep any model from being shared here.
    pub fn find(spec: &Serve, wanted: Wanted) -> Result<Option<Self>, WorkerError> {
        let size = spec.tensor_parallel as usize;
        if size <= 1 {
            return Ok(None);
        }
        let found = if wanted == Wanted::Cpu {
            Err(Fault::Unbuilt)
        } else {
            device::look()
        };
        let format = packed_format(group_dtype(spec));
        let chosen = format.and_then(|_| Self::choose(size, wanted, &found, available()));
        chosen.map(Some).map_err(|fault| refused(size, fault))
    }

    /// Whether they can share the model in this directory. Weights are not read.
    ///
    /// # Errors
    /// It cannot be cut into so many parts, or a part does not fit.
    pub fn hold(&self, directory: &Path, spec: &Serve) -> Result<(), WorkerError> {
        let failed =
            |error| WorkerError::permanent(format!("failed to read the model in {}", directory.display()), error);
        let config = Config::load(directory).map_err(failed)?;
        let defaults = Limits::default();
        let given = |value: Option<u32>, otherwise: usize| value.map_or(otherwise, |value| value as usize);
        let limits = Limits {
            max_step_tokens: given(spec.engine.max_step_tokens, defaults.max_step_tokens),
            max_rows: given(spec.engine.max_rows, defaults.max_rows),
            ..defaults
        };
        let fits = |serving| fits(self.size(), &config, &serving, self.memory);
        let held = serving(group_dtype(spec), &limits).and_then(fits);
        held.map_err(|fault| refused(self.size(), fault))
    }

    /// So many GPUs from the one that `wanted` means. `available` says whether NCCL can be used.
    fn choose(
        size: usize,
        wanted: Wanted,
        found: &Result<Machine, Fault>,
        available: Result<(), GroupFault>,
    ) -> Result<Self, GroupFault> {
        let cpu = |reason: &str| GroupFault::Cpu {
            size,
            reason: reason.to_owned(),
        };
        // Each rank opens its own.
        let first = match device::choose(wanted, found, |_| Ok(()))? {
            (Place::Cuda(first), ..) => first,
            (Place::Cpu, reason, ()) => return Err(cpu(&reason)),
        };
        available?;
        let machine = found.as_ref().map_err(|fault| GroupFault::Device(fault.clone()))?;
        let count = machine.cards.len();
        let cards = machine.cards.get(first..first + size);
        let cards = cards.ok_or(GroupFault::TooFew { size, first, count })?;
        match cards.iter().find(|card| card.capability < CAPABILITY) {
            Some(old) => Err(GroupFault::Device(Fault::OldCard {
                name: old.name.clone(),
                capability: old.capability,
            })),
            None => Ok(Self {
                numbers: (first..first + size).collect(),
                memory: cards.iter().map(|card| card.memory).min().unwrap_or(0),
            }),
        }
    }

    /// How many.
    pub fn size(&self) -> usize {
        self.numbers.len()
    }

    /// Their numbers, by rank.
    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }

    /// The number of rank 0's.
    pub fn first(&self) -> usize {
        self.numbers.first().copied().unwrap_or_default()
    }

    /// How many of them hold the same keys and values.
    pub fn copies(&self, config: &Config) -> usize {
        let shard = Shard::new(&TextShape::from(&config.text), 0, self.size());
        shard.map_or(1, |shard| shard.copies())
    }
}

#[cfg(feature = "nccl")]
fn available() -> Result<(), GroupFault> {
    /// 2.19.
    const LEAST: i32 = 21_900;
    match flotilla_kernels::gpu::nccl::version() {
        Ok(version) if version < LEAST => Err(GroupFault::OldLibrary(version)),
        Ok(_) => Ok(()),
        Err(error) => Err(GroupFault::NoLibrary(error.to_string())),
    }
}

#[cfg(not(feature = "nccl"))]
fn available() -> Result<(), GroupFault> {
    Err(GroupFault::Unbuilt)
}

fn refused(size: usize, fault: GroupFault) -> WorkerError {
    WorkerError::permanent(format!("the model cannot be shared by {size} GPUs"), fault)
}

/// The format that a role's model has on GPUs.
fn group_dtype(spec: &Serve) -> DType {
    spec.engine.dtype.map_or(default_dtype(Place::Cuda(0)), dtype_of)
}

fn packed_format(dtype: DType) -> Result<Dtype, GroupFault> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::Bf16),
        other => Err(GroupFault::Format(other.as_str())),
    }
}

fn serving(dtype: DType, limits: &Limits) -> Result<Serving, GroupFault> {
    Ok(Serving {
        dtype: packed_format(dtype)?,
        step_tokens: limits.max_step_tokens,
        sequences: limits.max_rows,
        ..Serving::default()
    })
}

/// Why one GPU of so much memory was not enough, if that is so by the plan.
pub fn too_large(config: &Config, dtype: DType, limits: &Limits, memory: usize) -> Option<GroupFault> {
    let serving = serving(dtype, limits).ok()?;
    fits(1, config, &serving, memory).err()
}

/// Whether so many GPUs of so much memory can share a model, with room for at least one token's keys and values.
fn fits(size: usize, config: &Config, serving: &Serving, memory: usize) -> Result<(), GroupFault> {
    let text = TextShape::from(&config.text);
    let vision = match &config.vision {
        Vision::Qwen25Vl(vision) => VisionShape::Qwen(vision.into()),
        Vision::LlavaOneVision(vision) => VisionShape::Siglip(vision.into()),
    };
    let plan = |size: usize| serving.plan(&text, Some(&vision), memory, size);
    let holds = |size: &usize| plan(*size).is_ok_and(|plan| plan.kv_tokens() > 0);
    let most = MOST as usize;
    let planned = plan(size).map_err(|fault| GroupFault::Uneven {
        fault,
        sizes: (2..=most).filter(|size| Shard::new(&text, 0, *size).is_ok()).collect(),
    })?;
    if planned.kv_tokens() > 0 {
        return Ok(());
    }
    Err(GroupFault::TooLarge {
        size,
        needed: planned.fixed(),
        memory,
        enough: (size + 1..=most).find(holds),
    })
}

#[cfg(test)]
mod tests {
    use flotilla_api::names::exit;

    use super::*;
    use crate::{device::Card, error::chain};

    fn machine(count: usize) -> Result<Machine, Fault> {
        Ok(Machine {
            driver: 13_000,
            cards: vec![
                Card {
                    name: "a card".to_owned(),
                    capability: (9, 0),
                    memory: 80_000_000_000,
                };
                count
            ],
            missing: Vec::new(),
        })
    }

    fn refusal(size: usize, wanted: Wanted, found: &Result<Machine, Fault>) -> String {
        let chosen = Places::choose(size, wanted, found, Ok(()));
        chosen.expect_err("no places").to_string()
    }

    /// The sample's base model, with other sizes.
    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
        let mut config = Config::load(&base).expect("a configuration");
        change(&mut config);
        config
    }

    /// The language model of 72B.
    fn large() -> Config {
        config(|config| {
            let text = &mut config.text;
            (text.hidden_size, text.num_hidden_layers, text.intermediate_size) = (8192, 80, 29568);
            (text.num_attention_heads, text.num_key_value_heads, text.head_dim) = (64, 8, 128);
            (text.vocab_size, text.tie_word_embeddings) = (152_064, false);
        })
    }

    #[test]
    fn ranks_take_gpus_in_a_row_from_the_one_that_was_asked_for() {
        let places = |wanted| Places::choose(2, wanted, &machine(4), Ok(())).expect("places");
        assert_eq!(places(Wanted::Auto).to_string(), "cuda:0, cuda:1");
        let last = places(Wanted::Cuda(Some(2)));
        assert_eq!((last.numbers(), last.first()), (&[2, 3][..], 2));
    }

    #[test]
    fn more_gpus_than_key_and_value_heads_hold_some_of_them_twice() {
        let places = |size| Places::choose(size, Wanted::Auto, &machine(8), Ok(())).expect("places");
        let two = config(|config| {
            (config.text.num_attention_heads, config.text.num_key_value_heads) = (16, 2);
            (config.text.intermediate_size, config.text.vocab_size) = (11_008, 151_936);
        });
        assert_eq!([2, 4, 8].map(|size| places(size).copies(&two)), [1, 2, 4]);
    }

    #[test]
    fn an_old_library_is_refused_with_its_version() {
        let text = GroupFault::OldLibrary(21_805).to_string();
        assert!(text.starts_with("NCCL 2.18.5 is loaded"), "{text}");
    }

    #[test]
    fn too_few_gpus_are_an_error_with_both_numbers() {
        let text = refusal(4, Wanted::Auto, &machine(2));
        assert!(
            text.contains("4 GPUs are to share the model, from cuda:0 on, and this process sees 2"),
            "{text}"
        );
        assert!(text.contains("nvidia.com/gpu: 4"), "{text}");
        let text = refusal(2, Wanted::Cuda(Some(3)), &machine(4));
        assert!(text.contains("from cuda:3 on, and this process sees 4"), "{text}");
    }

    #[test]
    fn a_cpu_is_refused_with_the_reason_why_it_would_be_one() {
        let text = refusal(2, Wanted::Cpu, &machine(2));
        assert!(text.contains("it would run on the CPU (asked for)"), "{text}");
        let text = refusal(2, Wanted::Auto, &Err(Fault::NoDriver("libcuda.so.1".to_owned())));
        assert!(
            text.contains("it would run on the CPU (no NVIDIA driver answers"),
            "{text}"
        );
        let text = refusal(2, Wanted::Cuda(None), &Err(Fault::NoCard));
        assert!(text.contains("the driver shows no GPU"), "{text}");
    }

    #[test]
    fn a_build_without_nccl_says_how_to_get_one() {
        let chosen = Places::choose(2, Wanted::Auto, &machine(2), Err(GroupFault::Unbuilt));
        assert!(chosen.expect_err("unbuilt").to_string().contains("make build-cuda"));
    }

    #[test]
    fn a_model_that_cannot_be_cut_evenly_says_why_and_which_numbers_can() {
        let seven = config(|config| {
            let text = &mut config.text;
            (text.num_attention_heads, text.num_key_value_heads) = (28, 4);
            (text.intermediate_size, text.vocab_size) = (18944, 152_064);
        });
        let fault = fits(8, &seven, &Serving::default(), 80_000_000_000).expect_err("uneven");
        let text = fault.to_string();
        assert!(text.contains("8 ranks cannot share 28 query heads"), "{text}");
        assert!(text.ends_with("numbers of GPUs that can share it: 2, 4"), "{text}");
    }

    #[test]
    fn a_model_that_does_not_fit_names_the_number_that_would_do() {
        let fault = fits(2, &large(), &Serving::default(), 60_000_000_000).expect_err("too large");
        let text = fault.to_string();
        assert!(text.contains("each of 2 GPUs needs 7"), "{text}");
        assert!(
            text.contains("the smallest has 60.0 GB; 4 of them would hold it"),
            "{text}"
        );
        let alone = too_large(&large(), DType::BF16, &Limits::default(), 80_000_000_000).expect("too large");
        assert!(alone.to_string().contains("the GPU needs 14"), "{alone}");
        assert!(fits(4, &large(), &Serving::default(), 60_000_000_000).is_ok());
        let fault = fits(8, &large(), &Serving::default(), 8_000_000_000).expect_err("too large");
        assert!(
            fault.to_string().contains("8 of them would not hold it either"),
            "{fault}"
        );
    }

    #[test]
    fn half_precision_of_16_bits_with_5_of_exponent_is_not_computed_in_parts() {
        let fault = packed_format(DType::F16).expect_err("f16");
        assert_eq!(
            fault.to_string(),
            "f16 is not computed by several GPUs: take bf16 or f32"
        );
    }

    #[test]
    fn one_device_needs_no_places_and_a_machine_without_gpus_refuses_more_for_good() {
        let spec = |size: u32| -> Serve {
            let spec = serde_json::json!({
                "model": { "uri": "file:///base" }, "servedModelName": "m", "purpose": "Both", "maxModelLen": 8, "maxQueue": 1,
                "tensorParallel": size
            });
            serde_json::from_value(spec).expect("a role")
        };
        assert!(Places::find(&spec(1), Wanted::Cpu).expect("no group").is_none());
        let error = Places::find(&spec(2), Wanted::Cpu).expect_err("a CPU");
        assert_eq!(error.exit_code(), exit::PERMANENT);
        let text = chain(&error);
        assert!(
            text.contains("the model cannot be shared by 2 GPUs: 2 GPUs are to share the model"),
            "{text}"
        );
    }
}
