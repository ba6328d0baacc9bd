//! Server-sent events.

use std::{convert::Infallible, pin::pin, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use futures::{Stream, StreamExt as _};
use serde::Serialize;
use utoipa::ToSchema;

/// One event of a stream as a client reads it.
#[derive(Debug, ToSchema)]
pub struct ServerSentEvent {
    /// What kind of event it is, where a stream has several.
    pub event: Option<String>,
    /// JSON on one line: a piece of the answer, or an error in the shape of all errors. `[DONE]` ends a stream of completions.
    pub data: String,
}

/// What ends the streams of this API.
pub const DONE: &str = "data: [DONE]\n\n";
/// A comment, which clients skip: proxies do not close a connection on which it comes from time to time.
const STILL_THERE: &str = ": still there\n\n";
/// Silence after which the comment is sent.
const SILENCE: Duration = Duration::from_secs(15);

/// One event with JSON as its data. JSON escapes line ends, so that its text is one line whatever is in it.
pub fn event(data: &impl Serialize) -> String {
    let json = serde_json::to_string(data).unwrap_or_else(|error| {
        let message = format!("failed to encode an event: {error}");
        serde_json::json!({"error": {"message": message, "type": "server_error", "param": null, "code": "encoding"}})
            .to_string()
    });
    format!("data: {json}\n\n")
}

/// An answer of events as they come. Dropping it, as a client does that hangs up, drops the stream.
pub fn response(events: impl Stream<Item = String> + Send + 'static) -> Response {
    let body = async_stream::stream! {
        let mut events = pin!(events);
        loop {
            match tokio::time::timeout(SILENCE, events.next()).await {
                Ok(Some(event)) => yield Ok::<_, Infallible>(event),
                Ok(None) => return,
                Err(_) => yield Ok(STILL_THERE.to_owned()),
            }
        }
    };
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// The data of the events in a text, by the rules of the HTML standard.
    fn read(text: &str) -> Vec<String> {
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut events = Vec::new();
        let mut data: Vec<&str> = Vec::new();
        for line in text.split('\n') {
            match line.split_once(':') {
                None if line.is_empty() && !data.is_empty() => events.push(std::mem::take(&mut data).join("\n")),
                Some(("data", value)) => data.push(value.strip_prefix(' ').unwrap_or(value)),
                _ => {}
            }
        }
        events
    }

    proptest! {
        #[test]
        fn any_text_survives(texts in prop::collection::vec("(\\PC|[\\n\\r\u{0}\u{2028}\u{FEFF}\"\\\\:])*", 1..5)) {
            let sent: String = texts.iter().map(|text| event(&json!({"text": text}))).collect();
            let received = read(&format!("{STILL_THERE}{sent}{DONE}"));
            prop_assert_eq!(received.len(), texts.len() + 1);
            for (event, text) in received.iter().zip(&texts) {
                let value: Value = serde_json::from_str(event).expect("JSON");
                prop_assert_eq!(&value["text"], text);
            }
            prop_assert_eq!(received.last().map(String::as_str), Some("[DONE]"));
        }
    }
}
