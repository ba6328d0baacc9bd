//! Parity and speed.

use half::bf16;
use rand::Rng;

use super::{
    Losses, Scores, Vocabulary, backward, forward,
    reference::{self, Head},
};
use crate::{
    Buffer, Dtype, Float, Gemm, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    sampling,
};

pub fn checks() -> Vec<Check> {
    let check = |name, run| Check { name, run };
    vec![
        check("vocabulary forward f32", |gpu, random| {
            forwards::<f32>(gpu, random, &SHAPES)
        }),
        check("vocabulary forward bf16", |gpu, random| {
            forwards::<bf16>(gpu, random, &SHAPES)
        }),
        check("vocabulary forward f32 odd width", |gpu, random| {
            forwards::<f32>(gpu, random, &ODD)
        }),
        check("vocabulary forward bf16 odd width", |gpu, random| {
            forwards::<bf16>(gpu, random, &ODD)
        }),
        check("vocabulary forward f32 extreme logits", extreme),
        check("vocabulary backward f32", |gpu, random| {
            backwards::<f32, f32>(gpu, random, &SHAPES)
        }),
        check("vocabulary backward bf16", |gpu, random| {
            backwards::<bf16, f32>(gpu, random, &SHAPES)
        }),
        check("vocabulary backward bf16 into bf16", |gpu, random| {
            backwards::<bf16, bf16>(gpu, random, &SHAPES)
        }),
        check("vocabulary backward f32 odd width", |gpu, random| {
            backwards::<f32, f32>(gpu, random, &ODD)
        }),
        check("vocabulary backward bf16 odd width", |gpu, random| {
            backwards::<bf16, f32>(gpu, random, &ODD)
        }),
        check("vocabulary log-probabilities f32 as sampled", |gpu, random| {
            sampled::<f32>(gpu, random)
        }),
        check("vocabulary log-probabilities bf16 as sampled", |gpu, random| {
            sampled::<bf16>(gpu, random)
        }),
    ]
}

/// Before anything has been compared.
const NOTHING: Distance = Distance {
    relative: 0.0,
    bound: 1.0,
};

/// Rows, width, vocabulary, rows at a time, tokens at a time.
type Shape = (usize, usize, usize, usize, usize);

const SHAPES: [Shape; 7] = [
    (33, 64, 1000, 64, 256),
    (33, 64, 1001, 16, 256),
    (70, 128, 4099, 32, 1024),
    (5, 32, 7, 5, 8),
    (1, 96, 513, 1, 128),
    (64, 256, 3000, 64, 3000),
    (40, 64, 2055, 40, 2048),
];
/// Widths whose rows are not at multiples of 16 bytes.
const ODD: [Shape; 2] = [(19, 37, 301, 19, 64), (24, 50, 530, 8, 128)];

/// A head and what it is applied to.
struct Problem<T> {
    vocabulary: Vocabulary,
    hidden: Vec<T>,
    weight: Vec<T>,
    targets: Vec<i32>,
}

/// Hidden states, weight and targets on the GPU.
type Operands<T> = (Buffer<T>, Buffer<T>, Buffer<i32>);

impl<T: Float> Problem<T> {
    fn new(random: &mut Draw, (rows, width, vocabulary, row_chunk, vocabulary_chunk): Shape, deviation: f32) -> Self {
        let target = |row: usize, random: &mut Draw| match row % 5 {
            // At the edges of chunks, at those of the vocabulary, ignored.
            0 => (vocabulary_chunk * random.below(3)).min(vocabulary - 1) as i32,
            1 => (vocabulary_chunk * random.between(1, 2) - 1).min(vocabulary - 1) as i32,
            2 if row.is_multiple_of(2) => -100,
            3 => vocabulary as i32 - 1,
            _ => random.below(vocabulary) as i32,
        };
        Self {
            vocabulary: Vocabulary {
                rows,
                width,
                vocabulary,
                temperature: [1.0, 0.7, 1.6][random.below(3)],
                row_chunk,
                vocabulary_chunk,
            },
            targets: (0..rows).map(|row| target(row, random)).collect(),
            hidden: random.normal(rows * width, 1.0),
            weight: random.normal(vocabulary * width, deviation / (width as f32).sqrt()),
        }
    }

    fn head(&self) -> Head {
        Head {
            rows: self.vocabulary.rows,
            width: self.vocabulary.width,
            vocabulary: self.vocabulary.vocabulary,
            temperature: self.vocabulary.temperature,
        }
    }

    fn upload(&self, gpu: &Gpu) -> Result<Operands<T>, GpuError> {
        Ok((
            gpu.upload(&self.hidden)?,
            gpu.upload(&self.weight)?,
            gpu.upload(&self.targets)?,
        ))
    }

