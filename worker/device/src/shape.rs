//! Sizes of language models and vision towers, the released ones by name.

use flotilla_model::{llava_onevision, qwen2_5_vl, text::TextConfig};

/// Released models whose shapes are known by name.
pub const NAMES: [&str; 6] = [
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen2.5-vl-72b",
    "llava-onevision-0.5b",
    "llava-onevision-7b",
    "llava-onevision-72b",
];

/// What is said where a name is none of [`NAMES`].
pub fn unknown(name: &str) -> String {
    format!("no shape {name:?}; there are {}", NAMES.join(", "))
}

/// Sizes of a Qwen2 language model, of which all families here are made.
#[derive(Clone, Debug, PartialEq)]
pub struct TextShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Added to the mean square of a normalization.
    pub eps: f32,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Frequencies per axis (time, height, width).
    pub sections: [usize; 3],
    /// Whether the output head is the embedding table.
    pub tied: bool,
}

impl From<&TextConfig> for TextShape {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "an epsilon is kept in f32 by every kernel"
    )]
    fn from(config: &TextConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            intermediate: config.intermediate_size,
            vocabulary: config.vocab_size,
            eps: config.rms_norm_eps as f32,
            theta: config.rope_theta,
            sections: config.mrope_section,
            tied: config.tie_word_embeddings,
        }
    }
}

impl TextShape {
    /// That of a released model, by one of [`NAMES`].
    pub fn named(name: &str) -> Option<Self> {
        // Both families have the same three blocks; they differ in positions, tables and the smallest size.
        let three = Self {
            hidden: 2048,
            layers: 36,
            heads: 16,
            kv_heads: 2,
            head_dim: 128,
            intermediate: 11008,
            vocabulary: 151_936,
            eps: 1e-6,
            theta: 1e6,
            sections: [16, 24, 24],
            tied: true,
        };
        let seven = Self {
            hidden: 3584,
            layers: 28,
            heads: 28,
            kv_heads: 4,
            intermediate: 18944,
            vocabulary: 152_064,
            tied: false,
            ..three.clone()
        };
        let seventy_two = Self {
            hidden: 8192,
            layers: 80,
            heads: 64,
            kv_heads: 8,
            intermediate: 29568,
            ..seven.clone()
        };
        let onevision = |shape: Self| Self {
            vocabulary: 152_128,
            sections: [shape.head_dim / 2, 0, 0],
            ..shape
        };
        Some(match name {
            "qwen2.5-vl-3b" => three,
            "qwen2.5-vl-7b" => seven,
            "qwen2.5-vl-72b" => seventy_two,
            "llava-onevision-0.5b" => Self {
                hidden: 896,
                layers: 24,
                heads: 14,
                kv_heads: 2,
                head_dim: 64,
                intermediate: 4864,
                vocabulary: 152_000,
                sections: [32, 0, 0],
                ..three
            },
            "llava-onevision-7b" => onevision(seven),
            "llava-onevision-72b" => onevision(seventy_two),
            _ => return None,
        })
    }

    /// Width of all query heads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads.
    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of packed queries, keys and values.
    pub fn packed_width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }

    /// Parameters of one layer: matrices, biases of queries, keys and values, norms.
    pub fn layer_parameters(&self) -> usize {
        let matrices =
            self.packed_width() * self.hidden + self.hidden * self.query_width() + 3 * self.intermediate * self.hidden;
        matrices + self.packed_width() + 2 * self.hidden
    }

    /// All parameters.
    pub fn parameters(&self) -> usize {
        let tables = if self.tied { 1 } else { 2 };
        self.layers * self.layer_parameters() + tables * self.vocabulary * self.hidden + self.hidden
    }

    /// Parameters that a decode step reads: all but the embedding table, of which it reads a row per token.
    pub fn read_parameters(&self) -> usize {
        self.layers * self.layer_parameters() + self.vocabulary * self.hidden + self.hidden
    }

    /// Keys and values of one token, over all layers.
    pub fn kv_values(&self) -> usize {
        2 * self.layers * self.key_width()
    }

    /// Operations of matrix products for one token, without attention: twice the parameters of matrices.
    pub fn token_operations(&self) -> f64 {
        let layer = self.layer_parameters() - self.packed_width() - 2 * self.hidden;
        2.0 * (self.layers * layer + self.vocabulary * self.hidden) as f64
    }

    /// Operations of attention of one token to `context` others, in all layers: two products.
    pub fn attention_operations(&self, context: usize) -> f64 {
        4.0 * (self.layers * self.query_width()) as f64 * context as f64
    }

    /// Which position axis each frequency turns with.
    pub fn axes(&self) -> Vec<i32> {
        let sections = self.sections.iter().zip(0..);
        sections
            .flat_map(|(count, axis)| std::iter::repeat_n(axis, *count))
            .collect()
    }
}

