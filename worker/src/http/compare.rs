//! `POST /v1/critic/compare`: which of two responses about a picture is better, how sure, and why.

use std::sync::Arc;

use axum::{Json, extract::State};
use flotilla_api::role::Purpose;
use flotilla_engine::{FinishReason, Request, Sampling};
use flotilla_model::Message;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    api::{Api, Body, check_model},
    chat::usage,
    chat_request::{ChatPart, ImageUrl},
    error::ApiError,
};
use crate::service::{
    Service, ServiceError,
    prompt::Conversation,
    verdict::{Verdict, rationale},
};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(compare)).with_state(state)
}

/// What a client may send.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CompareRequest {
    model: Option<String>,
    /// One picture, as a data URL.
    image: Option<ImageUrl>,
    /// Several pictures, as data URLs or content parts.
    #[serde(default)]
    images: Vec<Picture>,
    question: String,
    /// Two responses.
    responses: Vec<String>,
    /// Ask again with the responses in the other order.
    #[serde(default)]
    swap: bool,
    /// 0 if absent: the most likely verdict.
    #[serde(default)]
    temperature: f32,
    #[serde(default)]
    seed: u64,
    max_tokens: Option<usize>,
}

/// A picture of a comparison.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Picture {
    Part(ChatPart),
    Url(ImageUrl),
}

/// What is answered.
#[derive(Debug, Serialize)]
struct Comparison {
    id: String,
    object: &'static str,
    model: String,
    /// `1`, `2` or `tie`; null if the critic named none. With `swap`, and two orders that disagree, the sign of the mean
    /// margin decides, and without margins it is a tie.
    verdict: Option<Verdict>,
    /// Index of the better response; null for a tie or no verdict.
    winner: Option<usize>,
    /// Log-odds of response 1 against response 2, with `swap` the mean of both orders; null where the text opens no box.
    margin: Option<f64>,
    /// Why, in the critic's words.
    rationale: Option<String>,
    /// All that the critic wrote.
    raw: String,
    /// `stop` or `length`: a critic that ran out of tokens has not finished its thought.
    finish_reason: Option<FinishReason>,
    /// With `swap`: whether the two orders name different responses; null if one of them names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    order_flip: Option<Option<bool>>,
    /// With `swap`: what the critic said about the other order, in terms of the responses as they were sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    swapped: Option<Judgement>,
    usage: Value,
}

/// What a critic said about one order, in terms of the responses as they were sent.
#[derive(Clone, Debug, Serialize)]
struct Judgement {
    verdict: Option<Verdict>,
    margin: Option<f64>,
    rationale: Option<String>,
    raw: String,
    #[serde(skip)]
    finish: Option<FinishReason>,
    #[serde(skip)]
    tokens: (usize, usize),
}

impl Judgement {
    fn swapped(self) -> Self {
        Self {
            verdict: self.verdict.map(Verdict::swapped),
            margin: self.margin.map(|margin| -margin),
            ..self
        }
    }
}

/// Says which of two responses is better.
#[utoipa::path(post, path = "/v1/critic/compare", tag = "critic", responses((status = 200, description = "The verdict")))]
async fn compare(State(api): State<Api>, Body(request): Body<CompareRequest>) -> Result<Json<Comparison>, ApiError> {
    let service = api.service(Purpose::Critic)?;
    answer(service, request)
        .await
        .map(Json)
        .map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, mut request: CompareRequest) -> Result<Comparison, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let responses: [String; 2] = std::mem::take(&mut request.responses)
        .try_into()
        .map_err(|given: Vec<_>| {
            ApiError::invalid(
                "responses",
                format!("responses has {} entries, it takes 2", given.len()),
            )
        })?;
    if request.question.trim().is_empty() || responses.iter().any(|response| response.trim().is_empty()) {
        return Err(ApiError::invalid(
            "responses",
            "question and responses must not be empty",
        ));
    }
    let images = images(&mut request)?;
    let [first, second] = &responses;
    let straight = judge(&service, &request, &images, [first, second]);
    if !request.swap {
        let judgement = straight.await?;
        return Ok(conclude(&service, judgement, None));
    }
    // Both orders are in the engine at the same time.
    let (straight, swapped) = tokio::try_join!(straight, judge(&service, &request, &images, [second, first]))?;
    Ok(conclude(&service, straight, Some(swapped.swapped())))
}

fn images(request: &mut CompareRequest) -> Result<Vec<String>, ApiError> {
    let listed = std::mem::take(&mut request.images)
        .into_iter()
        .map(|picture| match picture {
            Picture::Part(ChatPart::ImageUrl { image_url }) | Picture::Url(image_url) => Ok(image_url.into_url()),
            Picture::Part(ChatPart::Text { .. }) => Err(ApiError::invalid("images", "images takes no text parts")),
        });
    let one = request.image.take().map(|image| Ok(image.into_url()));
    one.into_iter().chain(listed).collect()
}