    /// Log-probabilities, entropies and what backward needs, on the GPU.
    fn forward(&self, gpu: &Gpu) -> Result<[Buffer<f32>; 3], GpuError> {
        let rows = self.vocabulary.rows;
        let (hidden, weight, targets) = self.upload(gpu)?;
        let (log_prob, entropy, lse) = (gpu.poisoned(rows)?, gpu.poisoned(rows)?, gpu.poisoned(rows)?);
        let scores = Scores {
            log_prob: &log_prob,
            entropy: Some(&entropy),
            lse: &lse,
        };
        let scratch = gpu.poisoned::<u8>(self.vocabulary.forward_bytes())?;
        forward(gpu, &self.vocabulary, &hidden, &weight, &targets, &scores, &scratch)?;
        let alone = gpu.poisoned(rows)?;
        let scores = Scores {
            log_prob: &alone,
            entropy: None,
            lse: &lse,
        };
        forward(gpu, &self.vocabulary, &hidden, &weight, &targets, &scores, &scratch)?;
        Ok([alone, entropy, lse])
    }
}

/// Logits of f32 matrices are sums in f32; those of bf16 matrices are exact products summed in f32. What is left of them
/// in a log-probability of size 10 is an error of some 1e-6.
const LOG_PROB_BOUND: f64 = 5e-6;

fn forwards<T: Float>(gpu: &Gpu, random: &mut Draw, shapes: &[Shape]) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for shape in shapes {
        let deviation = [0.5, 2.0, 5.0][random.below(3)];
        let problem = Problem::<T>::new(random, *shape, deviation);
        let [log_prob, entropy, lse] = problem.forward(gpu)?;
        let (hidden, weight) = (widen(&problem.hidden), widen(&problem.weight));
        let expected = reference::forward(&problem.head(), &hidden, &weight, &problem.targets);
        for (ours, theirs) in [
            (log_prob, expected.log_prob),
            (entropy, expected.entropy),
            (lse, expected.lse),
        ] {
            worst = worst.worst(Distance::within(&gpu.download(&ours)?, &theirs, LOG_PROB_BOUND)?);
        }
    }
    Ok(worst)
}

/// Logits of thousands: one token has all the probability, and differences must not be lost.
fn extreme(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for (shape, deviation) in [(SHAPES[1], 3000.0), (SHAPES[2], 1e-6)] {
        let problem = Problem::<f32>::new(random, shape, deviation);
        let [log_prob, entropy, lse] = problem.forward(gpu)?;
        let expected = reference::forward(&problem.head(), &problem.hidden, &problem.weight, &problem.targets);
        worst = worst.worst(Distance::within(&gpu.download(&log_prob)?, &expected.log_prob, 1e-5)?);
        worst = worst.worst(Distance::within(&gpu.download(&lse)?, &expected.lse, 1e-5)?);
        // The entropy of a distribution with one possible token is nearly 0: compared absolutely.
        let entropy = gpu.download(&entropy)?;
        let apart = entropy.iter().zip(&expected.entropy).map(|(a, b)| (a - b).abs());
        worst = worst.worst(Distance {
            relative: f64::from(apart.fold(0.0, f32::max)),
            bound: 5e-3,
        });
        if entropy.iter().any(|one| !one.is_finite()) {
            return Err(CheckError::Differs("an entropy that is not finite".to_owned()));
        }
    }
    Ok(worst)
}

