//! Parity and speed.

use half::bf16;

use super::{
    Cache, Heads, SplitInto, Turn, backward,
    reference::{self, Angles, pool_index},
    split, split_parts,
};
use crate::{
    Buffer, Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    rows::{NONE, in_a_graph, near, random_bf16},
};

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "rotary_split f32",
            run: check_split::<f32>,
        },
        Check {
            name: "rotary_split bf16",
            run: check_split::<bf16>,
        },
        Check {
            name: "rotary_split of parts bf16",
            run: check_parts::<bf16>,
        },
        Check {
            name: "rotary_split angles to position 131071",
            run: check_angles,
        },
        Check {
            name: "rotary_backward f32",
            run: check_backward::<f32>,
        },
        Check {
            name: "rotary_backward bf16",
            run: check_backward::<bf16>,
        },
    ]
}

/// The language model of Qwen2.5-VL, its vision tower, SigLIP, and heads whose halves are odd; few tokens and many.
fn shapes(draw: &mut Draw) -> [Heads; 6] {
    let shape = |tokens, heads, kv_heads, head_dim| Heads {
        tokens,
        heads,
        kv_heads,
        head_dim,
    };
    [
        shape(draw.between(1, 9), 28, 4, 128),
        shape(draw.between(540, 580), 7, 1, 128),
        shape(draw.between(1, 9), 16, 16, 80),
        shape(draw.between(540, 580), 2, 2, 72),
        shape(draw.between(1, 9), 3, 1, 64),
        shape(draw.between(540, 580), 5, 2, 6),
    ]
}

fn draw_angles(draw: &mut Draw, axes: usize, tokens: usize, pairs: usize) -> Angles {
    Angles {
        positions: (0..axes * tokens).map(|_| draw.below(131_072) as i32).collect(),
        frequencies: reference::frequencies(1e6, pairs),
        axis_of: (0..pairs).map(|_| draw.below(axes) as u8).collect(),
    }
}

struct OnCard(Buffer<i32>, Buffer<f32>, Buffer<u8>, usize);

impl OnCard {
    fn upload(gpu: &Gpu, angles: &Angles, axes: usize) -> Result<Self, GpuError> {
        let positions = gpu.upload(&angles.positions)?;
        Ok(Self(
            positions,
            gpu.upload(&angles.frequencies)?,
            gpu.upload(&angles.axis_of)?,
            axes,
        ))
    }

    fn turn(&self) -> Turn<'_> {
        Turn {
            axes: self.3,
            positions: &self.0,
            frequencies: &self.1,
            axis_of: &self.2,
        }
    }
}

fn check_split<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for shape in shapes(draw) {
        let Heads {
            tokens,
            heads,
            kv_heads,
            head_dim,
        } = shape;
        let sizes = (heads * head_dim, kv_heads * head_dim);
        let (row, axes) = (sizes.0 + 2 * sizes.1, draw.between(1, 3));
        let qkv = draw.normal::<T>(tokens * row, 1.0);
        let bias = draw.normal::<T>(row, 1.0);
        let angles = draw_angles(draw, axes, tokens, head_dim / 2);
        let on_card = (
            gpu.upload(&qkv)?,
            gpu.upload(&bias)?,
            OnCard::upload(gpu, &angles, axes)?,
        );

        // Turned, with a bias, into a pool: slots in any order, some of none.
        let block_size = 8 << draw.below(2);
        let blocks = tokens.div_ceil(block_size) + 2;
        let mut slots = draw.order(blocks * block_size)[..tokens].to_vec();
        let slots = slots.iter_mut().map(|slot| *slot as i32);
        let slots = slots.enumerate().map(|(token, slot)| match token % 7 {
            3 => -1,
            5 => i32::MAX - 3,
            _ => slot,
        });
        let slots = slots.collect::<Vec<_>>();
        let pool = draw.normal::<T>(blocks * block_size * sizes.1, 1.0);
        let (mut k_pool, mut v_pool) = (widen(&pool), widen(&pool));
        let (mut q, mut k, v) = reference::unpack(&widen(&qkv), Some(&widen(&bias)), sizes);
        angles.turn(&mut q, tokens, 1.0);
        angles.turn(&mut k, tokens, 1.0);
        let stored = slots
            .iter()
            .enumerate()
            .filter(|(token, _)| ![3, 5].contains(&(token % 7)));
        for (token, slot) in stored {
            for head in 0..kv_heads {
                for i in 0..head_dim {
                    let to = pool_index(*slot as usize, head, i, (kv_heads, block_size, head_dim));
                    let from = (token * kv_heads + head) * head_dim + i;
                    (k_pool[to], v_pool[to]) = (k[from], v[from]);
                }
            }
        }
        let (keys, values) = (gpu.upload(&pool)?, gpu.upload(&pool)?);
        let slots = gpu.upload(&slots)?;
        let out = (
            gpu.poisoned::<T>(q.len())?,
            gpu.poisoned::<T>(k.len())?,
            gpu.poisoned::<T>(v.len())?,
        );
        let cache = Cache {
            keys: &keys,
            values: &values,
            slots: &slots,
            block_size,
        };
        let into = SplitInto {
            q: &out.0,
            k: Some(&out.1),
            v: Some(&out.2),
            cache: Some(cache),
        };
        split(gpu, shape, &on_card.0, Some(&on_card.1), Some(on_card.2.turn()), into)?;
        for (out, expected) in [
            (&out.0, &q),
            (&out.1, &k),
            (&out.2, &v),
            (&keys, &k_pool),
            (&values, &v_pool),
        ] {
            worst = worst.worst(near(&gpu.download(out)?, expected)?);
        }

        // As it is, and only into the pool.
        let into = SplitInto {
            k: None,
            v: None,
            ..into
        };
        split(gpu, shape, &on_card.0, None, None, into)?;
        let (q, k, v) = reference::unpack(&widen(&qkv), None, sizes);
        Distance::equal(&widen(&gpu.download(&out.0)?), &q)?;
        let into = SplitInto {
            k: Some(&out.1),
            v: Some(&out.2),
            cache: None,
            ..into
        };
        split(gpu, shape, &on_card.0, None, None, into)?;
        Distance::equal(&widen(&gpu.download(&out.1)?), &k)?;
        Distance::equal(&widen(&gpu.download(&out.2)?), &v)?;
    }
    Ok(worst)
}

