//! Collective operations over TCP: of CPU processes, and beside NCCL to meet and to notice a rank that is gone.
//!
//! Every rank has a connection with every other. A sum is made in two exchanges: each rank gets one part of the numbers from
//! all, adds the contributions in the order of ranks in f32, rounds once, and gives the sum to all. Short ones take one
//! exchange, in which everybody gets everything. Either way each number is the same sum in the same order everywhere, so
//! that ranks never drift apart, and the bytes that a rank sends are those of a ring.

use std::{
    io::{self, ErrorKind, Read},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    ops::Range,
    time::{Duration, Instant},
};

use flotilla_kernels::Float;

use super::{
    Collective, Membership,
    error::{Cause, CollectiveError, Operation},
    frame::{self, HEAD, Head, Kind, Wire},
    rendezvous::Connected,
};

/// A message that fits into the buffers of an idle connection: it is written before anything is read, without a thread.
const SHORT: usize = 16 << 10;
/// The longest reason that is passed on.
const MAX_REASON: usize = 400;
/// Who has given up stays so long for all others to hear why.
const PARTING: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    address: SocketAddr,
}

/// A place in a group of processes that are connected by TCP.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    size: usize,
    timeout: Duration,
    /// By rank; none at this one's place.
    peers: Vec<Option<Peer>>,
    /// Operations so far.
    sequence: u32,
    /// The first failure.
    broken: Option<String>,
}

/// What happened at which peer.
type Fault = (usize, Cause);

impl Drop for Tcp {
    fn drop(&mut self) {
        if self.broken.is_some() {
            self.part();
        }
    }
}

impl Tcp {
    /// Rank 0 of a group: waits at `listener` for the others.
    pub fn host(listener: &TcpListener, membership: &Membership) -> Result<Self, CollectiveError> {
        membership.validate()?;
        if membership.rank != 0 {
            return Err(CollectiveError::Input {
                rank: membership.rank,
                fault: "rank 0 is the one that the others come to".to_owned(),
            });
        }
        Self::new(membership, membership.host(listener)?)
    }

    /// Another rank of a group: comes to rank 0, which listens at `address` or soon will.
    pub fn join(address: &str, membership: &Membership) -> Result<Self, CollectiveError> {
        membership.validate()?;
        if membership.rank == 0 {
            return Err(CollectiveError::Input {
                rank: 0,
                fault: "rank 0 is the one that the others come to".to_owned(),
            });
        }
        Self::new(membership, membership.join(address)?)
    }

