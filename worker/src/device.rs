//! Which device models run on: what was asked for, what this machine has, what was chosen and why.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device, Tensor};
use clap::Args;

use crate::error::WorkerError;

/// The CUDA version that the kernels are built for, as the driver counts.
const CUDA: i32 = 13_000;
/// The oldest generation with bf16 in its tensor cores.
pub(crate) const CAPABILITY: (i32, i32) = (8, 0);
/// A GPU with less free memory is somebody else's: a context and its modules take half of that.
#[cfg(feature = "cuda")]
const FREE: usize = 1 << 30;
/// Says to a role where its model runs; also of `--device`.
pub const VARIABLE: &str = "FLOTILLA_DEVICE";

/// `--device`, for everything that loads a model.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct DeviceArguments {
    /// Where the model runs: auto takes the first GPU that can be used, else the CPU; cpu; cuda, or cuda:N for the N-th GPU,
    /// counted from 0. `flotilla-worker doctor` says what is there and what is in the way.
    #[arg(long, env = VARIABLE, value_name = "auto|cpu|cuda[:N]", default_value_t, hide_env_values = true)]
    pub device: Wanted,
}

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Wanted {
    /// A GPU if one can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, or the first that can be used.
    Cuda(Option<usize>),
}

/// What stands between a GPU and a model.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Fault {
    /// The feature `cuda` is not compiled in.
    #[error("this flotilla-worker was built without CUDA: build it with `make build-cuda`, or take the CUDA image")]
    Unbuilt,
    /// No driver, or it does not start.
    #[error(
        "no NVIDIA driver answers ({0}): on a machine with a GPU install driver 580 or newer; start a container with \
         `--gpus all`, a pod with the limit `nvidia.com/gpu: 1`"
    )]
    NoDriver(String),
    /// The driver is older than the libraries.
    #[error("the NVIDIA driver runs CUDA up to {}.{}, this build needs 13.0: install driver 580 or newer", .0 / 1000, .0 % 1000 / 10)]
    OldDriver(i32),
    /// The driver lists nothing.
    #[error(
        "the driver shows no GPU: CUDA_VISIBLE_DEVICES hides them, or the container was given none (`--gpus all`, \
         `nvidia.com/gpu: 1`)"
    )]
    NoCard,
    /// Libraries that are loaded at run time.
    #[error(
        "{} not found: install the libraries of CUDA 13 (NVIDIA's packages, or `pip install 'nvidia-cublas==13.*' nvidia-curand \
         'nvidia-cuda-nvrtc==13.*'`) and put their folder into LD_LIBRARY_PATH", .0.join(", ")
    )]
    Missing(Vec<&'static str>),
    /// No such number.
    #[error(
        "GPU {asked} was asked for, this process sees {count} (numbers begin at 0, CUDA_VISIBLE_DEVICES renumbers)"
    )]
    NoSuchCard {
        /// The number.
        asked: usize,
        /// How many there are.
        count: usize,
    },
    /// The card is too old.
    #[error("{name} has compute capability {}.{}, 8.0 (Ampere) is the least", .capability.0, .capability.1)]
    OldCard {
        /// The vendor's name.
        name: String,
        /// What it has.
        capability: (i32, i32),
    },
    /// Others have the memory.
    #[error("{name} has {} MiB of {} MiB free: nvidia-smi shows which process has the rest", .free >> 20, .memory >> 20)]
    Full {
        /// The vendor's name.
        name: String,
        /// Free bytes.
        free: usize,
        /// Bytes of the card.
        memory: usize,
    },
    /// It cannot be opened for another reason.
    #[error("GPU {0} cannot be opened: {1}")]
    Failed(usize, String),
}

/// A GPU as it was found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Card {
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

/// What a machine has for models besides its CPU.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Machine {
    /// The newest CUDA version that the driver runs, as 13000 for 13.0.
    pub driver: i32,
    /// The GPUs that this process sees.
    pub cards: Vec<Card>,
    /// Libraries that the loader does not find.
    pub missing: Vec<&'static str>,
}