/// Sizes of a vision tower with its way into the language model.
#[derive(Clone, Debug, PartialEq)]
pub enum VisionShape {
    /// Of Qwen2.5-VL.
    Qwen(QwenVision),
    /// Of LLaVA-OneVision.
    Siglip(SiglipVision),
}

/// Sizes of Qwen2.5-VL's tower: windowed attention with rotary positions, RMS norms, gated MLPs; a merger.
#[derive(Clone, Debug, PartialEq)]
pub struct QwenVision {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Frames of a patch.
    pub frames: usize,
    /// Side of a group of patches that becomes one token.
    pub merge: usize,
    /// Side of an attention window, in tokens.
    pub window: usize,
    /// Blocks that attend over a whole frame.
    pub full: Vec<usize>,
    /// Width of the output: the language model's.
    pub output: usize,
}

/// Sizes of LLaVA-OneVision's tower: SigLIP with learned positions and layer norms; a projector of two layers.
#[derive(Clone, Debug, PartialEq)]
pub struct SiglipVision {
    /// Layers on disk.
    pub depth: usize,
    /// Layers whose output is used.
    pub used: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Side of the square that the tower sees, in patches.
    pub side: usize,
    /// Side of that square, in pixels: what fills no patch is not looked at.
    pub pixels: usize,
    /// Width of the output: the language model's.
    pub output: usize,
}

impl VisionShape {
    /// That of a released model, by one of [`NAMES`].
    pub fn named(name: &str) -> Option<Self> {
        let output = TextShape::named(name)?.hidden;
        Some(if name.starts_with("qwen") {
            Self::Qwen(QwenVision {
                depth: 32,
                hidden: 1280,
                heads: 16,
                // The largest model's tower alone is a little wider.
                intermediate: if name.ends_with("-72b") { 3456 } else { 3420 },
                patch: 14,
                frames: 2,
                merge: 2,
                window: 4,
                full: vec![7, 15, 23, 31],
                output,
            })
        } else {
            Self::Siglip(SiglipVision {
                depth: 26,
                used: 26,
                hidden: 1152,
                heads: 16,
                intermediate: 4304,
                patch: 14,
                side: 27,
                pixels: 384,
                output,
            })
        })
    }

    /// All parameters before the language model.
    pub fn parameters(&self) -> usize {
        match self {
            Self::Qwen(tower) => tower.parameters(),
            Self::Siglip(tower) => tower.parameters(),
        }
    }
}

/// Parameters of a linear layer with a bias.
fn linear(inputs: usize, outputs: usize) -> usize {
    (inputs + 1) * outputs
}

impl QwenVision {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Values of a patch: three colours.
    pub fn patch_values(&self) -> usize {
        3 * self.frames * self.patch * self.patch
    }

    /// Width of the patches that become one token.
    pub fn merged(&self) -> usize {
        self.merge * self.merge * self.hidden
    }

    /// Width of the gated MLP as it is computed, zeros included: 3,420 bf16 numbers are no multiple of 16 bytes.
    pub fn padded(&self) -> usize {
        self.intermediate.next_multiple_of(64)
    }

    /// All parameters: patches without a bias, blocks, the merger.
    pub fn parameters(&self) -> usize {
        let (hidden, merged) = (self.hidden, self.merged());
        let attention = linear(hidden, 3 * hidden) + linear(hidden, hidden);
        let mlp = 2 * linear(hidden, self.intermediate) + linear(self.intermediate, hidden);
        let blocks = self.depth * (2 * hidden + attention + mlp);
        let merger = hidden + linear(merged, merged) + linear(merged, self.output);
        self.patch_values() * hidden + blocks + merger
    }
}

