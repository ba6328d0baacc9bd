//! Parity and speed.

use half::bf16;
use rand::Rng;

use super::{
    BROKEN, Drawn, Draws, MOST_TOP, Parameters, draw,
    reference::{How, Row, Token},
    top_log_probs,
};
use crate::{
    Buffer, Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
};

/// The largest f32 below 1.
const ALMOST_ONE: f32 = 1.0 - f32::EPSILON / 2.0;
/// Weights and their sums may be rounded otherwise by this share.
const ROUNDING: f32 = 4e-6;
/// Rows that may draw another token than the reference, all of them because a sum was rounded otherwise.
const MOST_OTHERS: f64 = 0.02;
/// Before anything has been compared.
const NOTHING: Distance = Distance {
    relative: 0.0,
    bound: 1.0,
};
/// Log-probabilities may be apart by this much: of f32 numbers up to 32, a few roundings.
const MOST_APART: f64 = 1e-5;

pub fn checks() -> Vec<Check> {
    let check = |name, run| Check { name, run };
    vec![
        check("sampling f32 plain", plain::<f32>),
        check("sampling bf16 plain", plain::<bf16>),
        check("sampling f32 odd vocabularies", odd::<f32>),
        check("sampling bf16 odd vocabularies", odd::<bf16>),
        check("sampling f32 top_k, top_p, min_p", cut::<f32>),
        check("sampling bf16 top_k, top_p, min_p", cut::<bf16>),
        check("sampling f32 flat and peaked", flat_and_peaked),
        check("sampling f32 ties", ties),
        check("sampling f32 minus infinity", masked),
        check("sampling f32 extremes", extremes),
        check("sampling f32 broken rows", broken),
        check("sampling f32 greedy", greedy),
        check("sampling f32 rows in another order", another_order),
        check("sampling f32 frequencies", |gpu, random| {
            frequencies(gpu, random, How::plain(0.0))
        }),
        check("sampling f32 frequencies top_k, top_p, min_p", |gpu, random| {
            let how = How {
                temperature: 0.8,
                top_k: 30,
                top_p: 0.95,
                min_p: 0.01,
                uniform: 0.0,
            };
            frequencies(gpu, random, how)
        }),
        check("sampling f32 top log-probabilities", |gpu, random| {
            top::<f32>(gpu, random)
        }),
        check("sampling bf16 top log-probabilities", |gpu, random| {
            top::<bf16>(gpu, random)
        }),
    ]
}

/// Parameters on the device.
struct Uploaded {
    temperature: Buffer<f32>,
    top_k: Buffer<u32>,
    top_p: Buffer<f32>,
    min_p: Buffer<f32>,
    uniform: Buffer<f32>,
}

impl Uploaded {
    fn new(gpu: &Gpu, hows: &[How]) -> Result<Self, GpuError> {
        let floats = |of: fn(&How) -> f32| gpu.upload(&hows.iter().map(of).collect::<Vec<_>>());
        Ok(Self {
            temperature: floats(|how| how.temperature)?,
            top_k: gpu.upload(&hows.iter().map(|how| how.top_k).collect::<Vec<_>>())?,
            top_p: floats(|how| how.top_p)?,
            min_p: floats(|how| how.min_p)?,
            uniform: floats(|how| how.uniform)?,
        })
    }

    fn parameters(&self) -> Parameters<'_> {
        Parameters {
            temperature: &self.temperature,
            top_k: &self.top_k,
            top_p: &self.top_p,
            min_p: &self.min_p,
            uniform: &self.uniform,
        }
    }
}

/// Draws on the GPU.
fn draw_all<T: Float>(gpu: &Gpu, vocabulary: usize, logits: &[T], hows: &[How]) -> Result<Vec<Token>, GpuError> {
    let rows = hows.len();
    let (token, log_prob, model) = (gpu.poisoned(rows)?, gpu.poisoned(rows)?, gpu.poisoned(rows)?);
    let drawn = Drawn {
        token: &token,
        log_prob: &log_prob,
        model_log_prob: &model,
    };
    let draws = Draws { rows, vocabulary };
    let uploaded = Uploaded::new(gpu, hows)?;
    draw(gpu, &draws, &gpu.upload(logits)?, &uploaded.parameters(), &drawn)?;
    let numbers = gpu.download(&log_prob)?.into_iter().zip(gpu.download(&model)?);
    let tokens = gpu.download(&token)?.into_iter().zip(numbers);
    let of = |(id, (log_prob, model_log_prob))| Token {
        id,
        log_prob,
        model_log_prob,
    };
    Ok(tokens.map(of).collect())
}

