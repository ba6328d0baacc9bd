//! Checkpoints and cases.

use std::{collections::HashMap, path::PathBuf, sync::LazyLock};

use candle_core::{DType, Device, Tensor};
use flotilla_model::{
    ImageLimits, Layout, LoadOptions, Medium, Message, Picture, Processor, Prompt, Video, Visual, Vlm, ops::Kernels,
};
use serde_json::{Value, json};

use crate::stored::{check, copy_of, fixtures, read_json};

/// The kernels that a machine chooses between.
pub const KERNELS: [Kernels; 2] = [Kernels::Auto, Kernels::Composed];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    Qwen25Vl,
    LlavaOneVision,
}

/// Where models are computed: on the CPU, or with FLOTILLA_DEVICE=cuda on the first GPU (`make test-cuda`).
fn device() -> Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| match std::env::var("FLOTILLA_DEVICE").as_deref() {
        Ok("cuda") => Device::new_cuda_with_stream(0).unwrap(),
        _ => Device::Cpu,
    });
    DEVICE.clone()
}

/// One family's checkpoint and cases.
pub struct Suite {
    pub family: Family,
    pub document: Value,
    pub cases: Vec<Case>,
}

/// One conversation and what the reference made of it.
pub struct Case {
    pub name: String,
    pub meta: Value,
    pub tensors: HashMap<String, Tensor>,
}

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::Qwen25Vl => "qwen2.5-vl",
            Self::LlavaOneVision => "llava-onevision",
        }
    }

    pub fn checkpoint(self) -> PathBuf {
        fixtures().join(format!("tiny-{}", self.name()))
    }

    /// Mean and deviation of the channels.
    fn normalization(self) -> ([f64; 3], [f64; 3]) {
        match self {
            Self::Qwen25Vl => (
                [0.481_454_66, 0.457_827_5, 0.408_210_73],
                [0.268_629_54, 0.261_302_58, 0.275_777_11],
            ),
            Self::LlavaOneVision => ([0.5; 3], [0.5; 3]),
        }
    }
}

impl Suite {
    pub fn of(family: Family) -> Self {
        let dir = fixtures().join("cases");
        let document = read_json(&dir.join(format!("{}.json", family.name())));
        let case = |meta: &Value| {
            let name = meta["name"].as_str().unwrap().to_owned();
            let path = dir.join(format!("{}.{name}.safetensors", family.name()));
            Case {
                tensors: candle_core::safetensors::load(path, &Device::Cpu).unwrap(),
                meta: meta.clone(),
                name,
            }
        };
        Self {
            family,
            cases: document["cases"].as_array().unwrap().iter().map(case).collect(),
            document,
        }
    }

    pub fn case(&self, name: &str) -> &Case {
        self.cases.iter().find(|case| case.name == name).unwrap()
    }

    pub fn model(&self, dtype: DType) -> Vlm {
        let device = device();
        Vlm::load(&self.family.checkpoint(), &LoadOptions { device, dtype }).unwrap()
    }

    /// The case as the reference prepared it: its ids, its pixels.
    pub fn prompt(&self, case: &Case) -> Prompt {
        let processor = Processor::load(&self.family.checkpoint()).unwrap();
        processor.arrange(case.ids(), case.visuals(self.family)).unwrap()
    }

    /// The case as our processor prepares its messages.
    pub fn prepared(&self, case: &Case) -> Prompt {
        let checkpoint = copy_of(&self.family.checkpoint());
        if case.meta["template"] == "older" {
            std::fs::remove_file(checkpoint.path().join("chat_template.jinja")).unwrap();
            let template = fixtures().join("llava-onevision-older.chat_template.json");
            std::fs::copy(template, checkpoint.path().join("chat_template.json")).unwrap();
        }
        let (messages, media) = case.conversation();
        let processor = Processor::load(checkpoint.path()).unwrap();
        processor.prepare(&messages, &media, 4096).unwrap()
    }
}

impl Case {
    pub fn ids(&self) -> Vec<u32> {
        self.integers("input_ids").into_iter().map(|id| id as u32).collect()
    }

    /// All elements of a tensor of integers.
    pub fn integers(&self, name: &str) -> Vec<i64> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Pictures, then videos.
    pub fn visuals(&self, family: Family) -> Vec<Visual> {
        let described = self.meta["visuals"].as_array().unwrap().iter().enumerate();
        described
            .map(|(number, described)| self.visual(family, number, described))
            .collect()
    }

    fn visual(&self, family: Family, number: usize, described: &Value) -> Visual {
        let pixels = &self.tensors[&format!("pixels.{number}")];
        let size = |key: &str| described[key].as_u64().unwrap() as usize;
        let layout = match described["kind"].as_str().unwrap() {
            "anyres" => Layout::Anyres {
                tiles: size("tiles"),
                height: size("height"),
                width: size("width"),
            },
            "square" => Layout::Square,
            "frames" => Layout::Frames { frames: size("frames") },
            kind => Layout::Patches {
                grid: serde_json::from_value(described["grid"].clone()).unwrap(),
                // Two positions a second.
                time_step: described["second_per_grid"]
                    .as_f64()
                    .map_or(0.0, |seconds| seconds * 2.0),
                video: kind == "video",
            },
        };
        // A picture is its own second frame.
        let pixels = match layout {
            Layout::Patches { video: false, .. } => Tensor::cat(&[pixels, pixels], 2).unwrap(),
            _ => pixels.clone(),
        };
        let plane = pixels.dims()[2..].iter().product::<usize>();
        let (mean, std) = family.normalization();
        let bytes: Vec<u8> = pixels.flatten_all().unwrap().to_vec1().unwrap();
        let normalized = bytes.iter().enumerate().map(|(at, byte)| {
            let channel = at / plane % 3;
            ((f64::from(*byte) / 255.0 - mean[channel]) / std[channel]) as f32
        });
        Visual {
            values: normalized.collect(),
            layout,
        }
    }

    /// The messages, and the pictures and videos that they name.
    fn conversation(&self) -> (Vec<Message>, Vec<Medium>) {
        let dir = fixtures().join("cases");
        let mut messages = read_json(&dir.join(self.meta["messages"].as_str().unwrap()));
        let picture = |path: &Value| {
            let bytes = std::fs::read(dir.join(path.as_str().unwrap())).unwrap();
            Picture::decode(&bytes, ImageLimits::default()).unwrap()
        };
        let mut media = Vec::new();
        for message in messages.as_array_mut().unwrap() {
            for part in message["content"].as_array_mut().into_iter().flatten() {
                if part["type"] == "image_url" {
                    media.push(Medium::Picture(picture(&part["image_url"]["url"])));
                    *part = json!({"type": "image"});
                } else if part["type"] == "video" {
                    let frames = part["video"].as_array().unwrap().iter().map(picture).collect();
                    let video = Video::new(frames, part["fps"].as_f64().unwrap()).unwrap();
                    media.push(Medium::Video(video));
                    *part = json!({"type": "video"});
                }
            }
        }
        (serde_json::from_value(messages).unwrap(), media)
    }

    /// Holds `[rows, width]` against what is stored of the tensor `name`.
    pub fn check(&self, name: &str, got: &Tensor) {
        check(&self.tensors, name, got, &self.name);
    }
}
