//! How the processes of a group find each other. Rank 0 listens at an address that all know; the others come to it, say
//! where they listen, and are told where the rest are; then each connects to those before it. On every connection both ends
//! prove that they know the token, which itself does not travel. What follows is neither secret nor signed: a group belongs
//! into a network of its own.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{
    error::{CollectiveError, Operation},
    frame::{self, Kind},
};

/// The most ranks: each has a connection with each.
pub(super) const MAX_RANKS: usize = 64;

const JOIN: Kind = Kind::Of(Operation::Join);
/// Names the protocol and its version in the first frame.
const MAGIC: &[u8; 8] = b"FLOTP001";
/// How long a connection may take to say who it is, so that a stray one does not keep the others out.
const INTRODUCTION: Duration = Duration::from_secs(3);
/// The longest frame of the meeting: the addresses of all ranks.
const MAX_TABLE: usize = 64 * MAX_RANKS;

type Nonce = [u8; 32];
type Proof = [u8; 32];

/// A secret that the ranks of a group share.
#[derive(Clone)]
pub struct Token(Vec<u8>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// From its bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// HMAC-SHA256 (RFC 2104) of the parts.
    fn prove(&self, parts: &[&[u8]]) -> Proof {
        const BLOCK: usize = 64;
        let mut key = [0; BLOCK];
        if self.0.len() > BLOCK {
            key[..32].copy_from_slice(&Sha256::digest(&self.0));
        } else {
            key[..self.0.len()].copy_from_slice(&self.0);
        }
        let mut inner = Sha256::new_with_prefix(key.map(|byte| byte ^ 0x36));
        parts.iter().for_each(|part| inner.update(part));
        let outer = Sha256::new_with_prefix(key.map(|byte| byte ^ 0x5c));
        outer.chain_update(inner.finalize()).finalize().into()
    }
}

/// Equality in a time that does not depend on where they differ.
fn same(one: &Proof, other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |apart, (a, b)| apart | (a ^ b)) == 0
}

/// A place in a group.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Which member this is, from 0.
    pub rank: usize,
    /// Members, this one included.
    pub size: usize,
    /// What they share.
    pub token: Token,
    /// How long a rank waits for another: to come, and in every operation. Longer than what ranks compute between two
    /// operations differs.
    pub timeout: Duration,
}

/// A peer that has proved itself.
#[derive(Debug)]
pub(super) struct Connected {
    pub rank: usize,
    pub stream: TcpStream,
    pub address: SocketAddr,
}

/// What a rank says of itself to one that it connects to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Card {
    rank: u32,
    size: u32,
    /// Where it listens itself.
    port: u16,
}

impl Card {
    const BYTES: usize = 10;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.rank.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..].copy_from_slice(&self.port.to_le_bytes());
        bytes
    }

    fn of_bytes([r0, r1, r2, r3, s0, s1, s2, s3, p0, p1]: [u8; Self::BYTES]) -> Self {
        Self {
            rank: u32::from_le_bytes([r0, r1, r2, r3]),
            size: u32::from_le_bytes([s0, s1, s2, s3]),
            port: u16::from_le_bytes([p0, p1]),
        }
    }
}

/// Why a connection was sent away.
enum Away {
    /// No peer of ours, or one that broke off: others may still come.
    Stranger(String),
    /// A peer that can never belong here; it was told why.
    Misfit(String),
}

impl From<io::Error> for Away {
    fn from(error: io::Error) -> Self {
        Self::Stranger(error.to_string())
    }
}

impl Membership {
    /// An error of a socket of this process.
    fn socket(&self, action: &'static str) -> impl FnOnce(io::Error) -> CollectiveError {
        let rank = self.rank;
        move |source| CollectiveError::Socket { rank, action, source }
    }