/// Whether a token is the reference's for numbers that differ by no more than rounding.
fn nearly(row: &Row<'_>, how: &How, id: u32) -> bool {
    let around = |value: f32| [value, value * (1.0 - ROUNDING), value * (1.0 + ROUNDING)];
    around(how.top_p).into_iter().any(|top_p| {
        around(how.min_p).into_iter().any(|min_p| {
            let uniforms = [how.uniform, how.uniform - ROUNDING, how.uniform + ROUNDING];
            uniforms.into_iter().any(|uniform| {
                let top_p = if how.top_p < 1.0 { top_p } else { 1.0 };
                let near = How {
                    top_p,
                    min_p,
                    uniform,
                    ..*how
                };
                row.draw(&near).id == id
            })
        })
    })
}

/// Draws and compares.
fn compare<T: Float>(gpu: &Gpu, vocabulary: usize, logits: &[T], hows: &[How]) -> Result<Distance, CheckError> {
    compare_within(gpu, vocabulary, logits, hows, MOST_OTHERS)
}

/// Draws and compares. The distance is the share of rows that drew another token because of rounding, or that of
/// log-probabilities.
fn compare_within<T: Float>(
    gpu: &Gpu,
    vocabulary: usize,
    logits: &[T],
    hows: &[How],
    most_others: f64,
) -> Result<Distance, CheckError> {
    let tokens = draw_all(gpu, vocabulary, logits, hows)?;
    let mut others = 0;
    let mut apart = 0f64;
    for ((token, how), logits) in tokens.iter().zip(hows).zip(logits.chunks_exact(vocabulary)) {
        let logits = widen(logits);
        let row = Row::new(&logits).ok_or_else(|| CheckError::Differs("a broken row".to_owned()))?;
        let wanted = row.draw(how);
        let wanted = if wanted.id == token.id {
            wanted
        } else if (token.id as usize) < vocabulary && nearly(&row, how, token.id) {
            others += 1;
            row.scored(token.id, how.temperature)
        } else {
            let fault = format!("{} drawn, {} expected: {how:?}", token.id, wanted.id);
            return Err(CheckError::Differs(fault));
        };
        for (ours, theirs) in [
            (token.log_prob, wanted.log_prob),
            (token.model_log_prob, wanted.model_log_prob),
        ] {
            let distance = f64::from((ours - theirs).abs()) / f64::from(theirs.abs().max(1.0));
            if distance.is_nan() || distance > MOST_APART {
                let fault = format!("a log-probability of {ours}, {theirs} expected: {how:?}");
                return Err(CheckError::Differs(fault));
            }
            apart = apart.max(distance);
        }
    }
    let others = Distance {
        relative: f64::from(others) / hows.len() as f64,
        bound: most_others,
    };
    let apart = Distance {
        relative: apart,
        bound: MOST_APART,
    };
    Ok(others.worst(apart))
}

fn uniform(random: &mut Draw) -> f32 {
    random.random().random::<f32>()
}

fn any_how(random: &mut Draw, vocabulary: usize) -> How {
    let flip = |random: &mut Draw| random.below(2) == 0;
    let top_k = match random.below(6) {
        0 | 1 => 0,
        2 => 1,
        3 => random.between(2, 200),
        4 => random.between(1, vocabulary),
        _ => vocabulary + random.below(3),
    };
    How {
        temperature: [0.0, 1.0, 0.3, 0.7, 1.3, 2.5][random.below(6)],
        top_k: top_k as u32,
        top_p: if flip(random) {
            1.0
        } else {
            [0.95, 0.5, 0.999, 1e-6, 0.05][random.below(5)]
        },
        min_p: if flip(random) {
            0.0
        } else {
            [0.01, 1.0, 0.2, 1e-5][random.below(4)]
        },
        uniform: uniform(random),
    }
}

