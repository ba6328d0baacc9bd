//! The other GPUs of a group that compute one language model: what a step exchanges with them.

#[cfg(feature = "nccl")]
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use flotilla_kernels::{Buffer, Float, GpuError};
#[cfg(feature = "nccl")]
use flotilla_kernels::{Gpu, ShapeError, rows};

#[cfg(feature = "nccl")]
use crate::parallel::{Collective, CollectiveError, Nccl, Shard, orders};
use crate::{shape::TextShape, step::Size};

/// Who holds the rest of the model.
#[derive(Debug, Default)]
pub(crate) enum Peers {
    /// Nobody: it is whole.
    #[default]
    None,
    /// GPUs of other processes.
    #[cfg(feature = "nccl")]
    Group(Box<Group>),
}

/// A place among them.
#[cfg(feature = "nccl")]
#[derive(Debug)]
pub(crate) struct Group {
    nccl: Nccl,
    shard: Shard,
    /// Whether the others are told of every step.
    leads: bool,
    /// `[sequences, vocabulary of a rank]`.
    own: Buffer<f32>,
    /// `[ranks, sequences, vocabulary of a rank]`.
    parts: Buffer<f32>,
    /// By the number of sequences: which row of `parts` each row of `[sequences, ranks, vocabulary of a rank]` is.
    orders: Mutex<HashMap<usize, Buffer<i32>>>,
}

#[cfg(feature = "nccl")]
impl Group {
    /// For steps of at most so many sequences. The weights must be those of `shard`.
    pub fn new(gpu: &Gpu, nccl: Nccl, shard: Shard, sequences: usize) -> Result<Self, GpuError> {
        ShapeError::unless(
            "group",
            (nccl.rank(), nccl.size()) == (shard.rank(), shard.size()),
            || {
                format!(
                    "the part of rank {} of {} at rank {} of {}",
                    shard.rank(),
                    shard.size(),
                    nccl.rank(),
                    nccl.size()
                )
            },
        )?;
        let rows = shard.local().vocabulary;
        Ok(Self {
            own: gpu.alloc(sequences * rows)?,
            parts: gpu.alloc(sequences * shard.whole().vocabulary)?,
            orders: Mutex::default(),
            nccl,
            shard,
            leads: false,
        })
    }

    /// What [`Self::orders`] says, uploaded when a number of sequences is met first: outside of a recording.
    fn order(&self, sequences: usize) -> Result<Buffer<i32>, GpuError> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = orders.get(&sequences) {
            return Ok(order.clone());
        }
        let ranks = self.shard.size();
        let rows = (0..sequences).flat_map(|sequence| (0..ranks).map(move |rank| rank * sequences + sequence));
        let rows = rows.map(|row| i32::try_from(row).unwrap_or(-1)).collect::<Vec<_>>();
        let order = self.nccl.communicator().gpu().upload(&rows)?;
        orders.insert(sequences, order.clone());
        Ok(order)
    }

    fn logits(&self, logits: &Buffer<f32>) -> Result<(), GpuError> {
        let (whole, local) = (self.shard.whole().vocabulary, self.shard.local().vocabulary);
        let sequences = logits.len() / whole;
        let communicator = self.nccl.communicator();
        let parts = self.parts.slice(0..logits.len())?;
        communicator.all_gather(&self.own.slice(0..sequences * local)?, &parts)?;
        rows::gather_rows(communicator.gpu(), local, &parts, &self.order(sequences)?, logits)
    }

    /// Waits for everything in the stream; a peer that is gone is an error.
    pub fn wait(&mut self) -> Result<(), CollectiveError> {
        self.nccl.wait()
    }

    /// From now on the others are told of every step: they must be in [`follow`](crate::TextModel::follow).
    pub fn lead(&mut self) {
        self.leads = true;
    }

    /// Tells the others that nothing more comes.
    pub fn end(&mut self) -> Result<(), CollectiveError> {
        if std::mem::take(&mut self.leads) {
            orders::give_end(&mut self.nccl)?;
        }
        Ok(())
    }

    /// Ranks and their operations.
    pub fn nccl(&mut self) -> &mut Nccl {
        &mut self.nccl
    }

    /// Leaves the model.
    pub fn into_nccl(self) -> Nccl {
        self.nccl
    }
}

