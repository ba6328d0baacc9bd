//! Seconds of each operation of a training step, one by one: where a step's time goes.

use std::fmt;

use flotilla_kernels::{
    Buffer, Gemm, Gpu, GpuError,
    activation::{bias_gradient, bias_gradient_scratch, swiglu, swiglu_backward},
    attention::{self, Gradients, Rows, Saved, Segments},
    bench, norm,
    norm::{Norm, RmsNormBackward, rms_norm, rms_norm_backward},
    rotary::{self, Heads, SplitInto},
    rows::fill_normal,
    vocabulary::{self, Losses, Scores},
};
use half::bf16;

use super::{
    Settings,
    buffers::{self, Rotation},
};
use crate::shape::TextShape;

/// One operation.
#[derive(Clone, Debug)]
pub struct Operation {
    /// What it is.
    pub name: String,
    /// How often a training step of one micro-batch does it where nothing is computed twice.
    pub count: usize,
    /// Median seconds.
    pub seconds: f64,
    /// Floating-point operations on tensor cores.
    pub operations: f64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<28} {:>9.1} us x {:<3} = {:>8.2} ms {:>6.0} TFLOP/s",
            self.name,
            self.seconds * 1e6,
            self.count,
            self.seconds * self.count as f64 * 1e3,
            self.operations / self.seconds / 1e12
        )
    }
}

struct Bench<'a> {
    gpu: &'a Gpu,
    shape: &'a TextShape,
    rows: usize,
    found: Vec<Operation>,
}

