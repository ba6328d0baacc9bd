//! The pod status that follows from what the node observed, as the kubelet writes it.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    record::{ContainerRecord, Exit, PodRecord, State},
    restart::RestartPolicy,
};

/// The node's own conditions; others belong to whoever wrote them.
pub const OWN_CONDITIONS: [&str; 5] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
];

/// Phase of a pod (core/v1 `PodStatus.phase`).
pub fn phase(pod: &Pod, record: &PodRecord) -> &'static str {
    if let Some(terminal) = terminal_phase(pod) {
        return terminal;
    }
    let policy = restart_policy(pod);
    if record.ended.is_some() {
        return if record.is_running() { "Running" } else { "Failed" };
    }
    let stopping = pod.metadata.deletion_timestamp.is_some();
    if stopping && !record.is_running() && record.containers.iter().any(|c| c.newest_exit().is_some()) {
        let failed = record.main().any(|c| c.newest_exit().is_none_or(|exit| exit.code != 0));
        return if failed { "Failed" } else { "Succeeded" };
    }
    let main_began = record.main().any(|c| c.newest_exit().is_some() || running(c));
    if !main_began && record.init().any(|c| !c.succeeded()) {
        let failed = policy == RestartPolicy::Never
            && record
                .init()
                .any(|c| matches!(&c.state, State::Terminated(exit) if exit.code != 0));
        return if failed { "Failed" } else { "Pending" };
    }
    main_phase(policy, record)
}

fn main_phase(policy: RestartPolicy, record: &PodRecord) -> &'static str {
    let never_ran = |c: &ContainerRecord| matches!(c.state, State::Waiting { .. }) && c.last.is_none();
    if record.main().any(never_ran) {
        return "Pending";
    }
    if record.main().any(|c| !matches!(c.state, State::Terminated(_))) {
        return "Running";
    }
    let failed = record.main().any(|c| !c.succeeded());
    match policy {
        RestartPolicy::Always => "Running",
        RestartPolicy::OnFailure if failed => "Running",
        RestartPolicy::Never if failed => "Failed",
        RestartPolicy::OnFailure | RestartPolicy::Never => "Succeeded",
    }
}

/// The phase that the API already has, when no later observation may change it.
pub fn terminal_phase(pod: &Pod) -> Option<&'static str> {
    match pod.status.as_ref()?.phase.as_deref()? {
        "Succeeded" => Some("Succeeded"),
        "Failed" => Some("Failed"),
        _ => None,
    }
}

/// `spec.restartPolicy`.
pub fn restart_policy(pod: &Pod) -> RestartPolicy {
    RestartPolicy::parse(pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()))
}

/// The whole status. Times of conditions that did not change come from `pod`; conditions of others are kept.
pub fn pod_status(pod: &Pod, record: &PodRecord, host_ip: Ipv4Addr, now: Timestamp) -> PodStatus {
    let before = pod.status.clone().unwrap_or_default();
    let spec = pod.spec.clone().unwrap_or_default();
    let phase = phase(pod, record);
    let address = record.ip.map(|ip| ip.to_string());
    let (reason, message) = record.ended.clone().map_or((None, None), |(r, m)| (Some(r), Some(m)));
    PodStatus {
        conditions: Some(conditions(pod, record, phase, now)),
        container_statuses: some_if_any(statuses(record.main(), &spec.containers)),
        init_container_statuses: some_if_any(statuses(
            record.init(),
            spec.init_containers.as_deref().unwrap_or_default(),
        )),
        host_ip: Some(host_ip.to_string()),
        host_ips: Some(vec![HostIP {
            ip: host_ip.to_string(),
        }]),
        pod_ip: address.clone(),
        pod_ips: address.map(|ip| vec![PodIP { ip }]),
        phase: Some(phase.to_owned()),
        qos_class: before.qos_class.clone().or_else(|| Some(qos_class(&spec).to_owned())),
        start_time: before.start_time.clone().or(Some(Time(record.started_at))),
        reason: reason.or_else(|| before.reason.clone()),
        message: message.or_else(|| before.message.clone()),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    }
}

