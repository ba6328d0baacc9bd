//! Qwen2.5-VL: a windowed vision tower, a patch merger and multimodal rotary positions.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `config.rs` | sizes of the vision tower |
//! | `visual_processor.rs` | pictures and videos to patches |
//! | `positions.rs` | multimodal rotary positions |
//! | `window.rs` | order of patches and attention windows |
//! | `vision.rs` | vision tower and merger |

mod config;
pub mod positions;
mod vision;
mod visual_processor;
pub mod window;

pub(crate) use config::TEXT;
pub use config::VisionConfig;
pub(crate) use vision::VisionTower;
pub use visual_processor::{FrameBudget, QwenVisualProcessor, TimeStep, smart_resize};

/// The family's chat template, for checkpoints that bring none.
pub(crate) const CHAT_TEMPLATE: &str = "\
{%- if messages and messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type in ['video', 'video_url'] %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.text is defined %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";