fn plain<T: Float>(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let (rows, vocabulary) = (9, 152_064);
    let logits = random.normal::<T>(rows * vocabulary, 2.5);
    let how = |index: usize, random: &mut Draw| How {
        temperature: [1.0, 0.7, 1.4][index % 3],
        ..How::plain(uniform(random))
    };
    let hows = (0..rows).map(|index| how(index, random)).collect::<Vec<_>>();
    compare(gpu, vocabulary, &logits, &hows)
}

fn odd<T: Float>(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    let larger = random.between(5000, 70_000);
    for vocabulary in [1, 2, 7, 9, 64, 997, 4099, larger, 1 << 18] {
        let rows = if vocabulary > 100_000 { 3 } else { 13 };
        let logits = random.normal::<T>(rows * vocabulary, 3.0);
        let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
        worst = worst.worst(compare(gpu, vocabulary, &logits, &hows)?);
    }
    Ok(worst)
}

fn cut<T: Float>(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for (rows, vocabulary) in [(240, 3000), (16, 152_064)] {
        let logits = random.normal::<T>(rows * vocabulary, 3.0);
        let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
        worst = worst.worst(compare(gpu, vocabulary, &logits, &hows)?);
    }
    Ok(worst)
}

/// Distributions whose nucleus is nearly everything, and those of a few tokens.
fn flat_and_peaked(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let vocabulary = 151_665;
    let deviations = [1e-3, 0.3, 1.0, 8.0, 40.0];
    let mut logits = Vec::new();
    let mut hows = Vec::new();
    for deviation in deviations {
        for (top_k, top_p) in [(0, 0.95), (20_000, 1.0), (30_000, 0.9), (50, 0.95)] {
            logits.extend(random.normal::<f32>(vocabulary, deviation));
            hows.push(How {
                top_k,
                top_p,
                ..How::plain(uniform(random))
            });
        }
    }
    compare(gpu, vocabulary, &logits, &hows)
}

fn ties(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for (vocabulary, rows) in [(60_001, 16), (700, 100)] {
        let levels = [1, 2, 5, 40];
        let mut logits = Vec::new();
        for row in 0..rows {
            let level = levels[row % levels.len()];
            logits.extend((0..vocabulary).map(|_| random.below(level) as f32 * 0.5 - 1.0));
        }
        let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
        worst = worst.worst(compare(gpu, vocabulary, &logits, &hows)?);
    }
    Ok(worst)
}

/// Most tokens are impossible.
fn masked(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let (vocabulary, rows) = (60_000, 24);
    let mut logits = vec![f32::NEG_INFINITY; vocabulary * rows];
    for row in logits.chunks_exact_mut(vocabulary) {
        for _ in 0..random.between(1, 40) {
            let at = random.below(vocabulary);
            row[at] = random.normal::<f32>(1, 3.0)[0];
        }
    }
    let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
    compare(gpu, vocabulary, &logits, &hows)
}

fn extremes(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let vocabulary = 5000;
    let mut logits = Vec::new();
    let mut hows = Vec::new();
    for scale in [1.0, 1e-30, 1e4, 1e30] {
        for (uniform, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (ALMOST_ONE, 0, 1.0, 0.0),
            (0.0, 100, 0.9, 0.0),
            (ALMOST_ONE, 100, 0.9, 0.0),
            (ALMOST_ONE, 0, f32::MIN_POSITIVE, 0.0),
            (0.5, 1, 1.0, 0.0),
            (0.5, u32::MAX, 1.0, 1.0),
        ] {
            logits.extend(random.normal::<f32>(vocabulary, scale));
            hows.push(How {
                top_k,
                top_p,
                min_p,
                ..How::plain(uniform)
            });
        }
    }
    // At the last of thousands of equal tokens every rounding counts.
    compare_within(gpu, vocabulary, &logits, &hows, 0.25)
}