fn some_if_any<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn statuses<'a>(records: impl Iterator<Item = &'a ContainerRecord>, specs: &[Container]) -> Vec<ContainerStatus> {
    records
        .map(|record| {
            let image = specs
                .iter()
                .find(|c| c.name == record.name)
                .and_then(|c| c.image.clone());
            container_status(record, image.unwrap_or_default())
        })
        .collect()
}

fn container_status(record: &ContainerRecord, image: String) -> ContainerStatus {
    let began = running(record) || record.newest_exit().is_some();
    let ready = if record.init { record.succeeded() } else { record.ready };
    ContainerStatus {
        name: record.name.clone(),
        image_id: if began { image.clone() } else { String::new() },
        image,
        container_id: record
            .process
            .map(super::record::ProcessId::container_id)
            .or_else(|| record.newest_exit().and_then(|exit| exit.container_id.clone())),
        state: Some(container_state(&record.state)),
        last_state: Some(ContainerState {
            terminated: record.last.as_ref().map(terminated),
            ..ContainerState::default()
        }),
        ready,
        started: Some(record.started),
        restart_count: i32::try_from(record.restart_count).unwrap_or(i32::MAX),
        ..ContainerStatus::default()
    }
}

fn container_state(state: &State) -> ContainerState {
    match state {
        State::Waiting { reason, message, .. } => ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.clone()),
                message: message.clone(),
            }),
            ..ContainerState::default()
        },
        State::Running { started_at } => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(Time(*started_at)),
            }),
            ..ContainerState::default()
        },
        State::Terminated(exit) => ContainerState {
            terminated: Some(terminated(exit)),
            ..ContainerState::default()
        },
    }
}

fn terminated(exit: &Exit) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: exit.code,
        signal: exit.signal,
        reason: Some(exit.reason.clone()),
        message: exit.message.clone(),
        started_at: Some(Time(exit.started_at)),
        finished_at: Some(Time(exit.finished_at)),
        container_id: exit.container_id.clone(),
    }
}

fn conditions(pod: &Pod, record: &PodRecord, phase: &str, now: Timestamp) -> Vec<PodCondition> {
    let sandbox_ready = record.prepared && phase != "Succeeded" && phase != "Failed";
    let (containers_ready, ready) = (containers_ready(record, phase), pod_ready(pod, record, phase));
    let own = [
        ("PodReadyToStartContainers", Verdict::of(sandbox_ready)),
        ("Initialized", initialized(record, phase)),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::of(true)),
    ];
    let before = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    let mut all: Vec<PodCondition> = own
        .into_iter()
        .map(|(kind, verdict)| condition(kind, verdict, before, pod.metadata.generation, now))
        .collect();
    all.extend(
        before
            .iter()
            .filter(|c| !OWN_CONDITIONS.contains(&c.type_.as_str()))
            .cloned(),
    );
    all
}

struct Verdict {
    holds: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn of(holds: bool) -> Self {
        Self {
            holds,
            reason: None,
            message: None,
        }
    }

    fn not(reason: &'static str, message: Option<String>) -> Self {
        Self {
            holds: false,
            reason: Some(reason),
            message,
        }
    }
}

fn condition(
    kind: &str,
    verdict: Verdict,
    before: &[PodCondition],
    generation: Option<i64>,
    now: Timestamp,
) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    let since = before
        .iter()
        .find(|c| c.type_ == kind && c.status == status)
        .and_then(|c| c.last_transition_time.clone())
        .unwrap_or(Time(now));
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(since),
        observed_generation: generation,
        ..PodCondition::default()
    }
}

fn initialized(record: &PodRecord, phase: &str) -> Verdict {
    if phase == "Succeeded" {
        return Verdict {
            holds: true,
            reason: Some("PodCompleted"),
            message: None,
        };
    }
    let main_began = record.main().any(|c| c.newest_exit().is_some() || running(c));
    let incomplete: Vec<&str> = record
        .init()
        .filter(|c| !c.succeeded())
        .map(|c| c.name.as_str())
        .collect();
    if main_began || incomplete.is_empty() {
        return Verdict::of(true);
    }
    Verdict::not(
        "ContainersNotInitialized",
        Some(format!("containers with incomplete status: [{}]", incomplete.join(" "))),
    )
}