#[cfg(feature = "nccl")]
fn failed(error: CollectiveError) -> GpuError {
    match error {
        CollectiveError::Gpu(error) => error,
        error => GpuError::Nccl {
            action: "step",
            status: error.to_string(),
        },
    }
}

impl Peers {
    /// Has the others compute a step too, if this rank leads.
    pub fn tell_step<T: Float>(
        &mut self,
        pool: (usize, usize),
        size: Size,
        words: &[u32],
        features: &[(Vec<i32>, Buffer<T>)],
    ) -> Result<(), GpuError> {
        match self {
            #[cfg(feature = "nccl")]
            Self::Group(group) if group.leads => {
                orders::give_step(&mut group.nccl, pool, size, words, features).map_err(failed)
            }
            _ => {
                let _ = (pool, size, words, features);
                Ok(())
            }
        }
    }

    /// Whether the model is whole.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Waits for everything in the stream, if there are others to be waited for.
    pub fn settle(&mut self) -> Result<(), GpuError> {
        match self {
            Self::None => Ok(()),
            #[cfg(feature = "nccl")]
            Self::Group(group) => group.wait().map_err(failed),
        }
    }

    /// Has the others copy blocks too, if this rank leads.
    pub fn tell_copy(&mut self, pool: (usize, usize), pairs: &[(u32, u32)]) -> Result<(), GpuError> {
        match self {
            #[cfg(feature = "nccl")]
            Self::Group(group) if group.leads => orders::give_copy(&mut group.nccl, pool, pairs).map_err(failed),
            _ => {
                let _ = (pool, pairs);
                Ok(())
            }
        }
    }

    /// Rows of all tables together: of a model of this shape here.
    pub fn vocabulary(&self, shape: &TextShape) -> usize {
        match self {
            Self::None => shape.vocabulary,
            #[cfg(feature = "nccl")]
            Self::Group(group) => group.shard.whole().vocabulary,
        }
    }

    /// Adds what all ranks have.
    pub fn sum<T: Float>(&self, values: &Buffer<T>) -> Result<(), GpuError> {
        match self {
            Self::None => {
                let _ = values;
                Ok(())
            }
            #[cfg(feature = "nccl")]
            Self::Group(group) => group.nccl.communicator().all_reduce_sum(values),
        }
    }

    /// Ids as rows of the table here: those of other ranks are none of it, and are looked up as zeros.
    pub fn localize(&self, ids: &mut [u32]) {
        match self {
            Self::None => {
                let _ = ids;
            }
            #[cfg(feature = "nccl")]
            Self::Group(group) => {
                let first = u32::try_from(group.shard.tokens().start).unwrap_or_default();
                ids.iter_mut().for_each(|id| *id = id.wrapping_sub(first));
            }
        }
    }

    /// Where this rank's logits go before [`Self::gather`] completes `all`, which `[sequences, vocabulary]` are to be.
    pub fn own_logits(&self, all: &Buffer<f32>) -> Result<Buffer<f32>, GpuError> {
        match self {
            Self::None => Ok(all.clone()),
            #[cfg(feature = "nccl")]
            Self::Group(group) => group.own.slice(0..all.len() / group.shard.size()),
        }
    }

    /// Completes the logits from those of all ranks, the same bits at each.
    pub fn gather(&self, all: &Buffer<f32>) -> Result<(), GpuError> {
        match self {
            Self::None => {
                let _ = all;
                Ok(())
            }
            #[cfg(feature = "nccl")]
            Self::Group(group) => group.logits(all),
        }
    }
}