fn broken(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let (vocabulary, rows) = (10_007, 6);
    let mut logits = random.normal::<f32>(rows * vocabulary, 2.0);
    logits[random.below(vocabulary)] = f32::NAN;
    logits[2 * vocabulary + random.below(vocabulary)] = f32::INFINITY;
    logits[3 * vocabulary..4 * vocabulary].fill(f32::NEG_INFINITY);
    logits[4 * vocabulary + random.below(vocabulary)] = -f32::NAN;
    let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
    let tokens = draw_all(gpu, vocabulary, &logits, &hows)?;
    for (row, token) in tokens.iter().enumerate() {
        let numbers = token.log_prob.is_finite() && token.model_log_prob.is_finite();
        let whole = row == 1 || row == 5;
        if numbers != whole || (token.id == BROKEN) == whole {
            return Err(CheckError::Differs(format!("row {row}: {token:?}")));
        }
    }
    Ok(Distance::EQUAL)
}

fn greedy(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let (vocabulary, rows) = (20_001, 12);
    let mut logits = random.normal::<f32>(rows * vocabulary, 2.0);
    for row in logits.chunks_exact_mut(vocabulary) {
        // Several most likely tokens; minus zero equals zero.
        let offset = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|logit| *logit -= offset);
        for _ in 0..random.below(4) {
            let at = random.below(vocabulary);
            row[at] = -0.0;
        }
    }
    let how = |random: &mut Draw| How {
        temperature: 0.0,
        ..any_how(random, vocabulary)
    };
    let hows = (0..rows).map(|_| how(random)).collect::<Vec<_>>();
    compare(gpu, vocabulary, &logits, &hows)
}

