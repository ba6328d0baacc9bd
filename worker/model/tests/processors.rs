//! Pictures and videos against `transformers`, torchvision and Pillow: tests/parity/fixtures/processors/ holds what
//! `make_processor_fixtures.py` made there.
//!
//! Pictures come from a formula that both sides repeat, or from the tiny files. All is compared to the last bit, but for
//! frames of MP4 files, whose colours FFmpeg converts otherwise.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use flotilla_model::{
    Config, ImageLimits, Layout, Medium, MediumSize, Picture, Sampling, Video, VideoLimits, Vision, VisualProcessor,
    llava_onevision::{OneVisionVisualProcessor, anyres::Anyres},
    media::Resampler,
    qwen2_5_vl::{QwenVisualProcessor, TimeStep, VisionConfig, smart_resize},
};
use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures/processors")
}

fn document() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("cases.json")).unwrap()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join(name), &Device::Cpu).unwrap()
}

fn cases(document: &Value, key: &str) -> Vec<Value> {
    let cases = document[key].as_array().unwrap().clone();
    assert!(!cases.is_empty(), "{key}");
    cases
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Smooth in places and noisy in others; the same numbers as in `make_processor_fixtures.py`.
fn picture(width: usize, height: usize, frame: usize) -> Picture {
    let level =
        move |x: usize, y: usize, c: usize| ((x * 3 + y * 5 + c * 40 + frame * 29 + x * y / 7 * 11) % 256) as u8;
    let pixel = move |x, y| [0, 1, 2].map(|c| level(x, y, c));
    Picture {
        width,
        height,
        rgb: (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| pixel(x, y)))
            .collect(),
    }
}

fn video(case: &Value) -> Video {
    let frame = |n| picture(number(&case["width"]), number(&case["height"]), n);
    Video {
        frames: (0..number(&case["frames"])).map(frame).collect(),
        fps: case["fps"].as_f64().unwrap_or(1.0),
    }
}

/// The values are those of the reference to the last bit.
fn assert_values(name: &str, made: &[f32], expected: &Value) {
    assert_eq!(made.len(), number(&expected["count"]), "{name}");
    let step = number(&expected["step"]);
    let listed = expected["values"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap());
    let worst = made
        .iter()
        .step_by(step)
        .zip(listed)
        .map(|(a, b)| (f64::from(*a) - b).abs())
        .fold(0.0, f64::max);
    assert!(worst < 1e-6, "{name}: a value is {worst} off");
    let bytes = made.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let mean = made.iter().map(|v| f64::from(*v)).sum::<f64>() / made.len() as f64;
    let off = mean - expected["mean"].as_f64().unwrap();
    assert_eq!(
        digest(&bytes),
        expected["digest"],
        "{name}: equal where listed, {off} off in the mean"
    );
}

fn directory(files: &[(&str, &Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, json) in files {
        std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    dir
}

fn qwen_vision() -> VisionConfig {
    let config = Config::from_json(&json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "tokens_per_second": 2}
    }));
    match config.unwrap().vision {
        Vision::Qwen25Vl(vision) => vision,
        Vision::LlavaOneVision(_) => panic!("another family"),
    }
}

fn one_vision(file: &Value, name: &str) -> OneVisionVisualProcessor {
    let side = file["size"]["height"].as_u64().unwrap_or(384);
    let one_square = json!([[side, side]]);
    let config = json!({
        "vision_config": {"image_size": side, "patch_size": 14},
        "image_grid_pinpoints": file.get("image_grid_pinpoints").unwrap_or(&one_square),
    });
    OneVisionVisualProcessor::load(directory(&[("config.json", &config), (name, file)]).path()).unwrap()
}

