//! What holds for every family.

use std::collections::BTreeMap;

use candle_core::{D, DType, Tensor};
use flotilla_model::{
    Config, Pass, Prompt, Row, Span, TextBatch, Visual, Vlm,
    ops::Kernels,
    rope::{frequencies, mrope_angles},
};

use crate::{
    fixture::{Case, KERNELS, Suite},
    stored::{TOLERANCE, draw, largest, worst},
};

/// Largest difference of a normalized pixel that was made of the byte that the reference has.
const PIXEL: f32 = 2e-6;
/// Largest relative difference of a gradient in f32.
const GRADIENT: f64 = 1e-3;
/// A gradient so much smaller than the largest is made of roundings.
const ROUNDING: f64 = 1e-6;
/// Relative Frobenius distance of logits from those in f32 that a type may have at all.
const HALF: [(&str, DType, f64); 2] = [("bf16", DType::BF16, 2e-2), ("f16", DType::F16, 5e-3)];
/// The reference's own distance, by which ours is measured where it is larger than that.
const HALF_OF_REFERENCE: f64 = 1.5;

fn features(model: &Vlm, prompt: &Prompt, pass: Pass) -> Vec<Tensor> {
    model.encode(&prompt.visuals.iter().collect::<Vec<_>>(), pass).unwrap()
}

pub fn row(model: &Vlm, prompt: &Prompt, pass: Pass) -> Row {
    prompt.row(&features(model, prompt, pass)).unwrap()
}

/// Logits of one row, `[tokens, vocabulary]`.
pub fn logits(model: &Vlm, row: &Row, pass: Pass) -> Tensor {
    let batch = TextBatch::new(std::slice::from_ref(row)).unwrap();
    let hidden = model.forward(&batch, pass).unwrap().get(0).unwrap();
    model.logits(&hidden, pass).unwrap()
}

pub fn parameters_are_exactly_those_of_the_reference(suite: &Suite) {
    let config = Config::load(&suite.family.checkpoint()).unwrap();
    let ours = config.parameters().into_iter().map(|p| (p.name, p.shape));
    let expected: BTreeMap<String, Vec<usize>> = serde_json::from_value(suite.document["parameters"].clone()).unwrap();
    assert_eq!(ours.collect::<BTreeMap<_, _>>(), expected);
}

pub fn messages_become_the_token_ids_of_the_reference(suite: &Suite) {
    for case in &suite.cases {
        assert_eq!(suite.prepared(case).ids, case.ids(), "{}", case.name);
    }
}

pub fn messages_become_the_pixels_of_the_reference(suite: &Suite) {
    for case in &suite.cases {
        let prepared = suite.prepared(case);
        // Videos follow pictures in the fixture.
        let mut ours = prepared.visuals.iter().collect::<Vec<_>>();
        ours.sort_by_key(|visual| visual.layout.is_video());
        let expected = case.visuals(suite.family);
        let layouts = |visuals: &[&Visual]| visuals.iter().map(|visual| visual.layout).collect::<Vec<_>>();
        assert_eq!(
            layouts(&ours),
            layouts(&expected.iter().collect::<Vec<_>>()),
            "{}",
            case.name
        );
        for (number, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
            assert_eq!(ours.values.len(), expected.values.len(), "{} {number}", case.name);
            let pairs = ours.values.iter().zip(&expected.values);
            let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(
                difference <= PIXEL,
                "{}: visual {number} differs by {difference}",
                case.name
            );
        }
    }
}

pub fn positions_are_exactly_those_of_the_reference(suite: &Suite) {
    for case in &suite.cases {
        let prompt = suite.prompt(case);
        let flat = case.integers("position_ids");
        let tokens = prompt.ids.len();
        for axis in 0..flat.len() / tokens {
            let ours = prompt.positions.iter().map(|position| i64::from(position[axis]));
            let expected = &flat[axis * tokens..(axis + 1) * tokens];
            assert_eq!(ours.collect::<Vec<_>>(), expected, "{} axis {axis}", case.name);
        }
        if let Some(delta) = case.meta["rope_delta"].as_i64() {
            assert_eq!(prompt.rope_delta, delta, "{}", case.name);
        }
    }
}

