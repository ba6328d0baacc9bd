//! The engine over a model whose arithmetic is exact: logits are a hash of the tokens that are read back from the blocks.

#![allow(clippy::expect_used, reason = "helpers of tests")]

mod ahead;
mod pool;
mod thread;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use flotilla_engine::{
    Engine, EngineError, FinishReason, Group, Limits, Recipe, Request, Runner, Sampling, generate, sequence::Sequence,
};
use pool::{Toy, logits};
use proptest::prelude::*;

fn request(prompt: &[u32], n: usize, max_tokens: usize, seed: u64) -> Request<Vec<u32>> {
    let sampling = Sampling {
        max_tokens,
        seed,
        stop_ids: vec![0],
        ..Sampling::default()
    };
    Request::new(prompt.to_vec(), n, sampling)
}

/// A request that ends by its length alone.
fn endless(prompt: &[u32], n: usize, max_tokens: usize) -> Request<Vec<u32>> {
    let mut request = request(prompt, n, max_tokens, 7);
    request.sampling.stop_ids.clear();
    request
}

fn run(requests: &[Request<Vec<u32>>], limits: Limits) -> (Toy, Vec<Group>) {
    let mut toy = Toy::default();
    let groups = generate(&mut toy, requests, limits, &|| false).expect("generates");
    (toy, groups)
}

/// What the engine must give for one sample, written down without an engine. `salt` is that of the weights at each token.
fn expected_with(request: &Request<Vec<u32>>, sample: usize, salt: impl Fn(usize) -> u64) -> Vec<u32> {
    let recipe = Recipe::new(&request.sampling, None, request.n, &request.prompt).expect("a recipe");
    let mut sequence = Sequence::new(0, sample, Arc::new(recipe));
    let mut row = (*request.prompt).clone();
    let mut ids = Vec::new();
    loop {
        let (token, finish) = sequence.extend(&logits(&row, salt(ids.len()))).expect("draws");
        row.push(token.id);
        ids.push(token.id);
        if finish.is_some() {
            return ids;
        }
    }
}

fn expected(request: &Request<Vec<u32>>, sample: usize) -> Vec<u32> {
    expected_with(request, sample, |_| 0)
}

/// Prompts of few different tokens, so that many begin alike.
fn requests() -> impl Strategy<Value = Vec<Request<Vec<u32>>>> {
    let one = (
        prop::collection::vec(1u32..3, 1..14),
        1usize..7,
        1usize..9,
        any::<u64>(),
    )
        .prop_map(|(prompt, n, max_tokens, seed)| request(&prompt, n, max_tokens, seed));
    prop::collection::vec(one, 1..8)
}

/// From hardly enough blocks for one sample to plenty for all.
fn limits() -> impl Strategy<Value = Limits> {
    (1usize..12, 1usize..20, 1usize..6, 0usize..60).prop_map(|(max_rows, max_step_tokens, block_size, spare)| Limits {
        max_rows,
        max_step_tokens,
        kv_blocks: 21usize.div_ceil(block_size) + spare,
        block_size,
        ..Limits::default()
    })
}

/// Draws its tokens and begins every step that it can.
fn eager() -> Toy {
    Toy {
        draws: true,
        begins: 1,
        ..Toy::default()
    }
}

/// Draws of an engine by request and sample.
type Drawn = BTreeMap<(u64, usize), Vec<u32>>;

/// One step, within its limits; what it draws is added.
fn step(engine: &mut Engine<Toy>, limits: Limits, drawn: &mut Drawn) {
    let step = engine.step().expect("steps");
    assert!(step.failures.is_empty());
    for event in step.events {
        let ids = drawn.entry((event.request, event.sample)).or_default();
        ids.push(event.token.id);
    }
    let record = engine.runner().record();
    assert!(record.widest_step <= limits.max_step_tokens, "the token budget holds");
    assert!(record.most_rows <= limits.max_rows, "the row limit holds");
    assert!(engine.running() <= limits.max_rows, "the row limit holds");
    assert!(engine.used_blocks() <= limits.kv_blocks);
}

