//! Decisions about rollout pods.

use super::*;

fn member(index: u32, attempt: u32, ready: bool) -> PodView {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": format!("critic-rollout-{index}-{attempt}"),
        "uid": format!("r{index}{attempt}")}, "status": {"podIP": format!("10.0.0.{index}")}}))
    .expect("a pod");
    PodView {
        stage: PodStage::Running,
        index: Some(index),
        attempt,
        ready,
        ..PodView::of(&pod, at(0))
    }
}

/// A job whose learner and `count` rollout pods run.
fn separate(count: u32) -> Observed {
    let mut observed = training(json!({"roles": {"rollout": {"replicas": count}}}), at_step(40, &[]));
    observed.rollout = (0..count).map(|index| member(index, 1, true)).collect();
    observed
}

fn lost(observed: &mut Observed, place: usize, at: Timestamp) {
    observed.rollout[place].stage = PodStage::Exited(Exit {
        at: Some(at),
        disrupted: true,
        progress: None,
        ..exit(137, Progress::default())
    });
}

#[test]
fn learner_and_rollout_pods_are_made_together() {
    let observed = observed(json!({"roles": {"rollout": {"replicas": 3, "threads": 5}}}));
    let plan = validate(&observed).expect("valid");
    let objects = build::build(&observed, &decided(&observed), &fleet(&observed), Some(&plan), "worker");
    let objects = objects.expect("builds").pods;
    let names: Vec<_> = objects
        .pods
        .iter()
        .filter_map(|pod| pod.metadata.name.as_deref())
        .collect();
    let expected = [
        "critic-train-1",
        "critic-rollout-0-1",
        "critic-rollout-1-1",
        "critic-rollout-2-1",
    ];
    assert_eq!(names, expected);
    assert_eq!(objects.config_maps.len(), 2);
    let Role::Train(train) = plan.learner.role else {
        panic!("another role");
    };
    assert_eq!(train.rollout.map(|rollout| rollout.lanes), Some(5));
    let (status, notes) = step(&observed);
    assert_eq!(notes[0].text, "pod critic-train-1 and 3 rollout pods were created");
    assert_eq!(status.rollout.expect("rollout").ready, "0/3");
}

#[test]
fn a_lost_rollout_pod_is_replaced_after_a_delay_and_the_learner_stays() {
    let mut observed = separate(3);
    lost(&mut observed, 1, at(1000));
    assert_eq!(fleet(&observed).create, []);
    assert_eq!(fleet(&observed).look_again, Some(at(1001)));
    observed.now = at(1001);
    assert_eq!(fleet(&observed).create, [rollout::Place { index: 1, attempt: 2 }]);
    assert_eq!(decided(&observed), Decision::Watch);
    let (status, notes) = step(&observed);
    assert_eq!((status.restarts, status.attempt), (0, 1));
    let rollout = status.rollout.clone().expect("rollout");
    assert_eq!((rollout.ready.as_str(), rollout.restarts), ("2/3", 1));
    assert_eq!(notes[0].reason, reason::ROLLOUT_REPLACED);
    // Its successor is there: the old one goes, and nothing is counted twice.
    observed.status = status;
    observed.rollout.insert(2, member(1, 2, true));
    let fleet = fleet(&observed);
    assert_eq!(fleet.create, []);
    assert_eq!(fleet.remove, [("critic-rollout-1-1".to_owned(), "r11".to_owned())]);
    assert_eq!(step(&observed).0.rollout.expect("rollout").restarts, 1);
}

#[test]
fn a_place_whose_pods_are_lost_over_and_over_is_filled_ever_later() {
    let mut observed = separate(1);
    observed.rollout = vec![member(0, 4, false)];
    lost(&mut observed, 0, at(100));
    observed.now = at(101);
    assert_eq!(fleet(&observed).look_again, Some(at(108)));
    // Lived for longer than ten minutes: the first delay again.
    lost(&mut observed, 0, at(701));
    observed.now = at(702);
    assert_eq!(fleet(&observed).create.len(), 1);
}

#[test]
fn rollout_pods_that_are_drained_are_replaced_at_once_under_another_name() {
    let mut observed = separate(2);
    observed.rollout[0].terminating = true;
    assert_eq!(fleet(&observed).create, [rollout::Place { index: 0, attempt: 2 }]);
}

