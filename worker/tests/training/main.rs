//! Role `train` on a tiny model: the same bytes however often it is interrupted and however many threads share the work.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail as tests do")]

mod fixture;

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use flotilla_api::{
    algorithm::Module,
    evaluation::Guard,
    progress::Stage,
    role::{ModelSource, Precision, Role, Rollout, Train},
    rollout::{RolloutPod, RolloutPods},
};
use flotilla_worker::{
    WorkerError,
    context::Context,
    device::Wanted,
    role,
    train::{fleet::Fleet, run::train},
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use self::fixture::{Fixture, device, exact_match, instruction};

#[test]
fn a_killed_sft_run_that_goes_on_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let spec = fixture.sft("a");
    let straight = fixture.complete(&spec);
    assert_eq!(fixture.complete(&spec), straight, "a complete run stays complete");
    // After an evaluation, and between two.
    for step in [4, 3, 1] {
        fixture.kill_after("a", step);
        assert_eq!(fixture.complete(&spec), straight, "killed after step {step}");
        assert_eq!(fixture.steps("a"), vec![1, 2, 3, 4, 5]);
    }
    let weights = fs::read(fixture.path("jobs/a/checkpoints/step-00000005/model.safetensors")).expect("weights");
    let base = flotilla_model::Vlm::load(&fixture.path("jobs/a/checkpoints/step-00000005"), &Default::default());
    assert!(base.is_ok() && !weights.is_empty(), "a checkpoint is a model directory");
    assert!(fixture.path("jobs/a/plot.svg").is_file());
}

#[test]
fn a_killed_grpo_run_that_goes_on_ends_with_the_same_bytes_and_so_does_another_number_of_threads() {
    let fixture = Fixture::new();
    let spec = fixture.grpo("a", vec![Module::Vision]);
    let straight = fixture.complete(&spec);
    for step in [2, 1] {
        fixture.kill_after("a", step);
        assert_eq!(fixture.complete(&spec), straight, "killed after step {step}");
        assert_eq!(fixture.steps("a"), vec![1, 2, 3]);
    }
    for threads in [1, 3] {
        let other = Train {
            threads,
            output_uri: format!("pvc://data/jobs/threads-{threads}"),
            ..spec.clone()
        };
        assert_eq!(fixture.complete(&other), straight, "{threads} threads");
    }
    let seed = Train {
        seed: 6,
        output_uri: "pvc://data/jobs/seed".into(),
        ..spec
    };
    assert_ne!(fixture.complete(&seed), straight, "another seed is another run");
}

/// On a GPU bits depend on which samples are computed together, and so on when each of them ends.
#[test]
fn a_killed_run_whose_samples_end_at_different_lengths_goes_on_to_the_same_bytes() {
    let fixture = Fixture::new();
    let mut spec = fixture.grpo("a", vec![Module::Vision]);
    let grpo = spec.algorithm.grpo.as_mut().expect("GRPO");
    grpo.max_completion_tokens = 40;
    let (_, progress) = fixture.run(&spec);
    let straight = fixture.complete(&spec);
    let [mean, longest] = ["response_length/mean", "response_length/max"].map(|name| progress.metrics[name]);
    assert!(mean < longest, "{mean} {longest}");
    for step in [2, 1] {
        fixture.kill_after("a", step);
        assert_eq!(fixture.complete(&spec), straight, "killed after step {step}");
    }
}

#[test]
fn grpo_trains_the_vision_tower_unless_it_is_frozen() {
    let fixture = Fixture::new();
    let tower = |run: &str, freeze: Vec<Module>| {
        fixture.complete(&fixture.grpo(run, freeze));
        let path = fixture.path(&format!("jobs/{run}/checkpoints/step-00000003/model.safetensors"));
        let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).expect("weights");
        let tensor = &tensors["visual.blocks.0.attn.qkv.weight"];
        tensor.flatten_all().expect("flat").to_vec1::<f32>().expect("f32")
    };
    assert_ne!(tower("trained", vec![]), tower("frozen", vec![Module::Vision]));
}

#[test]
fn a_onevision_base_is_trained_whole_and_its_checkpoint_is_one_of_its_family() {
    let fixture = Fixture::new();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/fixtures/tiny-llava-onevision");
    fs::remove_dir_all(fixture.path("base")).expect("remove");
    fs::create_dir(fixture.path("base")).expect("create");
    for entry in fs::read_dir(base).expect("the fixture") {
        let entry = entry.expect("entry");
        fs::copy(entry.path(), fixture.path("base").join(entry.file_name())).expect("copy");
    }
    let mut spec = fixture.sft("a");
    spec.model.random_seed = None;
    fixture.complete(&spec);
    let load = |path: &str| flotilla_model::Vlm::load(&fixture.path(path), &Default::default()).expect("a model");
    let (before, after) = (load("base"), load("jobs/a/checkpoints/step-00000005"));
    for ((name, before), (_, after)) in before.named_vars().iter().zip(after.named_vars()) {
        let values = |var: &candle_core::Var| var.flatten_all().expect("flat").to_vec1::<f32>().expect("f32");
        // The feature is taken before it, so that no gradient reaches it.
        let unused = name.contains("post_layernorm");
        assert_eq!(values(before) == values(&after), unused, "{name}");
    }
}

