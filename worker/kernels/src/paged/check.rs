use half::bf16;

use super::{Decode, Operands, Scratch, attend, plan, reference};
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    element::Element,
};

pub fn checks() -> Vec<Check> {
    macro_rules! check {
        ($name:literal, $run:expr) => {
            Check {
                name: $name,
                run: $run,
            }
        };
    }
    vec![
        check!("paged bf16 28/4 heads of 128, ragged lengths", ragged::<bf16>),
        check!("paged f32 28/4 heads of 128, ragged lengths", ragged::<f32>),
        check!("paged bf16 one long row", long::<bf16>),
        check!("paged f32 one long row", long::<f32>),
        check!("paged bf16 300 short rows", short::<bf16>),
        check!("paged bf16 16/2 heads of 128", |gpu, draw| other::<bf16>(
            gpu,
            draw,
            (16, 2, 128, 16)
        )),
        check!("paged bf16 14/2 heads of 64, blocks of 32", |gpu, draw| {
            other::<bf16>(gpu, draw, (14, 2, 64, 32))
        }),
        check!("paged f32 14/2 heads of 64, blocks of 32", |gpu, draw| other::<f32>(
            gpu,
            draw,
            (14, 2, 64, 32)
        )),
        check!("paged bf16 3/3 heads of 80, blocks of 8", |gpu, draw| other::<bf16>(
            gpu,
            draw,
            (3, 3, 80, 8)
        )),
        check!("paged f32 4/2 heads of 24, blocks of 8", |gpu, draw| other::<f32>(
            gpu,
            draw,
            (4, 2, 24, 8)
        )),
        check!("paged bf16 groups, 28/4 heads of 128", |gpu, draw| groups::<bf16>(
            gpu,
            draw,
            (28, 4, 128, 16)
        )),
        check!("paged f32 groups, 28/4 heads of 128", |gpu, draw| groups::<f32>(
            gpu,
            draw,
            (28, 4, 128, 16)
        )),
        check!("paged bf16 groups, 14/2 heads of 64, blocks of 8", |gpu, draw| {
            groups::<bf16>(gpu, draw, (14, 2, 64, 8))
        }),
        check!("paged bf16 groups, 16/2 heads of 128, blocks of 64", |gpu, draw| {
            groups::<bf16>(gpu, draw, (16, 2, 128, 64))
        }),
        check!("paged f32 groups, 3/3 heads of 80, blocks of 8", |gpu, draw| {
            groups::<f32>(gpu, draw, (3, 3, 80, 8))
        }),
        check!("paged bf16 one group of many rows", |gpu, draw| large_group::<bf16>(
            gpu,
            draw,
            (28, 4, 128, 16)
        )),
        check!("paged bf16 one group of many rows, 14/2 heads of 64", |gpu, draw| {
            large_group::<bf16>(gpu, draw, (14, 2, 64, 16))
        }),
        check!("paged bf16 a few rows over a long prefix", long_prefix::<bf16>),
        check!("paged f32 a few rows over a long prefix", long_prefix::<f32>),
        check!("paged bf16 many small groups", many_groups::<bf16>),
        check!("paged bf16 a graph serves other lengths and groups", graph),
    ]
}

/// Query heads, heads of keys and values, numbers of a head, tokens of a block.
type Heads = (usize, usize, usize, usize);

fn decode((heads, kv_heads, head_dim, block_size): Heads, rows: usize, longest: usize, groups: usize) -> Decode {
    Decode {
        rows,
        heads,
        kv_heads,
        head_dim,
        block_size,
        max_blocks: longest.div_ceil(block_size) + 1,
        groups,
        scale: 1.0 / (head_dim as f32).sqrt(),
    }
}

/// Inputs on the host. Slots and entries of tables that no sequence uses are poison.
struct Inputs<T> {
    q: Vec<T>,
    keys: Vec<T>,
    values: Vec<T>,
    tables: Vec<u32>,
    lengths: Vec<i32>,
    groups: Vec<[i32; 3]>,
}

