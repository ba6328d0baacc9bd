//! What a request will cost, before anything is computed.

use std::path::PathBuf;

use clap::Args;
use flotilla_model::{Content, Layout, Medium, MediumSize, Message, ModelError, Part};
use serde_json::{Value, json};

use super::{
    arguments::{MediaArguments, ModelArguments},
    bytes, grouped, messages,
};
use crate::error::WorkerError;

/// Arguments of `plan`.
#[derive(Args, Debug)]
pub struct PlanArguments {
    /// Which model; its weights are not read. `--dtype` is the precision that the cache is computed for.
    #[command(flatten)]
    pub model: ModelArguments,
    /// How pictures and videos are read.
    #[command(flatten)]
    pub media: MediaArguments,
    /// File of messages (JSON, OpenAI content parts). Without it, a user's turn of the sizes and text given here.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["images", "video_sizes", "text"])]
    pub messages: Option<PathBuf>,
    /// A picture of this size; may be repeated.
    #[arg(long = "image", value_name = "WIDTHxHEIGHT", value_parser = parse_picture)]
    pub images: Vec<MediumSize>,
    /// A video of so many sampled frames of this size, at 2 frames a second if not said; may be repeated.
    #[arg(long = "video", value_name = "FRAMESxWIDTHxHEIGHT[@FPS]", value_parser = parse_video)]
    pub video_sizes: Vec<MediumSize>,
    /// The user's text.
    #[arg(long, default_value = "")]
    pub text: String,
    /// Tokens that will be generated.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub max_tokens: usize,
    /// Completions that share the prompt.
    #[arg(long, default_value_t = 1)]
    pub n: usize,
    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Prints the plan.
pub fn run(arguments: &PlanArguments) -> Result<(), WorkerError> {
    let processor = arguments.model.processor(&arguments.media)?;
    let config = arguments.model.config()?;
    let (messages, sizes) = match &arguments.messages {
        Some(path) => {
            let conversation = messages::read(path, processor.sampling(), arguments.media.upright)
                .map_err(|error| WorkerError::permanent("failed to read the messages", error))?;
            let sizes = conversation.media.iter().map(Medium::size).collect();
            (conversation.messages, sizes)
        }
        None => described(arguments),
    };
    let plan = processor
        .plan(&messages, &sizes)
        .map_err(|error| WorkerError::permanent("the request cannot be served", error))?;
    let visual = plan.spans.iter().map(|(_, tokens)| *tokens).sum::<usize>();
    let total = plan.ids.len();
    let dtype: candle_core::DType = arguments.model.dtype.into();
    let per_token = config.text.kv_values_per_token() * dtype.size_in_bytes();
    // The prompt is held once for all completions.
    let cache = (total + arguments.n * arguments.max_tokens) * per_token;
    let context = config.text.max_position_embeddings;
    let rows = sizes.iter().zip(&plan.layouts).zip(&plan.spans);
    if arguments.json {
        let media = rows.map(|((size, layout), (start, tokens))| {
            json!({"size": size_text(size), "layout": layout, "start": start, "tokens": tokens})
        });
        let document = json!({
            "prompt_tokens": total, "text_tokens": total - visual, "visual_tokens": visual,
            "media": media.collect::<Vec<Value>>(), "kv_bytes_per_token": per_token, "kv_bytes": cache,
            "context": context, "fits": total + arguments.max_tokens <= context,
        });
        println!("{document:#}");
    } else {
        println!("{:<26} {:<34} {:>8} {:>8}", "PART", "BECOMES", "AT", "TOKENS");
        for ((size, layout), (start, tokens)) in rows {
            println!(
                "{:<26} {:<34} {start:>8} {tokens:>8}",
                size_text(size),
                layout_text(layout)
            );
        }
        println!("{:<26} {:<34} {:>8} {:>8}", "text and template", "", "", total - visual);
        println!("{:<26} {:<34} {:>8} {total:>8}", "prompt", "", "");
        println!(
            "\nkeys and values: {} ({} bytes a token in {}, {} new tokens each for n = {})",
            bytes(cache as u64),
            grouped(per_token as u64),
            arguments.model.dtype,
            arguments.max_tokens,
            arguments.n
        );
        println!("context: {} of {context} tokens", total + arguments.max_tokens);
    }
    if total + arguments.max_tokens > context {
        let too_long = ModelError::TooLong {
            tokens: total + arguments.max_tokens,
            limit: context,
        };
        return Err(WorkerError::permanent("the request cannot be served", too_long));
    }
    Ok(())
}

/// A user's turn of the sizes and text on the command line.
fn described(arguments: &PlanArguments) -> (Vec<Message>, Vec<MediumSize>) {
    let mut parts = vec![Part::Image; arguments.images.len()];
    parts.extend(vec![Part::Video; arguments.video_sizes.len()]);
    parts.push(Part::Text {
        text: arguments.text.clone(),
    });
    let message = Message {
        role: "user".to_owned(),
        content: Content::Parts(parts),
    };
    (
        vec![message],
        [arguments.images.as_slice(), &arguments.video_sizes].concat(),
    )
}

fn size_text(size: &MediumSize) -> String {
    match size {
        MediumSize::Picture { width, height } => format!("picture {width}x{height}"),
        MediumSize::Video {
            frames,
            width,
            height,
            fps,
        } => format!("video {frames}x{width}x{height} @{fps}"),
    }
}

fn layout_text(layout: &Layout) -> String {
    match layout {
        Layout::Patches { grid: [t, h, w], .. } => format!("{t}x{h}x{w} patches"),
        Layout::Anyres { tiles, .. } => format!("the whole and {} tiles", tiles - 1),
        Layout::Square => "one square".to_owned(),
        Layout::Frames { frames } => format!("{frames} frames"),
    }
}

fn parse_picture(text: &str) -> Result<MediumSize, String> {
    match numbers(text)?[..] {
        [width, height] => Ok(MediumSize::Picture { width, height }),
        _ => Err("WIDTHxHEIGHT is expected, for example 640x480".to_owned()),
    }
}

fn parse_video(text: &str) -> Result<MediumSize, String> {
    let (size, fps) = text.split_once('@').unwrap_or((text, "2"));
    let fps = fps.parse::<f64>().ok().filter(|fps| *fps > 0.0 && fps.is_finite());
    match (&numbers(size)?[..], fps) {
        (&[frames, width, height], Some(fps)) => Ok(MediumSize::Video {
            frames,
            width,
            height,
            fps,
        }),
        _ => Err("FRAMESxWIDTHxHEIGHT[@FPS] is expected, for example 32x1280x720@2".to_owned()),
    }
}

fn numbers(text: &str) -> Result<Vec<usize>, String> {
    let number = |part: &str| match part.parse::<usize>() {
        Ok(number @ 1..=1_000_000) => Ok(number),
        _ => Err(format!("{part:?} is not a number from 1 to 1000000")),
    };
    text.split('x').map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        assert_eq!(
            parse_picture("640x480"),
            Ok(MediumSize::Picture {
                width: 640,
                height: 480
            })
        );
        assert_eq!(
            parse_video("32x1280x720@1.5"),
            Ok(MediumSize::Video {
                frames: 32,
                width: 1280,
                height: 720,
                fps: 1.5
            })
        );
        for text in ["640", "640x0", "640xa", "640x480x3"] {
            assert!(parse_picture(text).is_err(), "{text}");
        }
        for text in ["640x480", "8x640x480@0", "8x640x480@"] {
            assert!(parse_video(text).is_err(), "{text}");
        }
    }
}
