use half::bf16;

use super::{
    Attention, Gradients, Pool, Rows, Saved, Segments, backward_scratch,
    launch::{Cores, backward_on, forward_on, prefill_on},
    reference,
    shapes::{Lengths, last, shape},
};
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError,
    check::{Check, CheckError, Distance, Draw, widen},
};

type Checked = Result<Distance, CheckError>;

/// Inputs on both sides. Where every token is query and key, q, k and v are columns of one matrix; otherwise rows have gaps of
/// NaN. Behind the last token there are rows of NaN, which belong to nobody.
struct Inputs<T> {
    cores: Cores,
    attention: Attention,
    lengths: Lengths,
    host: [Vec<f32>; 3],
    q: (Buffer<T>, usize),
    k: (Buffer<T>, usize),
    v: (Buffer<T>, usize),
    query_offsets: Buffer<u32>,
    key_offsets: Buffer<u32>,
    query_tokens: usize,
    key_tokens: usize,
}

/// Rows of `width` among rows of `stride`.
fn spread<T: Float>(to: &mut [T], rows: &[T], width: usize, stride: usize, column: usize) {
    for (row, values) in rows.chunks(width).enumerate() {
        to[row * stride + column..][..width].copy_from_slice(values);
    }
}

fn gather<T: Float>(from: &[T], rows: usize, width: usize, stride: usize, column: usize) -> Vec<T> {
    (0..rows)
        .flat_map(|row| from[row * stride + column..][..width].to_vec())
        .collect()
}

impl<T: Float> Inputs<T> {
    fn new(
        cores: Cores,
        gpu: &Gpu,
        draw: &mut Draw,
        attention: Attention,
        lengths: Lengths,
        deviation: f32,
    ) -> Result<Self, GpuError> {
        let (width, key_width) = (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
        );
        let (queries, keys) = (last(&lengths.queries), last(&lengths.keys));
        let padding = draw.below(3) * 50;
        let q = draw.normal::<T>(queries * width, deviation);
        let k = draw.normal::<T>(keys * key_width, deviation);
        let v = draw.normal::<T>(keys * key_width, 1.0);
        let (query_tokens, key_tokens) = (queries + padding, keys + padding);
        let buffers = if lengths.queries == lengths.keys {
            let stride = width + 2 * key_width;
            let mut packed = vec![T::POISON; query_tokens * stride];
            spread(&mut packed, &q, width, stride, 0);
            spread(&mut packed, &k, key_width, stride, width);
            spread(&mut packed, &v, key_width, stride, width + key_width);
            let packed = gpu.upload(&packed)?;
            let part = |column: usize| packed.slice(column.min(packed.len())..packed.len());
            [
                (part(0)?, stride),
                (part(width)?, stride),
                (part(width + key_width)?, stride),
            ]
        } else {
            let apart = |rows: &[T], tokens: usize, width: usize| {
                let stride = width + 8;
                let mut wide = vec![T::POISON; tokens * stride];
                spread(&mut wide, rows, width, stride, 0);
                Ok::<_, GpuError>((gpu.upload(&wide)?, stride))
            };
            [
                apart(&q, query_tokens, width)?,
                apart(&k, key_tokens, key_width)?,
                apart(&v, key_tokens, key_width)?,
            ]
        };
        let [q_rows, k_rows, v_rows] = buffers;
        Ok(Self {
            cores,
            attention,
            host: [widen(&q), widen(&k), widen(&v)],
            q: q_rows,
            k: k_rows,
            v: v_rows,
            query_offsets: gpu.upload(&lengths.queries)?,
            key_offsets: gpu.upload(&lengths.keys)?,
            lengths,
            query_tokens,
            key_tokens,
        })
    }

    fn rows(&self) -> [Rows<'_, T>; 3] {
        [&self.q, &self.k, &self.v].map(|(data, stride)| Rows::new(data, *stride))
    }

    fn segments(&self) -> Segments<'_> {
        Segments {
            queries: &self.query_offsets,
            keys: &self.key_offsets,
            query_tokens: self.query_tokens,
            key_tokens: self.key_tokens,
        }
    }

    fn width(&self) -> usize {
        self.attention.heads * self.attention.head_dim
    }

    fn forward(&self, gpu: &Gpu) -> Result<(Buffer<T>, Buffer<f32>), GpuError> {
        let out = gpu.poisoned(self.query_tokens * self.width())?;
        let lse = gpu.poisoned(self.query_tokens * self.attention.heads)?;
        let [q, k, v] = self.rows();
        forward_on(
            self.cores,
            gpu,
            &self.attention,
            q,
            k,
            v,
            &self.segments(),
            &out,
            Some(&lse),
        )?;
        Ok((out, lse))
    }

    fn reference(&self) -> (Vec<f32>, Vec<f32>) {
        let [q, k, v] = &self.host;
        reference::forward(&self.attention, q, k, v, &self.lengths.queries, &self.lengths.keys)
    }
}