#[test]
fn scaling_moves_the_number_of_rollout_pods_while_the_run_goes_on() {
    let mut observed = separate(3);
    observed.job.spec.roles.rollout.replicas = 1;
    let fewer = fleet(&observed);
    let removed: Vec<_> = fewer.remove.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(removed, ["critic-rollout-1-1", "critic-rollout-2-1"]);
    observed.job.spec.roles.rollout.replicas = 5;
    let more = fleet(&observed);
    assert_eq!((more.create.len(), more.remove.len()), (2, 0));
}

#[test]
fn a_run_that_is_suspended_or_over_has_no_rollout_pods() {
    let mut suspended = separate(2);
    suspended.job.spec.suspend = true;
    assert_eq!((fleet(&suspended).remove.len(), fleet(&suspended).create.len()), (2, 0));
    let mut complete = separate(2);
    complete.pod = Some(pod(PodStage::Exited(exit(0, at_step(80, &[80])))));
    complete.live = None;
    assert_eq!(fleet(&complete).remove.len(), 2);
    complete.status = step(&complete).0;
    assert!(matches!(decided(&complete), Decision::Rest { .. }));
    assert_eq!(fleet(&complete).remove.len(), 2, "what is left of them still goes");
    assert_eq!(complete.status.rollout.expect("rollout").ready, "0/0");
}

#[test]
fn a_learner_that_is_replaced_keeps_its_rollout_pods() {
    let mut observed = separate(2);
    observed.pod = Some(pod(PodStage::Exited(exit(137, at_step(40, &[])))));
    assert!(matches!(decided(&observed), Decision::Start { attempt: 2, .. }));
    assert_eq!((fleet(&observed).remove.len(), fleet(&observed).create.len()), (0, 0));
}

#[test]
fn rollout_pods_end_a_run_only_if_none_can_work() {
    let mut observed = separate(2);
    let crash = |code, message: &str| {
        let progress = Progress {
            message: message.into(),
            ..Progress::default()
        };
        Some(exit(code, progress))
    };
    observed.rollout[1].crash = crash(137, "killed");
    observed.rollout[1].container_restarts = 99;
    assert_eq!(decided(&observed), Decision::Watch, "it is ready again");
    observed.rollout[1].ready = false;
    assert_eq!(decided(&observed), Decision::Watch, "it does not crash over and over");
    observed.rollout[1].crash_loops = true;
    let Decision::Fail { reason: why, message } = decided(&observed) else {
        panic!("the run goes on");
    };
    assert_eq!(why, reason::RESTART_LIMIT);
    assert!(message.contains("critic-rollout-1-1 crashed 99 times"), "{message}");
    observed.rollout[1].crash = crash(78, "config.json: hidden_size is 0");
    let Decision::Fail { reason: why, message } = decided(&observed) else {
        panic!("the run goes on");
    };
    assert_eq!(why, reason::PERMANENT_FAILURE);
    assert_eq!(message, "rollout pod critic-rollout-1-1: config.json: hidden_size is 0");
}

#[test]
fn a_learner_is_told_its_ready_rollout_pods_until_it_knows_them() {
    let mut observed = separate(2);
    observed.pod.as_mut().expect("a learner").ip = Some("10.0.1.1".into());
    observed.rollout[1].ready = false;
    let tell = |observed: &Observed| rollout::news_for_learner(observed, &decided(observed));
    let (ip, pods) = tell(&observed).expect("news");
    assert_eq!((ip.as_str(), pods.pods.len()), ("10.0.1.1", 1));
    assert_eq!(pods.pods[0].address, "10.0.0.0:8080");
    let knows = |observed: &mut Observed, revision: &str| {
        let told = flotilla_api::progress::RolloutProgress {
            revision: revision.into(),
            weight_version: Some(39),
        };
        observed.live.as_mut().expect("live").rollout = Some(told);
    };
    knows(&mut observed, &pods.revision);
    assert_eq!(tell(&observed), None);
    assert_eq!(step(&observed).0.rollout.expect("rollout").weight_version, Some(39));
    // A container that was started again lost its weights: that is news.
    observed.rollout[0].container_restarts = 1;
    assert!(tell(&observed).is_some());
    observed.live = None;
    assert_eq!(tell(&observed), None, "a learner that does not answer is not told");
}
