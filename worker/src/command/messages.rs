//! A file of messages in the form of OpenAI's chat completions, with its pictures and videos.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flotilla_model::{Content, ImageLimits, Medium, Message, ModelError, Part, Picture, Sampling, Video, VideoLimits};
use serde_json::Value;

/// Largest file of messages, in bytes: data URLs may stand in it.
const MAX_BYTES: u64 = 256 << 20;
/// Frames per second of a list of frames that does not say.
const DEFAULT_FPS: f64 = 2.0;
/// Roles that templates know.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// What one picture may cost: a file on the own disk is trusted with more than a request.
const LIMITS: ImageLimits = ImageLimits {
    bytes: 256 << 20,
    time: Duration::from_secs(60),
    ..ImageLimits::DEFAULT
};

/// Why a file of messages cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MessagesError {
    /// A file cannot be read.
    #[error("{place}cannot read {}: {source}", path.display())]
    Read {
        /// Where it is named.
        place: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no JSON.
    #[error("{} is not JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The JSON is no list of messages.
    #[error("{place}: {problem}")]
    Invalid {
        /// Where.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// A picture or video cannot be used.
    #[error("{place}: {source}")]
    Medium {
        /// Where.
        place: String,
        /// Why.
        source: ModelError,
    },
}

/// Messages, and what their image and video parts show, in order.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// What they show.
    pub media: Vec<Medium>,
}

/// Reads a conversation; files are named relative to its own, or to the working directory. `sampling` picks the frames of video
/// files; `upright` turns pictures by their EXIF orientation.
pub fn read(path: &Path, sampling: Sampling, upright: bool) -> Result<Conversation, MessagesError> {
    let bytes = read_bounded(path, MAX_BYTES, "")?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|source| MessagesError::Json {
        path: path.to_owned(),
        source,
    })?;
    let root = path.parent().unwrap_or_else(|| Path::new("."));
    let reader = Reader {
        root,
        sampling,
        upright,
    };
    reader.conversation(&value)
}

struct Reader<'a> {
    root: &'a Path,
    sampling: Sampling,
    upright: bool,
}

impl Reader<'_> {
    fn conversation(&self, value: &Value) -> Result<Conversation, MessagesError> {
        // A whole request body is taken as well as its messages.
        let list = value.get("messages").unwrap_or(value);
        let Some(list) = list.as_array() else {
            return Err(invalid("messages", "not a list of messages"));
        };
        let mut conversation = Conversation::default();
        for (index, message) in list.iter().enumerate() {
            let place = format!("messages[{index}]");
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            if !ROLES.contains(&role) {
                return Err(invalid(
                    &place,
                    format!("role {role:?} is none of {}", ROLES.join(", ")),
                ));
            }
            let content = match message.get("content") {
                Some(Value::String(text)) => Content::Text(text.clone()),
                Some(Value::Array(parts)) => {
                    let mut read = Vec::with_capacity(parts.len());
                    for (number, part) in parts.iter().enumerate() {
                        let place = format!("{place}.content[{number}]");
                        read.push(self.part(part, &place, &mut conversation.media)?);
                    }
                    Content::Parts(read)
                }
                _ => return Err(invalid(&place, "content is neither a text nor a list of parts")),
            };
            conversation.messages.push(Message {
                role: role.to_owned(),
                content,
            });
        }
        if conversation.messages.is_empty() {
            return Err(invalid("messages", "the list is empty"));
        }
        Ok(conversation)
    }

    fn part(&self, part: &Value, place: &str, media: &mut Vec<Medium>) -> Result<Part, MessagesError> {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
        let text_of = |key: &str| {
            let value = part.get(key);
            let value = value
                .map(|value| value.get("url").unwrap_or(value))
                .and_then(Value::as_str);
            value.ok_or_else(|| invalid(place, format!("a part of type {kind:?} has its {key:?} as text")))
        };
        match kind {
            "text" => Ok(Part::Text {
                text: text_of("text")?.to_owned(),
            }),
            "image_url" | "image" => {
                let bytes = self.bytes(text_of(kind)?, place, LIMITS.bytes as u64)?;
                let decode = if self.upright {
                    Picture::decode_upright
                } else {
                    Picture::decode
                };
                let picture = decode(&bytes, LIMITS).map_err(medium(place))?;
                media.push(Medium::Picture(picture));
                Ok(Part::Image)
            }
            "video_url" | "video" => {
                media.push(Medium::Video(self.video(part, kind, place)?));
                Ok(Part::Video)
            }
            _ => Err(invalid(
                place,
                format!("type {kind:?} is none of text, image_url, image, video, video_url"),
            )),
        }
    }

    fn video(&self, part: &Value, kind: &str, place: &str) -> Result<Video, MessagesError> {
        let limits = VideoLimits {
            frame: LIMITS,
            ..VideoLimits::DEFAULT
        };
        let fps = match part.get("fps") {
            None => DEFAULT_FPS,
            Some(fps) => {
                let rate = fps.as_f64().filter(|rate| *rate > 0.0 && rate.is_finite());
                rate.ok_or_else(|| invalid(place, format!("fps {fps} is not a positive number")))?
            }
        };
        let source = part.get(kind).map(|value| value.get("url").unwrap_or(value));
        match source {
            Some(Value::Array(frames)) => {
                if frames.len() > limits.frames {
                    let problem = format!("{} frames, the limit is {}", frames.len(), limits.frames);
                    return Err(invalid(place, problem));
                }
                let mut encoded = Vec::with_capacity(frames.len());
                let mut left = limits.bytes as u64;
                for frame in frames {
                    let name = frame.as_str().or_else(|| frame.get("url")?.as_str());
                    let name = name.ok_or_else(|| invalid(place, "a frame is not named by a text"))?;
                    let bytes = self.bytes(name, place, left)?;
                    left = left.saturating_sub(bytes.len() as u64);
                    encoded.push(bytes);
                }
                Video::decode_frames(&encoded, fps, &limits).map_err(medium(place))
            }
            Some(Value::String(name)) => {
                let bytes = self.bytes(name, place, limits.bytes as u64)?;
                Video::decode(&bytes, self.sampling, &limits).map_err(medium(place))
            }
            _ => Err(invalid(
                place,
                format!("a part of type {kind:?} has in {kind:?} a list of frames or the name of an animation"),
            )),
        }
    }

    /// The bytes that a data URL holds or a relative path names.
    fn bytes(&self, url: &str, place: &str, limit: u64) -> Result<Vec<u8>, MessagesError> {
        if let Some(rest) = url.strip_prefix("data:") {
            let payload = rest.split_once(";base64,").map(|(_, payload)| payload);
            let payload = payload.ok_or_else(|| invalid(place, "only base64 data URLs are supported"))?;
            return STANDARD
                .decode(payload)
                .map_err(|error| invalid(place, format!("the data URL is not valid base64: {error}")));
        }
        if let Some((scheme, _)) = url.split_once("://").filter(|(scheme, _)| *scheme != "file") {
            return Err(invalid(
                place,
                format!("{scheme}:// is not fetched here: save the file and name its path"),
            ));
        }
        let name = Path::new(url.strip_prefix("file://").unwrap_or(url));
        let beside = self.root.join(name);
        // Beside the messages first, as links in a document; then as the shell that runs the command means it.
        let path = if beside.exists() || !name.exists() {
            &beside
        } else {
            name
        };
        read_bounded(path, limit, &format!("{place}: "))
    }
}

