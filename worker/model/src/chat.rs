//! Messages to prompt text by the checkpoint's own chat template.

use std::path::Path;

use minijinja::{Environment, ErrorKind, context, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ModelError, Result, tokenizer::optional_json};

/// One turn of a conversation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: Content,
}

impl Message {
    /// A turn of the user: these many images, then the text.
    pub fn user(images: usize, text: &str) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.push(Part::Text { text: text.to_owned() });
        Self {
            role: "user".into(),
            content: Content::Parts(parts),
        }
    }
}

/// Text, or text and images in order.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// Text alone.
    Text(String),
    /// Parts in order.
    Parts(Vec<Part>),
}

/// A piece of a message.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// The place of an image; the image itself travels beside the messages, in the same order.
    Image,
    /// The place of a video, likewise.
    Video,
}

impl Content {
    /// Image and video parts in order.
    pub fn media(&self) -> impl Iterator<Item = &Part> {
        let parts = match self {
            Self::Text(_) => &[],
            Self::Parts(parts) => parts.as_slice(),
        };
        parts.iter().filter(|part| matches!(part, Part::Image | Part::Video))
    }

    /// The same content in the form that a template reads.
    fn in_form(&self, form: Form) -> Self {
        match (form, self) {
            (Form::Parts, Self::Text(text)) => Self::Parts(vec![Part::Text { text: text.clone() }]),
            (Form::Text, Self::Parts(parts)) if self.media().next().is_none() => {
                let texts = parts.iter().filter_map(|part| match part {
                    Part::Text { text } => Some(text.as_str()),
                    Part::Image | Part::Video => None,
                });
                Self::Text(texts.collect())
            }
            _ => self.clone(),
        }
    }
}

/// In which form a template reads the content of a message. Templates for text alone print a list of parts as it is, and
/// those that walk over parts print nothing of a text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    Either,
    Parts,
    Text,
}

/// A parsed template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    form: Form,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of a checkpoint: `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`, whichever
    /// is there first; else the family's own, `built_in`.
    pub fn load(dir: &Path, built_in: &str) -> Result<Self> {
        let jinja = dir.join("chat_template.jinja");
        if jinja.exists() {
            return Self::new(&std::fs::read_to_string(&jinja).map_err(ModelError::file(&jinja))?);
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            let json = optional_json(&dir.join(file))?;
            if let Some(source) = json
                .as_ref()
                .and_then(|json| template_source(json.get("chat_template")?))
            {
                return Self::new(source);
            }
        }
        Self::new(built_in)
    }

    /// Parses a Jinja template as `transformers` does: blocks trimmed, `raise_exception` and `strftime_now` defined,
    /// `{% generation %}` blocks transparent.
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(template_error)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", |format: String| {
            jiff::Zoned::now().strftime(&format).to_string()
        });
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(template_error)?;
        let mut template = Self {
            environment,
            form: Form::Either,
        };
        template.form = template.probe();
        Ok(template)
    }

    /// Finds the form by rendering a word in both.
    fn probe(&self) -> Form {
        const WORD: &str = "flotilla-probe";
        let shows = |content: Content| {
            let message = Message {
                role: "user".into(),
                content,
            };
            let text = self.render(&[message], false).unwrap_or_default();
            text.contains(WORD) && !text.contains("\"text\"") && !text.contains("'text'")
        };
        let text = shows(Content::Text(WORD.into()));
        let parts = shows(Content::Parts(vec![Part::Text { text: WORD.into() }]));
        match (text, parts) {
            (false, true) => Form::Parts,
            (true, false) => Form::Text,
            _ => Form::Either,
        }
    }

    /// The prompt text of a conversation; with `generation_prompt` the assistant's turn is opened at the end.
    pub fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        let messages = messages.iter().map(|message| Message {
            role: message.role.clone(),
            content: message.content.in_form(self.form),
        });
        let messages = messages.collect::<Vec<_>>();
        let values = context! { messages => Serde(&messages), add_generation_prompt => generation_prompt, add_vision_id => false };
        template.render(values).map_err(template_error)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "passed to map_err")]
fn template_error(error: minijinja::Error) -> ModelError {
    ModelError::Template(format!("{error:#}"))
}

/// One template, or the one named `default` of a list.
fn template_source(value: &Value) -> Option<&str> {
    if let Some(source) = value.as_str() {
        return Some(source);
    }
    let named = value.as_array()?.iter().find(|entry| entry["name"] == "default")?;
    named["template"].as_str()
}

/// Replaces the tags that mark the assistant's tokens for training by an `if` that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + length + 2];
        let inner = tag[2..tag.len() - 2]
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        output.push_str(&rest[..start]);
        match inner {
            "generation" => output.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => output.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => output.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_template_writes_the_family_format() {
        let dir = tempfile::tempdir().unwrap();
        let template = ChatTemplate::load(dir.path(), crate::qwen2_5_vl::CHAT_TEMPLATE).unwrap();
        let text = template.render(&[Message::user(1, "What?")], true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n\
             <|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_system_message_replaces_the_default_one() {
        let template = ChatTemplate::new(crate::qwen2_5_vl::CHAT_TEMPLATE).unwrap();
        let system = Message {
            role: "system".into(),
            content: Content::Text("Be brief.".into()),
        };
        let text = template.render(&[system], false).unwrap();
        assert_eq!(text, "<|im_start|>system\nBe brief.<|im_end|>\n");
    }

    #[test]
    fn generation_blocks_are_transparent() {
        let source =
            "{% for m in messages %}{%- generation -%} {{ m.content.strip() }} {%- endgeneration %}{% endfor %}";
        let message = Message {
            role: "user".into(),
            content: Content::Text(" a ".into()),
        };
        assert_eq!(
            ChatTemplate::new(source).unwrap().render(&[message], false).unwrap(),
            "a"
        );
    }

    #[test]
    fn content_reaches_templates_that_read_text_alone_or_parts_alone() {
        let text = Message {
            role: "user".into(),
            content: Content::Text("a".into()),
        };
        let of_parts = "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}\
                        {% endfor %}{% endfor %}";
        let of_text = "{% for m in messages %}{{ m.content }}{% endfor %}";
        for source in [of_parts, of_text] {
            let template = ChatTemplate::new(source).unwrap();
            for message in [text.clone(), Message::user(0, "a")] {
                assert_eq!(template.render(&[message], false).unwrap(), "a", "{source}");
            }
        }
    }

    #[test]
    fn pictures_of_the_onevision_format_stand_before_the_text() {
        let template = ChatTemplate::new(crate::llava_onevision::CHAT_TEMPLATE).unwrap();
        let parts = vec![Part::Text { text: "What?".into() }, Part::Video, Part::Image];
        let message = Message {
            role: "user".into(),
            content: Content::Parts(parts),
        };
        assert_eq!(
            template.render(&[message], true).unwrap(),
            "<|im_start|>user\n<image>\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn what_a_template_raises_is_reported() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}").unwrap();
        let error = template.render(&[], false).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn the_checkpoint_template_wins_over_the_built_in() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"chat_template": [{"name": "default", "template": "T{{ messages|length }}"}]}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let text = ChatTemplate::load(dir.path(), crate::qwen2_5_vl::CHAT_TEMPLATE)
            .unwrap()
            .render(&[Message::user(0, "a")], false)
            .unwrap();
        assert_eq!(text, "T1");
    }
}
