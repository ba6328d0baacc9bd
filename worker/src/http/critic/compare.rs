//! `POST /v1/critic/compare`: which of several responses about a picture is better, how sure, and why.

use std::sync::Arc;

use axum::{Json, extract::State};
use flotilla_api::role::Purpose;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Picture, Refusals, check_writing, image_urls, not_empty,
    report::{RoundReport, StandingReport, TallyReport},
};
use crate::{
    critic::{
        Critic,
        bracket::Kind,
        contest::{Rules, play},
        field::Field,
        judge::{Case, Judge, Manner},
        pair::{Comparison, Opinion, Pair},
    },
    http::{
        answer::{Finish, Usage},
        api::{Api, Body, check_model},
        chat_request::ImageUrl,
        error::ApiError,
    },
    prompt::critic::Shows,
    service::{Service, verdict::Verdict},
};

/// Responses of one request.
const MAX_RESPONSES: usize = 32;

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(compare)).with_state(state)
}

/// What a client may send.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CompareRequest {
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
    /// Two responses, or more of which one is chosen.
    #[schema(min_items = 2, max_items = 32, example = json!(["7", "3"]))]
    responses: Vec<String>,
    /// Ask about each pair in both orders.
    #[serde(default)]
    both_orders: bool,
    /// The older name of `both_orders`.
    #[serde(default)]
    swap: bool,
    /// How one of more than two is chosen.
    #[serde(default)]
    selector: CompareSelector,
    /// Let the critic write its thoughts before its verdict. If not, the probabilities of the labels in a box that is
    /// opened for it decide: there is no text, and it takes one pass over the prompt.
    #[serde(default = "super::yes")]
    think: bool,
    /// Name of a template that shows two responses; that of the server if absent.
    template: Option<String>,
    /// Of what the critic writes; 0 takes the most likely verdict.
    #[serde(default)]
    #[schema(minimum = 0)]
    temperature: f32,
    /// Of what the critic writes; with more than two responses also of places, of who is shown first, and of lots.
    #[serde(default)]
    seed: u64,
    /// Longest text of the critic, in tokens; what the context leaves if absent.
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
}

/// How one of more than two responses is chosen.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CompareSelector {
    /// The winner of each pair goes on.
    #[default]
    Knockout,
    /// Everybody meets everybody.
    RoundRobin,
}

impl From<CompareSelector> for Kind {
    fn from(selector: CompareSelector) -> Self {
        match selector {
            CompareSelector::Knockout => Self::Knockout,
            CompareSelector::RoundRobin => Self::RoundRobin,
        }
    }
}

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
struct CompareAnswer {
    /// Names the answer.
    id: String,
    #[schema(value_type = String, example = "critic.comparison")]
    object: &'static str,
    /// Name of the model.
    model: String,
    /// `1`, `2` or `tie`; null if the critic named none, and of more than two responses. With both orders, if they
    /// disagree, the sign of the mean margin decides, and without margins it is a tie.
    verdict: Option<Verdict>,
    /// Index of the better response; null for a tie or no verdict.
    winner: Option<usize>,
    /// Log-odds of response 1 against response 2, with both orders the mean; null where the text opens no box, and of more
    /// than two responses.
    margin: Option<f64>,
    /// Why, in the critic's words.
    rationale: Option<String>,
    /// All that the critic wrote.
    raw: String,
    /// `stop` or `length`: a critic that ran out of tokens has not finished its thought. Null if it wrote nothing.
    finish_reason: Option<Finish>,
    /// With both orders: whether they name different responses; null if one of them names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<bool>)]
    order_flip: Option<Option<bool>>,
    /// With both orders: what the critic said about the other one, in terms of the responses as they were sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    swapped: Option<SwappedOpinion>,
    /// Of more than two responses: how one was chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<Table>,
    usage: Usage,
}

/// What a critic said about the other order, in terms of the responses as they were sent.
#[derive(Debug, Serialize, ToSchema)]
struct SwappedOpinion {
    verdict: Option<Verdict>,
    margin: Option<f64>,
    rationale: Option<String>,
    raw: String,
}

/// How one of more than two responses was chosen. Responses with the same text are one, named by the first index.
#[derive(Debug, Serialize, ToSchema)]
struct Table {
    selector: CompareSelector,
    rounds: Vec<RoundReport>,
    /// The best first (round robin).
    standings: Vec<StandingReport>,
    counts: TallyReport,
}