proptest! {
    #[test]
    fn tokens_are_those_of_one_request_at_a_time(requests in requests(), limits in limits()) {
        let (toy, groups) = run(&requests, limits);
        for (request, group) in requests.iter().zip(groups) {
            prop_assert_eq!(group.completions.len(), request.n);
            for (sample, completion) in group.completions.iter().enumerate() {
                prop_assert_eq!(completion.ids(), expected(request, sample));
                let stopped = completion.ids().last() == Some(&0);
                prop_assert_eq!(completion.finish == FinishReason::Stop, stopped);
            }
        }
        prop_assert!(toy.record().widest_step <= limits.max_step_tokens);
        prop_assert!(toy.record().most_rows <= limits.max_rows);
    }

    /// On a device bits depend on who stands beside whom: a run that goes on in a new process must compute as one that went on
    /// in the old one.
    #[test]
    fn an_engine_that_has_forgotten_asks_its_runner_for_what_a_new_one_does(
        before in requests(), requests in requests(), limits in limits(), begins in 0usize..2
    ) {
        let new = || Engine::new(Toy { draws: true, begins, ..Toy::default() }, "v0", limits).expect("an engine");
        let asked = |engine: &mut Engine<Toy>, requests: &[Request<Vec<u32>>]| {
            for request in requests {
                engine.submit(request).expect("submits");
            }
            let mut drawn = Drawn::new();
            while !engine.is_idle() {
                step(engine, limits, &mut drawn);
            }
            std::mem::take(&mut engine.runner_mut().asked)
        };
        let mut old = new();
        asked(&mut old, &before);
        old.forget().expect("forgets");
        prop_assert_eq!(asked(&mut old, &requests), asked(&mut new(), &requests));
    }

    #[test]
    fn a_runner_that_draws_itself_gives_the_same_tokens_and_probabilities(mut requests in requests(), limits in limits()) {
        (0..).zip(&mut requests).for_each(|(count, request)| request.sampling.watched_ids = (0..count % 4).collect());
        let mut drawing = Toy { draws: true, ..Toy::default() };
        let groups = generate(&mut drawing, &requests, limits, &|| false).expect("generates");
        let (_, expected) = run(&requests, limits);
        prop_assert_eq!(&groups, &expected);
        let tokens = groups.iter().flat_map(|group| &group.completions).map(|one| one.tokens.len() - 1);
        prop_assert!(drawing.record().drawn >= tokens.sum::<usize>(), "all but the first tokens");
    }

    #[test]
    fn steps_that_are_begun_early_give_the_same_tokens_and_probabilities(
        requests in requests(), limits in limits(), begins in 1usize..5,
    ) {
        let mut ahead = Toy { draws: true, begins, ..Toy::default() };
        let groups = generate(&mut ahead, &requests, limits, &|| false).expect("generates");
        let (_, expected) = run(&requests, limits);
        prop_assert_eq!(groups, expected);
        prop_assert!(ahead.record().widest_step <= limits.max_step_tokens);
        prop_assert!(ahead.record().most_rows <= limits.max_rows);
    }

    #[test]
    fn requests_may_join_end_and_be_cancelled_at_any_step(
        requests in requests(),
        limits in limits(),
        begins in 0usize..5,
        joins in prop::collection::vec(0usize..6, 8),
        cancels in prop::collection::vec(prop::option::of(0usize..10), 8),
        ends in prop::collection::vec((0usize..8, 0usize..6, 0usize..10), 0..4),
    ) {
        let toy = Toy { draws: begins > 0, begins, ..Toy::default() };
        let mut engine = Engine::new(toy, "v0", limits).expect("an engine");
        let mut drawn = Drawn::new();
        let mut ids = vec![None; requests.len()];
        let mut stopped = HashMap::new();
        for round in 0..2000 {
            for (index, request) in requests.iter().enumerate() {
                if ids[index].is_none() && joins[index] <= round {
                    ids[index] = Some(engine.submit(request).expect("submits"));
                }
                let Some(id) = ids[index] else { continue };
                if cancels[index] == Some(round) {
                    engine.cancel(id);
                    for sample in 0..request.n {
                        let before = drawn.get(&(id, sample)).map_or(0, Vec::len);
                        stopped.entry((id, sample)).or_insert(before);
                    }
                }
            }
            for (index, sample, at) in &ends {
                if let Some(Some(id)) = ids.get(*index) && *at == round && engine.end(*id, *sample) {
                    stopped.insert((*id, *sample), drawn.get(&(*id, *sample)).map_or(0, Vec::len));
                }
            }
            step(&mut engine, limits, &mut drawn);
            if round > 12 && engine.is_idle() {
                break;
            }
        }
        prop_assert!(engine.is_idle(), "everything ends within bounded steps");
        prop_assert_eq!(engine.used_blocks(), 0, "all blocks are free at the end");
        prop_assert_eq!((engine.running(), engine.waiting()), (0, 0));
        for (index, request) in requests.iter().enumerate() {
            for sample in 0..request.n {
                let key = (ids[index].expect("joined"), sample);
                let whole = expected(request, sample);
                let drawn = drawn.get(&key).map_or(&[][..], Vec::as_slice);
                prop_assert!(whole.starts_with(drawn));
                match stopped.get(&key) {
                    Some(before) => prop_assert!(drawn.len() == *before || drawn.len() == whole.len()),
                    None => prop_assert_eq!(drawn.len(), whole.len()),
                }
            }
        }
    }

    #[test]
    fn what_is_drawn_stays_when_weights_are_loaded_and_the_rest_is_drawn_with_the_new_ones(
        requests in requests(),
        limits in limits(),
        at in 1usize..8,
        begins in 0usize..3,
    ) {
        let toy = Toy { draws: begins > 0, begins, ..Toy::default() };
        let mut engine = Engine::new(toy, "v0", limits).expect("an engine");
        for request in &requests {
            engine.submit(request).expect("submits");
        }
        let mut drawn = Drawn::new();
        (0..at).for_each(|_| step(&mut engine, limits, &mut drawn));
        let before = drawn.clone();
        engine.load_weights("v1", |toy| { toy.salt = 1; Ok(()) }).expect("loads");
        prop_assert_eq!(engine.used_blocks(), 0, "nothing computed from the old weights is kept");
        while !engine.is_idle() {
            step(&mut engine, limits, &mut drawn);
        }
        for (index, request) in requests.iter().enumerate() {
            for sample in 0..request.n {
                let key = (index as u64, sample);
                let old = before.get(&key).map_or(0, Vec::len);
                prop_assert_eq!(&drawn[&key], &expected_with(request, sample, |token| u64::from(token >= old)));
            }
        }
    }
}