/// Blocks of the pool in checks: enough for every case of a kind, so that a graph can be used for several.
fn pool_blocks(decode: &Decode, lengths: &[usize]) -> usize {
    let blocks = lengths.iter().map(|length| length.div_ceil(decode.block_size));
    blocks.sum::<usize>() + 3
}

fn draw_inputs<T: Float>(
    draw: &mut Draw,
    decode: &Decode,
    blocks: usize,
    lengths: &[usize],
    groups: &[[usize; 3]],
) -> Inputs<T> {
    let block = decode.block_elements();
    let mut inputs = Inputs {
        // Scores with a deviation of 3: some tokens matter far more than others, and the maximum moves.
        q: draw.normal(decode.rows * decode.heads * decode.head_dim, 3.0),
        keys: vec![T::POISON; blocks * block],
        values: vec![T::POISON; blocks * block],
        tables: vec![u32::POISON; decode.rows * decode.max_blocks],
        lengths: lengths.iter().map(|length| *length as i32).collect(),
        groups: groups.iter().map(|group| group.map(|number| number as i32)).collect(),
    };
    let mut free = draw.order(blocks);
    for (row, length) in lengths.iter().enumerate() {
        // Of a prefix, the first row alone holds tokens.
        let member = groups
            .iter()
            .find(|group| group[1] > 1 && row > group[0] && row < group[0] + group[1]);
        let own = member.map_or(0, |group| group[2]);
        for first in (own..*length).step_by(decode.block_size) {
            let name = free.pop().unwrap_or_default();
            inputs.tables[row * decode.max_blocks + first / decode.block_size] = name;
            let tokens = decode.block_size.min(length - first);
            for kv_head in 0..decode.kv_heads {
                let at = name as usize * block + kv_head * decode.block_size * decode.head_dim;
                let numbers = at..at + tokens * decode.head_dim;
                inputs.keys[numbers.clone()].copy_from_slice(&draw.normal::<T>(numbers.len(), 1.0));
                inputs.values[numbers.clone()].copy_from_slice(&draw.normal::<T>(numbers.len(), 1.0));
            }
        }
    }
    inputs
}

/// Inputs and outputs on the card.
struct Operation<T> {
    q: Buffer<T>,
    keys: Buffer<T>,
    values: Buffer<T>,
    tables: Buffer<u32>,
    lengths: Buffer<i32>,
    groups: Option<Buffer<i32>>,
    out: Buffer<T>,
    lse: Buffer<f32>,
}

impl<T: Float> Operation<T> {
    fn new(gpu: &Gpu, inputs: &Inputs<T>, decode: &Decode) -> Result<Self, GpuError> {
        let groups = inputs.groups.concat();
        Ok(Self {
            q: gpu.upload(&inputs.q)?,
            keys: gpu.upload(&inputs.keys)?,
            values: gpu.upload(&inputs.values)?,
            tables: gpu.upload(&inputs.tables)?,
            lengths: gpu.upload(&inputs.lengths)?,
            groups: (decode.groups > 0).then(|| gpu.upload(&groups)).transpose()?,
            out: gpu.poisoned(inputs.q.len())?,
            lse: gpu.poisoned(decode.rows * decode.heads)?,
        })
    }

    fn run(&self, gpu: &Gpu, decode: &Decode, scratch: &Scratch) -> Result<(), GpuError> {
        plan(gpu, decode, &self.lengths, self.groups.as_ref(), scratch)?;
        let operands = Operands {
            q: &self.q,
            keys: &self.keys,
            values: &self.values,
            tables: &self.tables,
            out: &self.out,
            lse: Some(&self.lse),
        };
        attend(gpu, decode, &operands, scratch)
    }

