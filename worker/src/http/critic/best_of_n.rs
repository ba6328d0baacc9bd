//! `POST /v1/critic/best-of-n`: many candidates for a conversation, and the one that the model itself finds best; whole, or
//! as a stream of what happens on the way.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use flotilla_api::role::Purpose;
use futures::Stream;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_util::task::AbortOnDropHandle;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Refusals,
    best_of_n_answer::{BestOfN, CandidateReport, Told},
    best_of_n_request::BestOfNRequest,
    report::RoundReport,
};
use crate::{
    critic::best_of_n::{Job, Outcome, Progress},
    http::{
        api::{Api, Body, check_model},
        error::ApiError,
        sse::{self, ServerSentEvent},
    },
    service::{Service, ServiceError, account::Account},
};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(best_of_n)).with_state(state)
}

/// Generates candidates and chooses one of them.
///
/// With `stream` the answer is server-sent events: `candidate` as each is finished, `round` as each is decided, `result`
/// (the whole answer) or `error` in the end, then `[DONE]`. A client that hangs up cancels what is left.
#[utoipa::path(
    post,
    path = "/v1/critic/best-of-n",
    tag = "critic",
    request_body = BestOfNRequest,
    responses(
        (status = 200, description = "The chosen candidate and how it was chosen", content(
            (BestOfN = "application/json"),
            (ServerSentEvent = "text/event-stream"),
        )),
        Refusals,
    )
)]
async fn best_of_n(State(api): State<Api>, Body(request): Body<BestOfNRequest>) -> Result<Response, ApiError> {
    // Candidates are a policy's work, the choice a critic's.
    let service = api.service(Purpose::Policy)?;
    api.service(Purpose::Critic)?;
    answer(service, request).await.map_err(|error| api.refuse(error))
}

async fn answer(service: Arc<Service>, request: BestOfNRequest) -> Result<Response, ApiError> {
    check_model(&service, request.model.as_deref())?;
    let stream = request.stream;
    let (plan, told) = request.into_plan()?;
    // What is wrong with the request is answered with its status, not in a stream.
    let job = Job::begin(service.clone(), plan).await?;
    let (events, heard) = mpsc::unbounded_channel();
    if stream {
        // A task of its own: it shares what all requests need, and must not rest where its client does not read.
        let run = job.run(events);
        let run = match Account::current() {
            Some(account) => AbortOnDropHandle::new(tokio::spawn(account.during(run))),
            None => AbortOnDropHandle::new(tokio::spawn(run)),
        };
        let events = streamed(run, heard, service, told);
        return Ok(sse::response(events));
    }
    let outcome = Box::pin(job.run(events)).await?;
    Ok(Json(BestOfN::new(&service, &told, &outcome)).into_response())
}

/// What comes next of a job.
enum Next {
    Progress(Progress),
    End(Box<Result<Outcome, ServiceError>>),
}

fn streamed(
    mut run: AbortOnDropHandle<Result<Outcome, ServiceError>>,
    mut heard: UnboundedReceiver<Progress>,
    service: Arc<Service>,
    told: Told,
) -> impl Stream<Item = String> + Send + use<> {
    async_stream::stream! {
        let outcome = loop {
            let next = tokio::select! {
                biased;
                Some(progress) = heard.recv() => Next::Progress(progress),
                outcome = &mut run => {
                    let failed = |error| Err(ServiceError::Engine(format!("failed to choose: {error}")));
                    Next::End(Box::new(outcome.unwrap_or_else(failed)))
                }
            };
            match next {
                Next::Progress(progress) => yield progress_event(&progress),
                Next::End(outcome) => break outcome,
            }
        };
        // What was said in the last step before the end.
        while let Ok(progress) = heard.try_recv() {
            yield progress_event(&progress);
        }
        match *outcome {
            Ok(outcome) => yield event("result", &BestOfN::new(&service, &told, &outcome)),
            Err(error) => yield event("error", &ApiError::from(error).json()),
        }
        yield sse::DONE.to_owned();
    }
}

fn progress_event(progress: &Progress) -> String {
    match progress {
        Progress::Candidate(candidate) => event("candidate", &CandidateReport::new(candidate, None)),
        Progress::Round(selector, round) => {
            let mut data = json!(RoundReport::from(round));
            data["selector"] = Value::from(selector.name());
            event("round", &data)
        }
    }
}

/// An event with its name.
fn event(name: &str, data: &impl Serialize) -> String {
    format!("event: {name}\n{}", sse::event(data))
}