#[test]
fn samples_that_lose_their_blocks_draw_the_same_tokens() {
    let limits = Limits {
        kv_blocks: 12,
        block_size: 2,
        ..Limits::default()
    };
    let requests = [endless(&[1, 2, 1], 3, 12), endless(&[1, 2, 2, 2], 3, 12)];
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    for request in &requests {
        engine.submit(request).expect("submits");
    }
    let mut drawn = Drawn::new();
    while !engine.is_idle() {
        step(&mut engine, limits, &mut drawn);
    }
    assert!(engine.stats().preemptions.get() > 0, "the pool is too small for all");
    for ((request, sample), ids) in drawn {
        let request = &requests[usize::try_from(request).expect("small")];
        assert_eq!(ids, expected(request, sample));
    }
}

#[test]
fn the_samples_of_a_group_compute_their_prompt_once() {
    let prompt: Vec<u32> = (1..39).collect();
    let (toy, _) = run(&[endless(&prompt, 32, 4)], Limits::default());
    // Each sample but the last token of each goes through the model too.
    assert_eq!(toy.record().computed, 38 + 32 * 3);
    assert_eq!(toy.record().steps, 1 + 3, "all samples draw their first token together");
}

#[test]
fn a_prefix_is_computed_once_however_many_requests_that_have_it_arrive_together() {
    let prefix: Vec<u32> = (0..64).map(|i| i % 7 + 1).collect();
    let requests = (0..20).map(|i| {
        let mut prompt = prefix.clone();
        prompt.extend([10, i, 10]);
        endless(&prompt, 1, 1)
    });
    let requests: Vec<_> = requests.collect();
    let limits = Limits {
        max_step_tokens: 24,
        ..Limits::default()
    };
    let (toy, _) = run(&requests, limits);
    assert_eq!(toy.record().computed, 64 + 20 * 3);
}

#[test]
fn a_prompt_that_was_computed_before_costs_one_token() {
    let prompt: Vec<u32> = (1..33).collect();
    let limits = Limits::default();
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    for computed in [32, 33] {
        engine.submit(&endless(&prompt, 1, 1)).expect("submits");
        while !engine.is_idle() {
            engine.step().expect("steps");
        }
        assert_eq!(engine.runner().record().computed, computed);
    }
    assert_eq!(engine.stats().prefix_hits.get(), 31);
    assert_eq!(engine.stats().prefix_queries.get(), 64);
}