    /// A group of one, which waits for nobody; its timeout is that of a GPU's own work.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            size: 1,
            timeout: Duration::from_secs(60),
            peers: vec![None],
            sequence: 0,
            broken: None,
        }
    }

    fn new(membership: &Membership, connected: Vec<Connected>) -> Result<Self, CollectiveError> {
        let Membership {
            rank, size, timeout, ..
        } = *membership;
        let mut peers = Vec::new();
        peers.resize_with(size, || None);
        for Connected {
            rank: peer,
            stream,
            address,
        } in connected
        {
            let limits = stream
                .set_read_timeout(Some(timeout))
                .and_then(|()| stream.set_write_timeout(Some(timeout)));
            limits.map_err(|source| CollectiveError::Socket {
                rank,
                action: "limit how long a peer is waited for",
                source,
            })?;
            peers[peer] = Some(Peer { stream, address });
        }
        Ok(Self {
            rank,
            size,
            timeout,
            peers,
            sequence: 0,
            broken: None,
        })
    }

    /// How long a peer is waited for.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Waits without a limit until something comes from a rank, or until it leaves: a server may have nothing to do for days.
    pub fn idle(&mut self, from: usize) -> Result<(), CollectiveError> {
        self.usable()?;
        let Some(Some(peer)) = self.peers.get(from) else {
            return Ok(());
        };
        let cause = loop {
            match peer.stream.peek(&mut [0]) {
                Ok(0) => break Cause::Closed,
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => break self.cause(error, false),
            }
        };
        Err(self.fail(Operation::Broadcast, (from, cause)))
    }

    /// Leaves the group because of something outside of it, and tells the others why.
    pub fn give_up(&mut self, reason: &str) {
        if self.broken.is_none() {
            let reason = format!("rank {}: {reason}", self.rank);
            self.tell(reason);
        }
    }

    /// The first failure, after which every operation is an error.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Whether a peer is seen to have left, without waiting for any: what it sent in time is left to be read.
    pub fn look(&mut self) -> Result<(), CollectiveError> {
        self.usable()?;
        let fault = self.peers().find_map(|(rank, peer)| {
            let mut head = [0; HEAD];
            let looked = peer
                .stream
                .set_nonblocking(true)
                .and_then(|()| peer.stream.peek(&mut head));
            let restored = peer.stream.set_nonblocking(false);
            match looked {
                Ok(0) => Some((rank, Cause::Closed)),
                Ok(HEAD) if Head::of_bytes(head).is_some_and(|head| head.kind == Kind::Abort) => {
                    self.receive(rank, Operation::Barrier, 0).err()
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => Some((rank, self.cause(error, false))),
                _ => restored.err().map(|error| (rank, Cause::Io(error))),
            }
        });
        match fault {
            Some(fault) => Err(self.fail(Operation::Barrier, fault)),
            None => Ok(()),
        }
    }

    /// The least of what the ranks have, for a moment before which each works for a time of its own, as it does to load its
    /// part of a model: the others are waited for as long as all live.
    pub fn least(&mut self, mine: u64) -> Result<u64, CollectiveError> {
        const EVERY: Duration = Duration::from_millis(10);
        self.begin()?;
        let (operation, message) = (Operation::AllGather, encoded(&[mine]));
        let mut missing = self.peers().map(|(rank, _)| rank).collect::<Vec<_>>();
        let sent = missing
            .iter()
            .try_for_each(|rank| self.send(*rank, operation, &message));
        sent.map_err(|fault| self.fail(operation, fault))?;
        let mut least = mine;
        while !missing.is_empty() {
            self.look()?;
            let here = missing.iter().position(|rank| self.has_sent(*rank));
            let Some(here) = here else {
                std::thread::sleep(EVERY);
                continue;
            };
            let rank = missing.swap_remove(here);
            let received = self.receive(rank, operation, message.len());
            let theirs = received.map_err(|fault| self.fail(operation, fault))?;
            let mut number = [0u64];
            u64::decode(&theirs, &mut number);
            least = least.min(number[0]);
        }
        Ok(least)
    }

    /// Whether something of a peer can be read now.
    fn has_sent(&self, rank: usize) -> bool {
        let Some(Some(Peer { stream, .. })) = self.peers.get(rank) else {
            return false;
        };
        let there = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
        // A connection that cannot be set back fails at the next read.
        let _ = stream.set_nonblocking(false);
        matches!(there, Ok(bytes) if bytes > 0)
    }

    fn peers(&self) -> impl Iterator<Item = (usize, &Peer)> {
        let peers = self.peers.iter().enumerate();
        peers.filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)))
    }

    fn usable(&self) -> Result<(), CollectiveError> {
        match &self.broken {
            Some(first) => Err(CollectiveError::Broken {
                rank: self.rank,
                first: first.clone(),
            }),
            None => Ok(()),
        }
    }

    fn input(&self, holds: bool, fault: impl FnOnce() -> String) -> Result<(), CollectiveError> {
        if holds {
            Ok(())
        } else {
            Err(CollectiveError::Input {
                rank: self.rank,
                fault: fault(),
            })
        }
    }

    /// What an error of a connection says of its peer.
    fn cause(&self, error: io::Error, writing: bool) -> Cause {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut if writing => Cause::Stuck(self.timeout),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Cause::Silent(self.timeout),
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => Cause::Closed,
            ErrorKind::InvalidData => Cause::Protocol(error.to_string()),
            _ => Cause::Io(error),
        }
    }

    /// Gives the group up, and tells the other peers whose fault it was, so that all of them name the same.
    fn fail(&mut self, operation: Operation, (peer, cause): Fault) -> CollectiveError {
        let (rank, sequence) = (self.rank, self.sequence);
        let address = self.peers[peer]
            .as_ref()
            .map_or_else(|| SocketAddr::from(([0; 4], 0)), |peer| peer.address);
        let error = CollectiveError::Peer {
            rank,
            peer,
            address,
            operation,
            sequence,
            cause,
        };
        let reason = match &error {
            CollectiveError::Peer {
                cause: Cause::GaveUp(reason),
                ..
            } => reason.clone(),
            error => error.to_string(),
        };
        self.tell(reason);
        error
    }

    /// Tells every peer why there will be nothing more from here.
    fn tell(&mut self, reason: String) {
        let short = reason.chars().take(MAX_REASON).collect::<String>();
        for (_, peer) in self.peers() {
            let mut stream = &peer.stream;
            let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
            let _ = frame::write(&mut stream, Kind::Abort, self.sequence, short.as_bytes());
            let _ = stream.shutdown(Shutdown::Write);
        }
        self.broken = Some(reason);
    }

    /// Reads on for a while what peers still send: a connection that is closed over something unread is reset, and what was
    /// [told](Self::tell) is lost on its way.
    fn part(&self) {
        let share = PARTING / u32::try_from(self.size).unwrap_or(u32::MAX);
        for (_, peer) in self.peers() {
            let (mut stream, mut rest, begin) = (&peer.stream, [0; 1 << 14], Instant::now());
            while let Some(left) = share.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
                let limited = stream.set_read_timeout(Some(left));
                if limited.is_err() || !matches!(stream.read(&mut rest), Ok(1..)) {
                    break;
                }
            }
        }
    }

    /// Sends a message to each peer that has one and receives one of so many bytes from each that is named. Messages of
    /// different ranks cross: long ones are written by threads while this one reads.
    fn exchange(
        &mut self,
        operation: Operation,
        messages: &[(usize, Vec<u8>)],
        expected: &[(usize, usize)],
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let this = &*self;
        let exchanged = std::thread::scope(|scope| {
            let mut writers = Vec::new();
            for (to, message) in messages {
                let write = move || this.send(*to, operation, message);
                if message.len() <= SHORT {
                    write()?;
                } else {
                    writers.push(scope.spawn(write));
                }
            }
            let received = expected.iter();
            let received = received.map(|(from, bytes)| this.receive(*from, operation, *bytes));
            let received = received.collect::<Result<Vec<_>, Fault>>();
            for writer in writers {
                let lost = |_| (this.rank, Cause::Protocol("a thread that writes panicked".to_owned()));
                let written = writer.join().map_err(lost)?;
                if received.is_ok() {
                    written?;
                }
            }
            received
        });
        exchanged.map_err(|fault| self.fail(operation, fault))
    }

    fn send(&self, to: usize, operation: Operation, message: &[u8]) -> Result<(), Fault> {
        let Some(Peer { stream, .. }) = &self.peers[to] else {
            return Ok(());
        };
        let written = frame::write(&mut &*stream, Kind::Of(operation), self.sequence, message);
        written.map_err(|error| (to, self.unwritten(to, error)))
    }

    /// Why a peer took nothing. One that gave up has said why before it left.
    fn unwritten(&self, to: usize, error: io::Error) -> Cause {
        let cause = self.cause(error, true);
        let Some(Peer { stream, .. }) = &self.peers[to] else {
            return cause;
        };
        if matches!(cause, Cause::Closed) && stream.set_read_timeout(Some(Duration::from_millis(100))).is_ok() {
            // Messages that crossed may lie before it.
            while let Ok(head) = frame::read_head(&mut &*stream) {
                let mut body = vec![0; head.body];
                if (&mut &*stream).read_exact(&mut body).is_err() {
                    break;
                }
                if head.kind == Kind::Abort {
                    return Cause::GaveUp(String::from_utf8_lossy(&body).into_owned());
                }
            }
        }
        cause
    }

    fn receive(&self, from: usize, operation: Operation, bytes: usize) -> Result<Vec<u8>, Fault> {
        let Some(Peer { stream, .. }) = &self.peers[from] else {
            return Ok(Vec::new());
        };
        let mut stream = stream;
        let failed = |error| (from, self.cause(error, false));
        let mut message = Vec::with_capacity(bytes);
        loop {
            let head = frame::read_head(&mut stream).map_err(failed)?;
            let before = message.len();
            message.resize(before + head.body, 0);
            let wrong = match head.kind {
                Kind::Abort => {
                    stream.read_exact(&mut message[before..]).map_err(failed)?;
                    let reason = String::from_utf8_lossy(&message[before..]).into_owned();
                    return Err((from, Cause::GaveUp(reason)));
                }
                Kind::Of(theirs) if theirs != operation || head.sequence != self.sequence => {
                    Some(format!("it is in {theirs} {}", head.sequence))
                }
                Kind::Of(_) if head.message != bytes as u64 || message.len() > bytes => {
                    Some(format!("it has {} bytes, {bytes} are needed", head.message))
                }
                Kind::Of(_) => None,
            };
            if let Some(problem) = wrong {
                return Err((from, Cause::Protocol(problem)));
            }
            stream.read_exact(&mut message[before..]).map_err(failed)?;
            if message.len() == bytes {
                return Ok(message);
            }
        }
    }

    /// Begins an operation.
    fn begin(&mut self) -> Result<(), CollectiveError> {
        self.usable()?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    /// The same message to every peer, one of so many bytes from each.
    fn tell_all(
        &mut self,
        operation: Operation,
        message: &[u8],
        bytes: impl Fn(usize) -> usize,
    ) -> Result<Vec<(usize, Vec<u8>)>, CollectiveError> {
        let ranks = self.peers().map(|(rank, _)| rank).collect::<Vec<_>>();
        let messages = ranks.iter().map(|rank| (*rank, message.to_vec())).collect::<Vec<_>>();
        let expected = ranks.iter().map(|rank| (*rank, bytes(*rank))).collect::<Vec<_>>();
        let received = self.exchange(operation, &messages, &expected)?;
        Ok(ranks.into_iter().zip(received).collect())
    }

    /// The sums of what this rank and the others have of some numbers, in the order of ranks.
    fn sum<T: Wire + Float>(&self, mine: &mut [T], theirs: &[(usize, Vec<u8>)]) {
        let mut sums = vec![0f32; mine.len()];
        let mut contribution = vec![T::default(); mine.len()];
        for rank in 0..self.size {
            match theirs.iter().find(|(peer, _)| *peer == rank) {
                Some((_, bytes)) => T::decode(bytes, &mut contribution),
                None => contribution.copy_from_slice(mine),
            }
            for (sum, value) in sums.iter_mut().zip(&contribution) {
                // Negative zeros stay what they are.
                *sum = if rank == 0 {
                    value.to_f32()
                } else {
                    *sum + value.to_f32()
                };
            }
        }
        for (value, sum) in mine.iter_mut().zip(sums) {
            *value = T::from_f32(sum);
        }
    }
}

