//! The loop, over a model whose arithmetic is exact: logits are a hash of the row so far.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{cell::Cell, sync::Arc};

use flotilla_engine::{
    Engine, EngineError, EngineThread, FinishReason, Group, Limits, Request, Runner, Sampling, Tokens, generate,
    runner::{Cause, Logits},
    thread::Output,
};
use proptest::prelude::*;

const VOCABULARY: u32 = 11;

/// Counts what it computes; fails where it is told to.
#[derive(Debug, Default)]
struct Toy {
    prefilled: Cell<usize>,
    widest: Cell<usize>,
    fail_at: Option<u32>,
}

impl Toy {
    fn logits(&self, rows: &[Vec<u32>]) -> Result<Logits, Cause> {
        self.widest.set(self.widest.get().max(rows.len()));
        let mut values = Vec::new();
        for row in rows {
            if self.fail_at.is_some_and(|id| row.contains(&id)) {
                return Err("told to fail".into());
            }
            let mut hash = 0xcbf2_9ce4_8422_2325_u64;
            for id in row {
                hash = (hash ^ u64::from(*id)).wrapping_mul(0x0100_0000_01b3);
            }
            values.extend((0..VOCABULARY).map(|id| ((hash >> (id * 5)) % 32) as f32 / 8.0));
        }
        let vocabulary = VOCABULARY as usize;
        Ok(Logits { values, vocabulary })
    }
}

impl Runner for Toy {
    type Prompt = Vec<u32>;
    type Cache = Vec<Vec<u32>>;

    fn prompt_ids<'a>(&self, prompt: &'a Vec<u32>) -> &'a [u32] {
        prompt
    }

    fn prefill(&self, prompts: &[&Vec<u32>], repeat: &[usize], _: usize) -> Result<(Self::Cache, Logits), Cause> {
        self.prefilled.set(self.prefilled.get() + prompts.len());
        let rows: Self::Cache = prompts
            .iter()
            .zip(repeat)
            .flat_map(|(prompt, n)| std::iter::repeat_n((*prompt).clone(), *n))
            .collect();
        let logits = self.logits(&rows)?;
        Ok((rows, logits))
    }

    fn decode(&self, cache: &mut Self::Cache, ids: &[u32]) -> Result<Logits, Cause> {
        assert_eq!(cache.len(), ids.len());
        for (row, id) in cache.iter_mut().zip(ids) {
            row.push(*id);
        }
        self.logits(cache)
    }

    fn keep(&self, cache: &mut Self::Cache, rows: &[usize]) -> Result<(), Cause> {
        *cache = rows.iter().map(|row| cache[*row].clone()).collect();
        Ok(())
    }

    fn append(&self, cache: &mut Self::Cache, other: Self::Cache) -> Result<(), Cause> {
        cache.extend(other);
        Ok(())
    }
}

fn request(prompt: &[u32], n: usize, max_tokens: usize, seed: u64) -> Request<Vec<u32>> {
    let sampling = Sampling {
        max_tokens,
        seed,
        stop_ids: vec![0],
        ..Sampling::default()
    };
    Request::new(prompt.to_vec(), n, sampling)
}

fn run(requests: &[Request<Vec<u32>>], limits: Limits) -> Vec<Group> {
    generate(&Toy::default(), requests, limits, &|| false).expect("generates")
}

/// What [`generate`] must give for one sample, written down without an engine.
fn expected(request: &Request<Vec<u32>>, sample: usize) -> Vec<u32> {
    let mut row = (*request.prompt).clone();
    let mut sampler = flotilla_engine::sampler::Sampler::new(request.sampling.seed, sample);
    let mut ids = Vec::new();
    while ids.len() < request.sampling.max_tokens {
        let logits = Toy::default().logits(std::slice::from_ref(&row)).expect("logits");
        let id = sampler.draw(logits.row(0), &request.sampling).expect("draws").id;
        row.push(id);
        ids.push(id);
        if request.sampling.stop_ids.contains(&id) {
            break;
        }
    }
    ids
}

fn requests() -> impl Strategy<Value = Vec<Request<Vec<u32>>>> {
    let one = (prop::collection::vec(1u32..9, 1..6), 1usize..7, 1usize..9, any::<u64>())
        .prop_map(|(prompt, n, max_tokens, seed)| request(&prompt, n, max_tokens, seed));
    prop::collection::vec(one, 1..8)
}

fn limits() -> impl Strategy<Value = Limits> {
    (1usize..12, 1usize..20, 1usize..60).prop_map(|(max_rows, max_step_tokens, max_cache_tokens)| Limits {
        max_rows,
        max_step_tokens,
        kv_blocks: max_cache_tokens,
        block_size: 1,
        ..Limits::default()
    })
}