#[test]
fn other_weights_find_no_prefix_of_the_ones_before() {
    let prompt: Vec<u32> = (1..33).collect();
    let mut engine = Engine::new(Toy::default(), "v0", Limits::default()).expect("an engine");
    for version in ["v1", "v2"] {
        engine.submit(&endless(&prompt, 1, 1)).expect("submits");
        while !engine.is_idle() {
            engine.step().expect("steps");
        }
        engine.load_weights(version, |_| Ok(())).expect("loads");
    }
    let record = engine.runner().record();
    assert_eq!((record.computed, record.flushes), (64, 2));
    assert_eq!(engine.stats().prefix_hits.get(), 0);
}

#[test]
fn a_prompt_that_fills_all_blocks_is_computed_again_where_there_is_no_room_for_a_copy() {
    let limits = Limits {
        kv_blocks: 1,
        ..Limits::default()
    };
    let request = endless(&[1; 16], 1, 1);
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    let mut drawn = Drawn::new();
    for again in 0..2 {
        engine.submit(&request).expect("submits");
        let steps = (0..10).find(|_| {
            step(&mut engine, limits, &mut drawn);
            engine.is_idle()
        });
        assert!(steps.is_some(), "it waits for ever");
        assert_eq!(drawn[&(again, 0)], expected(&request, 0));
    }
}

#[test]
fn a_request_that_has_started_ends_however_many_wait_before_it_for_other_weights() {
    let limits = Limits {
        max_rows: 1,
        ..Limits::default()
    };
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    engine.submit(&endless(&[1], 600, 1)).expect("submits");
    let mut drawn = Drawn::new();
    step(&mut engine, limits, &mut drawn);
    for _ in 0..2_000 {
        engine.submit(&endless(&[2], 1, 1)).expect("submits");
    }
    engine.drain(true);
    let ended = (0..1_000).find(|_| {
        step(&mut engine, limits, &mut drawn);
        engine.started() == 0
    });
    assert!(ended.is_some(), "{} samples of 600 were drawn", drawn.len());
}

#[test]
fn weights_that_cannot_be_loaded_leave_the_version_and_the_requests() {
    let mut engine = Engine::new(Toy::default(), "v0", Limits::default()).expect("an engine");
    let request = endless(&[1, 2], 1, 3);
    engine.submit(&request).expect("submits");
    let mut drawn = Drawn::new();
    step(&mut engine, Limits::default(), &mut drawn);
    let error = engine
        .load_weights("v1", |_| Err("no such file".into()))
        .expect_err("fails");
    assert!(error.to_string().contains("\"v1\""), "{error}");
    assert_eq!(engine.version().as_ref(), "v0");
    while !engine.is_idle() {
        step(&mut engine, Limits::default(), &mut drawn);
    }
    assert_eq!(drawn[&(0, 0)], expected(&request, 0));
}

#[test]
fn a_large_group_does_not_keep_a_later_request_waiting() {
    let limits = Limits {
        max_rows: 4,
        ..Limits::default()
    };
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    engine.submit(&endless(&[1], 40, 5)).expect("submits");
    let mut drawn = Drawn::new();
    step(&mut engine, limits, &mut drawn);
    let late = engine.submit(&endless(&[2], 2, 5)).expect("submits");
    let begins = |drawn: &Drawn, sample| drawn.contains_key(&(late, sample));
    let mut rounds = 0;
    while !begins(&drawn, 0) {
        step(&mut engine, limits, &mut drawn);
        rounds += 1;
    }
    assert!(rounds <= 6, "it begins when the first rows are free: {rounds}");
    while !begins(&drawn, 1) {
        step(&mut engine, limits, &mut drawn);
        rounds += 1;
    }
    assert!(rounds <= 12, "its second sample is served like the group's: {rounds}");
}

#[test]
fn a_computed_prompt_is_not_given_up_for_a_request_that_does_not_fit_anyway() {
    let limits = Limits {
        kv_blocks: 13,
        block_size: 4,
        ..Limits::default()
    };
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    let prompt: Vec<u32> = (1..18).collect();
    engine.submit(&endless(&prompt, 2, 4)).expect("submits");
    // Eight blocks, and one that the running sample may need: only once that has ended there are so many.
    engine.submit(&endless(&[9; 30], 1, 2)).expect("submits");
    let mut drawn = Drawn::new();
    while !engine.is_idle() {
        step(&mut engine, limits, &mut drawn);
    }
    // Each prompt once, and all tokens but the last of each sample.
    assert_eq!(engine.runner().record().computed, 17 + 30 + 2 * 3 + 1);
}