fn backwards<T: Float, D: Float>(gpu: &Gpu, random: &mut Draw, shapes: &[Shape]) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for (index, shape) in shapes.iter().enumerate() {
        let problem = Problem::<T>::new(random, *shape, 2.0);
        let vocabulary = &problem.vocabulary;
        let rows = vocabulary.rows;
        let d_log_prob = random.normal::<f32>(rows, 1.0);
        let with_entropy = index % 3 != 2;
        let d_entropy = if with_entropy {
            random.normal::<f32>(rows, 0.5)
        } else {
            vec![0.0; rows]
        };
        let (hidden, weight) = (widen(&problem.hidden), widen(&problem.weight));
        let (head, of) = (problem.head(), (&hidden[..], &weight[..], &problem.targets[..]));
        let expected = reference::backward(&head, of, &d_log_prob, &d_entropy);
        let [_, entropy, lse] = problem.forward(gpu)?;
        let (d_log_prob, d_entropy) = (gpu.upload(&d_log_prob)?, gpu.upload(&d_entropy)?);
        let losses = Losses {
            lse: &lse,
            d_log_prob: &d_log_prob,
            entropy: with_entropy.then_some((&entropy, &d_entropy)),
        };
        let (hidden, weight, targets) = problem.upload(gpu)?;
        let scratch = gpu.poisoned::<u8>(vocabulary.backward_bytes::<T>())?;
        let d_hidden = gpu.poisoned::<T>(hidden.len())?;
        // Gradients are added to what is there: numbers of their size, so that rounding a sum in bf16 hides no gradient.
        let before = random.normal::<D>(weight.len(), root_mean_square(&expected.weight));
        let d_weight = gpu.upload(&before)?;
        let operands = (&hidden, &weight, &targets);
        backward(gpu, vocabulary, operands, &losses, &d_hidden, Some(&d_weight), &scratch)?;
        // In bf16 the gradients of the logits are rounded before they are summed.
        let bound = |dtype| match dtype {
            Dtype::F32 => 2e-5,
            Dtype::Bf16 => 6e-3,
        };
        worst = worst.worst(Distance::within(
            &gpu.download(&d_hidden)?,
            &expected.hidden,
            bound(T::DTYPE),
        )?);
        let added = gpu.download(&d_weight)?;
        let added = added
            .iter()
            .zip(&before)
            .map(|(after, before)| after.to_f32() - before.to_f32());
        // A sum in bf16 is rounded once for each chunk of rows, of which there are up to three.
        let bound = match D::DTYPE {
            Dtype::F32 => bound(T::DTYPE),
            Dtype::Bf16 => 1e-2,
        };
        worst = worst.worst(Distance::within(&added.collect::<Vec<_>>(), &expected.weight, bound)?);
        // Without a weight that is trained, the same gradient of the hidden states.
        let alone = gpu.poisoned::<T>(hidden.len())?;
        backward::<T, D>(gpu, vocabulary, operands, &losses, &alone, None, &scratch)?;
        worst = worst.worst(Distance::equal(&gpu.download(&alone)?, &gpu.download(&d_hidden)?)?);
    }
    Ok(worst)
}