/// A product in parts beside the same product added up and rounded before.
fn check_parts<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for shape in shapes(draw) {
        let (width, kept) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let (matrix, count) = (shape.tokens * (width + 2 * kept), draw.between(1, 9));
        let parts = draw.normal::<f32>(count * matrix, 1.0);
        let mut qkv = vec![0.0; matrix];
        for part in parts.chunks_exact(matrix) {
            qkv.iter_mut().zip(part).for_each(|(x, part)| *x += part);
        }
        let qkv = qkv.into_iter().map(T::from_f32).collect::<Vec<_>>();
        let (qkv, parts) = (gpu.upload(&qkv)?, gpu.upload(&parts)?);
        let bias = gpu.upload(&draw.normal::<T>(width + 2 * kept, 1.0))?;
        let angles = OnCard::upload(gpu, &draw_angles(draw, 1, shape.tokens, shape.head_dim / 2), 1)?;
        let results = [false, true].map(|in_parts| {
            let [q, k, v] = [width, kept, kept].map(|width| gpu.poisoned::<T>(shape.tokens * width));
            let (q, k, v) = (q?, k?, v?);
            let into = SplitInto {
                q: &q,
                k: Some(&k),
                v: Some(&v),
                cache: None,
            };
            if in_parts {
                split_parts(gpu, shape, (&parts, count), Some(&bias), Some(angles.turn()), into)?;
            } else {
                split(gpu, shape, &qkv, Some(&bias), Some(angles.turn()), into)?;
            }
            Ok::<_, GpuError>([gpu.download(&q)?, gpu.download(&k)?, gpu.download(&v)?])
        });
        let [whole, parts] = results;
        for (parts, whole) in parts?.iter().zip(&whole?) {
            Distance::equal(parts, whole)?;
        }
    }
    Ok(Distance::EQUAL)
}

/// cos and sin themselves, as the worst absolute error of any: each pair is (1, 0).
fn check_angles(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let (tokens, pairs) = (2000, 64);
    let shape = Heads {
        tokens,
        heads: 1,
        kv_heads: 1,
        head_dim: 2 * pairs,
    };
    let mut angles = draw_angles(draw, 1, tokens, pairs);
    angles.positions[0] = 131_071;
    let head = (0..2 * pairs).map(|i| f32::from(u8::from(i < pairs)));
    let row = head.cycle().take(3 * 2 * pairs);
    let qkv = row.cycle().take(tokens * 3 * 2 * pairs).collect::<Vec<_>>();
    let out = gpu.poisoned::<f32>(tokens * 2 * pairs)?;
    let into = SplitInto {
        q: &out,
        k: None,
        v: None,
        cache: None,
    };
    let on_card = OnCard::upload(gpu, &angles, 1)?;
    split(gpu, shape, &gpu.upload(&qkv)?, None, Some(on_card.turn()), into)?;
    let mut worst = 0f64;
    for (token, row) in gpu.download(&out)?.chunks_exact(2 * pairs).enumerate() {
        for pair in 0..pairs {
            let (cos, sin) = angles.at(token, tokens, pair);
            let apart = (f64::from(row[pair]) - cos)
                .abs()
                .max((f64::from(row[pair + pairs]) - sin).abs());
            // A NaN stays.
            worst = if apart <= worst { worst } else { apart };
        }
    }
    Ok(Distance {
        relative: worst,
        bound: 2.4e-7,
    })
}