/// Rows behind the last are as they were.
fn untouched<T: Float>(rest: &[T]) -> Result<(), CheckError> {
    if rest.iter().all(|value| value.to_f32().is_nan()) {
        Ok(())
    } else {
        Err(CheckError::Differs("rows behind the last were written".to_owned()))
    }
}

/// Weights are rounded to bf16 once before the second product, and so is the result: each at most 2e-3 of a number, on average of
/// squares.
fn forward_bound<T: Float>() -> f64 {
    match T::DTYPE {
        Dtype::Bf16 => 4e-3,
        Dtype::F32 => 1e-5,
    }
}

/// Besides the weights, the changes of scores are rounded to bf16, and the sums of products are taken of a rounded output: where
/// the softmax is peaked, a change is a small difference of such numbers.
fn backward_bound<T: Float>(deviation: f32) -> f64 {
    match T::DTYPE {
        Dtype::Bf16 if deviation > 1.0 => 1e-2,
        Dtype::Bf16 => 6e-3,
        Dtype::F32 => 1e-5,
    }
}

/// `lse` with its infinities, which must be where the reference has them.
fn lse_distance(inputs: &Inputs<impl Float>, lse: &[f32], reference: &[f32]) -> Checked {
    let queries = last(&inputs.lengths.queries);
    let mut finite = (Vec::new(), Vec::new());
    for head in 0..inputs.attention.heads {
        let (ours, rest) = lse[head * inputs.query_tokens..][..inputs.query_tokens].split_at(queries);
        untouched(rest)?;
        for (ours, wanted) in ours.iter().zip(&reference[head * queries..]) {
            if wanted.is_finite() {
                finite.0.push(*ours);
                finite.1.push(*wanted);
            } else if ours != wanted {
                return Err(CheckError::Differs(format!("lse {ours}, {wanted} expected")));
            }
        }
    }
    Distance::of(&finite.0, &finite.1)
}

fn forward_check<T: Float>(
    cores: Cores,
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    lengths: Lengths,
    deviation: f32,
) -> Checked {
    let inputs = Inputs::<T>::new(cores, gpu, draw, attention, lengths, deviation)?;
    let (out, lse) = inputs.forward(gpu)?;
    let (reference, reference_lse) = inputs.reference();
    let out = gpu.download(&out)?;
    let (out, rest) = out.split_at(reference.len());
    untouched(rest)?;
    let distance = Distance::within(out, &reference, forward_bound::<T>())?;
    Ok(distance.worst(lse_distance(&inputs, &gpu.download(&lse)?, &reference_lse)?))
}

/// Keys and values in blocks of random order; NaN wherever nothing was stored, and tables that name no block behind a sequence.
fn prefill_check<T: Float>(
    cores: Cores,
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    lengths: Lengths,
    block_size: usize,
) -> Checked {
    let inputs = Inputs::<T>::new(cores, gpu, draw, attention, lengths, 1.0)?;
    let Attention { kv_heads, head_dim, .. } = attention;
    let lengths = &inputs.lengths;
    let counts = lengths.keys.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
    let counts = counts.collect::<Vec<_>>();
    let max_blocks = counts.iter().map(|count| count.div_ceil(block_size)).max().unwrap_or(0) + 2;
    let blocks = counts.iter().map(|count| count.div_ceil(block_size)).sum::<usize>() + 7;
    let mut free = draw.order(blocks);
    let mut tables = vec![u32::MAX; counts.len() * max_blocks];
    let mut pools = [vec![T::POISON; blocks * kv_heads * block_size * head_dim], Vec::new()];
    pools[1] = pools[0].clone();
    for (sequence, count) in counts.iter().enumerate() {
        for key in 0..*count {
            let entry = &mut tables[sequence * max_blocks + key / block_size];
            if key % block_size == 0 {
                *entry = free.pop().unwrap_or(u32::MAX);
            }
            let block = *entry as usize;
            for head in 0..kv_heads {
                let to = ((block * kv_heads + head) * block_size + key % block_size) * head_dim;
                let from = ((lengths.keys[sequence] as usize + key) * kv_heads + head) * head_dim;
                for (pool, rows) in pools.iter_mut().zip(&inputs.host[1..]) {
                    for (to, from) in pool[to..to + head_dim].iter_mut().zip(&rows[from..]) {
                        *to = T::from_f32(*from);
                    }
                }
            }
        }
    }
    let kv_lengths = counts.iter().map(|count| i32::try_from(*count).unwrap_or(i32::MAX));
    let kv_lengths = gpu.upload(&kv_lengths.collect::<Vec<_>>())?;
    let (keys, values, tables) = (gpu.upload(&pools[0])?, gpu.upload(&pools[1])?, gpu.upload(&tables)?);
    let pool = Pool {
        keys: &keys,
        values: &values,
        tables: &tables,
        block_size,
        kv_lengths: &kv_lengths,
    };
    let out = gpu.poisoned(inputs.query_tokens * inputs.width())?;
    let [q, ..] = inputs.rows();
    prefill_on(
        cores,
        gpu,
        &attention,
        q,
        inputs.query_tokens,
        &inputs.query_offsets,
        &pool,
        &out,
    )?;
    let (reference, _) = inputs.reference();
    let out = gpu.download(&out)?;
    let (out, rest) = out.split_at(reference.len());
    untouched(rest)?;
    Distance::within(out, &reference, forward_bound::<T>())
}