fn containers_ready(record: &PodRecord, phase: &str) -> Verdict {
    match phase {
        "Succeeded" => return Verdict::not("PodCompleted", None),
        "Failed" => return Verdict::not("PodFailed", None),
        _ => {}
    }
    let unready: Vec<&str> = record.main().filter(|c| !c.ready).map(|c| c.name.as_str()).collect();
    if unready.is_empty() {
        return Verdict::of(true);
    }
    Verdict::not(
        "ContainersNotReady",
        Some(format!("containers with unready status: [{}]", unready.join(" "))),
    )
}

fn pod_ready(pod: &Pod, record: &PodRecord, phase: &str) -> Verdict {
    let containers = containers_ready(record, phase);
    if !containers.holds {
        return containers;
    }
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    let closed: Vec<String> = pod
        .spec
        .iter()
        .flat_map(|spec| spec.readiness_gates.iter().flatten())
        .map(|gate| gate.condition_type.as_str())
        .filter(|gate| !conditions.iter().any(|c| c.type_ == *gate && c.status == "True"))
        .map(|gate| {
            format!("corresponding condition of pod readiness gate \"{gate}\" does not exist or is not \"True\".")
        })
        .collect();
    if closed.is_empty() {
        Verdict::of(true)
    } else {
        Verdict::not("ReadinessGatesNotReady", Some(closed.join(", ")))
    }
}

fn running(record: &ContainerRecord) -> bool {
    matches!(record.state, State::Running { .. })
}