#[test]
fn a_suspended_run_saves_what_is_done_and_goes_on_to_the_same_bytes() {
    let fixture = Fixture::new();
    let straight = fixture.complete(&fixture.grpo("straight", vec![Module::Vision]));
    let spec = Train {
        checkpoint_every: 0,
        ..fixture.grpo("suspended", vec![Module::Vision])
    };
    // The signal comes at different places: in an evaluation, in rollouts, between steps.
    let mut suspensions = 0;
    for limit in [3, 9, 14, 25, 40] {
        let polls = AtomicUsize::new(0);
        let context = fixture.context();
        let outcome = train(&context, &spec, None, &|| {
            polls.fetch_add(1, Ordering::Relaxed) >= limit
        });
        match outcome {
            Err(WorkerError::Suspended { step }) => {
                suspensions += 1;
                assert_eq!(
                    context.progress.snapshot().checkpoints.last().expect("saved").step,
                    step
                );
            }
            Ok(()) => break,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(suspensions > 1, "{suspensions} suspensions");
    assert_eq!(fixture.complete(&spec), straight);
    assert_eq!(fixture.steps("suspended"), vec![1, 2, 3]);
}

#[test]
fn scores_and_metrics_reach_the_progress() {
    let fixture = Fixture::new();
    let spec = Train {
        evaluation_sets: vec![fixture.questions(), fixture.pairs()],
        ..fixture.grpo("a", vec![Module::Vision])
    };
    let (outcome, progress) = fixture.run(&spec);
    outcome.expect("completes");
    assert_eq!((progress.step, progress.total_steps), (3, 3));
    assert_eq!(progress.initial_scores.len(), 2);
    assert_eq!(
        progress.scores.iter().map(|score| score.step).collect::<Vec<_>>(),
        vec![3, 3]
    );
    assert!(progress.scores[1].swap_consistency.is_some());
    for name in [
        "reward/overall",
        "reward/preference",
        "reward/format",
        "actor/kl_loss",
        "actor/pg_loss",
        "actor/grad_norm",
        "response_length/mean",
        "timing_s/gen",
        "timing_s/update",
    ] {
        assert!(progress.metrics.contains_key(name), "{name}");
    }
    assert!(
        progress.metrics["rollout/max_log_prob_difference"] < 1e-3,
        "sampler and learner agree"
    );
    assert!(
        progress
            .checkpoints
            .iter()
            .any(|checkpoint| checkpoint.metrics.contains_key("questions/accuracy"))
    );
}

/// A rollout pod over the fixture's base; stopped with the runtime.
fn rollout_pod(fixture: &Fixture, runtime: &tokio::runtime::Runtime, (uid, device): (&str, Wanted)) -> RolloutPod {
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let pod = RolloutPod {
        name: format!("rollout-{uid}"),
        uid: uid.into(),
        address: listener.local_addr().expect("an address").to_string(),
    };
    let spec = Rollout {
        // Other weights than the learner begins with: it sends its own.
        model: ModelSource {
            uri: "pvc://data/base".into(),
            digest: None,
            random_seed: Some(99),
        },
        threads: 1,
        dtype: None,
    };
    let context = Context {
        device,
        ..fixture.context()
    };
    let role = role::run(context, Role::Rollout(spec), listener, CancellationToken::new());
    runtime.spawn(Box::pin(role));
    pod
}

#[test]
fn bf16_is_trained_in_on_a_gpu_and_refused_on_the_cpu() {
    let fixture = Fixture::new();
    let spec = Train {
        dtype: Some(Precision::Bf16),
        ..fixture.grpo("a", vec![Module::Vision])
    };
    if device() == Wanted::Cpu {
        let (outcome, _) = fixture.run(&spec);
        let error = outcome.expect_err("no bf16 on the CPU");
        assert_eq!(error.exit_code(), flotilla_api::names::exit::PERMANENT);
        assert!(flotilla_worker::error::chain(&error).contains("take f32"), "{error}");
        return;
    }
    let straight = fixture.complete(&spec);
    for step in [2, 1] {
        fixture.kill_after("a", step);
        assert_eq!(fixture.complete(&spec), straight, "rounding follows from the seed");
    }
}

#[test]
fn rollout_pods_train_the_same_bytes_as_a_colocated_run() {
    for freeze in [vec![Module::Vision], vec![]] {
        let fixture = Fixture::new();
        let colocated = fixture.complete(&fixture.grpo("colocated", freeze.clone()));
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        // A pod on a GPU takes most of its memory, so that there is room for one beside the learner.
        let pods = [("a", device()), ("b", Wanted::Cpu)].map(|pod| rollout_pod(&fixture, &runtime, pod));
        // Nobody listens there: its work goes to the others.
        let dead = RolloutPod {
            name: "rollout-dead".into(),
            uid: "dead".into(),
            address: "127.0.0.1:1".into(),
        };
        let (told, listed) = watch::channel(RolloutPods {
            revision: "r".into(),
            pods: std::iter::once(dead).chain(pods).collect(),
        });
        let context = fixture.context();
        let fleet = Fleet::new(&context, 1, listed, runtime.handle().clone()).expect("a fleet");
        let spec = fixture.grpo("separate", freeze);
        train(&context, &spec, Some(&fleet), &|| false).expect("completes");
        let progress = context.progress.snapshot();
        assert_eq!(progress.rollout.and_then(|rollout| rollout.weight_version), Some(3));
        let manifest = |run: &str| {
            let checkpoints = fixture.path(&format!("jobs/{run}/checkpoints"));
            fs::read_to_string(checkpoints.join("step-00000003/manifest.json")).expect("manifest")
        };
        // On a GPU the last bits of a sample depend on what is computed beside it.
        if device() == Wanted::Cpu {
            assert_eq!(manifest("separate"), colocated);
        }
        drop(told);
    }
}

#[test]
fn data_that_do_not_fit_the_algorithm_fail_for_good() {
    let fixture = Fixture::new();
    let wrong_set = Train {
        guard: Some(Guard {
            set: "nothing".into(),
            max_drop: 0.1,
        }),
        ..fixture.grpo("guard", vec![])
    };
    let no_answers = Train {
        datasets: vec![fixture.questions()],
        ..fixture.sft("sft")
    };
    let mut changed = fixture.sft("digest");
    changed.datasets[0].digest = "sha256:00".into();
    for (spec, words) in [
        (wrong_set, "guard.set \"nothing\""),
        (no_answers, "no completion to imitate"),
        (changed, "demanded was sha256:00"),
    ] {
        let error = fixture.run(&spec).0.expect_err(words);
        assert_eq!(error.exit_code(), flotilla_api::names::exit::PERMANENT);
        let text = flotilla_worker::error::chain(&error);
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_run_that_loses_the_guarded_ability_ends_with_the_checkpoint_that_had_it() {
    let fixture = Fixture::new();
    let train_on = |run: &str, digit: u8, steps: u32| {
        let source = format!("always-{digit}");
        fixture.write_source(&source, |_| (digit, digit + 1));
        let mut spec = fixture.sft(run);
        spec.datasets = vec![fixture.prepare_from(&source, &format!("{source}-answers"), instruction())];
        spec.evaluation_sets = vec![fixture.prepare_from("always-1", &format!("{run}-ones"), exact_match())];
        spec.evaluation_sets[0].name = "ones".into();
        spec.checkpoint_every = 3;
        spec.keep_last = 1;
        spec.evaluate_every = 5;
        if let Some(sft) = &mut spec.algorithm.sft {
            sft.steps = steps;
        }
        spec
    };
    let (outcome, progress) = fixture.run(&train_on("ones", 1, 40));
    outcome.expect("completes");
    assert_eq!(progress.scores[0].accuracy, 1.0, "the model answers 1");
    let result = progress.checkpoints.last().expect("a checkpoint");
    let mut spec = train_on("twos", 2, 40);
    spec.model = ModelSource {
        uri: result.uri.clone(),
        digest: Some(result.digest.clone()),
        random_seed: None,
    };
    spec.guard = Some(Guard {
        set: "ones".into(),
        max_drop: 0.5,
    });
    let (outcome, progress) = fixture.run(&spec);
    outcome.expect("a guarded end is a goal reached");
    assert_eq!(progress.stage, Stage::Completed);
    assert!(
        progress.message.contains("the guard on ones stopped the run"),
        "{}",
        progress.message
    );
    let tripped = progress.metrics["guard/stopped_at"];
    let result = progress.checkpoints.last().expect("a result");
    assert_eq!(
        f64::from(result.step),
        tripped - 10.0,
        "the evaluation before the two that fell"
    );
    assert_eq!(
        (progress.scores[0].step, progress.scores[0].accuracy >= 0.5),
        (result.step, true)
    );
    // A new attempt comes to the same end.
    let (outcome, again) = fixture.run(&spec);
    outcome.expect("completes again");
    assert_eq!(again.checkpoints.last().map(|c| &c.digest), Some(&result.digest));
}