/// Says which response is better.
#[utoipa::path(
    post,
    path = "/v1/critic/compare",
    tag = "critic",
    request_body = CompareRequest,
    responses((status = 200, description = "The verdict", body = CompareAnswer), Refusals)
)]
async fn compare(State(api): State<Api>, Body(request): Body<CompareRequest>) -> Result<Json<CompareAnswer>, ApiError> {
    let service = api.service(Purpose::Critic)?;
    answer(service, request)
        .await
        .map(Json)
        .map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: CompareRequest) -> Result<CompareAnswer, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let given = request.responses.len();
    if !(2..=MAX_RESPONSES).contains(&given) {
        let message = format!("responses has {given} entries, it takes 2 to {MAX_RESPONSES}");
        return Err(ApiError::invalid("responses", message));
    }
    not_empty("question", &request.question)?;
    for response in &request.responses {
        not_empty("responses", response)?;
    }
    check_writing(request.temperature, request.max_tokens)?;
    let asking = service.critics().find(request.template.as_deref(), Shows::Pair)?;
    let case = Case {
        visuals: service.visuals(image_urls(request.image, request.images)?).await?,
        question: request.question,
        texts: request.responses,
    };
    let manner = Manner {
        think: request.think,
        temperature: request.temperature,
        seed: request.seed,
        max_tokens: request.max_tokens,
        patient: given > 2,
    };
    let rules = Rules {
        seed: request.seed,
        both_orders: request.both_orders || request.swap,
    };
    let field = Field::new(&case.texts);
    let judge = Judge::new(service.clone(), asking, manner, case)?;
    if given == 2 {
        return two(&service, &judge, rules.both_orders).await;
    }
    several(&service, &judge, &field, request.selector, rules).await
}

async fn two(service: &Service, judge: &Judge, both_orders: bool) -> Result<CompareAnswer, ApiError> {
    let pair = Pair { first: 0, second: 1 };
    // Both orders are in the engine at the same time.
    let asked = [pair, pair.swapped()];
    let mut opinions = judge.judge(&asked[..1 + usize::from(both_orders)]).await?.into_iter();
    let straight = opinions.next().unwrap_or_default();
    let comparison = Comparison::settle(pair, straight, opinions.next());
    let spent = comparison.opinions().fold((0, 0), |spent, opinion| {
        (spent.0 + opinion.prompt_tokens, spent.1 + opinion.completion_tokens)
    });
    let flip = comparison.flip();
    let Comparison {
        verdict,
        margin,
        straight,
        swapped,
        ..
    } = comparison;
    Ok(CompareAnswer {
        verdict,
        winner: verdict.and_then(Verdict::winner),
        margin,
        rationale: straight.rationale,
        raw: straight.raw,
        finish_reason: straight.finish.map(Finish::from),
        order_flip: swapped.is_some().then_some(flip),
        swapped: swapped.map(SwappedOpinion::from),
        ..CompareAnswer::new(service, Usage::new(spent.0, spent.1))
    })
}

async fn several(
    service: &Service,
    judge: &Judge,
    field: &Field,
    selector: CompareSelector,
    rules: Rules,
) -> Result<CompareAnswer, ApiError> {
    let played = play(selector.into(), &field.entrants(), rules, judge, |_| {}).await?;
    let usage = Usage::new(played.tally.prompt_tokens, played.tally.completion_tokens);
    Ok(CompareAnswer {
        winner: played.winner,
        table: Some(Table {
            selector,
            rounds: played.rounds.iter().map(RoundReport::from).collect(),
            standings: played.standings.iter().map(StandingReport::from).collect(),
            counts: TallyReport::from(&played.tally),
        }),
        ..CompareAnswer::new(service, usage)
    })
}

impl CompareAnswer {
    /// Nothing said yet.
    fn new(service: &Service, usage: Usage) -> Self {
        Self {
            id: format!("cmp-{}", uuid::Uuid::new_v4().simple()),
            object: "critic.comparison",
            model: service.name.clone(),
            verdict: None,
            winner: None,
            margin: None,
            rationale: None,
            raw: String::new(),
            finish_reason: None,
            order_flip: None,
            swapped: None,
            table: None,
            usage,
        }
    }
}

impl From<Opinion> for SwappedOpinion {
    fn from(opinion: Opinion) -> Self {
        Self {
            verdict: opinion.verdict,
            margin: opinion.margin,
            rationale: opinion.rationale,
            raw: opinion.raw,
        }
    }
}