/// One of `parts` parts of so many numbers, as equal as can be.
fn part(length: usize, parts: usize, index: usize) -> Range<usize> {
    length * index / parts..length * (index + 1) / parts
}

fn encoded<T: Wire>(values: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    T::encode(values, &mut bytes);
    bytes
}

impl Collective for Tcp {
    type Read<'a, T: Wire> = &'a [T];
    type Write<'a, T: Wire> = &'a mut [T];

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce_sum<T: Wire + Float>(&mut self, values: &mut [T]) -> Result<(), CollectiveError> {
        self.begin()?;
        let (size, length, width) = (self.size, values.len(), size_of::<T>());
        if length * width <= SHORT {
            let theirs = self.tell_all(Operation::AllReduce, &encoded(values), |_| length * width)?;
            self.sum(values, &theirs);
            return Ok(());
        }
        let own = part(length, size, self.rank);
        let ranks = self.peers().map(|(rank, _)| rank).collect::<Vec<_>>();
        let messages = ranks
            .iter()
            .map(|rank| (*rank, encoded(&values[part(length, size, *rank)])));
        let messages = messages.collect::<Vec<_>>();
        let expected = ranks.iter().map(|rank| (*rank, own.len() * width)).collect::<Vec<_>>();
        let received = self.exchange(Operation::AllReduce, &messages, &expected)?;
        let theirs = ranks.into_iter().zip(received).collect::<Vec<_>>();
        self.sum(&mut values[own.clone()], &theirs);
        let sums = encoded(&values[own]);
        let theirs = self.tell_all(Operation::AllReduce, &sums, |rank| {
            part(length, size, rank).len() * width
        })?;
        for (rank, bytes) in theirs {
            T::decode(&bytes, &mut values[part(length, size, rank)]);
        }
        Ok(())
    }