    fn compare(&self, gpu: &Gpu, decode: &Decode, inputs: &Inputs<T>) -> Result<Distance, CheckError> {
        let pool = (widen(&inputs.keys), widen(&inputs.values));
        let (out, lse) = reference::attend(
            decode,
            &widen(&inputs.q),
            (&pool.0, &pool.1),
            &inputs.tables,
            &inputs.lengths,
            &inputs.groups,
        );
        let found = gpu.download(&self.out)?;
        // Every row by itself: a wrong one among many right ones must show.
        let row = decode.heads * decode.head_dim;
        let bound = match T::DTYPE {
            Dtype::F32 => 1e-5,
            Dtype::Bf16 => 5e-3,
        };
        let mut worst = Distance {
            relative: 0.0,
            bound: 1.0,
        };
        for (found, out) in found.chunks(row).zip(out.chunks(row)) {
            worst = worst.worst(Distance::within(found, out, bound)?);
        }
        // Of unused rows, minus infinity on both sides.
        let finite = |lse: Vec<f32>| {
            let number = |one: f32| if one == f32::NEG_INFINITY { 1e9 } else { one };
            lse.into_iter().map(number).collect::<Vec<_>>()
        };
        let (found, lse) = (finite(gpu.download(&self.lse)?), finite(lse));
        for (found, lse) in found.chunks(decode.heads).zip(lse.chunks(decode.heads)) {
            worst = worst.worst(Distance::within(found, lse, 1e-5)?);
        }
        Ok(worst)
    }
}

fn compare<T: Float>(
    gpu: &Gpu,
    draw: &mut Draw,
    decode: &Decode,
    lengths: &[usize],
    groups: &[[usize; 3]],
) -> Result<Distance, CheckError> {
    let inputs = draw_inputs::<T>(draw, decode, pool_blocks(decode, lengths), lengths, groups);
    let operation = Operation::new(gpu, &inputs, decode)?;
    let scratch = Scratch::new(gpu, decode)?;
    operation.run(gpu, decode, &scratch)?;
    let distance = operation.compare(gpu, decode, &inputs)?;
    // Again, in the same scratch memory: the same bits.
    let before = gpu.download(&operation.out)?;
    operation.run(gpu, decode, &scratch)?;
    Ok(distance.worst(Distance::equal(&gpu.download(&operation.out)?, &before)?))
}

/// Unused rows, single tokens, the edges of steps, blocks and units, and what lies between.
fn lengths(draw: &mut Draw, rows: usize, longest: usize) -> Vec<usize> {
    let edges = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 128];
    (0..rows)
        .map(|row| match edges.get(row) {
            Some(edge) => *edge,
            None => draw.between(0, longest),
        })
        .collect()
}

fn ragged<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let lengths = lengths(draw, 19, 500);
    compare::<T>(gpu, draw, &decode((28, 4, 128, 16), 19, 500, 0), &lengths, &[])
}

fn long<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let length = draw.between(9_000, 12_000);
    compare::<T>(gpu, draw, &decode((28, 4, 128, 16), 1, 12_000, 0), &[length], &[])
}

/// More rows than shares, so that a share holds several whole rows and unused ones lie between them.
fn short<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let lengths = (0..300)
        .map(|_| draw.below(3) * draw.between(1, 40))
        .collect::<Vec<_>>();
    compare::<T>(gpu, draw, &decode((28, 4, 128, 16), 300, 80, 0), &lengths, &[])
}

fn other<T: Float>(gpu: &Gpu, draw: &mut Draw, heads: Heads) -> Result<Distance, CheckError> {
    let lengths = lengths(draw, 22, 700);
    compare::<T>(gpu, draw, &decode(heads, 22, 700, 0), &lengths, &[])
}

/// Rows of groups of 1, 2, 5, 8 and 20, with rows in none between them. Some rows are unused; some end with the prefix.
fn draw_groups(draw: &mut Draw, block_size: usize) -> (Vec<usize>, Vec<[usize; 3]>) {
    let (mut lengths, mut groups) = (Vec::new(), Vec::new());
    for count in [1, 8, 2, 20, 5] {
        lengths.push(draw.between(0, 200));
        let prefix = block_size * draw.between(1, 320 / block_size);
        groups.push([lengths.len(), count, if count == 1 { 0 } else { prefix }]);
        for member in 0..count {
            lengths.push(match draw.below(6) {
                0 if member > 0 => 0,
                1 => prefix,
                _ => prefix + draw.between(1, 150),
            });
        }
    }
    lengths.push(draw.between(1, 300));
    groups.push([0, 0, 0]);
    (lengths, groups)
}

