//! LLaVA-OneVision: a SigLIP tower over squares, a projector, and squares arranged to rows with line ends.
//!
//! | file | what it is |
//! |---|---|
//! | `config.rs` | sizes of tower, projector and tiling |
//! | `anyres.rs` | geometry of a picture cut into squares |
//! | `arrangement.rs` | which token of which square stands where |
//! | `visual_processor.rs` | pictures and videos to squares |
//! | `vision.rs` | tower and projector |

pub mod anyres;
mod arrangement;
mod config;
mod vision;
mod visual_processor;

pub use arrangement::{Arrangement, Cell};
pub(crate) use config::TEXT;
pub use config::{SiglipConfig, VisionConfig};
pub(crate) use vision::VisionTower;
pub use visual_processor::OneVisionVisualProcessor;

/// The family's chat template, for checkpoints that bring none: pictures, then videos, then text, and no system message of
/// its own.
pub(crate) const CHAT_TEMPLATE: &str = "\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content if part.type in ['image', 'image_url'] %}<image>
{% endfor %}{% for part in message.content if part.type in ['video', 'video_url'] %}<video>
{% endfor %}{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";