/// Reads a file of at most `limit` bytes.
fn read_bounded(path: &Path, limit: u64, place: &str) -> Result<Vec<u8>, MessagesError> {
    let failed = |source| MessagesError::Read {
        place: place.to_owned(),
        path: path.to_owned(),
        source,
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > limit {
        let problem = format!("{} has {length} bytes, the limit is {limit}", path.display());
        return Err(invalid(place.trim_end_matches(": "), problem));
    }
    std::fs::read(path).map_err(failed)
}

fn invalid(place: &str, problem: impl Into<String>) -> MessagesError {
    MessagesError::Invalid {
        place: place.to_owned(),
        problem: problem.into(),
    }
}

fn medium(place: &str) -> impl FnOnce(ModelError) -> MessagesError + '_ {
    move |source| MessagesError::Medium {
        place: place.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read_value(value: &Value) -> Result<Conversation, MessagesError> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("messages.json");
        image::GrayImage::from_pixel(3, 2, image::Luma([9]))
            .save(directory.path().join("a.png"))
            .expect("a picture");
        std::fs::write(&path, value.to_string()).expect("writes");
        read(&path, Sampling::All, false)
    }

    fn refusal(value: &Value) -> String {
        read_value(value).expect_err("refused").to_string()
    }

    #[test]
    fn text_pictures_and_frames_are_read_in_order() {
        let conversation = read_value(&json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "?"},
                {"type": "video", "video": ["a.png", "a.png"], "fps": 4.0}
            ]}
        ]));
        let conversation = conversation.expect("reads");
        assert_eq!(conversation.messages.len(), 2);
        let Content::Parts(parts) = &conversation.messages[1].content else {
            panic!("no parts")
        };
        assert_eq!(parts[0], Part::Image);
        assert_eq!(parts[2], Part::Video);
        assert!(matches!(&conversation.media[0], Medium::Picture(picture) if picture.width == 3));
        assert!(matches!(&conversation.media[1], Medium::Video(video) if video.frames.len() == 2 && video.fps == 4.0));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let of = |part: Value| refusal(&json!([{"role": "user", "content": [part]}]));
        assert_eq!(refusal(&json!({"a": 1})), "messages: not a list of messages");
        assert_eq!(refusal(&json!([])), "messages: the list is empty");
        assert!(refusal(&json!([{"role": "tool", "content": ""}])).contains("messages[0]: role \"tool\""));
        assert!(of(json!({"type": "audio"})).contains("messages[0].content[0]: type \"audio\""));
        assert!(of(json!({"type": "image_url", "image_url": {"url": "b.png"}})).contains("cannot read"));
        assert!(
            of(json!({"type": "image_url", "image_url": {"url": "https://x/a.png"}}))
                .contains("https:// is not fetched")
        );
        assert!(
            of(json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}))
                .contains("not valid base64")
        );
        assert!(of(json!({"type": "image_url", "image_url": {"url": "messages.json"}})).contains("content[0]: image:"));
        assert!(of(json!({"type": "video", "video": []})).contains("no frame"));
        assert!(of(json!({"type": "video", "video": ["a.png"], "fps": 0})).contains("fps 0 is not a positive number"));
    }

    proptest! {
        #[test]
        fn no_json_panics(text in "\\PC{0,60}", key in "(type|role|content|image_url|video|fps)") {
            let value = json!([{"role": "user", "content": [{"type": "video", (key): text}]}]);
            let _ = read_value(&value);
        }
    }
}