/// Where a model will run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// A device that has been opened.
#[derive(Clone, Debug)]
pub struct Opened {
    /// For tensors.
    pub device: Device,
    /// Where it is.
    pub place: Place,
    /// Why this one, on one line.
    pub reason: String,
}

/// Decides, from what was asked for and what was found, and tries what it has decided for with `open`: the next GPU where one cannot
/// be opened and none was named. A GPU that is asked for and cannot be used is an error; for `auto` it is the reason why the CPU was
/// taken. Of several that cannot be opened the first says why.
pub fn choose<D>(
    wanted: Wanted,
    found: &Result<Machine, Fault>,
    open: impl Fn(Place) -> Result<D, Fault>,
) -> Result<(Place, String, D), Fault> {
    let on_cpu = |reason: String| Ok((Place::Cpu, reason, open(Place::Cpu)?));
    let (asked, why) = match wanted {
        Wanted::Cpu => return on_cpu("asked for".to_owned()),
        Wanted::Cuda(asked) => (asked, "asked for"),
        Wanted::Auto => (None, "the first GPU that can be used"),
    };
    let tried = usable(asked, found).and_then(|cards| {
        let mut first = None;
        for (number, card) in cards {
            match open(Place::Cuda(number)) {
                Ok(device) => {
                    let passed = first.map_or_else(String::new, |fault: Fault| format!("; {fault}"));
                    return Ok((Place::Cuda(number), format!("{}, {why}{passed}", card.name), device));
                }
                Err(fault) => drop(first.get_or_insert(fault)),
            }
        }
        Err(first.unwrap_or(Fault::NoCard))
    });
    match tried {
        Err(fault) if wanted == Wanted::Auto => on_cpu(fault.to_string()),
        tried => tried,
    }
}

/// The card that was asked for, or all that are new enough: at least one.
fn usable(asked: Option<usize>, found: &Result<Machine, Fault>) -> Result<Vec<(usize, &Card)>, Fault> {
    let machine = found.as_ref().map_err(Clone::clone)?;
    if machine.driver < CUDA {
        return Err(Fault::OldDriver(machine.driver));
    }
    if machine.cards.is_empty() {
        return Err(Fault::NoCard);
    }
    if !machine.missing.is_empty() {
        return Err(Fault::Missing(machine.missing.clone()));
    }
    let old = |card: &Card| Fault::OldCard {
        name: card.name.clone(),
        capability: card.capability,
    };
    if let Some(asked) = asked {
        let count = machine.cards.len();
        let card = machine.cards.get(asked).ok_or(Fault::NoSuchCard { asked, count })?;
        return if card.capability < CAPABILITY {
            Err(old(card))
        } else {
            Ok(vec![(asked, card)])
        };
    }
    let cards = machine.cards.iter().enumerate();
    let new = cards
        .filter(|(_, card)| card.capability >= CAPABILITY)
        .collect::<Vec<_>>();
    match new.is_empty() {
        true => Err(old(&machine.cards[0])),
        false => Ok(new),
    }
}

/// Looks at this machine.
#[cfg(not(feature = "cuda"))]
pub fn look() -> Result<Machine, Fault> {
    Err(Fault::Unbuilt)
}

#[cfg(feature = "cuda")]
fn no_driver(error: flotilla_kernels::GpuError) -> Fault {
    Fault::NoDriver(match error {
        flotilla_kernels::GpuError::NoDriver(cause) => cause,
        other => other.to_string(),
    })
}

/// Looks at this machine.
#[cfg(feature = "cuda")]
pub fn look() -> Result<Machine, Fault> {
    let survey = flotilla_kernels::gpu::survey().map_err(no_driver)?;
    let cards = survey.cards.into_iter().map(|listed| Card {
        name: listed.name,
        capability: listed.capability,
        memory: listed.memory,
    });
    Ok(Machine {
        driver: survey.driver,
        cards: cards.collect(),
        missing: survey.missing,
    })
}

