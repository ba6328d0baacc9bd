//! The loop on the caller's thread: what a colocated trainer calls between two updates.

use crate::{
    engine::Engine,
    error::EngineError,
    limits::Limits,
    request::{Completion, FinishReason, Group, Token},
    runner::{RequestFor, Runner},
};

/// Version of weights that live no longer than a call.
const UNNAMED: &str = "";

/// An engine with no more blocks than these requests can use at once.
pub fn engine_for<R: Runner>(
    runner: R,
    version: &str,
    requests: &[RequestFor<R>],
    limits: Limits,
) -> Result<Engine<R>, EngineError> {
    let sizes = requests.iter().map(|request| {
        let prompt_tokens = runner.prompt_tokens(&request.prompt);
        (request.n, prompt_tokens, request.sampling.max_tokens)
    });
    let limits = limits.fit(sizes);
    Engine::new(runner, version, limits)
}

/// Runs the requests to their end and gives their groups in the same order. The same calls give the same bits. `cancelled`
/// is asked between two steps; once it says yes the call ends with [`EngineError::Cancelled`].
pub fn generate<R: Runner>(
    runner: R,
    requests: &[RequestFor<R>],
    limits: Limits,
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<Group>, EngineError> {
    let mut groups = vec![Group::default(); requests.len()];
    generate_each(runner, requests, limits, cancelled, &mut |index, group| {
        if let Some(place) = groups.get_mut(index) {
            *place = group;
        }
    })?;
    Ok(groups)
}

/// As [`generate`], but hands over each group with the index of its request as soon as its last sample has ended.
pub fn generate_each<R: Runner>(
    runner: R,
    requests: &[RequestFor<R>],
    limits: Limits,
    cancelled: &dyn Fn() -> bool,
    finished: &mut dyn FnMut(usize, Group),
) -> Result<(), EngineError> {
    let mut engine = engine_for(runner, UNNAMED, requests, limits)?;
    run_each(&mut engine, requests, cancelled, finished)
}

/// As [`generate_each`], by an engine that is idle and stays: one that keeps its cache for what comes next. After an error
/// it is [cleared](Engine::clear).
pub fn run_each<R: Runner>(
    engine: &mut Engine<R>,
    requests: &[RequestFor<R>],
    cancelled: &dyn Fn() -> bool,
    finished: &mut dyn FnMut(usize, Group),
) -> Result<(), EngineError> {
    let run = run_to_the_end(engine, requests, cancelled, finished);
    if run.is_err() {
        engine.clear();
    }
    run
}

fn run_to_the_end<R: Runner>(
    engine: &mut Engine<R>,
    requests: &[RequestFor<R>],
    cancelled: &dyn Fn() -> bool,
    finished: &mut dyn FnMut(usize, Group),
) -> Result<(), EngineError> {
    let mut groups = Vec::with_capacity(requests.len());
    let mut first = None;
    for request in requests {
        // An engine numbers its requests one after another.
        let id = engine.submit(request)?;
        first.get_or_insert(id);
        groups.push(vec![Draft::default(); request.n]);
    }
    let first = first.unwrap_or_default();
    while !engine.is_idle() {
        if cancelled() {
            return Err(EngineError::Cancelled);
        }
        let step = engine.step()?;
        if let Some((_, error)) = step.failures.into_iter().next() {
            return Err(error);
        }
        for event in step.events {
            let Some(index) = event
                .request
                .checked_sub(first)
                .and_then(|index| usize::try_from(index).ok())
            else {
                continue;
            };
            let Some(drafts) = groups.get_mut(index) else { continue };
            if let Some(draft) = drafts.get_mut(event.sample) {
                draft.tokens.push(event.token);
                draft.finish = draft.finish.or(event.finish);
            }
            if event.finish.is_some() && drafts.iter().all(|draft| draft.finish.is_some()) {
                finished(index, finish(std::mem::take(drafts)));
            }
        }
    }
    Ok(())
}

/// A completion on its way.
#[derive(Clone, Debug, Default)]
struct Draft {
    tokens: Vec<Token>,
    finish: Option<FinishReason>,
}

fn finish(drafts: Vec<Draft>) -> Group {
    let completions = drafts
        .into_iter()
        .map(|draft| Completion {
            tokens: draft.tokens,
            finish: draft.finish.unwrap_or(FinishReason::Length),
        })
        .collect();
    Group { completions }
}