impl Bench<'_> {
    fn random(&self, length: usize) -> Result<Buffer<bf16>, GpuError> {
        let buffer = self.gpu.alloc(length)?;
        fill_normal(self.gpu, &buffer, 0.5, length as u64)?;
        Ok(buffer)
    }

    fn time(
        &mut self,
        name: &str,
        count: usize,
        operations: f64,
        run: impl FnMut() -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let seconds = bench::median(self.gpu, run)?;
        self.found.push(Operation {
            name: name.to_owned(),
            count,
            seconds,
            operations,
        });
        Ok(())
    }

    /// The three products of a linear layer.
    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<(), GpuError> {
        let (gpu, rows) = (self.gpu, self.rows);
        let (x, y) = (self.random(rows * inputs)?, self.random(rows * outputs)?);
        let weight = self.random(outputs * inputs)?;
        let gradient = self.random(outputs * inputs)?;
        let layers = self.shape.layers;
        let kinds = [
            ("forward", Gemm::linear(rows, outputs, inputs), [&x, &weight, &y]),
            (
                "by input",
                Gemm::input_gradient(rows, outputs, inputs),
                [&y, &weight, &x],
            ),
            (
                "by weight",
                Gemm::weight_gradient(rows, outputs, inputs),
                [&y, &x, &gradient],
            ),
        ];
        for (kind, product, [a, b, out]) in kinds {
            self.time(&format!("{name} {kind}"), layers, product.operations(), || {
                gpu.gemm(product, a, b, out)
            })?;
        }
        Ok(())
    }

    fn attention(&mut self, length: usize) -> Result<(), GpuError> {
        let (gpu, shape, rows) = (self.gpu, self.shape, self.rows);
        let offsets = (0..=rows / length).map(|index| u32::try_from(index * length).unwrap_or(u32::MAX));
        let offsets = gpu.upload(&offsets.collect::<Vec<_>>())?;
        let split = self.random(rows * shape.packed_width())?;
        let d_split = self.random(rows * shape.packed_width())?;
        let packed = self.random(rows * shape.packed_width())?;
        let bias = self.random(shape.packed_width())?;
        let out = self.random(rows * shape.query_width())?;
        let d_out = self.random(rows * shape.query_width())?;
        let lse = gpu.alloc::<f32>(rows * shape.heads)?;
        let delta = gpu.alloc::<f32>(rows * shape.heads)?;
        let positions = (0..3 * rows).map(|at| i32::try_from(at % length).unwrap_or(0));
        let positions = gpu.upload(&positions.collect::<Vec<_>>())?;
        let rotation = Rotation::new(gpu, shape)?;
        let heads = Heads {
            tokens: rows,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
        };
        let rule = buffers::attention(shape);
        let segments = Segments {
            queries: &offsets,
            keys: &offsets,
            query_tokens: rows,
            key_tokens: rows,
        };
        let parts = buffers::parts(shape, rows, &split)?;
        let d_parts = buffers::parts(shape, rows, &d_split)?;
        let widths = [shape.query_width(), shape.key_width(), shape.key_width()];
        let of = |parts: &[Buffer<bf16>; 3], index: usize| (parts[index].clone(), widths[index]);
        let (layers, pairs) = (shape.layers, rows as f64 * (length as f64 + 1.0) / 2.0);
        let products = shape.attention_operations(1) / layers as f64 * pairs;
        let [(q, q_stride), (k, stride), (v, _)] = [0, 1, 2].map(|index| of(&parts, index));
        let [(dq, _), (dk, _), (dv, _)] = [0, 1, 2].map(|index| of(&d_parts, index));
        let (q, k, v) = (Rows::new(&q, q_stride), Rows::new(&k, stride), Rows::new(&v, stride));
        self.time("attention forward", layers, products, || {
            attention::forward(gpu, &rule, q, k, v, &segments, &out, Some(&lse))
        })?;
        let saved = Saved {
            out: &out,
            lse: &lse,
            dout: &d_out,
        };
        let gradients = Gradients {
            dq: Rows::new(&dq, q_stride),
            dk: Rows::new(&dk, stride),
            dv: Rows::new(&dv, stride),
        };
        self.time("attention backward", layers, 2.0 * products, || {
            attention::backward(gpu, &rule, q, k, v, &segments, &saved, &gradients, &delta)
        })?;
        let into = SplitInto {
            q: &parts[0],
            k: Some(&parts[1]),
            v: Some(&parts[2]),
            cache: None,
        };
        self.time("split and turn", layers, 0.0, || {
            rotary::split(gpu, heads, &packed, Some(&bias), Some(rotation.turn(&positions)), into)
        })?;
        self.time("split and turn backward", layers, 0.0, || {
            let turn = rotation.turn(&positions);
            rotary::backward(gpu, heads, Some(turn), (&dq, &dk, &dv), &packed)
        })?;
        let width = shape.packed_width();
        let (sums, scratch) = (gpu.zeros(width)?, gpu.alloc(bias_gradient_scratch(rows, width))?);
        self.time("bias gradient", layers, 0.0, || {
            bias_gradient(gpu, rows, width, &packed, &sums, &scratch)
        })
    }

    fn rows(&mut self) -> Result<(), GpuError> {
        let (gpu, shape, rows) = (self.gpu, self.shape, self.rows);
        let (hidden, layers) = (shape.hidden, shape.layers);
        let (x, y, weight) = (
            self.random(rows * hidden)?,
            self.random(rows * hidden)?,
            self.random(hidden)?,
        );
        let norm = Norm {
            rows,
            width: hidden,
            eps: shape.eps,
        };
        let inverse = gpu.alloc::<f32>(rows)?;
        self.time("norm forward", 4 * layers, 0.0, || {
            rms_norm(gpu, norm, &x, None, &weight, &y, Some(&inverse))
        })?;
        let sums = gpu.zeros::<f32>(hidden)?;
        let scratch = gpu.alloc(norm::rms_norm_backward_scratch(gpu, norm))?;
        let dx = self.random(rows * hidden)?;
        self.time("norm backward", 2 * layers, 0.0, || {
            let operands = RmsNormBackward {
                dy: &y,
                x: &x,
                weight: &weight,
                inverse_rms: &inverse,
                dx: &dx,
                accumulate: true,
                dweight: Some((&sums, &scratch)),
            };
            rms_norm_backward(gpu, norm, operands)
        })?;
        self.time("copy of the stream", 2 * layers, 0.0, || gpu.copy(&x, &y))?;
        let width = shape.intermediate;
        let (gate_up, gated) = (self.random(rows * 2 * width)?, self.random(rows * width)?);
        self.time("swiglu", layers, 0.0, || swiglu(gpu, rows, width, &gate_up, &gated))?;
        self.time("swiglu backward", layers, 0.0, || {
            swiglu_backward(gpu, rows, width, &gate_up, &gated, &gate_up, Some(&gated))
        })
    }

    fn head(&mut self, settings: &Settings) -> Result<(), GpuError> {
        let (gpu, shape, rows) = (self.gpu, self.shape, self.rows);
        let heads = buffers::vocabulary(shape, settings, rows, 1.0);
        let scratch = gpu.alloc(heads.backward_bytes::<bf16>().max(heads.forward_bytes()))?;
        let hidden = self.random(rows * shape.hidden)?;
        let d_hidden = self.random(rows * shape.hidden)?;
        let weight = self.random(shape.vocabulary * shape.hidden)?;
        let gradient = self.random(shape.vocabulary * shape.hidden)?;
        let targets = gpu.zeros::<i32>(rows)?;
        let [log_prob, lse, entropy] = [gpu.zeros(rows)?, gpu.zeros(rows)?, gpu.zeros(rows)?];
        let product = Gemm::linear(rows, shape.vocabulary, shape.hidden).operations();
        let scores = Scores {
            log_prob: &log_prob,
            entropy: Some(&entropy),
            lse: &lse,
        };
        self.time("head forward", 1, product, || {
            vocabulary::forward(gpu, &heads, &hidden, &weight, &targets, &scores, &scratch)
        })?;
        let losses = Losses {
            lse: &lse,
            d_log_prob: &log_prob,
            entropy: None,
        };
        // Logits are computed again, which the model's operations do not count.
        self.time("head backward", 1, 2.0 * product, || {
            let operands = (&hidden, &weight, &targets);
            vocabulary::backward(gpu, &heads, operands, &losses, &d_hidden, Some(&gradient), &scratch)
        })
    }
}

/// Measures operations of a micro-batch of `rows` tokens in sequences of `length`; of `products_only` those of linear layers.
pub fn parts(
    gpu: &Gpu,
    shape: &TextShape,
    settings: &Settings,
    (rows, length): (usize, usize),
    products_only: bool,
) -> Result<Vec<Operation>, GpuError> {
    let mut bench = Bench {
        gpu,
        shape,
        rows,
        found: Vec::new(),
    };
    bench.linear("qkv", shape.packed_width(), shape.hidden)?;
    bench.linear("output", shape.hidden, shape.query_width())?;
    bench.linear("gate and up", 2 * shape.intermediate, shape.hidden)?;
    bench.linear("down", shape.hidden, shape.intermediate)?;
    if !products_only {
        bench.attention(length)?;
        bench.rows()?;
        bench.head(settings)?;
    }
    Ok(bench.found)
}