fn another_order(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let (vocabulary, rows) = (30_000, 40);
    let logits = random.normal::<f32>(rows * vocabulary, 2.0);
    let hows = (0..rows).map(|_| any_how(random, vocabulary)).collect::<Vec<_>>();
    let tokens = draw_all(gpu, vocabulary, &logits, &hows)?;
    let order = random.order(rows);
    let (mut shuffled, mut shuffled_hows, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for row in order.into_iter().map(|row| row as usize).take(rows - 3) {
        shuffled.extend_from_slice(&logits[row * vocabulary..(row + 1) * vocabulary]);
        shuffled_hows.push(hows[row]);
        expected.push(tokens[row]);
    }
    Distance::equal(&draw_all(gpu, vocabulary, &shuffled, &shuffled_hows)?, &expected)
}

/// Chi-square of 100,000 draws.
fn frequencies(gpu: &Gpu, random: &mut Draw, how: How) -> Result<Distance, CheckError> {
    let (vocabulary, rows) = (61, 100_000);
    let row = random.normal::<f32>(vocabulary, 1.0);
    let logits = row.repeat(rows);
    let draws = (0..rows).map(|_| How {
        uniform: uniform(random),
        ..how
    });
    let tokens = draw_all(gpu, vocabulary, &logits, &draws.collect::<Vec<_>>())?;
    let reference = Row::new(&row).ok_or_else(|| CheckError::Differs("a broken row".to_owned()))?;
    let kept = reference.kept(&how);
    let weight = |id: u32| f64::from(reference.scored(id, how.temperature).log_prob).exp();
    let mass = kept.iter().map(|id| weight(*id)).sum::<f64>();
    let mut counts = vec![0f64; vocabulary];
    for token in &tokens {
        *counts
            .get_mut(token.id as usize)
            .ok_or_else(|| CheckError::Differs(format!("token {}", token.id)))? += 1.0;
    }
    let outside = (0..vocabulary as u32).find(|id| !kept.contains(id) && counts[*id as usize] > 0.0);
    if let Some(id) = outside {
        return Err(CheckError::Differs(format!("token {id} is drawn, but not kept")));
    }
    let chi_square = kept.iter().map(|id| {
        let expected = rows as f64 * weight(*id) / mass;
        (counts[*id as usize] - expected).powi(2) / expected
    });
    // Six standard deviations of a chi-square.
    let freedom = kept.len() as f64 - 1.0;
    Ok(Distance {
        relative: chi_square.sum(),
        bound: freedom + 6.0 * (2.0 * freedom).sqrt(),
    })
}

fn top<T: Float>(gpu: &Gpu, random: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NOTHING;
    for (rows, vocabulary, count) in [(3, 152_064, MOST_TOP), (7, 997, 5), (4, 3, 8), (2, 40_000, 1)] {
        let mut logits = random.normal::<T>(rows * vocabulary, 3.0);
        // All equal; and a few possible tokens.
        logits[..vocabulary].fill(T::from_f32(-2.0));
        if rows > 1 {
            logits[vocabulary + 2..2 * vocabulary].fill(T::from_f32(f32::NEG_INFINITY));
        }
        let (ids, log_probs) = (gpu.poisoned::<u32>(rows * count)?, gpu.poisoned(rows * count)?);
        let draws = Draws { rows, vocabulary };
        top_log_probs(gpu, &draws, &gpu.upload(&logits)?, count, &ids, &log_probs)?;
        let (mut expected_ids, mut expected) = (Vec::new(), Vec::new());
        for logits in logits.chunks_exact(vocabulary) {
            let logits = widen(logits);
            let row = Row::new(&logits).ok_or_else(|| CheckError::Differs("a broken row".to_owned()))?;
            let mut top = row.top(count);
            top.resize(count, (BROKEN, f32::NAN));
            expected_ids.extend(top.iter().map(|(id, _)| *id));
            expected.extend(top.iter().map(|(_, log_prob)| *log_prob));
        }
        Distance::equal(&gpu.download(&ids)?, &expected_ids)?;
        let log_probs = gpu.download(&log_probs)?;
        let same = |(ours, theirs): &(&f32, &f32)| {
            ours == theirs
                || (ours.is_nan() && theirs.is_nan())
                || (*ours - *theirs).abs() <= 1e-5 * theirs.abs().max(1.0)
        };
        if let Some((ours, theirs)) = log_probs.iter().zip(&expected).find(|pair| !same(pair)) {
            return Err(CheckError::Differs(format!("{ours}, {theirs} expected")));
        }
        let finite = |values: &[f32]| values.iter().copied().filter(|one| one.is_finite()).collect::<Vec<_>>();
        worst = worst.worst(Distance::of(&finite(&log_probs), &finite(&expected))?);
    }
    Ok(worst)
}

pub fn cases() -> Vec<Case> {
    let case = |name, prepare| Case { name, prepare };
    vec![
        case("sampling 1x152064 f32", |gpu, random| {
            prepare::<f32>(gpu, random, 1, PLAIN)
        }),
        case("sampling 8x152064 f32", |gpu, random| {
            prepare::<f32>(gpu, random, 8, PLAIN)
        }),
        case("sampling 32x152064 f32", |gpu, random| {
            prepare::<f32>(gpu, random, 32, PLAIN)
        }),
        case("sampling 128x152064 f32", |gpu, random| {
            prepare::<f32>(gpu, random, 128, PLAIN)
        }),
        case("sampling 256x152064 f32", |gpu, random| {
            prepare::<f32>(gpu, random, 256, PLAIN)
        }),
        case("sampling 256x152064 f32 temperature 0.7", |gpu, random| {
            prepare::<f32>(gpu, random, 256, (0.7, 0, 1.0, 2.5))
        }),
        case("sampling 256x152064 bf16", |gpu, random| {
            prepare::<bf16>(gpu, random, 256, PLAIN)
        }),
        case("sampling 1x152064 f32 top_k 50 top_p 0.95", |gpu, random| {
            prepare::<f32>(gpu, random, 1, CUT)
        }),
        case("sampling 8x152064 f32 top_k 50 top_p 0.95", |gpu, random| {
            prepare::<f32>(gpu, random, 8, CUT)
        }),
        case("sampling 32x152064 f32 top_k 50 top_p 0.95", |gpu, random| {
            prepare::<f32>(gpu, random, 32, CUT)
        }),
        case("sampling 128x152064 f32 top_k 50 top_p 0.95", |gpu, random| {
            prepare::<f32>(gpu, random, 128, CUT)
        }),
        case("sampling 256x152064 f32 top_k 50 top_p 0.95", |gpu, random| {
            prepare::<f32>(gpu, random, 256, CUT)
        }),
        case("sampling 1x152064 f32 top_p 0.95 flat", |gpu, random| {
            prepare::<f32>(gpu, random, 1, (1.0, 0, 0.95, 2.5))
        }),
        case("sampling 256x152064 f32 top_p 0.95 flat", |gpu, random| {
            prepare::<f32>(gpu, random, 256, (1.0, 0, 0.95, 2.5))
        }),
        case("sampling 1x152064 f32 top_p 0.95 peaked", |gpu, random| {
            prepare::<f32>(gpu, random, 1, (0.6, 0, 0.95, 4.0))
        }),
        case("sampling top 20 of 32x152064 f32", |gpu, random| {
            let (rows, vocabulary) = (32, 152_064);
            let (logits, bytes) = rotating::<f32>(gpu, random, rows, vocabulary, 2.5)?;
            let (ids, log_probs) = (gpu.alloc(rows * MOST_TOP)?, gpu.alloc(rows * MOST_TOP)?);
            let gpu = gpu.clone();
            let mut turn = 0;
            Ok(Prepared {
                run: Box::new(move || {
                    turn += 1;
                    let draws = Draws { rows, vocabulary };
                    top_log_probs(&gpu, &draws, &logits[turn % logits.len()], MOST_TOP, &ids, &log_probs)
                }),
                bytes,
                operations: 0.0,
            })
        }),
    ]
}

/// Temperature, `top_k`, `top_p`, and the deviation of the logits.
type Setting = (f32, u32, f32, f32);

const PLAIN: Setting = (1.0, 0, 1.0, 2.5);
const CUT: Setting = (1.0, 50, 0.95, 2.5);

/// Several times logits, more than the cache holds, and the bytes of one.
fn rotating<T: Float>(
    gpu: &Gpu,
    random: &mut Draw,
    rows: usize,
    vocabulary: usize,
    deviation: f32,
) -> Result<(Vec<Buffer<T>>, f64), GpuError> {
    let row = random.normal::<T>(vocabulary + 4096, deviation);
    let bytes = rows * vocabulary * T::DTYPE.bytes();
    let copies = ((160 << 20) / bytes).clamp(2, 300);
    let one = |random: &mut Draw| {
        // Rows that begin elsewhere in the same numbers.
        let mut values = Vec::with_capacity(rows * vocabulary);
        for _ in 0..rows {
            let at = random.below(4096);
            values.extend_from_slice(&row[at..at + vocabulary]);
        }
        gpu.upload(&values)
    };
    let logits = (0..copies).map(|_| one(random)).collect::<Result<Vec<_>, _>>()?;
    Ok((logits, bytes as f64))
}

fn prepare<T: Float>(
    gpu: &Gpu,
    random: &mut Draw,
    rows: usize,
    (temperature, top_k, top_p, deviation): Setting,
) -> Result<Prepared, GpuError> {
    let vocabulary = 152_064;
    let (logits, bytes) = rotating::<T>(gpu, random, rows, vocabulary, deviation)?;
    let hows = (0..rows).map(|_| How {
        temperature,
        top_k,
        top_p,
        ..How::plain(uniform(random))
    });
    let uploaded = Uploaded::new(gpu, &hows.collect::<Vec<_>>())?;
    let (token, log_prob, model) = (gpu.alloc(rows)?, gpu.alloc(rows)?, gpu.alloc(rows)?);
    let gpu = gpu.clone();
    let mut turn = 0;
    Ok(Prepared {
        run: Box::new(move || {
            turn += 1;
            let drawn = Drawn {
                token: &token,
                log_prob: &log_prob,
                model_log_prob: &model,
            };
            let draws = Draws { rows, vocabulary };
            draw(
                &gpu,
                &draws,
                &logits[turn % logits.len()],
                &uploaded.parameters(),
                &drawn,
            )
        }),
        bytes,
        operations: 0.0,
    })
}
