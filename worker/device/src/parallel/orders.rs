//! What the leader of a group of GPUs has the others do: rank 0 runs the engine, and every other rank repeats its steps.

use flotilla_kernels::{Buffer, Float, Gpu};

use super::{Collective, CollectiveError, Nccl};
use crate::step::{Mail, Size};

/// One thing to do. Features are those of `step` in the language model: rows of activations, and what stands there.
#[derive(Debug)]
pub(crate) enum Order<T> {
    /// Compute a step over a pool of so many blocks of so many tokens.
    Step {
        pool: (usize, usize),
        size: Size,
        words: Vec<u32>,
        features: Vec<(Vec<i32>, Buffer<T>)>,
    },
    /// Copy blocks of that pool.
    Copy {
        pool: (usize, usize),
        pairs: Vec<(u32, u32)>,
    },
    /// Nothing more comes.
    End,
}

const STEP: u32 = 1;
const COPY: u32 = 2;
const END: u32 = 3;
/// Words of a head: kind, pool, five sizes of a step, how many things follow.
const HEAD: usize = 9;

fn word(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The leader's side of a step. Features travel from GPU to GPU.
pub(crate) fn give_step<T: Float>(
    nccl: &mut Nccl,
    pool: (usize, usize),
    size: Size,
    words: &[u32],
    features: &[(Vec<i32>, Buffer<T>)],
) -> Result<(), CollectiveError> {
    let sizes = [size.decodes, size.prefill, size.chunks, size.blocks, size.groups].map(word);
    let [decodes, prefill, chunks, blocks, groups] = sizes;
    let count = word(features.len());
    let mut head = [
        STEP,
        word(pool.0),
        word(pool.1),
        decodes,
        prefill,
        chunks,
        blocks,
        groups,
        count,
    ];
    nccl.control().broadcast(&mut head, 0)?;
    nccl.control().broadcast(&mut words.to_vec(), 0)?;
    for (at, features) in features {
        nccl.control().broadcast(&mut [word(at.len())], 0)?;
        nccl.control().broadcast(&mut at.clone(), 0)?;
        nccl.communicator().broadcast(features, 0)?;
    }
    Ok(())
}

/// The leader's side of a copy.
pub(crate) fn give_copy(nccl: &mut Nccl, pool: (usize, usize), pairs: &[(u32, u32)]) -> Result<(), CollectiveError> {
    let mut head = [COPY, word(pool.0), word(pool.1), 0, 0, 0, 0, 0, word(pairs.len())];
    nccl.control().broadcast(&mut head, 0)?;
    let mut words = pairs.iter().flat_map(|(from, to)| [*from, *to]).collect::<Vec<_>>();
    nccl.control().broadcast(&mut words, 0)
}

/// The leader's last order.
pub(crate) fn give_end(nccl: &mut Nccl) -> Result<(), CollectiveError> {
    let mut head = [END, 0, 0, 0, 0, 0, 0, 0, 0];
    nccl.control().broadcast(&mut head, 0)
}

/// The next order, as the others see it: waited for as long as the leader lives.
pub(crate) fn take<T: Float>(nccl: &mut Nccl, gpu: &Gpu, hidden: usize) -> Result<Order<T>, CollectiveError> {
    let mut head = [0u32; HEAD];
    nccl.control().idle(0)?;
    nccl.control().broadcast(&mut head, 0)?;
    let [kind, blocks, block_size, decodes, prefill, chunks, table, groups, count] = head.map(|word| word as usize);
    let pool = (blocks, block_size);
    if kind == COPY as usize {
        let mut words = vec![0u32; 2 * count];
        nccl.control().broadcast(&mut words, 0)?;
        let (pairs, _) = words.as_chunks::<2>();
        let pairs = pairs.iter().map(|[from, to]| (*from, *to)).collect();
        return Ok(Order::Copy { pool, pairs });
    }
    if kind != STEP as usize {
        return Ok(Order::End);
    }
    let size = Size {
        decodes,
        prefill,
        chunks,
        blocks: table,
        groups,
    };
    let mut words = vec![0u32; Mail::new(size).words];
    nccl.control().broadcast(&mut words, 0)?;
    let mut features = Vec::new();
    for _ in 0..count {
        let mut rows = [0u32];
        nccl.control().broadcast(&mut rows, 0)?;
        let mut at = vec![0i32; rows[0] as usize];
        nccl.control().broadcast(&mut at, 0)?;
        let values = gpu.alloc(at.len() * hidden)?;
        nccl.communicator().broadcast(&values, 0)?;
        features.push((at, values));
    }
    Ok(Order::Step {
        pool,
        size,
        words,
        features,
    })
}