#[test]
fn sides_are_those_of_the_reference() {
    let (document, tensors) = (document(), tensors("plans.safetensors"));
    let sides = numbers(&document["sides"]);
    for (which, bounds) in document["bounds"].as_array().unwrap().iter().enumerate() {
        let bounds = numbers(bounds);
        let expected = tensors[&format!("smart_resize.{which}")].to_dtype(DType::I64).unwrap();
        let expected = expected.to_vec3::<i64>().unwrap();
        for (row, height) in expected.iter().zip(&sides) {
            for (expected, width) in row.iter().zip(&sides) {
                let (h, w) = smart_resize(*height, *width, 28, bounds[0], bounds[1]).unwrap();
                assert_eq!([h as i64, w as i64], expected[..], "{height}x{width} within {bounds:?}");
            }
        }
    }
}

#[test]
fn canvases_and_tokens_are_those_of_the_reference() {
    let tensors = tensors("plans.safetensors");
    let pinpoints = |most: usize, side: usize| {
        let row = move |i: usize| (1..=most).map(move |j| (i * side, j * side));
        (1..=most).flat_map(row).collect::<Vec<_>>()
    };
    for (name, anyres) in [
        (
            "anyres.released",
            Anyres::new(pinpoints(6, 384), "anyres_max_9", 384, 27).unwrap(),
        ),
        (
            "anyres.tiny",
            Anyres::new(pinpoints(3, 56), "anyres_max_2", 56, 4).unwrap(),
        ),
    ] {
        let rows = tensors[name].to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
        for row in rows {
            let row = row.iter().map(|n| *n as usize).collect::<Vec<_>>();
            let [height, width, rows, columns, tokens] = row[..] else {
                panic!("{row:?}")
            };
            match anyres.plan(height, width) {
                Ok(plan) => {
                    assert_eq!(plan.canvas, (rows, columns), "{name}: {height}x{width}");
                    assert_eq!(
                        anyres.tokens(height, width).unwrap(),
                        tokens,
                        "{name}: {height}x{width}"
                    );
                }
                Err(_) => assert_eq!((rows, columns), (0, 0), "{name}: {height}x{width}"),
            }
        }
    }
}

#[test]
fn resizing_is_that_of_pillow_and_torchvision_to_the_last_bit() {
    for case in cases(&document(), "resampled") {
        let (from, to) = (numbers(&case["from"]), numbers(&case["to"]));
        let source = picture(from[0], from[1], 0);
        for (resampler, key) in [(Resampler::Pillow, "pillow"), (Resampler::Torchvision, "torchvision")] {
            let made = source.resize_with(resampler, to[0], to[1]);
            assert_eq!(digest(&made.rgb), case[key], "{key}: {from:?} to {to:?}");
        }
    }
}

#[test]
fn patches_of_pictures_are_those_of_the_reference_to_the_last_bit() {
    for case in cases(&document(), "qwen_pictures") {
        let dir = directory(&[("preprocessor_config.json", &case["file"])]);
        let (width, height) = (number(&case["width"]), number(&case["height"]));
        let mut processor = QwenVisualProcessor::load(dir.path(), &qwen_vision()).unwrap();
        let name = format!("{} {width}x{height}", case["name"]);
        let grid = numbers(&case["grid"]).try_into().unwrap();
        let layout = Layout::Patches {
            grid,
            time_step: 0.0,
            video: false,
        };
        assert_eq!(
            processor.plan(&[MediumSize::Picture { width, height }]).unwrap(),
            [layout],
            "{name}"
        );
        let medium = [Medium::Picture(picture(width, height, 0))];
        let made = processor.process(&medium).unwrap();
        assert_eq!(made[0].layout, layout, "{name}");
        assert_values(&name, &made[0].values, &case["slow"]);
        processor.resample_pictures(dir.path(), Resampler::Torchvision).unwrap();
        assert_values(&name, &processor.process(&medium).unwrap()[0].values, &case["fast"]);
    }
}