fn root_mean_square(values: &[f32]) -> f32 {
    (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt()
}

/// The log-probability that a token was drawn with is the one that training computes. The distance is the mean difference.
fn sampled<T: Float>(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut problem = Problem::<T>::new(random, (96, 256, 20_005, 64, 4096), 3.0);
    let Vocabulary {
        rows,
        width,
        vocabulary,
        temperature,
        ..
    } = problem.vocabulary;
    let (hidden, weight, _) = problem.upload(gpu)?;
    let logits = gpu.poisoned::<f32>(rows * vocabulary)?;
    gpu.gemm(Gemm::linear(rows, vocabulary, width), &hidden, &weight, &logits)?;
    let uniforms = (0..rows).map(|_| random.random().random::<f32>()).collect::<Vec<_>>();
    let (temperatures, top_k) = (gpu.upload(&vec![temperature; rows])?, gpu.zeros(rows)?);
    let (ones, zeros) = (gpu.upload(&vec![1f32; rows])?, gpu.zeros(rows)?);
    let (token, log_prob, model_log_prob) = (gpu.poisoned::<u32>(rows)?, gpu.poisoned(rows)?, gpu.poisoned(rows)?);
    sampling::draw(
        gpu,
        &sampling::Draws { rows, vocabulary },
        &logits,
        &sampling::Parameters {
            temperature: &temperatures,
            top_k: &top_k,
            top_p: &ones,
            min_p: &zeros,
            uniform: &gpu.upload(&uniforms)?,
        },
        &sampling::Drawn {
            token: &token,
            log_prob: &log_prob,
            model_log_prob: &model_log_prob,
        },
    )?;
    problem.targets = gpu.download(&token)?.into_iter().map(|id| id as i32).collect();
    let [trained, ..] = problem.forward(gpu)?;
    let (drawn, trained) = (gpu.download(&log_prob)?, gpu.download(&trained)?);
    let apart = drawn.iter().zip(&trained).map(|(a, b)| f64::from((a - b).abs()));
    Ok(Distance {
        relative: apart.sum::<f64>() / rows as f64,
        bound: 1e-5,
    })
}

/// The head of Qwen2.5-VL-7B.
const WIDTH: usize = 3584;
const TOKENS: usize = 152_064;

pub fn cases() -> Vec<Case> {
    let case = |name, prepare| Case { name, prepare };
    vec![
        case("vocabulary forward 4096x3584x152064 bf16", |gpu, random| {
            prepare_forward(gpu, random, 4096, None)
        }),
        case("vocabulary backward 4096x3584x152064 bf16", |gpu, random| {
            prepare_backward(gpu, random, 4096, None)
        }),
        case("vocabulary forward 1024x3584x152064 bf16", |gpu, random| {
            prepare_forward(gpu, random, 1024, None)
        }),
        case("vocabulary backward 1024x3584x152064 bf16", |gpu, random| {
            prepare_backward(gpu, random, 1024, None)
        }),
        case(
            "vocabulary forward 4096, chunks that stay in the cache",
            |gpu, random| prepare_forward(gpu, random, 4096, Some((2048, 4224))),
        ),
    ]
}

/// Random numbers, repeated: drawing half a billion takes longer than measuring.
fn tiled(gpu: &Gpu, random: &mut Draw, length: usize, deviation: f32) -> Result<Buffer<bf16>, GpuError> {
    let period = (1 << 20) + 8;
    let numbers = gpu.upload(&random.normal::<bf16>(period, deviation))?;
    let all = gpu.alloc(length)?;
    for start in (0..length).step_by(period) {
        let count = period.min(length - start);
        gpu.copy(&numbers.slice(0..count)?, &all.slice(start..start + count)?)?;
    }
    Ok(all)
}

/// A head, its operands, and places for what it computes.
struct Setup {
    vocabulary: Vocabulary,
    hidden: Buffer<bf16>,
    weight: Buffer<bf16>,
    targets: Buffer<i32>,
    log_prob: Buffer<f32>,
    lse: Buffer<f32>,
    entropy: Buffer<f32>,
}

impl Setup {
    fn new(gpu: &Gpu, random: &mut Draw, rows: usize, chunks: Option<(usize, usize)>) -> Result<Self, GpuError> {
        let mut vocabulary = Vocabulary::new(rows, WIDTH, TOKENS, 1.0);
        if let Some((row_chunk, vocabulary_chunk)) = chunks {
            vocabulary.row_chunk = row_chunk;
            vocabulary.vocabulary_chunk = vocabulary_chunk;
        }
        let targets = (0..rows).map(|_| random.below(TOKENS) as i32).collect::<Vec<_>>();
        Ok(Self {
            vocabulary,
            hidden: tiled(gpu, random, rows * WIDTH, 1.0)?,
            weight: tiled(gpu, random, TOKENS * WIDTH, 0.03)?,
            targets: gpu.upload(&targets)?,
            log_prob: gpu.alloc(rows)?,
            lse: gpu.alloc(rows)?,
            entropy: gpu.alloc(rows)?,
        })
    }

    fn forward(&self, gpu: &Gpu, scratch: &Buffer<u8>) -> Result<(), GpuError> {
        let scores = Scores {
            log_prob: &self.log_prob,
            entropy: Some(&self.entropy),
            lse: &self.lse,
        };
        forward(
            gpu,
            &self.vocabulary,
            &self.hidden,
            &self.weight,
            &self.targets,
            &scores,
            scratch,
        )
    }

    fn operations(&self) -> f64 {
        Gemm::linear(self.vocabulary.rows, TOKENS, WIDTH).operations()
    }

    fn weight_bytes(&self) -> f64 {
        2.0 * (TOKENS * WIDTH) as f64
    }
}

fn prepare_forward(
    gpu: &Gpu,
    random: &mut Draw,
    rows: usize,
    chunks: Option<(usize, usize)>,
) -> Result<Prepared, GpuError> {
    let setup = Setup::new(gpu, random, rows, chunks)?;
    let scratch = gpu.alloc::<u8>(setup.vocabulary.forward_bytes())?;
    let gpu = gpu.clone();
    Ok(Prepared {
        bytes: setup.weight_bytes(),
        operations: setup.operations(),
        run: Box::new(move || setup.forward(&gpu, &scratch)),
    })
}

/// With a weight that is trained: three products, of which the first computes the logits again.
fn prepare_backward(
    gpu: &Gpu,
    random: &mut Draw,
    rows: usize,
    chunks: Option<(usize, usize)>,
) -> Result<Prepared, GpuError> {
    let setup = Setup::new(gpu, random, rows, chunks)?;
    let bytes = setup.vocabulary.forward_bytes();
    let scratch = gpu.alloc::<u8>(setup.vocabulary.backward_bytes::<bf16>().max(bytes))?;
    setup.forward(gpu, &scratch)?;
    let d_log_prob = gpu.upload(&random.normal::<f32>(rows, 1.0 / rows as f32))?;
    let d_hidden = gpu.alloc::<bf16>(setup.hidden.len())?;
    let d_weight = gpu.zeros::<f32>(setup.weight.len())?;
    let gpu = gpu.clone();
    Ok(Prepared {
        bytes: setup.weight_bytes() * 5.0,
        operations: 3.0 * setup.operations(),
        run: Box::new(move || {
            let losses = Losses {
                lse: &setup.lse,
                d_log_prob: &d_log_prob,
                entropy: None,
            };
            let operands = (&setup.hidden, &setup.weight, &setup.targets);
            backward(
                &gpu,
                &setup.vocabulary,
                operands,
                &losses,
                &d_hidden,
                Some(&d_weight),
                &scratch,
            )
        }),
    })
}