/// `dq`, `dk`, `dv` as the kernels wrote them, without the gaps of their rows.
fn gradients<T: Float>(gpu: &Gpu, inputs: &Inputs<T>, dout: &Buffer<T>) -> Result<[Vec<T>; 3], CheckError> {
    let attention = &inputs.attention;
    let (out, lse) = inputs.forward(gpu)?;
    let widths = [attention.heads, attention.kv_heads, attention.kv_heads].map(|heads| heads * attention.head_dim);
    let strides = widths.map(|width| width + 16);
    let tokens = [inputs.query_tokens, inputs.key_tokens, inputs.key_tokens];
    let make = |which: usize| gpu.poisoned::<T>(tokens[which] * strides[which]);
    let buffers = [make(0)?, make(1)?, make(2)?];
    let scratch = gpu.poisoned(backward_scratch(attention, inputs.query_tokens))?;
    let saved = Saved {
        out: &out,
        lse: &lse,
        dout,
    };
    let written = Gradients {
        dq: Rows::new(&buffers[0], strides[0]),
        dk: Rows::new(&buffers[1], strides[1]),
        dv: Rows::new(&buffers[2], strides[2]),
    };
    let [q, k, v] = inputs.rows();
    backward_on(
        inputs.cores,
        gpu,
        attention,
        q,
        k,
        v,
        &inputs.segments(),
        &saved,
        &written,
        &scratch,
    )?;
    let used = [
        last(&inputs.lengths.queries),
        last(&inputs.lengths.keys),
        last(&inputs.lengths.keys),
    ];
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for (which, buffer) in buffers.iter().enumerate() {
        let values = gpu.download(buffer)?;
        untouched(&values[used[which] * strides[which]..])?;
        untouched(&gather(&values, used[which], 16, strides[which], widths[which]))?;
        all[which] = gather(&values, used[which], widths[which], strides[which], 0);
    }
    Ok(all)
}

fn upload_rows<T: Float>(gpu: &Gpu, rows: &[T], length: usize) -> Result<Buffer<T>, GpuError> {
    let mut all = rows.to_vec();
    all.resize(length, T::POISON);
    gpu.upload(&all)
}

fn backward_check<T: Float>(
    cores: Cores,
    gpu: &Gpu,
    draw: &mut Draw,
    attention: Attention,
    lengths: Lengths,
    deviation: f32,
) -> Checked {
    let inputs = Inputs::<T>::new(cores, gpu, draw, attention, lengths, deviation)?;
    let dout = draw.normal::<T>(inputs.host[0].len(), 1.0);
    let on_device = upload_rows(gpu, &dout, inputs.query_tokens * inputs.width())?;
    let ours = gradients(gpu, &inputs, &on_device)?;
    let [q, k, v] = &inputs.host;
    let (queries, keys) = (&inputs.lengths.queries, &inputs.lengths.keys);
    let (dq, dk, dv) = reference::backward(&attention, q, k, v, queries, keys, &widen(&dout));
    let bound = backward_bound::<T>(deviation);
    let mut worst = Distance::within(&ours[0], &dq, bound)?;
    for (ours, wanted) in ours[1..].iter().zip([dk, dv]) {
        worst = worst.worst(Distance::within(ours, &wanted, bound)?);
    }
    Ok(worst)
}