impl Wanted {
    /// Looks, chooses and opens; says in the log which device it is and why.
    pub fn open(self) -> Result<Opened, WorkerError> {
        let opened = self
            .try_open()
            .map_err(|fault| WorkerError::permanent(format!("the model cannot run on {self}"), fault))?;
        tracing::info!(device = %opened.place, reason = opened.reason, "device");
        Ok(opened)
    }

    /// [`Self::open`] without a word.
    pub fn try_open(self) -> Result<Opened, Fault> {
        // The CPU needs no look at drivers.
        let found = if self == Self::Cpu { Err(Fault::Unbuilt) } else { look() };
        let (place, reason, device) = choose(self, &found, open)?;
        Ok(Opened { device, place, reason })
    }
}

fn open(place: Place) -> Result<Device, Fault> {
    let Place::Cuda(number) = place else {
        return Ok(Device::Cpu);
    };
    // Held until the tensors' device is there too: what it has set ends with the last one that uses the GPU.
    #[cfg(feature = "cuda")]
    let _gpu = prepare(number)?;
    // One stream for every thread: with the default, threads would have one each, without an order between them.
    let opened = Device::new_cuda_with_stream(number).and_then(|device| {
        // Kernels of another generation, or newer than the driver, would fail at the first use.
        (Tensor::ones(1, DType::BF16, &device)? * 2.0)?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        Ok(device)
    });
    opened.map_err(|error| Fault::Failed(number, error.to_string()))
}

/// Freed memory stays with the process from here on, tensors' too; a GPU that is somebody else's is refused.
#[cfg(feature = "cuda")]
fn prepare(number: usize) -> Result<flotilla_kernels::Gpu, Fault> {
    let failed = |error: flotilla_kernels::GpuError| Fault::Failed(number, error.to_string());
    let gpu = flotilla_kernels::Gpu::new(number).map_err(failed)?;
    let card = gpu.card().map_err(failed)?;
    if card.free < FREE {
        return Err(Fault::Full {
            name: card.name,
            free: card.free,
            memory: card.memory,
        });
    }
    Ok(gpu)
}

