//! How the names of a checkpoint's tensors become those of the hub: every release of the libraries that write them moved a
//! few modules, and the files of all of them are still around.
//!
//! The hub's names are what the families ask for and what is written. Sources: `_checkpoint_conversion_mapping` of
//! `modeling_qwen2_5_vl.py` and `modeling_llava_onevision.py` in transformers 4.57, and the conversion script of
//! LLaVA-OneVision for the names of its authors.

/// The names of one family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Names {
    /// Prefix as found, prefix on the hub: the first that fits is replaced, and a name that none fits is the hub's.
    pub prefixes: &'static [(&'static str, &'static str)],
    /// Tensors that may be there although nothing asks for them, by their hub names.
    pub ignored: &'static [Ignored],
    /// Prefixes of parameters that may be absent; they then have their initial values. Only parameters whose initial
    /// values are constants can be.
    pub optional: &'static [&'static str],
}

/// Tensors that may be there although nothing asks for them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ignored {
    /// The tensor of this name.
    Name(&'static str),
    /// Tensors whose names begin so.
    Prefix(&'static str),
    /// Tensors whose names end so.
    Suffix(&'static str),
    /// The one layer after the last that is asked for, of the stack with this prefix.
    LayerAfterLast(&'static str),
}

/// A rotary table that some releases stored beside the weights.
const INVERSE_FREQUENCIES: Ignored = Ignored::Suffix(".inv_freq");

impl Names {
    /// Qwen2.5-VL: `visual.`, `model.`, `lm_head.weight` on the hub.
    pub const QWEN2_5_VL: Self = Self {
        prefixes: &[
            ("model.visual.", "visual."),
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("language_model.", "model."),
        ],
        // A head in a checkpoint whose head is tied repeats the embedding.
        ignored: &[INVERSE_FREQUENCIES, Ignored::Name("lm_head.weight")],
        optional: &[],
    };

    /// LLaVA-OneVision: `vision_tower.`, `multi_modal_projector.`, `image_newline`, `language_model.` on the hub.
    pub const LLAVA_ONEVISION: Self = Self {
        prefixes: &[
            ("model.vision_tower.vision_tower.", "vision_tower."),
            ("model.vision_tower.", "vision_tower."),
            ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
            ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.image_newline", "image_newline"),
            ("model.language_model.", "language_model.model."),
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("language_model.model.", "language_model.model."),
            ("language_model.lm_head.", "language_model.lm_head."),
            ("language_model.", "language_model.model."),
        ],
        ignored: &[
            INVERSE_FREQUENCIES,
            Ignored::Suffix(".position_ids"),
            Ignored::Name("language_model.lm_head.weight"),
            // The model reads the last layer but one; its authors' files hold the last one too, and the pooling head.
            Ignored::LayerAfterLast("vision_tower.vision_model.encoder.layers."),
            Ignored::Prefix("vision_tower.vision_model.head."),
        ],
        // The feature is taken before it: files that leave it out lose nothing.
        optional: &["vision_tower.vision_model.post_layernorm."],
    };

    /// The hub's name of a tensor.
    pub fn hub(&self, found: &str) -> String {
        let replaced = self.prefixes.iter().find_map(|(prefix, hub)| {
            let rest = found.strip_prefix(prefix)?;
            Some(format!("{hub}{rest}"))
        });
        replaced.unwrap_or_else(|| found.to_owned())
    }

    /// Whether a tensor may be there although none of `asked` (sorted) is it, both by hub names.
    pub fn ignores(&self, name: &str, asked: &[&str]) -> bool {
        self.ignored.iter().any(|ignored| match ignored {
            Ignored::Name(exact) => name == *exact,
            Ignored::Prefix(prefix) => name.starts_with(prefix),
            Ignored::Suffix(suffix) => name.ends_with(suffix),
            Ignored::LayerAfterLast(stack) => layer(name, stack).is_some_and(|number| {
                let last = asked.iter().filter_map(|name| layer(name, stack)).max();
                last.is_some_and(|last| number == last + 1)
            }),
        })
    }

    /// Whether a parameter may be absent.
    pub fn is_optional(&self, name: &str) -> bool {
        self.optional.iter().any(|prefix| name.starts_with(prefix))
    }
}

/// The number of the layer that a tensor belongs to.
fn layer(name: &str, stack: &str) -> Option<u32> {
    name.strip_prefix(stack)?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_generation_of_qwen_names_becomes_the_hubs() {
        let norm = [
            "model.norm.weight",
            "model.language_model.norm.weight",
            "language_model.model.norm.weight",
            "language_model.norm.weight",
        ];
        for found in norm {
            assert_eq!(Names::QWEN2_5_VL.hub(found), "model.norm.weight", "{found}");
        }
        for found in ["visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"] {
            assert_eq!(Names::QWEN2_5_VL.hub(found), "visual.merger.ln_q.weight", "{found}");
        }
        for found in ["lm_head.weight", "language_model.lm_head.weight"] {
            assert_eq!(Names::QWEN2_5_VL.hub(found), "lm_head.weight", "{found}");
        }
    }

    #[test]
    fn every_generation_of_onevision_names_becomes_the_hubs() {
        let cases: [(&str, &[&str]); 6] = [
            ("image_newline", &["image_newline", "model.image_newline"]),
            (
                "multi_modal_projector.linear_2.bias",
                &[
                    "multi_modal_projector.linear_2.bias",
                    "model.multi_modal_projector.linear_2.bias",
                    "model.mm_projector.2.bias",
                ],
            ),
            (
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                &[
                    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                ],
            ),
            (
                "language_model.model.layers.3.mlp.up_proj.weight",
                &[
                    "language_model.model.layers.3.mlp.up_proj.weight",
                    "model.language_model.layers.3.mlp.up_proj.weight",
                    "model.layers.3.mlp.up_proj.weight",
                    "language_model.layers.3.mlp.up_proj.weight",
                ],
            ),
            (
                "language_model.model.embed_tokens.weight",
                &["model.embed_tokens.weight", "model.language_model.embed_tokens.weight"],
            ),
            (
                "language_model.lm_head.weight",
                &["language_model.lm_head.weight", "lm_head.weight"],
            ),
        ];
        for (hub, found) in cases {
            for found in found {
                assert_eq!(Names::LLAVA_ONEVISION.hub(found), hub, "{found}");
            }
        }
    }

    #[test]
    fn the_hubs_names_stay_as_they_are() {
        for names in [Names::QWEN2_5_VL, Names::LLAVA_ONEVISION] {
            for (_, hub) in names.prefixes {
                let name = format!("{hub}x.weight");
                assert_eq!(names.hub(&name), name);
            }
        }
    }

    #[test]
    fn only_the_layer_after_the_last_is_ignored() {
        let name = |layer: u32| format!("vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.bias");
        let asked = [name(0), name(1)];
        let asked = asked.iter().map(String::as_str).collect::<Vec<_>>();
        assert!(Names::LLAVA_ONEVISION.ignores(&name(2), &asked));
        assert!(!Names::LLAVA_ONEVISION.ignores(&name(3), &asked));
        assert!(!Names::LLAVA_ONEVISION.ignores(&name(0), &[]));
        assert!(Names::LLAVA_ONEVISION.ignores("vision_tower.vision_model.head.probe", &asked));
        assert!(!Names::LLAVA_ONEVISION.ignores("vision_tower.vision_model.post_layernorm.bias", &asked));
        assert!(Names::QWEN2_5_VL.ignores("visual.rotary_pos_emb.inv_freq", &[]));
    }
}
