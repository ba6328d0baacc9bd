//! What travels between ranks: frames of a fixed head and a bounded body.

use std::io::{self, Read, Write};

use flotilla_kernels::Element;
use half::bf16;

use super::error::Operation;

/// The longest body. Longer messages are several frames; a head that says more is an error before anything is allocated.
pub(super) const MAX_BODY: usize = 1 << 20;
/// Bytes of a head.
pub(super) const HEAD: usize = 20;

/// Numbers that travel: little-endian, as wide as they are.
pub trait Wire: Element {
    /// Appends them.
    fn encode(values: &[Self], to: &mut Vec<u8>);
    /// Reads as many as `to` holds; `from` has exactly their bytes.
    fn decode(from: &[u8], to: &mut [Self]);
}

macro_rules! wire {
    ($($number:ty),*) => {$(
        impl Wire for $number {
            fn encode(values: &[Self], to: &mut Vec<u8>) {
                to.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }

            fn decode(from: &[u8], to: &mut [Self]) {
                let (bytes, _) = from.as_chunks::<{ size_of::<$number>() }>();
                for (value, bytes) in to.iter_mut().zip(bytes) {
                    *value = Self::from_le_bytes(*bytes);
                }
            }
        }
    )*};
}

wire!(f32, bf16, u8, i8, u32, i32, u64);

/// What a frame is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// A part of an operation.
    Of(Operation),
    /// The sender gives up; the body says why.
    Abort,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Of(Operation::Join) => 1,
            Self::Of(Operation::AllReduce) => 2,
            Self::Of(Operation::AllGather) => 3,
            Self::Of(Operation::Broadcast) => 4,
            Self::Of(Operation::Barrier) => 5,
            Self::Abort => 6,
        }
    }

    fn of_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Of(Operation::Join),
            2 => Self::Of(Operation::AllReduce),
            3 => Self::Of(Operation::AllGather),
            4 => Self::Of(Operation::Broadcast),
            5 => Self::Of(Operation::Barrier),
            6 => Self::Abort,
            _ => return None,
        })
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Head {
    pub kind: Kind,
    /// The operation's number.
    pub sequence: u32,
    /// Bytes of the body.
    pub body: usize,
    /// Bytes of the message of which this is a frame.
    pub message: u64,
}

impl Head {
    pub fn to_bytes(self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[0] = self.kind.code();
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::try_from(self.body).unwrap_or(u32::MAX).to_le_bytes());
        bytes[12..].copy_from_slice(&self.message.to_le_bytes());
        bytes
    }

    /// None for what no rank writes.
    pub fn of_bytes(bytes: [u8; HEAD]) -> Option<Self> {
        let [kind, 0, 0, 0, s0, s1, s2, s3, b0, b1, b2, b3, message @ ..] = bytes else {
            return None;
        };
        let body = usize::try_from(u32::from_le_bytes([b0, b1, b2, b3])).ok()?;
        let message = u64::from_le_bytes(message);
        (body <= MAX_BODY && body as u64 <= message).then_some(Self {
            kind: Kind::of_code(kind)?,
            sequence: u32::from_le_bytes([s0, s1, s2, s3]),
            body,
            message,
        })
    }
}

/// A message as frames, each ready to be written at once. An empty message is one frame without a body.
pub(super) fn frames(kind: Kind, sequence: u32, message: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let frame = move |body: &[u8]| {
        let head = Head {
            kind,
            sequence,
            body: body.len(),
            message: message.len() as u64,
        };
        [&head.to_bytes(), body].concat()
    };
    let empty = message.is_empty().then_some(message);
    empty.into_iter().chain(message.chunks(MAX_BODY)).map(frame)
}

/// Reads the next head. `InvalidData` is a head that no rank writes.
pub(super) fn read_head(from: &mut impl Read) -> io::Result<Head> {
    let mut bytes = [0; HEAD];
    from.read_exact(&mut bytes)?;
    Head::of_bytes(bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no frame of this protocol"))
}

/// Writes a message.
pub(super) fn write(to: &mut impl Write, kind: Kind, sequence: u32, message: &[u8]) -> io::Result<()> {
    frames(kind, sequence, message).try_for_each(|frame| to.write_all(&frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REDUCE: Kind = Kind::Of(Operation::AllReduce);

    #[test]
    fn numbers_travel_as_they_are() {
        let values = [0.0f32, -0.0, f32::MIN_POSITIVE, f32::NAN, 1.5e38];
        let mut bytes = Vec::new();
        f32::encode(&values, &mut bytes);
        let mut back = [9.0; 5];
        f32::decode(&bytes, &mut back);
        assert_eq!(values.map(f32::to_bits), back.map(f32::to_bits));

        let halves = [bf16::NEG_ZERO, bf16::MAX, bf16::from_f32(1.0)];
        let mut bytes = Vec::new();
        bf16::encode(&halves, &mut bytes);
        assert_eq!(bytes.len(), 6);
        let mut back = [bf16::ONE; 3];
        bf16::decode(&bytes, &mut back);
        assert_eq!(halves.map(bf16::to_bits), back.map(bf16::to_bits));
    }

    #[test]
    fn long_messages_are_several_frames_and_empty_ones_are_one() {
        assert_eq!(frames(REDUCE, 3, &[]).count(), 1);
        let message = vec![7; MAX_BODY + 5];
        let sent = frames(REDUCE, 3, &message).collect::<Vec<_>>();
        assert_eq!(
            sent.iter().map(Vec::len).collect::<Vec<_>>(),
            [HEAD + MAX_BODY, HEAD + 5]
        );
        let head = read_head(&mut sent[1].as_slice()).unwrap();
        let expected = Head {
            kind: REDUCE,
            sequence: 3,
            body: 5,
            message: MAX_BODY as u64 + 5,
        };
        assert_eq!(head, expected);
    }

    #[test]
    fn strange_heads_are_refused_before_their_body_is_read() {
        let mut long = Head {
            kind: REDUCE,
            sequence: 0,
            body: 1,
            message: u64::MAX,
        }
        .to_bytes();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Head::of_bytes(long), None);
        let error = read_head(&mut &b"GET /metrics HTTP/1."[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