    fn all_gather<T: Wire>(&mut self, own: &[T], whole: &mut [T]) -> Result<(), CollectiveError> {
        let length = own.len();
        self.input(whole.len() == self.size * length, || {
            format!(
                "{} numbers are no room for {} parts of {length}",
                whole.len(),
                self.size
            )
        })?;
        self.begin()?;
        let theirs = self.tell_all(Operation::AllGather, &encoded(own), |_| size_of_val(own))?;
        let place = |rank: usize| rank * length..(rank + 1) * length;
        whole[place(self.rank)].copy_from_slice(own);
        for (rank, bytes) in theirs {
            T::decode(&bytes, &mut whole[place(rank)]);
        }
        Ok(())
    }

    fn broadcast<T: Wire>(&mut self, values: &mut [T], root: usize) -> Result<(), CollectiveError> {
        self.input(root < self.size, || format!("there is no rank {root} to hear"))?;
        self.begin()?;
        if self.rank == root {
            let bytes = encoded(values);
            let messages = self.peers().map(|(rank, _)| (rank, bytes.clone())).collect::<Vec<_>>();
            self.exchange(Operation::Broadcast, &messages, &[])?;
        } else {
            let expected = [(root, size_of_val(values))];
            let received = self.exchange(Operation::Broadcast, &[], &expected)?;
            T::decode(&received.concat(), values);
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.begin()?;
        self.tell_all(Operation::Barrier, &[], |_| 0).map(drop)
    }
}

#[cfg(test)]
mod tests;
