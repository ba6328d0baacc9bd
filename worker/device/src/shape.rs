//! Sizes of a language model.

use flotilla_model::text::TextConfig;

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