    pub(super) fn validate(&self) -> Result<(), CollectiveError> {
        let (rank, size) = (self.rank, self.size);
        let rules = [
            (
                rank < size && size <= MAX_RANKS,
                format!("rank {rank} of {size} ranks; at most {MAX_RANKS} are possible"),
            ),
            (!self.token.0.is_empty() || size == 1, "the token is empty".to_owned()),
            (!self.timeout.is_zero(), "the timeout is zero".to_owned()),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, fault)) => Err(CollectiveError::Input { rank, fault }),
            None => Ok(()),
        }
    }

    /// The way of rank 0: waits for the others and tells them where they are.
    pub(super) fn host(&self, listener: &TcpListener) -> Result<Vec<Connected>, CollectiveError> {
        let deadline = Instant::now() + self.timeout;
        let mut peers = Vec::new();
        let mut listens = vec![None; self.size];
        let met = self.accept(listener, 1..self.size, deadline, &mut peers, |card, address| {
            listens[card.rank as usize] = Some(SocketAddr::new(address.ip(), card.port));
        });
        if let Err(error) = met {
            let why = error.to_string();
            for peer in &mut peers {
                let _ = frame::write(&mut peer.stream, Kind::Abort, 0, why.as_bytes());
            }
            return Err(error);
        }
        let table = listens.iter().flatten().map(|address| format!("{address}\n"));
        let table = table.collect::<String>();
        for peer in &mut peers {
            frame::write(&mut peer.stream, JOIN, 0, table.as_bytes())
                .map_err(self.socket("tell a rank where the others are"))?;
        }
        Ok(peers)
    }

    /// The way of the others: to rank 0 at `address`, then to those before this one; those after it come here.
    pub(super) fn join(&self, address: &str) -> Result<Vec<Connected>, CollectiveError> {
        let deadline = Instant::now() + self.timeout;
        // It listens at the address from which it reaches rank 0, which the others reach too.
        let mut listener = None;
        let mut first = self.connect(0, address, deadline, |stream| {
            let bound = TcpListener::bind((stream.local_addr()?.ip(), 0))?;
            let port = bound.local_addr()?.port();
            listener = Some(bound);
            Ok(port)
        })?;
        let listener = listener.ok_or_else(|| self.refused(0, address, "it did not ask where this rank listens"))?;
        let table = self
            .read_table(&mut first.stream, deadline)
            .map_err(|cause| self.refused(0, address, &cause))?;
        let mut peers = vec![first];
        for (peer, address) in (1..self.rank).zip(&table) {
            peers.push(self.connect(peer, &address.to_string(), deadline, |_| Ok(0))?);
        }
        self.accept(&listener, self.rank + 1..self.size, deadline, &mut peers, |_, _| ())?;
        Ok(peers)
    }

    fn refused(&self, peer: usize, address: &str, cause: &str) -> CollectiveError {
        CollectiveError::Refused {
            rank: self.rank,
            peer,
            address: address.to_owned(),
            cause: cause.to_owned(),
        }
    }

    /// Where ranks 1, 2, … listen.
    fn read_table(&self, stream: &mut TcpStream, deadline: Instant) -> Result<Vec<SocketAddr>, String> {
        let fault = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "it never said where the others are".to_owned(),
            _ => error.to_string(),
        };
        stream.set_read_timeout(Some(remaining(deadline))).map_err(fault)?;
        let table = receive(stream, JOIN, MAX_TABLE).map_err(fault)?;
        let table = std::str::from_utf8(&table).map_err(|error| error.to_string())?;
        let table = table.lines().map(str::parse).collect::<Result<Vec<SocketAddr>, _>>();
        let table = table.map_err(|error| error.to_string())?;
        if table.len() + 1 == self.size {
            Ok(table)
        } else {
            Err(format!("it named {} ranks", table.len() + 1))
        }
    }

    /// Waits for one connection of each of the ranks `wanted`.
    fn accept(
        &self,
        listener: &TcpListener,
        wanted: std::ops::Range<usize>,
        deadline: Instant,
        peers: &mut Vec<Connected>,
        mut came: impl FnMut(Card, SocketAddr),
    ) -> Result<(), CollectiveError> {
        listener.set_nonblocking(true).map_err(self.socket("listen"))?;
        let mut missing = wanted.collect::<Vec<_>>();
        let mut refused = String::new();
        while !missing.is_empty() {
            let (stream, address) = match listener.accept() {
                Ok(connection) => connection,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                }
                Err(_) => {
                    return Err(CollectiveError::Missing {
                        rank: self.rank,
                        size: self.size,
                        missing,
                        limit: self.timeout,
                        refused,
                    });
                }
            };
            match self.receive_guest(stream, address, deadline, &missing) {
                Ok((peer, card)) => {
                    missing.retain(|rank| *rank != peer.rank);
                    came(card, address);
                    peers.push(peer);
                }
                // The last reason is enough: a scanner may come a thousand times.
                Err(Away::Stranger(why) | Away::Misfit(why)) => refused = format!("; {address} was sent away: {why}"),
            }
        }
        Ok(())
    }

    /// The accepting end of an introduction.
    fn receive_guest(
        &self,
        mut stream: TcpStream,
        address: SocketAddr,
        deadline: Instant,
        missing: &[usize],
    ) -> Result<(Connected, Card), Away> {
        stream.set_nonblocking(false)?;
        prepare(&stream, remaining(deadline).min(INTRODUCTION))?;
        let mine = rand::random::<Nonce>();
        frame::write(&mut stream, JOIN, 0, &[MAGIC, &mine[..]].concat())?;
        let answer = receive(&mut stream, JOIN, 32 + Card::BYTES + 32)?;
        let (Some((theirs, rest)), true) = (answer.split_first_chunk::<32>(), answer.len() == 32 + Card::BYTES + 32)
        else {
            return Err(Away::Stranger("it spoke another protocol".to_owned()));
        };
        let (bytes, proof) = rest.split_first_chunk().unwrap_or((&[0; Card::BYTES], &[]));
        let card = Card::of_bytes(*bytes);
        let rank = card.rank as usize;
        let verdict = if !same(&self.token.prove(&[b"join", &mine, theirs, bytes]), proof) {
            Err("its token is another".to_owned())
        } else if card.size as usize != self.size {
            Err(format!(
                "it takes the group to have {} ranks, not {}",
                card.size, self.size
            ))
        } else if !missing.contains(&rank) {
            Err(format!("rank {rank} is there already or is none of this group"))
        } else {
            Ok(())
        };
        if let Err(why) = verdict {
            frame::write(&mut stream, Kind::Abort, 0, why.as_bytes())?;
            return Err(Away::Misfit(why));
        }
        let proof = self.token.prove(&[b"welcome", &mine, theirs, &rank_bytes(self.rank)]);
        frame::write(&mut stream, JOIN, 0, &proof)?;
        let peer = Connected { rank, stream, address };
        Ok((peer, card))
    }

    /// Connects to `peer`, again and again until the deadline: it may not be there yet.
    fn connect(
        &self,
        peer: usize,
        address: &str,
        deadline: Instant,
        mut port: impl FnMut(&TcpStream) -> io::Result<u16>,
    ) -> Result<Connected, CollectiveError> {
        loop {
            let cause = match self.introduce(peer, address, deadline, &mut port) {
                Ok(peer) => return Ok(peer),
                Err(Away::Misfit(cause)) => return Err(self.refused(peer, address, &cause)),
                Err(Away::Stranger(cause)) => cause,
            };
            if Instant::now() >= deadline {
                return Err(self.refused(peer, address, &format!("{cause}, for {:?}", self.timeout)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The connecting end of an introduction.
    fn introduce(
        &self,
        peer: usize,
        address: &str,
        deadline: Instant,
        port: &mut impl FnMut(&TcpStream) -> io::Result<u16>,
    ) -> Result<Connected, Away> {
        let mut stream = dial(address, remaining(deadline))?;
        prepare(&stream, remaining(deadline))?;
        let greeting = receive(&mut stream, JOIN, 40)?;
        let theirs = match greeting.split_first_chunk::<8>() {
            Some((magic, nonce)) if magic == MAGIC && nonce.len() == 32 => nonce,
            _ => return Err(Away::Misfit("it speaks another protocol".to_owned())),
        };
        let card = Card {
            rank: u32::try_from(self.rank).unwrap_or(u32::MAX),
            size: u32::try_from(self.size).unwrap_or(u32::MAX),
            port: port(&stream)?,
        };
        let (mine, card) = (rand::random::<Nonce>(), card.to_bytes());
        let proof = self.token.prove(&[b"join", theirs, &mine, &card]);
        frame::write(&mut stream, JOIN, 0, &[&mine[..], &card, &proof].concat())?;
        let welcome = receive(&mut stream, JOIN, 32).map_err(|error| match error.kind() {
            ErrorKind::ConnectionRefused => Away::Misfit(error.to_string()),
            _ => Away::from(error),
        })?;
        let expected = self.token.prove(&[b"welcome", theirs, &mine, &rank_bytes(peer)]);
        if !same(&expected, &welcome) {
            return Err(Away::Misfit(
                "it does not know the token, or is another rank".to_owned(),
            ));
        }
        let address = stream.peer_addr()?;
        Ok(Connected {
            rank: peer,
            stream,
            address,
        })
    }
}

fn rank_bytes(rank: usize) -> [u8; 4] {
    u32::try_from(rank).unwrap_or(u32::MAX).to_le_bytes()
}

/// Time left; never zero, which sockets take for no limit.
fn remaining(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

fn prepare(stream: &TcpStream, limit: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))
}

fn dial(address: &str, limit: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reads a frame of `kind`, or why the other end gave up, as `ConnectionRefused`.
fn receive(stream: &mut TcpStream, kind: Kind, most: usize) -> io::Result<Vec<u8>> {
    let head = frame::read_head(stream)?;
    if head.body > most.max(512) || (head.kind != kind && head.kind != Kind::Abort) {
        return Err(io::Error::new(ErrorKind::InvalidData, "it spoke another protocol"));
    }
    let mut body = vec![0; head.body];
    io::Read::read_exact(stream, &mut body)?;
    if head.kind == Kind::Abort {
        let why = String::from_utf8_lossy(&body).into_owned();
        return Err(io::Error::new(ErrorKind::ConnectionRefused, why));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, cases 2 and 6.
    #[test]
    fn proofs_are_hmac_sha256() {
        let hex = |proof: Proof| proof.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let proof = Token::new("Jefe").prove(&[b"what do ya want ", b"for nothing?"]);
        assert_eq!(
            hex(proof),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        let proof = Token::new([0xaa; 131]).prove(&[b"Test Using Larger Than Block-Size Key - Hash Key First"]);
        assert_eq!(
            hex(proof),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn cards_travel() {
        let card = Card {
            rank: 3,
            size: 0x0102_0304,
            port: 50_001,
        };
        assert_eq!(Card::of_bytes(card.to_bytes()), card);
    }

    #[test]
    fn a_token_is_not_printed() {
        assert_eq!(format!("{:?}", Token::new("secret")), "Token");
    }
}