proptest! {
    #[test]
    fn tokens_do_not_depend_on_what_else_is_in_the_batch(requests in requests(), limits in limits()) {
        for (request, group) in requests.iter().zip(run(&requests, limits)) {
            prop_assert_eq!(group.completions.len(), request.n);
            for (sample, completion) in group.completions.iter().enumerate() {
                prop_assert_eq!(completion.ids(), expected(request, sample));
                let stopped = completion.ids().last() == Some(&0);
                prop_assert_eq!(completion.finish == FinishReason::Stop, stopped);
            }
        }
    }

    #[test]
    fn requests_may_join_and_be_cancelled_at_any_step(
        requests in requests(),
        limits in limits(),
        joins in prop::collection::vec(0usize..6, 8),
        cancels in prop::collection::vec(prop::option::of(0usize..10), 8),
    ) {
        let mut engine = Engine::new(Toy::default(), limits);
        let mut drawn = std::collections::HashMap::<_, Vec<u32>>::new();
        let mut ids = vec![None; requests.len()];
        let mut cancelled = vec![false; requests.len()];
        for step in 0.. {
            for (index, request) in requests.iter().enumerate() {
                if ids[index].is_none() && joins[index] <= step {
                    ids[index] = Some(engine.submit(request).expect("submits"));
                }
                if let (Some(id), Some(at)) = (ids[index], cancels[index]) && at == step {
                    engine.cancel(id);
                    cancelled[index] = true;
                }
            }
            for event in engine.step().expect("steps") {
                let index = ids.iter().position(|id| *id == Some(event.request)).expect("known");
                prop_assert!(!cancelled[index], "a cancelled request gives no more tokens");
                drawn.entry((index, event.sample)).or_default().push(event.token.id);
            }
            if step > 12 && engine.is_idle() {
                break;
            }
        }
        for (index, request) in requests.iter().enumerate() {
            for sample in 0..request.n {
                let whole = expected(request, sample);
                let drawn = drawn.get(&(index, sample)).map_or(&[][..], Vec::as_slice);
                prop_assert!(whole.starts_with(drawn));
                prop_assert!(cancelled[index] || drawn.len() == whole.len());
            }
        }
        prop_assert_eq!(engine.running(), 0);
    }
}

#[test]
fn the_samples_of_a_group_share_one_prefill() {
    let toy = Toy::default();
    generate(&toy, &[request(&[1, 2, 3], 8, 4, 0)], Limits::default(), &|| false).expect("generates");
    assert_eq!(toy.prefilled.get(), 1);
}

#[test]
fn the_row_limit_holds() {
    let toy = Toy::default();
    let limits = Limits {
        max_rows: 5,
        ..Limits::default()
    };
    let requests: Vec<_> = (0..6).map(|seed| request(&[1, 2], 3, 6, seed)).collect();
    generate(&toy, &requests, limits, &|| false).expect("generates");
    assert_eq!(toy.widest.get(), 5);
}

#[test]
fn a_cancelled_rollout_says_so() {
    let outcome = generate(&Toy::default(), &[request(&[1], 1, 4, 0)], Limits::default(), &|| true);
    assert!(matches!(outcome, Err(EngineError::Cancelled)));
}

#[test]
fn what_cannot_be_run_is_refused() {
    let limits = Limits::default();
    for request in [request(&[], 1, 4, 0), request(&[1], 0, 4, 0), request(&[1], 1, 0, 0)] {
        let outcome = generate(&Toy::default(), &[request], limits, &|| false);
        assert!(matches!(outcome, Err(EngineError::InvalidRequest(_))));
    }
}

fn tokens(mut output: Tokens) -> Result<Vec<u32>, EngineError> {
    let mut ids = Vec::new();
    while let Some(output) = output.blocking_recv() {
        match output {
            Output::Token { token, .. } => ids.push(token.id),
            Output::Failed(error) => return Err(error),
        }
    }
    Ok(ids)
}

#[test]
fn the_thread_serves_many_callers_and_ends_with_its_last_handle() {
    let (thread, handle) = EngineThread::spawn(Toy::default(), "v0", Limits::default(), 64).expect("spawns");
    let callers: Vec<_> = (0..16)
        .map(|seed| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                let request = request(&[1, 2, 3], 1, 20, seed);
                let output = handle.submit(request.clone()).expect("has room");
                assert_eq!(tokens(output).expect("ends"), expected(&request, 0));
            })
        })
        .collect();
    for caller in callers {
        caller.join().expect("holds");
    }
    assert_eq!(handle.queued(), 0);
    drop(handle);
    thread.join();
}

#[test]
fn a_full_queue_refuses() {
    let (_thread, handle) = EngineThread::spawn(Toy::default(), "v0", Limits::default(), 0).expect("spawns");
    let refused = handle.submit(request(&[1], 1, 4, 0)).expect_err("nobody may wait");
    assert_eq!((refused.waiting, refused.limit), (0, 0));
}

#[test]
fn a_failed_step_ends_its_requests_and_not_the_thread() {
    let toy = Toy {
        fail_at: Some(10),
        ..Toy::default()
    };
    let (_thread, handle) = EngineThread::spawn(toy, "v0", Limits::default(), 8).expect("spawns");
    let failed = tokens(handle.submit(request(&[10], 1, 4, 0)).expect("has room"));
    assert!(failed.expect_err("fails").to_string().contains("prefill"));
    let mut fine = request(&[1], 1, 1, 0);
    fine.sampling.stop_ids.clear();
    assert_eq!(
        tokens(handle.submit(fine).expect("has room")).expect("goes on").len(),
        1
    );
}