async fn judge(
    service: &Arc<Service>,
    request: &CompareRequest,
    images: &[String],
    responses: [&str; 2],
) -> Result<Judgement, ApiError> {
    let text = service
        .critic_template()
        .render(&request.question, Some(responses))
        .map_err(|error| ServiceError::invalid("question", crate::error::chain(&error)))?;
    let conversation = Conversation {
        messages: vec![Message::user(images.len(), &text)],
        image_urls: images.to_vec(),
    };
    let (prompt, max_tokens) = service.prepare(conversation, request.max_tokens).await?;
    let tokenizer = service.processor().tokenizer();
    let sampling = Sampling {
        temperature: request.temperature,
        seed: request.seed,
        max_tokens,
        stop_ids: tokenizer.stop_ids().to_vec(),
        watched_ids: service.verdict_tokens().watched_ids(),
        ..Sampling::default()
    };
    sampling
        .validate()
        .map_err(|error| ApiError::invalid("temperature", error.to_string()))?;
    let generation = service.generate(Request::new(prompt, 1, sampling), &[])?;
    let prompt_tokens = generation.prompt_tokens();
    let (mut samples, completion_tokens) = generation.collect().await?;
    let sample = samples.pop().unwrap_or_default();
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default();
    Ok(Judgement {
        verdict: Verdict::parse(&sample.text),
        margin: service.verdict_tokens().margin(&sample.tokens, decode),
        rationale: rationale(&sample.text).map(str::to_owned),
        raw: sample.text,
        finish: sample.finish,
        tokens: (prompt_tokens, completion_tokens),
    })
}

fn conclude(service: &Service, straight: Judgement, swapped: Option<Judgement>) -> Comparison {
    let (verdict, margin) = match &swapped {
        None => (straight.verdict, straight.margin),
        Some(swapped) => combine(&straight, swapped),
    };
    let tokens = swapped.as_ref().map_or((0, 0), |judgement| judgement.tokens);
    Comparison {
        id: format!("cmp-{}", uuid::Uuid::new_v4().simple()),
        object: "critic.comparison",
        model: service.name.clone(),
        verdict,
        winner: verdict.and_then(Verdict::winner),
        margin,
        rationale: straight.rationale,
        raw: straight.raw,
        finish_reason: straight.finish,
        order_flip: swapped
            .as_ref()
            .map(|swapped| Some(straight.verdict? != swapped.verdict?)),
        usage: usage(straight.tokens.0 + tokens.0, straight.tokens.1 + tokens.1),
        swapped,
    }
}

/// The verdict and margin of both orders together.
fn combine(straight: &Judgement, swapped: &Judgement) -> (Option<Verdict>, Option<f64>) {
    let margin = straight.margin.zip(swapped.margin).map(|(a, b)| f64::midpoint(a, b));
    let verdict = match (straight.verdict, swapped.verdict) {
        (Some(a), Some(b)) if a == b => Some(a),
        (Some(_), Some(_)) => Some(match margin {
            Some(margin) if margin > 0.0 => Verdict::First,
            Some(margin) if margin < 0.0 => Verdict::Second,
            _ => Verdict::Tie,
        }),
        (one, other) => one.or(other),
    };
    (verdict, margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judgement(verdict: Option<Verdict>, margin: Option<f64>) -> Judgement {
        Judgement {
            verdict,
            margin,
            rationale: None,
            raw: String::new(),
            finish: None,
            tokens: (0, 0),
        }
    }

    #[test]
    fn two_orders_that_agree_keep_their_verdict() {
        let first = judgement(Some(Verdict::First), Some(2.0));
        let (verdict, margin) = combine(&first, &judgement(Some(Verdict::Second), Some(-1.0)).swapped());
        assert_eq!(verdict, Some(Verdict::First));
        assert!((margin.expect("both") - 1.5).abs() < 1e-12);
    }

    #[test]
    fn two_orders_that_disagree_are_settled_by_how_sure_they_were() {
        // A critic that always says 1, more surely where the second response stands first.
        let first = judgement(Some(Verdict::First), Some(0.5));
        let swapped = judgement(Some(Verdict::First), Some(2.0)).swapped();
        assert_eq!(combine(&first, &swapped).0, Some(Verdict::Second));
        let silent = judgement(Some(Verdict::First), None).swapped();
        assert_eq!(combine(&first, &silent), (Some(Verdict::Tie), None));
    }
}