pub fn rotary_tables_are_those_of_the_reference(suite: &Suite) {
    let text = Config::load(&suite.family.checkpoint()).unwrap().text;
    let frequencies = frequencies(text.rope_theta, text.head_dim);
    let mut compared = 0;
    for case in suite
        .cases
        .iter()
        .filter(|case| case.tensors.contains_key("rotary.cos"))
    {
        let angles = mrope_angles(&suite.prompt(case).positions, &frequencies, text.mrope_section);
        let half = frequencies.len();
        for (name, function) in [("rotary.cos", f32::cos as fn(f32) -> f32), ("rotary.sin", f32::sin)] {
            let expected: Vec<Vec<f32>> = case.tensors[name].to_vec2().unwrap();
            for (angles, expected) in angles.chunks(half).zip(expected) {
                assert_eq!(expected[..half], expected[half..]);
                for (angle, expected) in angles.iter().zip(expected) {
                    assert!((function(*angle) - expected).abs() < 1e-5, "{} {name}", case.name);
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 0);
}

pub fn the_stream_after_every_block_is_that_of_the_reference(suite: &Suite) {
    let mut model = suite.model(DType::F32);
    for kernels in KERNELS {
        model.set_kernels(kernels);
        for case in &suite.cases {
            check_streams(&model, &suite.prompt(case), case);
        }
    }
}

fn check_streams(model: &Vlm, prompt: &Prompt, case: &Case) {
    let mut streams = BTreeMap::<usize, Vec<Tensor>>::new();
    let mut features = Vec::new();
    // The reference runs its tower once for pictures and once for videos.
    for video in [false, true] {
        let own = prompt.visuals.iter().filter(|visual| visual.layout.is_video() == video);
        let mut block = 0;
        let encoded = model.encode_traced(&own.collect::<Vec<_>>(), Pass::Infer, |stream| {
            block += 1;
            streams.entry(block).or_default().push(stream.clone());
        });
        features.extend(encoded.unwrap());
    }
    for (block, parts) in streams {
        case.check(&format!("vision.{block}"), &Tensor::cat(&parts, 0).unwrap());
    }
    if !features.is_empty() {
        case.check("features", &Tensor::cat(&features, 0).unwrap());
    }
    let batch = TextBatch::new(&[prompt.row(&features).unwrap()]).unwrap();
    let mut layer = 0;
    let hidden = model.forward_traced(&batch, Pass::Infer, |stream| {
        case.check(&format!("text.{layer}"), stream);
        layer += 1;
    });
    assert_eq!(layer, model.config().text.num_hidden_layers + 1);
    case.check("hidden", &hidden.unwrap().get(0).unwrap());
}

pub fn logits_of_all_cases_in_one_ragged_batch_are_those_of_the_reference(suite: &Suite) {
    let mut model = suite.model(DType::F32);
    for kernels in KERNELS {
        model.set_kernels(kernels);
        for (case, logits) in suite.cases.iter().zip(batch_logits(suite, &model)) {
            case.check("logits", &logits);
        }
    }
}

fn batch_logits(suite: &Suite, model: &Vlm) -> Vec<Tensor> {
    let rows = suite
        .cases
        .iter()
        .map(|case| row(model, &suite.prompt(case), Pass::Infer));
    let rows = rows.collect::<Vec<_>>();
    let hidden = model.forward(&TextBatch::new(&rows).unwrap(), Pass::Infer).unwrap();
    let own = rows.iter().enumerate().map(|(index, row)| {
        let hidden = hidden.get(index).unwrap().narrow(0, 0, row.ids.len()).unwrap();
        model.logits(&hidden, Pass::Infer).unwrap()
    });
    own.collect()
}

pub fn a_row_alone_has_the_logits_that_it_has_in_a_batch(suite: &Suite) {
    let model = suite.model(DType::F32);
    for (case, together) in suite.cases.iter().zip(batch_logits(suite, &model)) {
        let alone = logits(&model, &row(&model, &suite.prompt(case), Pass::Infer), Pass::Infer);
        let difference = worst(&alone, &together) / largest(&alone);
        assert!(difference < TOLERANCE / 10.0, "{}: {difference}", case.name);
    }
}

fn best(logits: &Tensor) -> Vec<u32> {
    logits.argmax(D::Minus1).unwrap().to_vec1().unwrap()
}

fn greedy(case: &Case) -> Vec<u32> {
    case.integers("greedy").into_iter().map(|id| id as u32).collect()
}

/// Tokens of a block of keys and values.
const BLOCK: usize = 16;

/// Where the copies of some rows lie. Copies of a row share the full blocks of its prompt.
struct Plan {
    /// The blocks of each copy, with the index of its row.
    tables: Vec<(usize, Vec<u32>)>,
    /// What must be copied once the prompts are computed.
    pairs: Vec<(u32, u32)>,
    blocks: u32,
}

fn lay_out(rows: &[Row], repeat: &[usize], tokens: usize) -> Plan {
    let (mut tables, mut pairs, mut next) = (Vec::new(), Vec::new(), 0);
    for (index, (row, repeat)) in rows.iter().zip(repeat).enumerate() {
        let (full, count) = (row.ids.len() / BLOCK, (row.ids.len() + tokens).div_ceil(BLOCK));
        let first = (next..next + count as u32).collect::<Vec<_>>();
        next += count as u32;
        tables.push((index, first.clone()));
        for _ in 1..*repeat {
            let own = next..next + (count - full) as u32;
            next = own.end;
            pairs.push((first[full], own.start));
            tables.push((index, first[..full].iter().copied().chain(own).collect()));
        }
    }
    Plan {
        tables,
        pairs,
        blocks: next,
    }
}

/// The most likely tokens after each row, `repeat` times side by side.
fn continuations(model: &Vlm, rows: &[Row], repeat: &[usize], tokens: usize) -> Vec<Vec<u32>> {
    let Plan { tables, pairs, blocks } = lay_out(rows, repeat, tokens);
    let mut pool = model.pool(blocks as usize, BLOCK).unwrap();
    let firsts = rows.iter().enumerate().map(|(index, row)| Span {
        ids: &row.ids,
        positions: &row.positions,
        features: row.features.clone(),
        stored: 0,
        blocks: &tables.iter().find(|(owner, _)| *owner == index).unwrap().1,
        wanted: true,
    });
    let hidden = model.extend(&mut pool, &firsts.collect::<Vec<_>>()).unwrap();
    model.copy(&mut pool, &pairs).unwrap();
    let owners = tables.iter().map(|(owner, _)| *owner as u32).collect::<Vec<_>>();
    let owners = Tensor::from_vec(owners, tables.len(), model.device()).unwrap();
    let mut hidden = hidden.index_select(&owners, 0).unwrap();
    let mut found = vec![Vec::new(); tables.len()];
    for step in 0..tokens {
        let next = best(&model.logits(&hidden, Pass::Infer).unwrap());
        let positions = tables
            .iter()
            .map(|(owner, _)| [[rows[*owner].next_position() + step as u32; 3]])
            .collect::<Vec<_>>();
        let spans = tables.iter().enumerate().map(|(index, (owner, blocks))| Span {
            ids: &next[index..=index],
            positions: &positions[index],
            features: Vec::new(),
            stored: rows[*owner].ids.len() + step,
            blocks,
            wanted: true,
        });
        hidden = model.extend(&mut pool, &spans.collect::<Vec<_>>()).unwrap();
        for (row, id) in found.iter_mut().zip(&next) {
            row.push(*id);
        }
    }
    found
}

pub fn greedy_continuations_over_a_cache_repeat_the_reference(suite: &Suite) {
    let mut model = suite.model(DType::F32);
    for kernels in KERNELS {
        model.set_kernels(kernels);
        let rows = suite
            .cases
            .iter()
            .map(|case| row(&model, &suite.prompt(case), Pass::Infer));
        let rows = rows.collect::<Vec<_>>();
        let found = continuations(&model, &rows, &vec![1; rows.len()], 24);
        for (case, found) in suite.cases.iter().zip(found) {
            assert_eq!(found, greedy(case), "{}", case.name);
        }
    }
}

pub fn greedy_continuations_by_whole_rows_repeat_the_reference(suite: &Suite) {
    let model = suite.model(DType::F32);
    for case in &suite.cases {
        let expected = greedy(case);
        let prompt = row(&model, &suite.prompt(case), Pass::Infer);
        let whole = prompt.followed_by(&expected[..expected.len() - 1]);
        let found = best(&logits(&model, &whole, Pass::Infer));
        assert_eq!(found[prompt.ids.len() - 1..], expected, "{}", case.name);
    }
}

pub fn repeated_rows_of_a_prefill_continue_alike(suite: &Suite) {
    let model = suite.model(DType::F32);
    let cases = [suite.case("image"), suite.case("text"), suite.case("interleaved")];
    let rows = cases.map(|case| row(&model, &suite.prompt(case), Pass::Infer));
    let repeat = [2, 1, 3];
    let found = continuations(&model, &rows, &repeat, 8);
    let expected = cases
        .iter()
        .zip(repeat)
        .flat_map(|(case, n)| vec![greedy(case)[..8].to_vec(); n]);
    assert_eq!(found, expected.collect::<Vec<_>>());
}

pub fn half_precision_is_as_close_as_that_of_the_reference(suite: &Suite) {
    let full = suite.model(DType::F32);
    for (name, dtype, bound) in HALF {
        let half = suite.model(dtype);
        for case in &suite.cases {
            let of = |model: &Vlm| {
                let logits = logits(model, &row(model, &suite.prompt(case), Pass::Infer), Pass::Infer);
                logits.to_dtype(DType::F64).unwrap()
            };
            let norm = |tensor: &Tensor| {
                tensor
                    .sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
                    .sqrt()
            };
            let (exact, rounded) = (of(&full), of(&half));
            let distance = norm(&(&rounded - &exact).unwrap()) / norm(&exact);
            let reference = case.meta["errors"][name].as_f64().unwrap();
            let allowed = bound.max(HALF_OF_REFERENCE * reference);
            assert!(
                distance < allowed,
                "{} {name}: {distance}, the reference has {reference}",
                case.name
            );
        }
    }
}

pub fn the_gradient_of_every_parameter_is_that_of_the_reference(suite: &Suite) {
    let mut model = suite.model(DType::F32);
    for kernels in KERNELS {
        model.set_kernels(kernels);
        for name in suite.document["gradients"].as_object().unwrap().keys() {
            check_gradients(suite, &model, name, kernels);
        }
    }
}

fn check_gradients(suite: &Suite, model: &Vlm, name: &str, kernels: Kernels) {
    let stored = &suite.document["gradients"][name];
    let row = row(model, &suite.prompt(suite.case(name)), Pass::Train);
    let targets = row.ids[1..].to_vec();
    let logits = logits(model, &row, Pass::Train).narrow(0, 0, targets.len()).unwrap();
    let loss = kernels
        .log_probs(&logits, &targets, 1.0)
        .unwrap()
        .mean_all()
        .unwrap()
        .neg()
        .unwrap();
    let expected = stored["loss"].as_f64().unwrap();
    assert!(
        (f64::from(loss.to_scalar::<f32>().unwrap()) - expected).abs() < 1e-5 * expected,
        "{name}: loss"
    );
    let gradients = loss.backward().unwrap();
    let vars = model.named_vars();
    // A bias of keys without rotation changes nothing but roundings.
    let norms = stored["parameters"]
        .as_object()
        .unwrap()
        .values()
        .filter_map(|stored| stored[0].as_f64());
    let rounding = ROUNDING * norms.fold(0.0, f64::max);
    assert_eq!(vars.len(), stored["parameters"].as_object().unwrap().len());
    for (parameter, var) in vars {
        let what = format!("{name}, {parameter}");
        let stored = &stored["parameters"][&parameter];
        let found = gradients.get(&var);
        if stored.is_null() {
            assert!(
                found.is_none_or(|gradient| largest(gradient) == 0.0),
                "{what}: the reference has no gradient"
            );
            continue;
        }
        let (norm, product) = (stored[0].as_f64().unwrap(), stored[1].as_f64().unwrap());
        let found = found.unwrap_or_else(|| panic!("{what}: no gradient"));
        let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
        let probe = draw(&format!("{parameter}/probe"), found.len());
        let pairs = found.iter().zip(&probe);
        let found_product = pairs.map(|(g, p)| f64::from(*g) * f64::from(*p)).sum::<f64>();
        let found_norm = found.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let allowed = GRADIENT * norm + rounding;
        assert!(
            (found_norm - norm).abs() < allowed,
            "{what}: norm {found_norm}, expected {norm}"
        );
        assert!(
            (found_product - product).abs() < allowed,
            "{what}: product {found_product}, expected {product}"
        );
    }
}
