//! The loop on the caller's thread: what a colocated trainer calls between two updates.

use crate::{
    engine::Engine,
    error::EngineError,
    request::{Completion, FinishReason, Group, Token},
    runner::{RequestFor, Runner},
    scheduler::Limits,
};

/// Runs the requests to their end and gives their groups in the same order. `cancelled` is asked between two steps;
/// once it says yes the call ends with [`EngineError::Cancelled`].
pub fn generate<R: Runner>(
    runner: &R,
    requests: &[RequestFor<R>],
    limits: Limits,
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<Group>, EngineError> {
    let mut engine = Engine::new(runner, limits);
    let mut groups = Vec::with_capacity(requests.len());
    for request in requests {
        // A fresh engine numbers its requests from zero: the number is the index.
        engine.submit(request)?;
        groups.push(vec![Draft::default(); request.n]);
    }
    while !engine.is_idle() {
        if cancelled() {
            return Err(EngineError::Cancelled);
        }
        for event in engine.step()? {
            let group = usize::try_from(event.request)
                .ok()
                .and_then(|index| groups.get_mut(index));
            if let Some(draft) = group.and_then(|group| group.get_mut(event.sample)) {
                draft.tokens.push(event.token);
                draft.finish = draft.finish.or(event.finish);
            }
        }
    }
    Ok(groups.into_iter().map(finish).collect())
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