fn groups<T: Float>(gpu: &Gpu, draw: &mut Draw, heads: Heads) -> Result<Distance, CheckError> {
    let (lengths, groups) = draw_groups(draw, heads.3);
    let decode = decode(heads, lengths.len(), 500, groups.len());
    compare::<T>(gpu, draw, &decode, &lengths, &groups)
}

/// More columns than a tile has, and a prefix whose last chunk is short.
fn large_group<T: Float>(gpu: &Gpu, draw: &mut Draw, heads: Heads) -> Result<Distance, CheckError> {
    let lengths = (0..70).map(|_| 1_040 + draw.between(1, 40)).collect::<Vec<_>>();
    let decode = decode(heads, 70, 1_100, 1);
    compare::<T>(gpu, draw, &decode, &lengths, &[[0, 70, 1_040]])
}

/// A prefix that is cut into many shares, of which some are shorter than a chunk.
fn long_prefix<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let prefix = 16 * draw.between(150, 260);
    let lengths = (0..5).map(|_| prefix + draw.between(0, 70)).collect::<Vec<_>>();
    let decode = decode((28, 4, 128, 16), 5, 4_300, 1);
    compare::<T>(gpu, draw, &decode, &lengths, &[[0, 5, prefix]])
}

/// More prefixes and heads than blocks of threads, so that a share holds the end of one and the beginning of another.
fn many_groups<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let (mut lengths, mut groups) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let (rows, prefix) = (draw.between(2, 12), 16 * draw.between(1, 20));
        groups.push([lengths.len(), rows, prefix]);
        lengths.extend((0..rows).map(|_| prefix + draw.between(0, 60)));
    }
    let decode = decode((28, 4, 128, 16), lengths.len(), 400, groups.len());
    compare::<T>(gpu, draw, &decode, &lengths, &groups)
}

/// Recorded with one set of lengths, tables and groups, and replayed with others.
fn graph(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let heads = (28, 4, 128, 16);
    let (lengths, groups) = draw_groups(draw, heads.3);
    let decode = decode(heads, lengths.len(), 500, groups.len());
    let blocks = pool_blocks(&decode, &lengths) + 200;
    let first = draw_inputs::<bf16>(draw, &decode, blocks, &lengths, &groups);
    let operation = Operation::new(gpu, &first, &decode)?;
    let scratch = Scratch::new(gpu, &decode)?;
    operation.run(gpu, &decode, &scratch)?;
    let mut graph = gpu.record(|| operation.run(gpu, &decode, &scratch))?;
    let lengths = lengths.iter().map(|_| draw.between(0, 60)).collect::<Vec<_>>();
    let mut groups = vec![[0, 0, 0]; groups.len()];
    groups[1] = [3, 6, 16];
    let lengths = lengths
        .iter()
        .enumerate()
        .map(|(row, length)| if (3..9).contains(&row) { length + 16 } else { *length })
        .collect::<Vec<_>>();
    let second = draw_inputs::<bf16>(draw, &decode, blocks, &lengths, &groups);
    gpu.write(&operation.q, &second.q)?;
    gpu.write(&operation.keys, &second.keys)?;
    gpu.write(&operation.values, &second.values)?;
    gpu.write(&operation.tables, &second.tables)?;
    gpu.write(&operation.lengths, &second.lengths)?;
    if let Some(groups) = &operation.groups {
        gpu.write(groups, &second.groups.concat())?;
    }
    gpu.write(&operation.out, &vec![bf16::POISON; operation.out.len()])?;
    gpu.replay(&mut graph)?;
    operation.compare(gpu, &decode, &second)
}

const QWEN_7B: Heads = (28, 4, 128, 16);
const QWEN_3B: Heads = (16, 2, 128, 16);
const QWEN_HALF_B: Heads = (14, 2, 64, 16);

