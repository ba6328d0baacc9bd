//! Passes over a job whose learner samples in pods of their own.

use super::*;

/// A job whose learner samples in `replicas` pods; edits keep its status.
fn separate(world: &mut World, replicas: u32, suspend: bool) -> Arc<TrainingJob> {
    let spec = json!({"model": {"uri": "pvc://digits/base"}, "datasets": [{"datasetRef": {"name": "pairs"}}],
        "algorithm": {"grpo": {"steps": 80}}, "rewards": [{"rule": "preference", "weight": 1.0}], "suspend": suspend,
        "checkpoint": {"storage": {"claimName": "digits"}}, "roles": {"rollout": {"replicas": replicas}}});
    let status = world.read("trainingjobs", "critic")["status"].clone();
    Arc::new(world.put("trainingjobs", "TrainingJob", "critic", &spec, &status))
}

async fn pass(world: &World, job: &Arc<TrainingJob>) {
    let pass = training_job::reconcile(Arc::clone(job), Arc::clone(&world.context));
    pass.await.expect("a pass");
}

fn of_kind(writes: &[String], prefix: &str) -> usize {
    writes.iter().filter(|write| write.starts_with(prefix)).count()
}

#[tokio::test]
async fn a_gang_of_64_pods_is_one_pass_of_one_write_each_and_no_read() {
    let mut world = World::new();
    ready_dataset(&mut world);
    let job = separate(&mut world, 63, false);
    pass(&world, &job).await;
    let writes = world.writes();
    assert_eq!(of_kind(&writes, "pods/"), 64);
    // Token, two roles, status and event.
    assert_eq!(writes.len(), 64 + 5, "{writes:?}");
    assert_eq!(world.reads(), [""; 0]);
    // The watch has not told of them yet: nothing is made twice.
    pass(&world, &job).await;
    assert_eq!((world.writes(), world.reads()), (vec![], vec![]));
    world.all_run();
    pass(&world, &job).await;
    assert_eq!(world.writes(), ["critic/status"]);
    assert_eq!(
        world.read("trainingjobs", "critic")["status"]["rollout"]["ready"],
        "63/63"
    );
    pass(&world, &job).await;
    assert_eq!((world.writes(), world.reads()), (vec![], vec![]));
}

#[tokio::test]
async fn a_rollout_pod_that_is_gone_is_made_again_and_the_learner_is_left_alone() {
    let mut world = World::new();
    ready_dataset(&mut world);
    let job = separate(&mut world, 3, false);
    pass(&world, &job).await;
    world.all_run();
    pass(&world, &job).await;
    world.writes();
    let evicted = json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"});
    world.pod("critic-rollout-1-1", &evicted);
    pass(&world, &job).await;
    let writes = world.writes();
    assert_eq!(of_kind(&writes, "pods/critic-rollout-1-2"), 1, "{writes:?}");
    assert_eq!(of_kind(&writes, "pods/"), 1);
    assert_eq!(of_kind(&writes, "event RolloutPodsReplaced"), 1);
    let status = world.read("trainingjobs", "critic")["status"].clone();
    assert_eq!(
        (&status["restarts"], &status["rollout"]["restarts"]),
        (&json!(0), &json!(1))
    );
    world.pod("critic-rollout-1-2", &json!({"phase": "Pending"}));
    pass(&world, &job).await;
    assert_eq!(
        of_kind(&world.writes(), &format!("DELETE {CORE}/pods/critic-rollout-1-1")),
        1
    );
}

#[tokio::test]
async fn rollout_pods_come_and_go_with_the_spec_and_none_is_asked_to_go_twice() {
    let mut world = World::new();
    ready_dataset(&mut world);
    let job = separate(&mut world, 2, false);
    pass(&world, &job).await;
    world.all_run();
    pass(&world, &job).await;
    world.writes();
    let job = separate(&mut world, 4, false);
    pass(&world, &job).await;
    let writes = world.writes();
    assert_eq!(
        of_kind(&writes, "pods/critic-rollout-2-1") + of_kind(&writes, "pods/critic-rollout-3-1"),
        2
    );
    let job = separate(&mut world, 1, false);
    pass(&world, &job).await;
    assert_eq!(
        of_kind(&world.writes(), &format!("DELETE {CORE}/pods/critic-rollout")),
        3
    );
    let job = separate(&mut world, 1, true);
    pass(&world, &job).await;
    let writes = world.writes();
    assert_eq!(of_kind(&writes, &format!("DELETE {CORE}/pods/critic-rollout-0-1")), 1);
    assert_eq!(of_kind(&writes, &format!("DELETE {CORE}/pods/critic-train-1")), 1);
    assert_eq!(of_kind(&writes, "DELETE"), 2, "{writes:?}");
    pass(&world, &job).await;
    assert_eq!(world.writes(), [""; 0], "the watch has not told that they go");
}

#[tokio::test]
async fn a_finished_run_leaves_no_rollout_pods() {
    let mut world = World::new();
    ready_dataset(&mut world);
    let job = separate(&mut world, 2, false);
    pass(&world, &job).await;
    world.all_run();
    world.writes();
    let last = json!({"stage": "Completed", "step": 80, "totalSteps": 80, "metrics": {"loss": 0.1}});
    world.pod("critic-train-1", &exited(0, &last));
    pass(&world, &job).await;
    assert_eq!(
        of_kind(&world.writes(), &format!("DELETE {CORE}/pods/critic-rollout")),
        2
    );
    assert_eq!(world.read("trainingjobs", "critic")["status"]["phase"], "Complete");
}