/// Threads that share a batch on a device: as many as asked for on the CPU; one feeds a GPU.
pub fn threads(device: &Device, asked: usize) -> usize {
    if device.is_cpu() { asked.max(1) } else { 1 }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            // An empty variable is none.
            "" | "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Ok(Self::Cuda(Some(number))),
                _ => Err("a device is auto, cpu, cuda or cuda:N, for example cuda:1".to_owned()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(cards: &[(i32, i32)]) -> Result<Machine, Fault> {
        let card = |(number, capability): (usize, &(i32, i32))| Card {
            name: format!("card {number}"),
            capability: *capability,
            memory: 80_000_000_000,
        };
        Ok(Machine {
            driver: 13_000,
            cards: cards.iter().enumerate().map(card).collect(),
            missing: Vec::new(),
        })
    }

    fn well(_: Place) -> Result<(), Fault> {
        Ok(())
    }

    fn place(wanted: Wanted, found: &Result<Machine, Fault>) -> Result<Place, Fault> {
        choose(wanted, found, well).map(|(place, ..)| place)
    }

    #[test]
    fn devices_are_read_as_they_are_written() {
        for wanted in [Wanted::Auto, Wanted::Cpu, Wanted::Cuda(None), Wanted::Cuda(Some(7))] {
            assert_eq!(wanted.to_string().parse(), Ok(wanted));
        }
        assert_eq!("".parse(), Ok(Wanted::Auto));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cuda:one", "CPU"] {
            assert!(wrong.parse::<Wanted>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn auto_takes_the_first_card_that_is_new_enough() {
        let found = machine(&[(7, 5), (9, 0), (10, 0)]);
        assert_eq!(place(Wanted::Auto, &found), Ok(Place::Cuda(1)));
        assert_eq!(place(Wanted::Cuda(None), &found), Ok(Place::Cuda(1)));
        assert_eq!(place(Wanted::Cuda(Some(2)), &found), Ok(Place::Cuda(2)));
        assert_eq!(place(Wanted::Cpu, &found), Ok(Place::Cpu));
    }

    #[test]
    fn auto_takes_the_cpu_and_says_what_was_in_the_way() {
        let cases = [
            (Err(Fault::Unbuilt), "make build-cuda"),
            (Err(Fault::NoDriver("libcuda.so.1: not found".to_owned())), "driver 580"),
            (machine(&[]), "CUDA_VISIBLE_DEVICES"),
            (machine(&[(7, 0)]), "compute capability 7.0"),
            (
                machine(&[(9, 0)]).map(|found| Machine {
                    driver: 12_040,
                    ..found
                }),
                "up to 12.4",
            ),
            (
                machine(&[(9, 0)]).map(|found| Machine {
                    missing: vec!["libcurand.so.10"],
                    ..found
                }),
                "libcurand.so.10",
            ),
        ];
        for (found, said) in cases {
            let (place, reason, ()) = choose(Wanted::Auto, &found, well).expect("a choice");
            assert_eq!(place, Place::Cpu);
            assert!(reason.contains(said), "{reason}");
            // What auto falls back from is an error where the GPU was asked for.
            let fault = choose(Wanted::Cuda(None), &found, well).expect_err("no GPU");
            assert_eq!(fault.to_string(), reason);
        }
    }

    /// Opens all but these.
    fn all_but(full: &[usize]) -> impl Fn(Place) -> Result<(), Fault> {
        move |place| match place {
            Place::Cuda(number) if full.contains(&number) => Err(Fault::Full {
                name: format!("card {number}"),
                free: 1 << 20,
                memory: 80 << 30,
            }),
            _ => Ok(()),
        }
    }

    #[test]
    fn where_none_is_named_a_gpu_that_others_have_filled_is_passed_over() {
        let found = machine(&[(9, 0), (9, 0), (9, 0)]);
        for wanted in [Wanted::Auto, Wanted::Cuda(None)] {
            let (place, reason, ()) = choose(wanted, &found, all_but(&[0, 1])).expect("a choice");
            assert_eq!(place, Place::Cuda(2));
            assert!(
                reason.starts_with("card 2, ") && reason.contains("; card 0 has 1 MiB"),
                "{reason}"
            );
        }
        let fault = choose(Wanted::Cuda(Some(1)), &found, all_but(&[1])).expect_err("it is full");
        assert!(
            fault.to_string().starts_with("card 1 has 1 MiB of 81920 MiB free"),
            "{fault}"
        );
    }

    #[test]
    fn where_every_gpu_is_full_the_first_says_so() {
        let found = machine(&[(9, 0), (9, 0)]);
        let (place, reason, ()) = choose(Wanted::Auto, &found, all_but(&[0, 1])).expect("the CPU");
        assert_eq!(place, Place::Cpu);
        assert!(reason.starts_with("card 0 has 1 MiB"), "{reason}");
        let fault = choose(Wanted::Cuda(None), &found, all_but(&[0, 1])).expect_err("no GPU");
        assert_eq!(fault.to_string(), reason);
    }

    #[test]
    fn a_number_that_is_not_there_is_an_error_with_the_count() {
        let fault = place(Wanted::Cuda(Some(2)), &machine(&[(9, 0), (9, 0)])).expect_err("two cards");
        assert_eq!(fault, Fault::NoSuchCard { asked: 2, count: 2 });
        let fault = place(Wanted::Cuda(Some(0)), &machine(&[(7, 5)])).expect_err("an old card");
        assert!(fault.to_string().contains("card 0 has compute capability 7.5"));
    }

    #[test]
    fn one_thread_feeds_a_gpu_and_the_cpu_has_those_that_were_asked_for() {
        assert_eq!(threads(&Device::Cpu, 4), 4);
        assert_eq!(threads(&Device::Cpu, 0), 1);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_cuda_says_so_where_a_gpu_is_asked_for() {
        let error = Wanted::Cuda(Some(0)).open().expect_err("no CUDA");
        assert_eq!(error.exit_code(), flotilla_api::names::exit::PERMANENT);
        assert!(crate::error::chain(&error).contains("built without CUDA"));
        assert!(Wanted::Auto.open().expect("the CPU").device.is_cpu());
    }
}