pub fn cases() -> Vec<Case> {
    macro_rules! case {
        ($name:literal, $load:expr) => {
            Case {
                name: $name,
                prepare: |gpu, draw| $load.prepare(gpu, draw),
            }
        };
    }
    vec![
        case!("paged 28 layers, 7B 1 x 1k", Load::alone(QWEN_7B, 1, 1024)),
        case!("paged 28 layers, 7B 1 x 32k", Load::alone(QWEN_7B, 1, 32 << 10)),
        case!("paged 28 layers, 7B 8 x 4k", Load::alone(QWEN_7B, 8, 4096)),
        case!("paged 28 layers, 7B 32 x 1k", Load::alone(QWEN_7B, 32, 1024)),
        case!("paged 28 layers, 7B 128 x 1k", Load::alone(QWEN_7B, 128, 1024)),
        case!("paged 28 layers, 7B 256 x 1k", Load::alone(QWEN_7B, 256, 1024)),
        case!("paged 28 layers, 3B 128 x 1k", Load::alone(QWEN_3B, 128, 1024)),
        case!("paged 28 layers, 0.5B 128 x 1k", Load::alone(QWEN_HALF_B, 128, 1024)),
        case!(
            "paged 28 layers, 7B 16 groups of 8, 1.5k + 256, not shared",
            Load::group(16, 8)
        ),
        case!(
            "paged 28 layers, 7B 16 groups of 8, 1.5k + 256, shared",
            Load::group(16, 8).shared()
        ),
        case!(
            "paged 28 layers, 7B 1 group of 8, 1.5k + 256, not shared",
            Load::group(1, 8)
        ),
        case!(
            "paged 28 layers, 7B 1 group of 8, 1.5k + 256, shared",
            Load::group(1, 8).shared()
        ),
        case!(
            "paged 28 layers, 7B 1 group of 128, 1.5k + 256, not shared",
            Load::group(1, 128)
        ),
        case!(
            "paged 28 layers, 7B 1 group of 128, 1.5k + 256, shared",
            Load::group(1, 128).shared()
        ),
        case!(
            "paged 28 layers, 7B 4 groups of 8, 1.5k + 256, not shared",
            Load::group(4, 8)
        ),
        case!(
            "paged 28 layers, 7B 4 groups of 8, 1.5k + 256, shared",
            Load::group(4, 8).shared()
        ),
        case!(
            "paged 28 layers, 7B 1 group of 32, 1.5k + 256, not shared",
            Load::group(1, 32)
        ),
        case!(
            "paged 28 layers, 7B 1 group of 32, 1.5k + 256, shared",
            Load::group(1, 32).shared()
        ),
        case!(
            "paged 28 layers, 7B 8 groups of 32, 1.5k + 256, not shared",
            Load::group(8, 32)
        ),
        case!(
            "paged 28 layers, 7B 8 groups of 32, 1.5k + 256, shared",
            Load::group(8, 32).shared()
        ),
        case!(
            "paged 28 layers, 7B 1 group of 128, 1.5k + 48, not shared",
            Load::group(1, 128).after(48)
        ),
        case!(
            "paged 28 layers, 7B 1 group of 128, 1.5k + 48, shared",
            Load::group(1, 128).after(48).shared()
        ),
        case!(
            "paged 28 layers, 7B 16 groups of 8, 1.5k + 48, not shared",
            Load::group(16, 8).after(48)
        ),
        case!(
            "paged 28 layers, 7B 16 groups of 8, 1.5k + 48, shared",
            Load::group(16, 8).after(48).shared()
        ),
        case!("paged 28 layers, 7B 128 x 256", Load::alone(QWEN_7B, 128, 256)),
        case!("paged 7B plan of 128 rows", Load::alone(QWEN_7B, 128, 1024).plan()),
    ]
}

/// Layers of a step in a benchmark: its times and bytes are those of so many.
const LAYERS: usize = 28;

/// A batch that is measured: groups of rows whose first `prefix` tokens lie in the same blocks, and `own` tokens of each row.
#[derive(Clone, Copy)]
struct Load {
    heads: Heads,
    groups: usize,
    members: usize,
    prefix: usize,
    own: usize,
    /// Whether the kernel is told of the groups.
    shared: bool,
    /// Whether planning is measured instead.
    plan: bool,
}

impl Load {
    fn alone(heads: Heads, rows: usize, own: usize) -> Self {
        Self {
            heads,
            groups: rows,
            members: 1,
            prefix: 0,
            own,
            shared: false,
            plan: false,
        }
    }

