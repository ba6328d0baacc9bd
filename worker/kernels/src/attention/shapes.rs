//! Shapes and lengths that checks and benchmarks share.

use super::Attention;
use crate::check::Draw;

/// Of queries and keys, as prefix sums.
#[derive(Clone)]
pub struct Lengths {
    pub queries: Vec<u32>,
    pub keys: Vec<u32>,
}

impl Lengths {
    pub fn of(pairs: &[(usize, usize)]) -> Self {
        let prefix = |lengths: Vec<usize>| {
            let mut sums = vec![0];
            for length in lengths {
                sums.push(sums[sums.len() - 1] + u32::try_from(length).unwrap_or(u32::MAX));
            }
            sums
        };
        Self {
            queries: prefix(pairs.iter().map(|pair| pair.0).collect()),
            keys: prefix(pairs.iter().map(|pair| pair.1).collect()),
        }
    }

    /// Around the edges of tiles, empty ones too, in random order.
    pub fn edges(draw: &mut Draw) -> Self {
        let edges = [1, 15, 16, 17, 0, 63, 64, 65, 127, 128, 129, 191, 2, 0, 200];
        let order = draw.order(edges.len());
        let lengths = order.iter().map(|at| edges[*at as usize]);
        Self::of(&lengths.map(|length| (length, length)).collect::<Vec<_>>())
    }

    /// More segments than a warp has lanes.
    pub fn many(draw: &mut Draw) -> Self {
        let lengths = (0..77).map(|_| draw.below(40)).collect::<Vec<_>>();
        Self::of(&lengths.iter().map(|length| (*length, *length)).collect::<Vec<_>>())
    }

    /// Chunks after what is cached, chunks of sequences that have nothing else, and keys that nobody asks for.
    pub fn chunks(draw: &mut Draw) -> Self {
        let mut pairs = vec![
            (1, 1),
            (1, 130),
            (16, 17),
            (64, 256),
            (130, 130),
            (65, 191),
            (0, 0),
            (0, 40),
        ];
        pairs.extend((0..4).map(|_| {
            let queries = draw.between(1, 140);
            (queries, queries + draw.below(300))
        }));
        let order = draw.order(pairs.len());
        Self::of(&order.iter().map(|at| pairs[*at as usize]).collect::<Vec<_>>())
    }

    /// Queries that see no key: more of them than keys.
    pub fn blind(draw: &mut Draw) -> Self {
        let pairs = (0..6)
            .map(|_| (draw.between(60, 200), draw.between(0, 60)))
            .collect::<Vec<_>>();
        Self::of(&pairs)
    }

    pub fn one(length: usize) -> Self {
        Self::of(&[(length, length)])
    }
}

pub fn last(offsets: &[u32]) -> usize {
    offsets.last().map_or(0, |last| *last as usize)
}

/// Shapes by their names in the checks.
pub fn shape(heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> Attention {
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let scale = 1.0 / (head_dim as f32).sqrt();
    Attention {
        heads,
        kv_heads,
        head_dim,
        scale,
        causal,
    }
}