fn check_backward<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for shape in shapes(draw) {
        let Heads {
            tokens,
            heads,
            kv_heads,
            head_dim,
        } = shape;
        let sizes = (heads * head_dim, kv_heads * head_dim);
        let (dq, dk) = (
            draw.normal::<T>(tokens * sizes.0, 1.0),
            draw.normal::<T>(tokens * sizes.1, 1.0),
        );
        let dv = draw.normal::<T>(tokens * sizes.1, 1.0);
        let axes = draw.between(1, 3);
        let angles = draw_angles(draw, axes, tokens, head_dim / 2);
        let inputs = (gpu.upload(&dq)?, gpu.upload(&dk)?, gpu.upload(&dv)?);
        let inputs = (&inputs.0, &inputs.1, &inputs.2);
        let on_card = OnCard::upload(gpu, &angles, axes)?;
        let out = gpu.poisoned::<T>(tokens * (sizes.0 + 2 * sizes.1))?;
        backward(gpu, shape, Some(on_card.turn()), inputs, &out)?;
        let (mut q, mut k, v) = (widen(&dq), widen(&dk), widen(&dv));
        angles.turn(&mut q, tokens, -1.0);
        angles.turn(&mut k, tokens, -1.0);
        worst = worst.worst(near(&gpu.download(&out)?, &reference::repack(&q, &k, &v, sizes))?);
        backward(gpu, shape, None, inputs, &out)?;
        let expected = reference::repack(&widen(&dq), &widen(&dk), &v, sizes);
        Distance::equal(&widen(&gpu.download(&out)?), &expected)?;
    }
    Ok(worst)
}

const LANGUAGE: (usize, usize, usize) = (28, 4, 128);
const VISION: (usize, usize, usize) = (16, 16, 80);

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "rotary_split into rows and pool 16384 tokens 28+4 heads x128",
            prepare: |gpu, draw| splits(gpu, draw, 16_384, LANGUAGE, (true, true)),
        },
        Case {
            name: "rotary_split into rows 16384 tokens 28+4 heads x128",
            prepare: |gpu, draw| splits(gpu, draw, 16_384, LANGUAGE, (true, false)),
        },
        Case {
            name: "rotary_split vision 32768 tokens 16+16 heads x80",
            prepare: |gpu, draw| splits(gpu, draw, 32_768, VISION, (true, false)),
        },
        Case {
            name: "rotary_split decode 1 token into pool, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, splits(gpu, draw, 1, LANGUAGE, (false, true))?),
        },
        Case {
            name: "rotary_split decode 64 tokens into pool, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, splits(gpu, draw, 64, LANGUAGE, (false, true))?),
        },
        Case {
            name: "rotary_split decode 256 tokens into pool, 20 in a graph",
            prepare: |gpu, draw| in_a_graph(gpu, 20, splits(gpu, draw, 256, LANGUAGE, (false, true))?),
        },
        Case {
            name: "rotary_backward 16384 tokens 28+4 heads x128",
            prepare: backwards,
        },
    ]
}

fn splits(
    gpu: &Gpu,
    draw: &mut Draw,
    tokens: usize,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    (rows, pool): (bool, bool),
) -> Result<Prepared, GpuError> {
    let shape = Heads {
        tokens,
        heads,
        kv_heads,
        head_dim,
    };
    let (q, k) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
    let qkv = random_bf16(gpu, q + 2 * k)?;
    let bias = random_bf16(gpu, (heads + 2 * kv_heads) * head_dim)?;
    let mut angles = draw_angles(draw, 3, tokens, head_dim / 2);
    angles.positions.iter_mut().for_each(|position| *position %= 32_768);
    let angles = OnCard::upload(gpu, &angles, 3)?;
    let out = (random_bf16(gpu, q)?, random_bf16(gpu, k)?, random_bf16(gpu, k)?);
    let length = tokens.next_multiple_of(16) * kv_heads * head_dim;
    let (keys, values) = (random_bf16(gpu, length)?, random_bf16(gpu, length)?);
    let slots = gpu.upload(&(0..tokens as i32).collect::<Vec<_>>())?;
    let gpu = gpu.clone();
    let copies = usize::from(rows) + usize::from(pool);
    Ok(Prepared {
        run: Box::new(move || {
            let cache = Cache {
                keys: &keys,
                values: &values,
                slots: &slots,
                block_size: 16,
            };
            let into = SplitInto {
                q: &out.0,
                k: rows.then_some(&out.1),
                v: rows.then_some(&out.2),
                cache: pool.then_some(cache),
            };
            split(&gpu, shape, &qkv, Some(&bias), Some(angles.turn()), into)
        }),
        bytes: (2 * (2 * q + 2 * k * (1 + copies))) as f64,
        operations: 0.0,
    })
}

fn backwards(gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
    let (tokens, (heads, kv_heads, head_dim)) = (16_384, LANGUAGE);
    let shape = Heads {
        tokens,
        heads,
        kv_heads,
        head_dim,
    };
    let (q, k) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
    let (dq, dk, dv) = (random_bf16(gpu, q)?, random_bf16(gpu, k)?, random_bf16(gpu, k)?);
    let out = random_bf16(gpu, q + 2 * k)?;
    let mut angles = draw_angles(draw, 3, tokens, head_dim / 2);
    angles.positions.iter_mut().for_each(|position| *position %= 32_768);
    let angles = OnCard::upload(gpu, &angles, 3)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || backward(&gpu, shape, Some(angles.turn()), (&dq, &dk, &dv), &out)),
        bytes: (2 * 2 * (q + 2 * k)) as f64,
        operations: 0.0,
    })
}
