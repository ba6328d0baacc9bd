//! Collective operations of GPUs. The ranks meet over TCP, and keep that connection: plans of steps travel over it, and it
//! is where a rank that is gone is seen, which NCCL's kernels would wait for without end.

use std::time::Duration;

use flotilla_kernels::{
    Buffer, Float, Gpu,
    gpu::nccl::{Communicator, UniqueId},
};

use super::{Collective, CollectiveError, Tcp, Wire};

/// A GPU's place in a group. Operations are put into the GPU's stream and return at once; they may be recorded in a graph,
/// once each has been done outside of one. [`Self::wait`] is where failures are seen: call it before results are read.
#[derive(Debug)]
pub struct Nccl {
    communicator: Communicator,
    control: Tcp,
}

impl Nccl {
    /// Joins the GPUs of the ranks of `control`.
    pub fn new(gpu: &Gpu, mut control: Tcp) -> Result<Self, CollectiveError> {
        let mut id = [0; UniqueId::BYTES];
        if control.rank() == 0 {
            let drawn = UniqueId::new();
            if let Err(error) = &drawn {
                control.give_up(&error.to_string());
            }
            id = drawn?.to_bytes();
        }
        control.broadcast(&mut id, 0)?;
        // NCCL waits for all ranks without a limit: they are here.
        control.barrier()?;
        let id = UniqueId::from_bytes(id);
        let joined = Communicator::new(gpu, &id, control.rank(), control.size());
        if let Err(error) = &joined {
            control.give_up(&error.to_string());
        }
        Ok(Self {
            communicator: joined?,
            control,
        })
    }

    /// The GPUs' own group, whose operations take no mutable reference: a model that records graphs holds it.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// The connection of the processes.
    pub fn control(&mut self) -> &mut Tcp {
        &mut self.control
    }

    /// Waits for everything in the stream. A rank that left is named; one that stopped is a failure after the timeout.
    pub fn wait(&mut self) -> Result<(), CollectiveError> {
        let Self { communicator, control } = self;
        let mut left = None;
        let waited = communicator.wait(control.timeout(), || match control.look() {
            Ok(()) => true,
            Err(error) => {
                left = Some(error);
                false
            }
        });
        match (waited, left) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(left)) => Err(left),
            (Err(error), None) => {
                self.control.give_up(&error.to_string());
                Err(error.into())
            }
        }
    }

    /// How long a rank is waited for.
    pub fn timeout(&self) -> Duration {
        self.control.timeout()
    }
}

impl Collective for Nccl {
    type Read<'a, T: Wire> = &'a Buffer<T>;
    type Write<'a, T: Wire> = &'a Buffer<T>;

    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    fn size(&self) -> usize {
        self.communicator.size()
    }

    fn all_reduce_sum<T: Wire + Float>(&mut self, values: &Buffer<T>) -> Result<(), CollectiveError> {
        Ok(self.communicator.all_reduce_sum(values)?)
    }

    fn all_gather<T: Wire>(&mut self, part: &Buffer<T>, whole: &Buffer<T>) -> Result<(), CollectiveError> {
        Ok(self.communicator.all_gather(part, whole)?)
    }

    fn broadcast<T: Wire>(&mut self, values: &Buffer<T>, root: usize) -> Result<(), CollectiveError> {
        Ok(self.communicator.broadcast(values, root)?)
    }

    /// Of the streams too: everything before it has been done on every GPU.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.wait()?;
        self.control.barrier()
    }
}