#[test]
fn patches_of_videos_are_those_of_the_reference_to_the_last_bit() {
    for case in cases(&document(), "qwen_videos") {
        let dir = directory(&[("video_preprocessor_config.json", &case["file"])]);
        let mut processor = QwenVisualProcessor::load(dir.path(), &qwen_vision()).unwrap();
        let made = processor.process(&[Medium::Video(video(&case))]).unwrap();
        let (seconds, grid) = (
            case["seconds"].as_f64().unwrap(),
            numbers(&case["grid"]).try_into().unwrap(),
        );
        let layout = |time_step| Layout::Patches {
            grid,
            time_step,
            video: true,
        };
        assert_eq!(made[0].layout, layout(seconds * 2.0));
        assert_values(&case["file"].to_string(), &made[0].values, &case["made"]);
        processor.time_step = TimeStep::Integer;
        let plan = processor.plan(&[Medium::Video(video(&case)).size()]).unwrap();
        assert_eq!(plan, [layout(seconds.trunc() * 2.0)]);
    }
}

#[test]
fn squares_of_pictures_are_those_of_the_reference_to_the_last_bit() {
    for case in cases(&document(), "one_vision") {
        let processor = one_vision(&case["file"], "preprocessor_config.json");
        let sizes = case["sizes"]
            .as_array()
            .unwrap()
            .iter()
            .map(numbers)
            .collect::<Vec<_>>();
        let media = sizes.iter().map(|size| Medium::Picture(picture(size[0], size[1], 0)));
        let made = processor.process(&media.collect::<Vec<_>>()).unwrap();
        for ((made, expected), squares) in made
            .iter()
            .zip(case["made"].as_array().unwrap())
            .zip(numbers(&case["squares"]))
        {
            let tiles = match made.layout {
                Layout::Anyres { tiles, .. } => tiles,
                _ => 1,
            };
            assert_eq!(tiles, squares, "{sizes:?}");
            assert_values(&format!("{sizes:?}"), &made.values, expected);
        }
    }
}

#[test]
fn squares_of_videos_are_those_of_the_reference_to_the_last_bit() {
    for case in cases(&document(), "one_vision_videos") {
        let processor = one_vision(&case["file"], "video_preprocessor_config.json");
        let made = processor.process(&[Medium::Video(video(&case))]).unwrap();
        assert_eq!(
            made[0].layout,
            Layout::Frames {
                frames: number(&case["frames"])
            }
        );
        assert_values(&case["file"].to_string(), &made[0].values, &case["made"]);
    }
}

#[test]
fn sampled_frames_are_those_of_the_reference() {
    let bytes = |indices: &[usize]| {
        indices
            .iter()
            .flat_map(|n| (*n as u32).to_le_bytes())
            .collect::<Vec<_>>()
    };
    for case in cases(&document(), "sampling") {
        let (total, fps) = (number(&case["total"]), case["fps"].as_f64().unwrap());
        let indices = Sampling::QWEN.indices(total, fps);
        assert_eq!(indices.len(), number(&case["count"]), "{total} at {fps}");
        assert_eq!(
            digest(&bytes(&indices)),
            case["digest"],
            "{total} at {fps}: {indices:?}"
        );
        let spread = Sampling::ONE_VISION.indices(total, fps);
        assert_eq!(digest(&bytes(&spread)), case["one_vision"], "{total}: {spread:?}");
    }
}

