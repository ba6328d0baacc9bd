//! The critic's endpoints and what they share.
//!
//! | file | what |
//! |---|---|
//! | [`compare`](mod@compare) | which of several responses is better |
//! | [`score`](mod@score) | how good a response is |
//! | [`best_of_n`](mod@best_of_n) | many candidates, one of which is chosen |
//! | [`best_of_n_request`], [`best_of_n_answer`] | its body and its answer |
//! | [`report`] | rounds, standings and counts as they are answered |

pub mod best_of_n;
pub mod best_of_n_answer;
pub mod best_of_n_request;
pub mod compare;
pub mod report;
pub mod score;

use serde::Deserialize;
use utoipa::{IntoResponses, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use super::{
    api::Api,
    chat_request::{ChatPart, ImageUrl},
    error::{ApiError, ErrorBody},
};

/// The endpoints.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new()
        .merge(compare::router(state.clone()))
        .merge(score::router(state.clone()))
        .merge(best_of_n::router(state))
}

/// A picture, as a URL or as a part of a message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Picture {
    /// A part of a message.
    Part(ChatPart),
    /// A URL.
    Url(ImageUrl),
}

/// The URLs of a request's pictures, in order.
fn image_urls(image: Option<ImageUrl>, images: Vec<Picture>) -> Result<Vec<String>, ApiError> {
    let listed = images.into_iter().map(|picture| match picture {
        Picture::Part(ChatPart::ImageUrl { image_url }) | Picture::Url(image_url) => Ok(image_url.into_url()),
        Picture::Part(ChatPart::Text { .. }) => Err(ApiError::invalid("images", "images takes no text parts")),
    });
    let one = image.map(|image| Ok(image.into_url()));
    one.into_iter().chain(listed).collect()
}

/// How the endpoints refuse.
#[derive(Debug, IntoResponses)]
#[allow(dead_code, reason = "only its description is used")]
enum Refusals {
    /// A field is wrong; `param` names it.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// An API key is needed.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// The deployment has another purpose.
    #[response(status = 403)]
    Purpose(ErrorBody),
    /// Another model is served.
    #[response(status = 404)]
    Model(ErrorBody),
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// Too many requests wait.
    #[response(status = 429)]
    Overloaded(ErrorBody),
    /// The model failed.
    #[response(status = 500)]
    Failed(ErrorBody),
    /// The model is being loaded, or the replica drains.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

fn yes() -> bool {
    true
}

/// Refuses an empty text.
fn not_empty(param: &'static str, text: &str) -> Result<(), ApiError> {
    if text.trim().is_empty() {
        return Err(ApiError::invalid(param, format!("{param} must not be empty")));
    }
    Ok(())
}

/// Refuses what no text can be drawn from.
fn check_writing(temperature: f32, max_tokens: Option<usize>) -> Result<(), ApiError> {
    if !(temperature >= 0.0 && temperature.is_finite()) {
        let message = format!("temperature {temperature} is not a number of at least 0");
        return Err(ApiError::invalid("temperature", message));
    }
    if max_tokens == Some(0) {
        return Err(ApiError::invalid("max_tokens", "max_tokens is 0"));
    }
    Ok(())
}