impl SiglipVision {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Values of a patch: three colours.
    pub fn patch_values(&self) -> usize {
        3 * self.patch * self.patch
    }

    /// Patches of a square, each of which is a token.
    pub fn tokens(&self) -> usize {
        self.side * self.side
    }

    /// All parameters on disk: patches, positions, layers, the last norm (which is not used), the projector, the line end.
    pub fn parameters(&self) -> usize {
        let hidden = self.hidden;
        let attention = 4 * linear(hidden, hidden);
        let mlp = linear(hidden, self.intermediate) + linear(self.intermediate, hidden);
        let tower = self.depth * (4 * hidden + attention + mlp) + 2 * hidden;
        let patches = linear(self.patch_values(), hidden) + self.tokens() * hidden;
        patches + tower + linear(hidden, self.output) + linear(self.output, self.output) + self.output
    }
}

impl From<&qwen2_5_vl::VisionConfig> for QwenVision {
    fn from(config: &qwen2_5_vl::VisionConfig) -> Self {
        Self {
            depth: config.depth,
            hidden: config.hidden_size,
            heads: config.num_heads,
            intermediate: config.intermediate_size,
            patch: config.patch_size,
            frames: config.temporal_patch_size,
            merge: config.spatial_merge_size,
            window: config.window_tokens(),
            full: config.fullatt_block_indexes.clone(),
            output: config.out_hidden_size,
        }
    }
}

impl From<&llava_onevision::VisionConfig> for SiglipVision {
    fn from(config: &llava_onevision::VisionConfig) -> Self {
        let tower = &config.tower;
        Self {
            depth: tower.num_hidden_layers,
            used: config.used_layers,
            hidden: tower.hidden_size,
            heads: tower.num_attention_heads,
            intermediate: tower.intermediate_size,
            patch: tower.patch_size,
            side: tower.side(),
            pixels: tower.image_size,
            output: config.text_hidden_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All parameters and those before the language model, as the reference implementation (transformers) counts them.
    #[test]
    fn released_shapes_have_the_parameters_of_the_reference() {
        let counts = [
            ("qwen2.5-vl-3b", 3_754_622_976, 668_684_288),
            ("qwen2.5-vl-7b", 8_292_166_656, 676_550_144),
            ("qwen2.5-vl-72b", 73_410_777_344, 704_573_696),
        ];
        for (name, all, vision) in counts {
            assert_eq!(VisionShape::named(name).unwrap().parameters(), vision, "{name}");
            assert_eq!(TextShape::named(name).unwrap().parameters(), all - vision, "{name}");
        }
    }

    /// The reference's counts of this family are known to four digits.
    #[test]
    fn onevision_shapes_have_the_parameters_of_the_reference() {
        let counts = [
            ("llava-onevision-0.5b", 893.7),
            ("llava-onevision-7b", 8030.8),
            ("llava-onevision-72b", 73181.6),
        ];
        for (name, millions) in counts {
            let all = TextShape::named(name).unwrap().parameters() + VisionShape::named(name).unwrap().parameters();
            assert!((all as f64 / 1e6 - millions).abs() < 0.06, "{name}: {all}");
        }
    }

    #[test]
    fn every_name_has_consistent_shapes() {
        for name in NAMES {
            let text = TextShape::named(name).unwrap();
            assert_eq!(text.sections.iter().sum::<usize>(), text.head_dim / 2, "{name}");
            assert_eq!(text.query_width(), text.hidden, "{name}");
            assert!(text.heads.is_multiple_of(text.kv_heads), "{name}");
            let output = match VisionShape::named(name).unwrap() {
                VisionShape::Qwen(tower) => tower.output,
                VisionShape::Siglip(tower) => tower.output,
            };
            assert_eq!(output, text.hidden, "{name}");
        }
        assert_eq!(TextShape::named("qwen2.5-vl-8b"), None);
        assert_eq!(VisionShape::named("qwen2.5-vl-8b"), None);
    }
}