/// `status.qosClass` by the requests and limits of cpu and memory.
fn qos_class(spec: &PodSpec) -> &'static str {
    let kinds = ["cpu", "memory"];
    let (mut any, mut guaranteed) = (false, true);
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let resources = container.resources.clone().unwrap_or_default();
        let (requests, limits) = (
            resources.requests.unwrap_or_default(),
            resources.limits.unwrap_or_default(),
        );
        for kind in kinds {
            any |= requests.contains_key(kind) || limits.contains_key(kind);
            guaranteed &= limits
                .get(kind)
                .is_some_and(|limit| requests.get(kind).unwrap_or(limit) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PodReadinessGate;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn pod(policy: &str, init: &[&str], main: &[&str]) -> Pod {
        let containers = |names: &[&str]| -> Vec<Container> {
            names
                .iter()
                .map(|name| Container {
                    name: (*name).to_owned(),
                    image: Some("sh".to_owned()),
                    ..Container::default()
                })
                .collect()
        };
        Pod {
            spec: Some(PodSpec {
                restart_policy: Some(policy.to_owned()),
                init_containers: Some(containers(init)),
                containers: containers(main),
                ..PodSpec::default()
            }),
            ..Pod::default()
        }
    }

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            signal: None,
            reason: if code == 0 { "Completed" } else { "Error" }.to_owned(),
            message: None,
            started_at: at(1),
            finished_at: at(2),
            container_id: Some("process://7-9".to_owned()),
        }
    }

    fn status_of<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
        status
            .conditions
            .as_deref()
            .unwrap()
            .iter()
            .find(|c| c.type_ == kind)
            .unwrap()
    }

    fn status(pod: &Pod, record: &PodRecord) -> PodStatus {
        pod_status(pod, record, Ipv4Addr::LOCALHOST, at(50))
    }

    #[test]
    fn a_new_pod_is_pending_and_its_container_is_being_created() {
        let pod = pod("Always", &[], &["a"]);
        let status = status(&pod, &PodRecord::new(&pod, at(0)));
        assert_eq!(status.phase.as_deref(), Some("Pending"));
        let waiting = status.container_statuses.as_ref().unwrap()[0]
            .state
            .clone()
            .unwrap()
            .waiting
            .unwrap();
        assert_eq!(waiting.reason.as_deref(), Some("ContainerCreating"));
        assert_eq!(
            status_of(&status, "Ready").reason.as_deref(),
            Some("ContainersNotReady")
        );
        assert_eq!(
            status_of(&status, "ContainersReady").message.as_deref(),
            Some("containers with unready status: [a]")
        );
        assert_eq!(status_of(&status, "Initialized").status, "True");
    }

    #[test]
    fn containers_wait_while_an_init_container_runs() {
        let pod = pod("Always", &["i"], &["a"]);
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].state = State::Running { started_at: at(1) };
        let status = status(&pod, &record);
        assert_eq!(status.phase.as_deref(), Some("Pending"));
        let initialized = status_of(&status, "Initialized");
        assert_eq!(initialized.reason.as_deref(), Some("ContainersNotInitialized"));
        assert_eq!(
            initialized.message.as_deref(),
            Some("containers with incomplete status: [i]")
        );
    }

    #[test]
    fn the_phase_follows_exit_codes_and_the_restart_policy() {
        for (policy, code, expected) in [
            ("Never", 0, "Succeeded"),
            ("Never", 1, "Failed"),
            ("OnFailure", 0, "Succeeded"),
            ("OnFailure", 1, "Running"),
            ("Always", 0, "Running"),
            ("Always", 1, "Running"),
        ] {
            let pod = pod(policy, &[], &["a"]);
            let mut record = PodRecord::new(&pod, at(0));
            record.containers[0].end(exit(code));
            assert_eq!(phase(&pod, &record), expected, "{policy} {code}");
        }
    }

    #[test]
    fn a_failed_init_container_fails_a_pod_that_never_restarts() {
        let pod = pod("Never", &["i"], &["a"]);
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].end(exit(2));
        assert_eq!(phase(&pod, &record), "Failed");
    }

    #[test]
    fn a_terminal_phase_never_changes_again() {
        let mut pod = pod("Never", &[], &["a"]);
        pod.status = Some(PodStatus {
            phase: Some("Failed".to_owned()),
            ..PodStatus::default()
        });
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].state = State::Running { started_at: at(1) };
        assert_eq!(phase(&pod, &record), "Failed");
    }

    #[test]
    fn a_completed_pod_says_so_in_its_conditions() {
        let pod = pod("Never", &[], &["a"]);
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].end(exit(0));
        let status = status(&pod, &record);
        for kind in ["Ready", "ContainersReady"] {
            assert_eq!(status_of(&status, kind).reason.as_deref(), Some("PodCompleted"));
        }
        let container = &status.container_statuses.as_ref().unwrap()[0];
        assert_eq!(container.container_id.as_deref(), Some("process://7-9"));
        assert_eq!(
            container.state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code,
            0
        );
    }

    #[test]
    fn a_stopped_pod_that_is_being_deleted_gets_a_terminal_phase() {
        let mut pod = pod("Always", &[], &["a"]);
        pod.metadata.deletion_timestamp = Some(Time(at(3)));
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].end(exit(0));
        assert_eq!(phase(&pod, &record), "Succeeded");
        record.containers[0].end(exit(143));
        assert_eq!(phase(&pod, &record), "Failed");
    }

    #[test]
    fn a_readiness_gate_holds_back_ready_but_not_containers_ready() {
        let mut pod = pod("Always", &[], &["a"]);
        pod.spec.as_mut().unwrap().readiness_gates = Some(vec![PodReadinessGate {
            condition_type: "example.org/gate".to_owned(),
        }]);
        let mut record = PodRecord::new(&pod, at(0));
        record.containers[0].state = State::Running { started_at: at(1) };
        record.containers[0].ready = true;
        let closed = status(&pod, &record);
        assert_eq!(status_of(&closed, "ContainersReady").status, "True");
        assert_eq!(
            status_of(&closed, "Ready").reason.as_deref(),
            Some("ReadinessGatesNotReady")
        );
        pod.status = Some(PodStatus {
            conditions: Some(vec![PodCondition {
                type_: "example.org/gate".to_owned(),
                status: "True".to_owned(),
                ..PodCondition::default()
            }]),
            ..PodStatus::default()
        });
        let open = status(&pod, &record);
        assert_eq!(status_of(&open, "Ready").status, "True");
        assert_eq!(status_of(&open, "example.org/gate").status, "True");
    }

    #[test]
    fn a_condition_keeps_its_time_while_its_status_stays() {
        let mut pod = pod("Always", &[], &["a"]);
        let record = PodRecord::new(&pod, at(0));
        pod.status = Some(pod_status(&pod, &record, Ipv4Addr::LOCALHOST, at(10)));
        let later = pod_status(&pod, &record, Ipv4Addr::LOCALHOST, at(20));
        assert_eq!(Some(later), pod.status);
    }
}