#[test]
fn files_of_every_kind_are_decoded_as_pillow_decodes_them() {
    let mut problems = Vec::new();
    for case in cases(&document(), "files") {
        let name = case["name"].as_str().unwrap();
        let bytes = std::fs::read(fixtures().join(name)).unwrap();
        let picture = match Picture::decode(&bytes, ImageLimits::DEFAULT) {
            Ok(picture) => picture,
            Err(error) => {
                problems.push(format!("{name}: {error}"));
                continue;
            }
        };
        let size = (number(&case["width"]), number(&case["height"]));
        assert_eq!((picture.width, picture.height), size, "{name}");
        if digest(&picture.rgb) != case["digest"] {
            problems.push(format!("{name} {}: other pixels", case["mode"]));
        }
        if let Some(expected) = case.get("upright") {
            let upright = Picture::decode_upright(&bytes, ImageLimits::DEFAULT).unwrap();
            assert_eq!((upright.width, upright.height), (size.1, size.0), "{name}");
            assert_eq!(digest(&upright.rgb), *expected, "{name}");
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn animations_are_composed_as_pillow_composes_them() {
    let mut problems = Vec::new();
    for case in cases(&document(), "animations") {
        let name = case["name"].as_str().unwrap();
        let bytes = std::fs::read(fixtures().join(name)).unwrap();
        let video = Video::decode_animation(&bytes, Sampling::All, &VideoLimits::DEFAULT).unwrap();
        assert_eq!(Some(video.fps), case["fps"].as_f64(), "{name}");
        let made = video
            .frames
            .iter()
            .map(|frame| Value::from(digest(&frame.rgb)))
            .collect::<Vec<_>>();
        if Value::from(made.clone()) != case["frames"] {
            problems.push(format!("{name}: {made:?}, {}", case["frames"]));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn a_frame_of_another_size_than_its_header_says_is_refused() {
    let mut bytes = std::fs::read(fixtures().join("lossy_alpha.webp")).unwrap();
    // Width of the first frame in its VP8 header, behind the start code.
    let width = bytes.windows(3).position(|code| code == [0x9D, 0x01, 0x2A]).unwrap() + 3;
    bytes[width] = 2;
    assert!(Picture::decode(&bytes, ImageLimits::DEFAULT).is_err());
    assert!(Video::decode(&bytes, Sampling::All, &VideoLimits::DEFAULT).is_err());
}

proptest! {
    #[test]
    fn a_damaged_file_of_any_kind_gives_a_picture_or_an_error(
        which in 0usize..1000,
        damage in proptest::collection::vec((0usize..1 << 16, any::<u8>()), 1..20),
        cut in 0usize..1 << 14,
    ) {
        let document = document();
        let names = [cases(&document, "files"), cases(&document, "animations")].concat();
        let name = names[which % names.len()]["name"].as_str().unwrap();
        let mut bytes = std::fs::read(fixtures().join(name)).unwrap();
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(8 + cut % (4 * bytes.len()));
        if let Ok(picture) = Picture::decode_upright(&bytes, ImageLimits::DEFAULT) {
            prop_assert_eq!(picture.rgb.len(), picture.width * picture.height * 3);
        }
        if let Ok(video) = Video::decode(&bytes, Sampling::QWEN, &VideoLimits::DEFAULT) {
            video.check().unwrap();
        }
    }
}

#[cfg(not(feature = "video-file"))]
#[test]
fn a_file_without_the_feature_is_refused_with_what_to_do() {
    let bytes = std::fs::read(fixtures().join("baseline.mp4")).unwrap();
    let error = Video::decode(&bytes, Sampling::All, &VideoLimits::DEFAULT).unwrap_err();
    assert!(
        error.to_string().contains("need a build with the feature video-file"),
        "{error}"
    );
}

#[cfg(feature = "video-file")]
mod files {
    use super::*;

    fn clip(name: &str) -> Vec<u8> {
        std::fs::read(fixtures().join(name)).unwrap()
    }

    fn mean(frame: &Picture, channel: usize) -> f64 {
        let levels = frame.rgb.iter().skip(channel).step_by(3);
        levels.map(|level| f64::from(*level)).sum::<f64>() / (frame.width * frame.height) as f64
    }

    #[test]
    fn frames_of_a_file_are_those_that_ffmpeg_shows() {
        for case in cases(&document(), "clips").iter().take(2) {
            let bytes = clip(case["name"].as_str().unwrap());
            for sampling in [Sampling::All, Sampling::QWEN, Sampling::AtMost(5), Sampling::AtMost(1)] {
                let video = Video::decode(&bytes, sampling, &VideoLimits::DEFAULT).unwrap();
                let kept = sampling.indices(40, 10.0);
                assert_eq!((video.frames.len(), video.fps), (kept.len(), kept.len() as f64 / 4.0));
                for (frame, number) in video.frames.iter().zip(kept) {
                    assert_eq!((frame.width, frame.height), (46, 34));
                    for channel in 0..3 {
                        let expected = case["means"][number][channel].as_f64().unwrap();
                        let off = mean(frame, channel) - expected;
                        assert!(
                            off.abs() < 1.5,
                            "{}: frame {number}, channel {channel}: {off}",
                            case["name"]
                        );
                        let corner = f64::from(frame.rgb[(30 * 46 + 40) * 3 + channel]);
                        let off = corner - case["corners"][number][channel].as_f64().unwrap();
                        assert!(
                            off.abs() < 3.0,
                            "{}: frame {number}, channel {channel}: {off}",
                            case["name"]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn other_codecs_and_fragments_are_refused_with_what_to_do() {
        let refusal = |name: &str, limits: &VideoLimits| {
            Video::decode(&clip(name), Sampling::QWEN, limits)
                .unwrap_err()
                .to_string()
        };
        let limits = VideoLimits::DEFAULT;
        assert!(refusal("mpeg4.mp4", &limits).contains("\"mp4v\", only H.264 is supported"));
        assert!(refusal("fragmented.mp4", &limits).contains("it is fragmented"));
        let few = VideoLimits { frames: 39, ..limits };
        assert_eq!(refusal("baseline.mp4", &few), "video: more than 39 frames");
        let short = VideoLimits { seconds: 3.0, ..limits };
        assert!(refusal("baseline.mp4", &short).contains("4.0 seconds, the limit is 3"));
        let small = VideoLimits {
            frame: ImageLimits {
                pixels: 1000,
                ..ImageLimits::DEFAULT
            },
            ..limits
        };
        assert!(refusal("baseline.mp4", &small).contains("46x34 pixels, the limit is 1000 pixels"));
        let late = VideoLimits {
            time: std::time::Duration::ZERO,
            ..limits
        };
        assert!(refusal("baseline.mp4", &late).contains("decoding takes longer"));
    }

    #[test]
    fn groups_without_a_sampled_frame_are_not_decoded() {
        let mut bytes = clip("reordered.mp4");
        let all = Video::decode(&bytes, Sampling::All, &VideoLimits::DEFAULT).unwrap();
        // The samples lie between the start and the tables at the end: the later ones are lost.
        let tables = bytes.windows(4).position(|kind| kind == b"moov").unwrap();
        bytes[tables - 800..tables - 4].fill(0);
        assert!(Video::decode(&bytes, Sampling::All, &VideoLimits::DEFAULT).is_err());
        let first = Video::decode(&bytes, Sampling::AtMost(1), &VideoLimits::DEFAULT).unwrap();
        assert_eq!(first.frames, all.frames[..1]);
    }

    proptest! {
        #[test]
        fn a_damaged_file_gives_a_video_or_an_error(
            damage in proptest::collection::vec((0usize..1 << 16, any::<u8>()), 1..40),
            cut in 0usize..1 << 16,
        ) {
            let mut bytes = clip("reordered.mp4");
            for (at, value) in damage {
                let at = 8 + at % (bytes.len() - 8);
                bytes[at] = value;
            }
            let whole = Video::decode(&bytes, Sampling::QWEN, &VideoLimits::DEFAULT);
            if let Ok(video) = whole {
                video.check().unwrap();
            }
            bytes.truncate(8 + cut % (bytes.len() - 8));
            let _ = Video::decode(&bytes, Sampling::QWEN, &VideoLimits::DEFAULT);
        }
    }
}