#[test]
fn a_cancelled_request_frees_its_blocks_at_once() {
    let mut engine = Engine::new(Toy::default(), "v0", Limits::default()).expect("an engine");
    let id = engine.submit(&endless(&[1; 40], 4, 8)).expect("submits");
    let other = engine.submit(&endless(&[2; 40], 1, 8)).expect("submits");
    engine.step().expect("steps");
    let both = engine.used_blocks();
    engine.cancel(id);
    assert!(engine.used_blocks() < both);
    assert_eq!(engine.stats().running.get(), 1);
    assert!(engine.end(other, 0));
    assert_eq!(engine.used_blocks(), 0);
    assert!(engine.is_idle());
    // Nobody steps an idle engine: what is told must not wait for a step.
    let stats = engine.stats();
    assert_eq!((stats.running.get(), stats.kv_blocks_used.get()), (0, 0));
}

#[test]
fn a_sample_that_is_ended_before_it_has_begun_leaves_the_others() {
    let limits = Limits {
        max_rows: 1,
        ..Limits::default()
    };
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    let request = endless(&[1, 2, 3], 3, 4);
    let id = engine.submit(&request).expect("submits");
    let mut drawn = Drawn::new();
    step(&mut engine, limits, &mut drawn);
    assert!(engine.end(id, 1));
    assert!(!engine.end(id, 1), "once");
    while !engine.is_idle() {
        step(&mut engine, limits, &mut drawn);
    }
    assert_eq!(drawn.keys().map(|(_, sample)| *sample).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(drawn[&(id, 2)], expected(&request, 2));
}

#[test]
fn a_request_ends_at_its_deadline() {
    let mut engine = Engine::new(Toy::default(), "v0", Limits::default()).expect("an engine");
    let mut late = endless(&[1, 2], 2, 9);
    late.deadline = Some(Instant::now());
    let id = engine.submit(&late).expect("submits");
    let other = engine.submit(&endless(&[1, 2], 1, 2)).expect("submits");
    let step = engine.step().expect("steps");
    assert!(matches!(step.failures[..], [(request, EngineError::Deadline)] if request == id));
    assert!(step.events.iter().all(|event| event.request == other));
}

#[test]
fn logits_that_are_no_numbers_end_their_request_alone() {
    let toy = Toy {
        broken_after: Some(10),
        ..Toy::default()
    };
    let mut engine = Engine::new(toy, "v0", Limits::default()).expect("an engine");
    let broken = engine.submit(&endless(&[10], 2, 4)).expect("submits");
    let fine = engine.submit(&endless(&[1], 1, 1)).expect("submits");
    let step = engine.step().expect("steps");
    assert!(matches!(step.failures[..], [(request, EngineError::NotFinite { .. })] if request == broken));
    assert_eq!(step.events[0].request, fine);
    assert_eq!(engine.used_blocks(), 0);
}

#[test]
fn a_cancelled_rollout_says_so() {
    let outcome = generate(Toy::default(), &[request(&[1], 1, 4, 0)], Limits::default(), &|| true);
    assert!(matches!(outcome, Err(EngineError::Cancelled)));
}

#[test]
fn what_cannot_be_run_is_refused() {
    let limits = Limits {
        kv_blocks: 4,
        block_size: 2,
        ..Limits::default()
    };
    let refused = |request: Request<Vec<u32>>| {
        let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
        match engine.submit(&request) {
            Err(EngineError::InvalidRequest(fault)) => fault,
            other => panic!("{other:?}"),
        }
    };
    for nothing in [request(&[], 1, 4, 0), request(&[1], 0, 4, 0), request(&[1], 1, 0, 0)] {
        refused(nothing);
    }
    let fault = refused(request(&[1; 5], 1, 5, 0));
    assert!(
        fault.contains("5 prompt tokens and 5 new ones takes 5 blocks of 2 tokens"),
        "{fault}"
    );
    let mut engine = Engine::new(Toy::default(), "v0", limits).expect("an engine");
    engine
        .submit(&request(&[1; 5], 9, 4, 0))
        .expect("eight tokens are stored");
    let none = Limits { max_rows: 0, ..limits };
    assert!(Engine::new(Toy::default(), "v0", none).is_err());
}

#[test]
fn the_prompt_of_a_runner_is_told_by_its_tokens() {
    assert_eq!(Toy::default().prompt_tokens(&vec![1, 2, 3]), 3);
}