    fn group(groups: usize, members: usize) -> Self {
        Self {
            heads: QWEN_7B,
            groups,
            members,
            prefix: 1536,
            own: 256,
            shared: false,
            plan: false,
        }
    }

    /// With so many tokens of each row's own.
    fn after(self, own: usize) -> Self {
        Self { own, ..self }
    }

    fn shared(self) -> Self {
        Self { shared: true, ..self }
    }

    fn plan(self) -> Self {
        Self { plan: true, ..self }
    }

    fn prepare(self, gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
        let rows = self.groups * self.members;
        let block_size = self.heads.3;
        let decode = decode(
            self.heads,
            rows,
            self.prefix + self.own,
            if self.shared { self.groups } else { 0 },
        );
        let (prefix_blocks, own_blocks) = (self.prefix / block_size, self.own / block_size);
        let blocks = self.groups * prefix_blocks + rows * own_blocks;
        let mut free = draw.order(blocks).into_iter();
        let mut tables = vec![u32::POISON; rows * decode.max_blocks];
        for group in tables.chunks_mut(self.members * decode.max_blocks) {
            let prefix = free.by_ref().take(prefix_blocks).collect::<Vec<_>>();
            for row in group.chunks_mut(decode.max_blocks) {
                row[..prefix_blocks].copy_from_slice(&prefix);
                for (entry, block) in row[prefix_blocks..].iter_mut().zip(free.by_ref().take(own_blocks)) {
                    *entry = block;
                }
            }
        }
        let groups = (0..self.groups)
            .flat_map(|group| [group * self.members, self.members, self.prefix].map(|number| number as i32))
            .collect::<Vec<_>>();
        let lengths = gpu.upload(&vec![(self.prefix + self.own) as i32; rows])?;
        let groups = self.shared.then(|| gpu.upload(&groups)).transpose()?;
        let scratch = Scratch::new(gpu, &decode)?;
        plan(gpu, &decode, &lengths, groups.as_ref(), &scratch)?;
        if self.plan {
            let gpu = gpu.clone();
            return Ok(Prepared {
                run: Box::new(move || plan(&gpu, &decode, &lengths, groups.as_ref(), &scratch)),
                bytes: (4 * rows) as f64,
                operations: 0.0,
            });
        }
        let queries = rows * decode.heads * decode.head_dim;
        let pool = blocks * decode.block_elements();
        let bytes = 2.0 * (2 * pool + 2 * queries) as f64;
        // Layer after layer, so that none finds its keys in the cache.
        let pools = (300e6 / bytes).ceil().clamp(1.0, LAYERS as f64) as usize;
        let some = gpu.upload(&draw.normal::<bf16>(1 << 20, 1.0))?;
        let fill = || {
            let buffer = gpu.alloc::<bf16>(pool)?;
            for from in (0..pool).step_by(some.len()) {
                let length = some.len().min(pool - from);
                gpu.copy(&some.slice(0..length)?, &buffer.slice(from..from + length)?)?;
            }
            Ok::<_, GpuError>(buffer)
        };
        let pools = (0..pools)
            .map(|_| Ok((fill()?, fill()?)))
            .collect::<Result<Vec<_>, GpuError>>()?;
        let q = gpu.upload(&draw.normal::<bf16>(queries, 1.0))?;
        let out = gpu.alloc::<bf16>(queries)?;
        let tables = gpu.upload(&tables)?;
        let layer = |layer: usize| {
            let operands = Operands {
                q: &q,
                keys: &pools[layer % pools.len()].0,
                values: &pools[layer % pools.len()].1,
                tables: &tables,
                out: &out,
                lse: None,
            };
            attend(gpu, &decode, &operands, &scratch)
        };
        layer(0)?;
        // As a step runs it: from a graph.
        let mut graph = gpu.record(|| (0..LAYERS).try_for_each(layer))?;
        let kept = (q, out, tables, scratch, pools);
        let gpu = gpu.clone();
        Ok(Prepared {
            run: Box::new(move || {
                let _ = &kept;
                gpu.replay(&mut graph)
            }),
            bytes: LAYERS as f64 * bytes,
            operations: 0.0,
        })
    }
}
