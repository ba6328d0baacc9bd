//! `POST /v1/critic/score`: how good a response about a picture is, with the critic's distribution over the scores.

use std::sync::Arc;

use axum::{Json, extract::State};
use flotilla_api::role::Purpose;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Picture, Refusals, check_writing, image_urls, not_empty,
    report::{ScoreProbability, probabilities},
};
use crate::{
    critic::{
        judge::{Case, Judge, Manner},
        scale::Scale,
    },
    http::{
        answer::{Finish, Usage},
        api::{Api, Body, check_model},
        chat_request::ImageUrl,
        error::ApiError,
    },
    prompt::critic::Shows,
    service::Service,
};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(score)).with_state(state)
}

/// What a client may send.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ScoreRequest {
    /// Name of the served model; whatever is served if absent.
    model: Option<String>,
    /// One picture.
    image: Option<ImageUrl>,
    /// Several pictures.
    #[serde(default)]
    images: Vec<Picture>,
    /// What was asked.
    #[schema(min_length = 1, example = "What digit is this?")]
    question: String,
    /// What is scored.
    #[schema(min_length = 1, example = "7")]
    response: String,
    /// The scores; those of the template if absent, which are 1 to 10 by default.
    range: Option<Range>,
    /// Let the critic write its thoughts before it scores. The distribution is read after them.
    #[serde(default)]
    think: bool,
    /// Name of a template that shows one response; `critic-score` if absent.
    template: Option<String>,
    /// Of the thoughts; 0 takes the most likely ones.
    #[serde(default)]
    #[schema(minimum = 0)]
    temperature: f32,
    /// Of the thoughts.
    #[serde(default)]
    seed: u64,
    /// Longest thoughts, in tokens; what the context leaves if absent.
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
}

/// Equally spaced scores, at most 101.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Range {
    /// The least score.
    #[schema(example = 1)]
    minimum: f64,
    /// The best score.
    #[schema(example = 10)]
    maximum: f64,
    /// Between two scores.
    #[serde(default = "one")]
    #[schema(exclusive_minimum = 0, example = 1)]
    step: f64,
}

fn one() -> f64 {
    1.0
}

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
struct Score {
    /// Names the answer.
    id: String,
    #[schema(value_type = String, example = "critic.score")]
    object: &'static str,
    /// Name of the model.
    model: String,
    /// The expected score.
    score: f64,
    /// The most likely score.
    mode: Option<f64>,
    /// How undecided the critic is (nats): 0 if it gives one score all the probability, ln n if n are equally likely.
    entropy: f64,
    /// How likely each score is, given that the critic names one of the scale.
    distribution: Vec<ScoreProbability>,
    /// Probability that the critic names any score of the scale. Little of it means that the template does not lead to
    /// scores.
    mass: f64,
    /// The scores.
    range: Range,
    /// Why, in the critic's words; null unless it was to think.
    rationale: Option<String>,
    /// All that the critic wrote before the box; empty unless it was to think.
    raw: String,
    /// Why its thoughts ended; null unless it was to think.
    finish_reason: Option<Finish>,
    usage: Usage,
}

/// Scores a response.
///
/// The score is read from the probabilities that the critic gives to the labels of the scale in a box that is opened for
/// it, all of them, so it needs no parsing and has no noise of sampling.
#[utoipa::path(
    post,
    path = "/v1/critic/score",
    tag = "critic",
    request_body = ScoreRequest,
    responses((status = 200, description = "The score and its distribution", body = Score), Refusals)
)]
async fn score(State(api): State<Api>, Body(request): Body<ScoreRequest>) -> Result<Json<Score>, ApiError> {
    let service = api.service(Purpose::Critic)?;
    answer(service, request)
        .await
        .map(Json)
        .map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: ScoreRequest) -> Result<Score, ApiError> {
    check_model(&service, request.model.as_deref())?;
    not_empty("question", &request.question)?;
    not_empty("response", &request.response)?;
    check_writing(request.temperature, request.max_tokens)?;
    let asking = service.critics().find(request.template.as_deref(), Shows::One)?;
    let scale = match request.range {
        Some(Range { minimum, maximum, step }) => {
            Scale::new(minimum, maximum, step).map_err(|error| ApiError::invalid("range", error.to_string()))?
        }
        None => asking.template.scale,
    };
    let case = Case {
        visuals: service.visuals(image_urls(request.image, request.images)?).await?,
        question: request.question,
        texts: vec![request.response],
    };
    let manner = Manner {
        think: request.think,
        temperature: request.temperature,
        seed: request.seed,
        max_tokens: request.max_tokens,
        patient: false,
    };
    let model = service.name.clone();
    let scored = Judge::new(service, asking, manner, case)?.score(0, &scale).await?;
    let distribution = &scored.distribution;
    Ok(Score {
        id: format!("score-{}", uuid::Uuid::new_v4().simple()),
        object: "critic.score",
        model,
        score: distribution.expectation(),
        mode: distribution.mode(),
        entropy: distribution.entropy(),
        distribution: probabilities(distribution),
        mass: distribution.mass,
        range: Range {
            minimum: scale.min(),
            maximum: scale.max(),
            step: scale.step(),
        },
        rationale: scored.rationale,
        raw: scored.raw,
        finish_reason: scored.finish.map(Finish::from),
        usage: Usage::new(scored.prompt_tokens, scored.completion_tokens),
    })
}
