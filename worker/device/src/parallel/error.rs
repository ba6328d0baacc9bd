use std::{fmt, io, net::SocketAddr, time::Duration};

/// An operation of a group.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// Ranks find each other.
    Join,
    /// Sums over all ranks.
    AllReduce,
    /// Parts of all ranks.
    AllGather,
    /// Numbers of one rank.
    Broadcast,
    /// All ranks are there.
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Join => "join",
            Self::AllReduce => "all-reduce",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        })
    }
}

/// What a peer did.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Its process has ended, or it left.
    #[error("it closed its connection")]
    Closed,
    /// It stopped, or it is in other work.
    #[error("it sent nothing for {0:?}")]
    Silent(Duration),
    /// It takes nothing: it stopped, or its machine is gone.
    #[error("it took nothing for {0:?}")]
    Stuck(Duration),
    /// It is in another operation, or no member of this group.
    #[error("{0}")]
    Protocol(String),
    /// It gave up for a reason of its own, which it told.
    #[error("it gave up: {0}")]
    GaveUp(String),
    /// The network.
    #[error("{0}")]
    Io(io::Error),
}

/// Why an operation of a group failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A peer is gone, late or wrong.
    #[error("rank {rank}: {operation} {sequence} failed at rank {peer} ({address}): {cause}")]
    Peer {
        /// This rank.
        rank: usize,
        /// The rank at fault.
        peer: usize,
        /// Where it is.
        address: SocketAddr,
        /// What was done.
        operation: Operation,
        /// Its number in the life of the group.
        sequence: u32,
        /// What happened.
        cause: Cause,
    },
    /// Some ranks never came.
    #[error("rank {rank}: ranks {missing:?} of {size} did not come within {limit:?}{refused}")]
    Missing {
        /// This rank.
        rank: usize,
        /// Ranks that are needed.
        size: usize,
        /// Those that did not come.
        missing: Vec<usize>,
        /// How long was waited.
        limit: Duration,
        /// Who came and was sent away, and why.
        refused: String,
    },
    /// The meeting point could not be reached or did not let this rank in.
    #[error("rank {rank}: rank {peer} at {address} did not let it in: {cause}")]
    Refused {
        /// This rank.
        rank: usize,
        /// The rank that was asked.
        peer: usize,
        /// Where.
        address: String,
        /// Why.
        cause: String,
    },
    /// The group failed before and cannot be used again.
    #[error("rank {rank}: the group failed before: {first}")]
    Broken {
        /// This rank.
        rank: usize,
        /// The first failure.
        first: String,
    },
    /// Arguments that do not fit.
    #[error("rank {rank}: {fault}")]
    Input {
        /// This rank.
        rank: usize,
        /// What does not fit.
        fault: String,
    },
    /// A socket of this process.
    #[error("rank {rank}: {action}: {source}")]
    Socket {
        /// This rank.
        rank: usize,
        /// What was done.
        action: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// The card.
    #[cfg(feature = "nccl")]
    #[error(transparent)]
    Gpu(#[from] flotilla_kernels::GpuError),
}