/// Two runs, bit for bit.
fn repeat_check<T: Float>(cores: Cores, gpu: &Gpu, draw: &mut Draw, attention: Attention, lengths: Lengths) -> Checked {
    let inputs = Inputs::<T>::new(cores, gpu, draw, attention, lengths, 1.0)?;
    let dout = draw.normal::<T>(inputs.host[0].len(), 1.0);
    let dout = upload_rows(gpu, &dout, inputs.query_tokens * inputs.width())?;
    let bits = |values: &[T]| values.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>();
    let out = || Ok::<_, CheckError>(bits(&gpu.download(&inputs.forward(gpu)?.0)?));
    Distance::equal(&out()?, &out()?)?;
    let (first, second) = (gradients(gpu, &inputs, &dout)?, gradients(gpu, &inputs, &dout)?);
    for (first, second) in first.iter().zip(&second) {
        Distance::equal(&bits(first), &bits(second))?;
    }
    Ok(Distance::EQUAL)
}

/// The 7B model's heads of one key head, so that references end in time.
fn text(head_dim: usize) -> Attention {
    shape(7, 1, head_dim, true)
}

/// Parity with the reference.
pub(super) fn checks() -> Vec<Check> {
    // bf16 by each kind of tensor cores; what the first has not falls to the second, and to plain cores.
    macro_rules! check {
        (plain $name:literal, |$cores:ident, $gpu:ident, $draw:ident| $run:expr) => {
            vec![check!(Hopper, $name, |$cores, $gpu, $draw| $run)]
        };
        (both $name:literal, |$cores:ident, $gpu:ident, $draw:ident| $run:expr) => {
            vec![
                check!(
                    Hopper,
                    concat!("attention wgmma ", $name),
                    |$cores, $gpu, $draw| $run
                ),
                check!(
                    Tensor,
                    concat!("attention mma.sync ", $name),
                    |$cores, $gpu, $draw| $run
                ),
            ]
        };
        ($kind:ident, $name:expr, |$cores:ident, $gpu:ident, $draw:ident| $run:expr) => {
            Check {
                name: $name,
                run: |$gpu, $draw| {
                    let $cores = Cores::$kind;
                    $run
                },
            }
        };
    }
    [
        check!(plain "attention forward f32 d128 causal edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<f32>(cores, gpu, draw, text(128), lengths, 1.0)
        }),
        check!(both "forward bf16 d128 causal edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<bf16>(cores, gpu, draw, text(128), lengths, 1.0)
        }),
        check!(both "forward bf16 d128 16/2 heads causal chunks", |cores, gpu, draw| {
            let lengths = Lengths::chunks(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(16, 2, 128, true), lengths, 1.0)
        }),
        check!(both "forward bf16 d64 14/2 heads causal edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(14, 2, 64, true), lengths, 1.0)
        }),
        // More tiles than multiprocessors.
        check!(both "forward bf16 d64 12/12 heads causal many segments", |cores, gpu, draw| {
            let lengths = Lengths::many(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(12, 12, 64, true), lengths, 1.0)
        }),
        check!(both "forward bf16 d128 causal one long segment", |cores, gpu, draw| {
            let length = draw.between(700, 1100);
            forward_check::<bf16>(cores, gpu, draw, shape(2, 1, 128, true), Lengths::one(length), 1.0)
        }),
        check!(both "forward bf16 d128 causal blind queries", |cores, gpu, draw| {
            let lengths = Lengths::blind(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(2, 1, 128, true), lengths, 1.0)
        }),
        check!(plain "attention forward f32 d64 causal blind queries", |cores, gpu, draw| {
            let lengths = Lengths::blind(draw);
            forward_check::<f32>(cores, gpu, draw, shape(2, 1, 64, true), lengths, 1.0)
        }),
        check!(plain "attention forward f32 d128 causal peaked", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<f32>(cores, gpu, draw, text(128), lengths, 4.0)
        }),
        check!(both "forward bf16 d128 causal peaked", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<bf16>(cores, gpu, draw, text(128), lengths, 4.0)
        }),
        check!(plain "attention forward f32 d80 windows", |cores, gpu, draw| {
            let lengths = Lengths::many(draw);
            forward_check::<f32>(cores, gpu, draw, shape(4, 4, 80, false), lengths, 1.0)
        }),
        check!(both "forward bf16 d80 windows", |cores, gpu, draw| {
            let lengths = Lengths::many(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(4, 4, 80, false), lengths, 1.0)
        }),
        check!(both "forward bf16 d80 edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            forward_check::<bf16>(cores, gpu, draw, shape(4, 4, 80, false), lengths, 1.0)
        }),
        check!(both "forward bf16 d72 pictures of 729", |cores, gpu, draw| {
            let lengths = Lengths::of(&[(729, 729), (729, 729)]);
            forward_check::<bf16>(cores, gpu, draw, shape(2, 2, 72, false), lengths, 1.0)
        }),
        check!(plain "attention forward bf16 d36 and d256 on plain cores", |cores, gpu, draw| {
            let (some, others) = (Lengths::edges(draw), Lengths::chunks(draw));
            let narrow = forward_check::<bf16>(cores, gpu, draw, shape(4, 2, 36, true), some, 1.0)?;
            let wide = forward_check::<bf16>(cores, gpu, draw, shape(2, 1, 256, false), others, 1.0)?;
            Ok(narrow.worst(wide))
        }),
        check!(plain "attention prefill f32 d128 pool", |cores, gpu, draw| {
            let lengths = Lengths::chunks(draw);
            prefill_check::<f32>(cores, gpu, draw, text(128), lengths, 16)
        }),
        check!(both "prefill bf16 d128 pool", |cores, gpu, draw| {
            let lengths = Lengths::chunks(draw);
            prefill_check::<bf16>(cores, gpu, draw, shape(14, 2, 128, true), lengths, 16)
        }),
        check!(both "prefill bf16 d64 pool, blocks of 8", |cores, gpu, draw| {
            let lengths = Lengths::chunks(draw);
            prefill_check::<bf16>(cores, gpu, draw, shape(14, 2, 64, true), lengths, 8)
        }),
        check!(both "prefill bf16 d128 pool, blocks of 64", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            prefill_check::<bf16>(cores, gpu, draw, shape(16, 2, 128, true), lengths, 64)
        }),
        check!(plain "attention backward f32 d128 edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<f32>(cores, gpu, draw, text(128), lengths, 1.0)
        }),
        check!(both "backward bf16 d128 edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<bf16>(cores, gpu, draw, text(128), lengths, 1.0)
        }),
        check!(both "backward bf16 d128 14/2 heads chunks", |cores, gpu, draw| {
            let lengths = Lengths::chunks(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(14, 2, 128, true), lengths, 1.0)
        }),
        check!(both "backward bf16 d64 14/2 heads edges", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(14, 2, 64, true), lengths, 1.0)
        }),
        check!(both "backward bf16 d128 12/6 heads many segments", |cores, gpu, draw| {
            let lengths = Lengths::many(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(12, 6, 128, true), lengths, 1.0)
        }),
        check!(both "backward bf16 d128 one long segment", |cores, gpu, draw| {
            let length = draw.between(500, 800);
            backward_check::<bf16>(cores, gpu, draw, shape(2, 1, 128, true), Lengths::one(length), 1.0)
        }),
        check!(both "backward bf16 d128 blind queries", |cores, gpu, draw| {
            let lengths = Lengths::blind(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(2, 1, 128, true), lengths, 1.0)
        }),
        check!(plain "attention backward f32 d64 blind queries", |cores, gpu, draw| {
            let lengths = Lengths::blind(draw);
            backward_check::<f32>(cores, gpu, draw, shape(2, 1, 64, true), lengths, 1.0)
        }),
        check!(plain "attention backward f32 d64 peaked", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<f32>(cores, gpu, draw, text(64), lengths, 2.0)
        }),
        check!(both "backward bf16 d128 peaked", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<bf16>(cores, gpu, draw, text(128), lengths, 2.0)
        }),
        check!(both "backward bf16 d80 windows", |cores, gpu, draw| {
            let lengths = Lengths::many(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(4, 4, 80, false), lengths, 1.0)
        }),
        check!(plain "attention backward bf16 d36 on plain cores", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            backward_check::<bf16>(cores, gpu, draw, shape(4, 2, 36, true), lengths, 1.0)
        }),
        check!(both "bf16 d128 equal bits of two runs", |cores, gpu, draw| {
            let lengths = Lengths::edges(draw);
            repeat_check::<bf16>(cores, gpu, draw, shape(14, 2, 128, true), lengths)
        }),
    ]
    .concat()
}
