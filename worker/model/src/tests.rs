//! Facts about whole models of a tiny shape.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::json;

use crate::{
    Config, Layout, LoadOptions, Medium, Message, ModelError, Pass, Picture, Processor, Vision, Visual, Vlm,
    batch::{Row, TextBatch},
    ops::Kernels,
    pool::Span,
    qwen2_5_vl::positions::{VisualSpan, positions},
};

const IMAGE: u32 = 60;

fn config() -> Config {
    Config::from_json(&json!({
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "image_token_id": IMAGE,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
            "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    }))
    .unwrap()
}

fn model() -> Vlm {
    Vlm::random(config(), 5, &LoadOptions::default()).unwrap()
}

fn layout(grid: [usize; 3]) -> Layout {
    Layout::Patches {
        grid,
        time_step: 0.0,
        video: false,
    }
}

fn image(grid: [usize; 3], seed: usize) -> Visual {
    let count = grid.iter().product::<usize>() * 96;
    let patches = (0..count)
        .map(|i| ((i * 37 + seed * 101) % 211) as f32 / 105.0 - 1.0)
        .collect();
    Visual {
        values: patches,
        layout: layout(grid),
    }
}

/// Two tokens of text, one image, `tail` tokens of text.
fn row(model: &Vlm, image: &Visual, tail: &[u32], pass: Pass) -> Row {
    let features = model.encode(&[image], pass).unwrap().remove(0);
    let tokens = features.dim(0).unwrap();
    let ids = [&[1, 2], vec![IMAGE; tokens].as_slice(), tail].concat();
    let Layout::Patches { grid, time_step, .. } = image.layout else {
        panic!("{:?}", image.layout)
    };
    let span = VisualSpan {
        start: 2,
        grid,
        time_step,
    };
    Row {
        positions: positions(ids.len(), &[span], 2).unwrap(),
        ids,
        features: vec![(2, features)],
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_near(a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let worst = values(a)
        .iter()
        .zip(values(b))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= tolerance, "{worst}");
}

#[test]
fn text_alone_equals_an_independent_qwen2() {
    use candle_transformers::models::qwen2;
    let model = model();
    let text = &model.config().text;
    let other = qwen2::Config {
        vocab_size: text.vocab_size,
        hidden_size: text.hidden_size,
        intermediate_size: text.intermediate_size,
        num_hidden_layers: text.num_hidden_layers,
        num_attention_heads: text.num_attention_heads,
        num_key_value_heads: text.num_key_value_heads,
        max_position_embeddings: 128,
        sliding_window: 128,
        max_window_layers: 2,
        tie_word_embeddings: true,
        rope_theta: text.rope_theta,
        rms_norm_eps: text.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    };
    let tensors = model
        .named_vars()
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()));
    let builder = VarBuilder::from_tensors(
        tensors.collect::<HashMap<_, _>>(),
        candle_core::DType::F32,
        &Device::Cpu,
    );
    let mut other = qwen2::ModelForCausalLM::new(&other, builder).unwrap();
    let ids = (0..17u32).map(|i| (i * 13 + 5) % 60).collect::<Vec<_>>();
    let expected = other
        .forward(&Tensor::from_slice(&ids, (1, 17), &Device::Cpu).unwrap(), 0)
        .unwrap();
    let hidden = model
        .forward(&TextBatch::new(&[Row::text(ids)]).unwrap(), Pass::Infer)
        .unwrap();
    let logits = model.logits(&hidden.narrow(1, 16, 1).unwrap(), Pass::Infer).unwrap();
    assert_near(&logits, &expected, 1e-5);
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() {
    let model = model();
    let rows = [
        row(&model, &image([1, 4, 4], 1), &[5, 6, 7, 8, 9], Pass::Infer),
        Row::text(vec![3, 4, 5]),
        row(&model, &image([1, 6, 4], 2), &[5], Pass::Infer),
    ];
    let together = model.forward(&TextBatch::new(&rows).unwrap(), Pass::Infer).unwrap();
    for (index, row) in rows.iter().enumerate() {
        let length = row.ids.len();
        let alone = model
            .forward(&TextBatch::new(std::slice::from_ref(row)).unwrap(), Pass::Infer)
            .unwrap();
        let part = together.narrow(0, index, 1).unwrap().narrow(1, 0, length).unwrap();
        assert_near(&part, &alone, 1e-5);
    }
}

/// A sequence that grows over a pool of blocks of 4 tokens.
struct Growing {
    row: Row,
    stored: usize,
    blocks: Vec<u32>,
}

impl Growing {
    fn new(row: Row, blocks: &[u32]) -> Self {
        Self {
            row,
            stored: 0,
            blocks: blocks.to_vec(),
        }
    }

    /// The next `tokens` tokens; features that begin among them are cut where they end.
    fn span(&self, tokens: usize, wanted: bool) -> Span<'_> {
        let range = self.stored..self.stored + tokens;
        let cut = |(start, features): &(usize, Tensor)| {
            let from = range.start.max(*start);
            let to = range.end.min(start + features.dim(0).unwrap());
            (from < to).then(|| (from - range.start, features.narrow(0, from - start, to - from).unwrap()))
        };
        Span {
            ids: &self.row.ids[range.clone()],
            positions: &self.row.positions[range.clone()],
            features: self.row.features.iter().filter_map(cut).collect(),
            stored: self.stored,
            blocks: &self.blocks,
            wanted,
        }
    }
}

/// Hidden states of whole sequences, `[tokens, hidden]`.
fn whole(model: &Vlm, row: &Row) -> Tensor {
    let batch = TextBatch::new(std::slice::from_ref(row)).unwrap();
    model.forward(&batch, Pass::Infer).unwrap().squeeze(0).unwrap()
}

#[test]
fn spans_over_a_pool_equal_the_whole_sequence() {
    for kernels in [Kernels::Auto, Kernels::Composed] {
        let mut model = model();
        model.set_kernels(kernels);
        let mut pool = model.pool(12, 4).unwrap();
        let picture = row(&model, &image([1, 4, 6], 1), &[5, 6, 7], Pass::Infer);
        let mut sequences = [
            Growing::new(picture.followed_by(&[10, 20, 30]), &[9, 2, 5, 0]),
            Growing::new(Row::text((1..15).collect()), &[1, 8, 3, 11]),
        ];
        let expected = [0, 1].map(|index| whole(&model, &sequences[index].row));
        // Chunks cut the picture in two and mix with a single token; the second sequence starts later.
        for step in [[5, 0], [4, 7], [1, 1], [2, 4], [1, 1], [1, 1]] {
            let spans = sequences.iter().zip(step).filter(|(_, tokens)| *tokens > 0);
            let spans = spans.map(|(sequence, tokens)| sequence.span(tokens, true));
            let states = model.extend(&mut pool, &spans.collect::<Vec<_>>()).unwrap();
            let grown = step.into_iter().enumerate().filter(|(_, tokens)| *tokens > 0);
            for (state, (index, tokens)) in grown.enumerate() {
                sequences[index].stored += tokens;
                let last = expected[index].narrow(0, sequences[index].stored - 1, 1).unwrap();
                assert_near(&states.narrow(0, state, 1).unwrap(), &last, 1e-5);
            }
        }
        assert_eq!(sequences.map(|sequence| sequence.stored), [14, 14]);
    }
}

#[test]
fn sequences_share_blocks_until_one_of_them_writes() {
    let model = model();
    let mut pool = model.pool(4, 4).unwrap();
    let prompt = Growing::new(Row::text(vec![1, 2, 3, 4, 5, 6]), &[0, 1]);
    model.extend(&mut pool, &[prompt.span(6, false)]).unwrap();
    model.copy(&mut pool, &[(1, 3)]).unwrap();
    let fork = |id: u32, blocks: &[u32]| Growing {
        stored: 6,
        ..Growing::new(prompt.row.followed_by(&[id]), blocks)
    };
    let forks = [fork(7, &[0, 1]), fork(8, &[0, 3])];
    let states = model
        .extend(&mut pool, &[forks[0].span(1, true), forks[1].span(1, true)])
        .unwrap();
    for (index, fork) in forks.iter().enumerate() {
        let last = whole(&model, &fork.row).narrow(0, 6, 1).unwrap();
        assert_near(&states.narrow(0, index, 1).unwrap(), &last, 1e-5);
    }
}

#[test]
fn states_are_those_of_the_spans_that_want_them() {
    let model = model();
    let mut pool = model.pool(3, 4).unwrap();
    let sequences = [[1, 2, 3], [4, 5, 6], [7, 8, 9]].map(|ids| Row::text(ids.to_vec()));
    let sequences = [0, 1, 2].map(|i| Growing::new(sequences[i as usize].clone(), &[i]));
    let wanted = [false, true, false];
    let spans = sequences
        .iter()
        .zip(wanted)
        .map(|(sequence, wanted)| sequence.span(3, wanted));
    let states = model.extend(&mut pool, &spans.collect::<Vec<_>>()).unwrap();
    assert_eq!(states.dims()[0], 1);
    assert_near(
        &states,
        &whole(&model, &sequences[1].row).narrow(0, 2, 1).unwrap(),
        1e-5,
    );
    let nobody = sequences
        .iter()
        .map(|sequence| sequence.span(3, false))
        .collect::<Vec<_>>();
    assert_eq!(model.extend(&mut pool, &nobody).unwrap().dims()[0], 0);
}

#[test]
fn a_span_without_room_is_refused() {
    let model = model();
    let mut pool = model.pool(2, 4).unwrap();
    let mut refused = |blocks: &[u32], stored: usize| {
        let sequence = Growing {
            stored,
            ..Growing::new(Row::text((1..8).collect()), blocks)
        };
        let error = model.extend(&mut pool, &[sequence.span(2, true)]).unwrap_err();
        error.to_string()
    };
    let error = refused(&[1], 3);
    assert!(
        error.contains("1 blocks of 4 tokens have no room for 2 tokens after 3"),
        "{error}"
    );
    let error = refused(&[2], 0);
    assert!(error.contains("no block 2 in a pool of 2"), "{error}");
    assert!(model.pool(0, 16).is_err());
}

fn loss(model: &Vlm) -> Tensor {
    let rows = [
        row(model, &image([1, 4, 10], 1), &[5, 6, 7, 8, 9], Pass::Train),
        row(model, &image([1, 4, 4], 2), &[9, 8, 3], Pass::Train),
    ];
    let hidden = model.forward(&TextBatch::new(&rows).unwrap(), Pass::Train).unwrap();
    let last = hidden
        .flatten(0, 1)
        .unwrap()
        .index_select(&Tensor::new(&[15u32, 22], &Device::Cpu).unwrap(), 0);
    let logits = model.logits(&last.unwrap(), Pass::Train).unwrap();
    Kernels::Auto
        .log_probs(&logits, &[11, 12], 1.0)
        .unwrap()
        .sum_all()
        .unwrap()
}

#[test]
fn every_parameter_gets_a_gradient_and_fused_equals_composed() {
    let mut model = model();
    let fused = loss(&model).backward().unwrap();
    model.set_kernels(Kernels::Composed);
    let composed = loss(&model).backward().unwrap();
    for (name, var) in model.named_vars() {
        let (a, b) = (fused.get(&var), composed.get(&var));
        let (a, b) = (
            a.unwrap_or_else(|| panic!("{name}")),
            b.unwrap_or_else(|| panic!("{name}")),
        );
        let norm = values(b).iter().map(|v| v * v).sum::<f32>().sqrt();
        // Adding the same vector to every key changes no softmax: that bias has no gradient but rounding.
        if !name.ends_with("k_proj.bias") {
            assert!(norm > 1e-7, "{name} has no gradient");
        }
        let distance = values(a)
            .iter()
            .zip(values(b))
            .map(|(a, b)| (a - b).powi(2))
            .sum::<f32>()
            .sqrt();
        assert!(distance <= 1e-4 * norm + 1e-6, "{name}: {distance} of {norm}");
    }
}

#[test]
fn frozen_parameters_get_no_gradient_and_do_not_change_the_others() {
    let mut model = model();
    let all = loss(&model).backward().unwrap();
    model.set_trainable(|name| name.starts_with("model.layers")).unwrap();
    let some = loss(&model).backward().unwrap();
    for (name, var) in model.named_vars() {
        match (some.get(&var), name.starts_with("model.layers")) {
            (Some(gradient), true) => assert_near(gradient, all.get(&var).unwrap(), 1e-6),
            (None, false) => {}
            (gradient, _) => panic!("{name}: gradient {}", gradient.is_some()),
        }
    }
}

#[test]
fn inference_records_nothing() {
    let model = model();
    let row = row(&model, &image([1, 4, 4], 1), &[5], Pass::Infer);
    let hidden = model.forward(&TextBatch::new(&[row]).unwrap(), Pass::Infer).unwrap();
    assert!(!hidden.track_op());
}

#[test]
fn images_do_not_see_each_other() {
    let model = model();
    let images = [image([1, 12, 20], 1), image([1, 4, 4], 2), image([2, 4, 6], 3)];
    let together = model.encode(&images.each_ref(), Pass::Infer).unwrap();
    for (image, features) in images.iter().zip(&together) {
        assert_near(&model.encode(&[image], Pass::Infer).unwrap()[0], features, 1e-5);
    }
}

#[test]
fn a_window_does_not_see_its_neighbour_without_a_full_block() {
    let mut config = config();
    let Vision::Qwen25Vl(vision) = &mut config.vision else {
        panic!("another family")
    };
    vision.fullatt_block_indexes.clear();
    let windowed = Vlm::random(config, 5, &LoadOptions::default()).unwrap();
    let full = model();
    // A window is 2 x 2 tokens here; change the last patch of a frame of two windows.
    let (before, mut after) = (image([1, 4, 8], 1), image([1, 4, 8], 1));
    let last = after.values.len() - 96;
    after.values[last..].fill(0.5);
    let first_token =
        |model: &Vlm, image: &Visual| values(&model.encode(&[image], Pass::Infer).unwrap()[0].narrow(0, 0, 1).unwrap());
    assert_eq!(first_token(&windowed, &before), first_token(&windowed, &after));
    assert_ne!(first_token(&full, &before), first_token(&full, &after));
}

#[test]
fn a_saved_model_loads_to_the_same_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    model.save_weights(&dir.path().join("model.safetensors")).unwrap();
    let config = json!({
        "text_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        "tie_word_embeddings": true, "image_token_id": IMAGE,
        "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "spatial_patch_size": 4, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let loaded = Vlm::load(dir.path(), &LoadOptions::default()).unwrap();
    let batch = TextBatch::new(&[Row::text(vec![1, 2, 3])]).unwrap();
    let run = |model: &Vlm| values(&model.forward(&batch, Pass::Infer).unwrap());
    assert_eq!(run(&model), run(&loaded));
}

#[test]
fn a_deep_copy_keeps_its_values_when_the_source_moves() {
    let model = model();
    let copy = model.deep_copy().unwrap();
    let batch = TextBatch::new(&[Row::text(vec![1, 2, 3])]).unwrap();
    let run = |model: &Vlm| values(&model.forward(&batch, Pass::Infer).unwrap());
    let before = run(&copy);
    let (_, var) = model
        .named_vars()
        .into_iter()
        .find(|(name, _)| name == "model.norm.weight")
        .unwrap();
    var.set(&(var.as_detached_tensor() * 2.0).unwrap()).unwrap();
    assert_ne!(run(&model), before);
    assert_eq!(run(&copy), before);
}

/// A checkpoint directory without weights: three words, images of 8 x 8 pixels a token.
fn processor() -> Processor {
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, text: String| std::fs::write(dir.path().join(file), text).unwrap();
    let config = json!({
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "image_token_id": IMAGE, "eos_token_id": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {"hidden_size": 16, "num_heads": 2, "patch_size": 4, "window_size": 16, "out_hidden_size": 32}
    });
    let special = json!({"id": IMAGE, "content": "<|image_pad|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "what": 1, "end": 2, "<|image_pad|>": IMAGE}, "unk_token": "<unk>"}
    });
    let template = "{% for m in messages %}{% for p in m.content %}\
                    {{ ' <|image_pad|> ' if p.type == 'image' else p.text }}{% endfor %}{% endfor %} end";
    write("config.json", config.to_string());
    write("tokenizer.json", tokenizer.to_string());
    write("chat_template.jinja", template.to_owned());
    write(
        "preprocessor_config.json",
        json!({"min_pixels": 64, "max_pixels": 4096}).to_string(),
    );
    Processor::load(dir.path()).unwrap()
}

fn picture(width: usize, height: usize) -> Picture {
    let rgb = vec![7; width * height * 3];
    Picture { width, height, rgb }
}

#[test]
fn a_prompt_has_as_many_placeholders_as_its_pictures_have_tokens() {
    let pictures = [picture(16, 8), picture(8, 16)].map(Medium::Picture);
    let prompt = processor()
        .prepare(&[Message::user(2, "what")], &pictures, 100)
        .unwrap();
    assert_eq!(prompt.ids, [IMAGE, IMAGE, IMAGE, IMAGE, 1, 2]);
    assert_eq!(prompt.spans, [(0, 2), (2, 2)]);
    assert_eq!(
        prompt.positions,
        [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 3, 2], [4; 3], [5; 3]]
    );
    assert_eq!(
        (prompt.rope_delta, prompt.visuals[0].layout, prompt.visuals[1].layout),
        (0, layout([1, 2, 4]), layout([1, 4, 2]))
    );
    assert_eq!(processor().tokenizer().stop_ids(), [2]);
}

#[test]
fn a_prompt_that_cannot_be_is_refused_with_its_numbers() {
    let processor = processor();
    let prepare = |messages: &[Message], pictures: &[Medium]| processor.prepare(messages, pictures, 5).unwrap_err();
    let count = prepare(&[Message::user(2, "what")], &[Medium::Picture(picture(8, 8))]);
    assert!(
        count
            .to_string()
            .contains("2 image and 0 video parts, but 1 images and 0 videos"),
        "{count}"
    );
    let long = prepare(&[Message::user(1, "what")], &[Medium::Picture(picture(32, 8))]);
    assert!(matches!(long, ModelError::TooLong { tokens: 6, limit: 5 }), "{long}");
    let smuggled = prepare(&[Message::user(0, "what <|image_pad|>")], &[]);
    assert!(
        smuggled.to_string().contains("1 image placeholders for 0 images"),
        "{smuggled}"
    );
}
