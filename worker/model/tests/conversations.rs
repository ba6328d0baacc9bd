//! Properties of whole conversations: what is planned is what is made, and nothing panics.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::PathBuf;

use flotilla_model::{Content, LoadOptions, Medium, Message, ModelError, Part, Pass, Picture, Processor, Video, Vlm};
use proptest::prelude::*;

const FAMILIES: [&str; 2] = ["tiny-qwen2.5-vl", "tiny-llava-onevision"];

fn checkpoint(name: &str) -> PathBuf {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures");
    fixtures.join(name)
}

/// A part of a message with what it shows.
#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    Picture(Picture),
    Video(Video),
}

fn picture() -> impl Strategy<Value = Picture> {
    (1usize..260, 1usize..260).prop_map(|(width, height)| Picture {
        width,
        height,
        rgb: (0..width * height * 3).map(|i| (i * 31 % 256) as u8).collect(),
    })
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        "\\PC{0,12}".prop_map(Piece::Text),
        picture().prop_map(Piece::Picture),
        (picture(), 1usize..6, prop_oneof![Just(0.5), Just(2.0), Just(24.0)]).prop_map(|(frame, frames, fps)| {
            Piece::Video(Video {
                frames: vec![frame; frames],
                fps,
            })
        }),
    ]
}

fn conversation(turns: Vec<(bool, Vec<Piece>)>) -> (Vec<Message>, Vec<Medium>) {
    let mut media = Vec::new();
    let mut messages = Vec::new();
    for (assistant, pieces) in turns {
        let parts = pieces.into_iter().map(|piece| match piece {
            Piece::Text(text) => Part::Text { text },
            Piece::Picture(picture) => {
                media.push(Medium::Picture(picture));
                Part::Image
            }
            Piece::Video(video) => {
                media.push(Medium::Video(video));
                Part::Video
            }
        });
        messages.push(Message {
            role: if assistant { "assistant" } else { "user" }.to_owned(),
            content: Content::Parts(parts.collect()),
        });
    }
    (messages, media)
}

fn turns() -> impl Strategy<Value = Vec<(bool, Vec<Piece>)>> {
    prop::collection::vec((any::<bool>(), prop::collection::vec(piece(), 0..4)), 1..3)
}

/// The planned tokens are those of the prompt, and the tower makes as many features as there are placeholders.
fn planned_is_made(family: &str, messages: &[Message], media: &[Medium]) -> Result<(), ModelError> {
    let processor = Processor::load(&checkpoint(family))?;
    let model = Vlm::load(&checkpoint(family), &LoadOptions::default())?;
    let sizes = media.iter().map(Medium::size).collect::<Vec<_>>();
    let plan = processor.plan(messages, &sizes)?;
    let prompt = processor.prepare(messages, media, plan.ids.len())?;
    assert_eq!((&prompt.ids, &prompt.spans), (&plan.ids, &plan.spans));
    let layouts = prompt.visuals.iter().map(|visual| visual.layout).collect::<Vec<_>>();
    assert_eq!(layouts, plan.layouts);
    assert_eq!(prompt.positions.len(), prompt.ids.len());
    let features = model.encode(&prompt.visuals.iter().collect::<Vec<_>>(), Pass::Infer)?;
    for (features, (_, tokens)) in features.iter().zip(&prompt.spans) {
        assert_eq!(features.dim(0).unwrap(), *tokens);
    }
    assert!(matches!(
        processor.prepare(messages, media, plan.ids.len() - 1),
        Err(ModelError::TooLong { .. })
    ));
    Ok(())
}

#[test]
fn a_picture_too_narrow_for_a_column_of_tokens_still_has_its_lines() {
    for (width, height) in [(1, 150), (150, 1)] {
        let picture = Picture {
            width,
            height,
            rgb: vec![9; width * height * 3],
        };
        let media = [Medium::Picture(picture)];
        planned_is_made("tiny-llava-onevision", &[Message::user(1, "?")], &media).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_conversation_is_made_as_planned_or_refused_with_a_typed_error(turns in turns()) {
        let (messages, media) = conversation(turns);
        for family in FAMILIES {
            match planned_is_made(family, &messages, &media) {
                Ok(()) => {}
                // A strip of pixels, or a control token that random text happens to spell.
                Err(ModelError::Image(_) | ModelError::Video(_) | ModelError::Template(_)) => {}
                Err(other) => prop_assert!(false, "{family}: {other}"),
            }
        }
    }
}
