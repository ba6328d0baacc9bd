//! Steps that are begun before the tokens of the step before are read.

use flotilla_engine::{Engine, EngineError, Limits};

use super::{Drawn, eager, endless, expected, pool::Toy, request, step};

#[test]
fn all_decode_steps_but_the_first_are_begun_before_the_tokens_they_take_are_read() {
    let mut engine = Engine::new(eager(), "v0", Limits::default()).expect("an engine");
    engine.submit(&endless(&[1, 2, 3], 8, 20)).expect("submits");
    let mut drawn = Drawn::new();
    while !engine.is_idle() {
        step(&mut engine, Limits::default(), &mut drawn);
    }
    // A prompt, and a token for each step after it.
    let record = engine.runner().record();
    assert_eq!((record.steps, record.ahead), (20, 18));
    assert_eq!(
        record.computed,
        3 + 8 * 19,
        "nothing is computed in vain where lengths end samples"
    );
}

#[test]
fn a_sample_that_stops_is_computed_once_more_and_leaves_the_others() {
    let mut seeds = (0..).map(|seed| request(&[1], 1, 40, seed));
    let stops = seeds.find(|request| (5..30).contains(&expected(request, 0).len()));
    let stops = stops.expect("a seed with which it draws its stop token");
    let goes_on = endless(&[2, 1], 1, 40);
    let tokens = expected(&stops, 0).len();
    let mut engine = Engine::new(eager(), "v0", Limits::default()).expect("an engine");
    for request in [&stops, &goes_on] {
        engine.submit(request).expect("submits");
    }
    let mut drawn = Drawn::new();
    while !engine.is_idle() {
        step(&mut engine, Limits::default(), &mut drawn);
    }
    assert_eq!(drawn[&(0, 0)], expected(&stops, 0));
    assert_eq!(drawn[&(1, 0)], expected(&goes_on, 0));
    let record = engine.runner().record();
    assert_eq!(record.computed, (1 + tokens - 1) + (2 + 39) + 1);
    assert_eq!((record.steps, record.ahead), (40, 38), "the other one goes on at once");
}

#[test]
fn a_step_that_was_begun_for_samples_that_have_ended_is_forgotten() {
    let mut engine = Engine::new(eager(), "v0", Limits::default()).expect("an engine");
    let mut drawn = Drawn::new();
    for _ in 0..2 {
        let id = engine.submit(&endless(&[1, 2], 2, 30)).expect("submits");
        (0..4).for_each(|_| step(&mut engine, Limits::default(), &mut drawn));
        engine.cancel(id);
        assert_eq!((engine.is_idle(), engine.used_blocks()), (true, 0));
    }
    assert_eq!(drawn[&(1, 0)], expected(&endless(&[1, 2], 2, 30), 0)[..4]);
}

#[test]
fn an_engine_whose_step_was_begun_and_failed_can_be_cleared() {
    let request = endless(&[1, 2], 1, 30);
    let late = expected(&request, 0)[8];
    let toy = Toy {
        fail_at: Some(late),
        ..eager()
    };
    let mut engine = Engine::new(toy, "v0", Limits::default()).expect("an engine");
    engine.submit(&request).expect("submits");
    let failed = (0..30).find_map(|_| engine.step().err()).expect("it fails");
    assert!(matches!(failed, EngineError::Model { step: "compute", .. }));
    engine.clear();
    engine.runner_mut().fail_at = None;
    engine.submit(&request).expect("submits");
    let mut drawn = Drawn::new();
    while !engine.is_idle() {
        step(&mut engine, Limits::default(), &mut drawn);
    }
    assert_eq!(drawn[&(1, 0)], expected(&request, 0));
}
