//! Startup, readiness and liveness probes.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::net::TcpStream;

use super::process::{self, Launch};

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// Until it succeeds the others wait; its failure kills the container.
    Startup,
    /// Decides whether the pod gets traffic.
    Readiness,
    /// Its failure kills the container.
    Liveness,
}

impl ProbeKind {
    /// As it stands in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }

    /// The container's probe of this kind.
    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
        }
    }
}

/// Turns single outcomes into verdicts: a verdict falls after as many equal outcomes in a row as its threshold says.
#[derive(Clone, Debug)]
pub struct Counter {
    success_threshold: u32,
    failure_threshold: u32,
    last: Option<bool>,
    row: u32,
}

impl Counter {
    /// Thresholds of `probe`; Kubernetes' defaults are 1 success and 3 failures.
    pub fn new(probe: &Probe) -> Self {
        let threshold = |value: Option<i32>, default: u32| {
            value
                .and_then(|value| u32::try_from(value).ok())
                .filter(|value| *value > 0)
                .unwrap_or(default)
        };
        Self {
            success_threshold: threshold(probe.success_threshold, 1),
            failure_threshold: threshold(probe.failure_threshold, 3),
            last: None,
            row: 0,
        }
    }

    /// Counts one outcome; a verdict if its threshold is reached.
    pub fn observe(&mut self, success: bool) -> Option<bool> {
        self.row = if self.last == Some(success) {
            self.row.saturating_add(1)
        } else {
            1
        };
        self.last = Some(success);
        let threshold = if success {
            self.success_threshold
        } else {
            self.failure_threshold
        };
        (self.row >= threshold).then_some(success)
    }
}

/// What a probe needs to know of its container.
#[derive(Clone, Debug)]
pub struct ProbeTarget {
    /// The container.
    pub container: Arc<Container>,
    /// Address of the pod.
    pub pod_ip: Ipv4Addr,
    /// How the container was started: the environment and directory of `exec` probes.
    pub launch: Arc<Launch>,
    /// Client without proxies.
    pub http: reqwest::Client,
}

/// Seconds of a field, at least `least`.
fn seconds(value: Option<i32>, default: u64, least: u64) -> Duration {
    Duration::from_secs(
        value
            .and_then(|value| u64::try_from(value).ok())
            .unwrap_or(default)
            .max(least),
    )
}

/// Pause before the first try.
pub fn initial_delay(probe: &Probe) -> Duration {
    seconds(probe.initial_delay_seconds, 0, 0)
}

/// Pause between two tries.
pub fn period(probe: &Probe) -> Duration {
    seconds(probe.period_seconds, 10, 1)
}

/// Tries once. The error is the text of the `Unhealthy` event.
pub async fn attempt(probe: &Probe, target: &ProbeTarget) -> Result<(), String> {
    let timeout = seconds(probe.timeout_seconds, 1, 1);
    if let Some(action) = &probe.http_get {
        return http_get(action, target, timeout).await;
    }
    if let Some(action) = &probe.tcp_socket {
        let host = action.host.clone().unwrap_or_else(|| target.pod_ip.to_string());
        let port = port_number(&action.port, &target.container)?;
        return match tokio::time::timeout(timeout, TcpStream::connect((host.as_str(), port))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("dial tcp {host}:{port}: {error}")),
            Err(_) => Err(format!("dial tcp {host}:{port}: i/o timeout")),
        };
    }
    if let Some(action) = &probe.exec {
        return exec(action.command.as_deref().unwrap_or_default(), target, timeout).await;
    }
    Err("this node runs httpGet, tcpSocket and exec probes only".to_owned())
}

/// Number of a port given as number or as the name of a container port.
pub fn port_number(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => name.parse().ok().or_else(|| {
            let ports = container.ports.iter().flatten();
            ports
                .filter(|port| port.name.as_ref() == Some(name))
                .map(|port| port.container_port)
                .next()
        }),
    };
    number
        .and_then(|number| u16::try_from(number).ok())
        .filter(|number| *number > 0)
        .ok_or_else(|| format!("container {} has no port {port:?}", container.name))
}

/// One request of an `httpGet` action, for probes and hooks; 200 to 399 is a success.
pub async fn http_get(action: &HTTPGetAction, target: &ProbeTarget, timeout: Duration) -> Result<(), String> {
    let scheme = action.scheme.as_deref().unwrap_or("HTTP");
    if scheme != "HTTP" {
        return Err(format!("this node probes over HTTP only, not over {scheme}"));
    }
    let host = action.host.clone().unwrap_or_else(|| target.pod_ip.to_string());
    let port = port_number(&action.port, &target.container)?;
    let path = action.path.as_deref().unwrap_or("/");
    let url = format!("http://{host}:{port}/{}", path.trim_start_matches('/'));
    let mut request = target
        .http
        .get(&url)
        .timeout(timeout)
        .header("user-agent", "kube-probe/flotilla");
    for header in action.http_headers.iter().flatten() {
        request = request.header(&header.name, &header.value);
    }
    match request.send().await {
        Ok(answer) if (200..400).contains(&answer.status().as_u16()) => Ok(()),
        Ok(answer) => Err(format!(
            "HTTP probe failed with statuscode: {}",
            answer.status().as_u16()
        )),
        Err(error) => Err(format!("Get \"{url}\": {}", innermost(&error))),
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Runs a command in the container's environment; exit code 0 is a success.
pub async fn exec(command: &[String], target: &ProbeTarget, timeout: Duration) -> Result<(), String> {
    let Some((program, args)) = command.split_first() else {
        return Err("exec without a command".to_owned());
    };
    let launch = Launch {
        program: program.into(),
        args: args.to_vec(),
        env: target.launch.env.clone(),
        dir: target.launch.dir.clone(),
    };
    let started = process::start(&launch).map_err(|error| format!("{program}: {error}"))?;
    match tokio::time::timeout(timeout, started.process.wait(|_| ())).await {
        Ok(Ok(ended)) if ended.code == 0 => Ok(()),
        Ok(Ok(ended)) => Err(format!(
            "command {command:?} exited with {}: {}",
            ended.code,
            output_of(started)
        )),
        Ok(Err(error)) => Err(format!("waiting for {command:?}: {error}")),
        Err(_) => {
            started.process.kill();
            let reaped = started.process.wait(|_| ()).await;
            Err(format!(
                "command {command:?} timed out after {timeout:?} ({})",
                reaped.map_or(-1, |ended| ended.code)
            ))
        }
    }
}

/// The first bytes of what a command printed. Its group is dead, so the pipes end.
fn output_of(started: process::Started) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    for stream in [
        &mut started.stdout.take(512) as &mut dyn Read,
        &mut started.stderr.take(512),
    ] {
        if let Err(error) = stream.read_to_end(&mut text) {
            tracing::debug!(%error, "reading the output of a probe");
        }
    }
    String::from_utf8_lossy(&text).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf};

    use k8s_openapi::api::core::v1::{ContainerPort, TCPSocketAction};

    use super::*;

    fn probe(success: i32, failure: i32) -> Probe {
        Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Probe::default()
        }
    }

    fn target() -> ProbeTarget {
        let container = Container {
            name: "c".to_owned(),
            ports: Some(vec![ContainerPort {
                name: Some("http".to_owned()),
                container_port: 8080,
                ..ContainerPort::default()
            }]),
            ..Container::default()
        };
        ProbeTarget {
            container: Arc::new(container),
            pod_ip: Ipv4Addr::LOCALHOST,
            launch: Arc::new(Launch {
                program: PathBuf::from("/bin/true"),
                args: Vec::new(),
                env: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
                dir: PathBuf::from("/"),
            }),
            http: reqwest::Client::new(),
        }
    }

    #[test]
    fn a_verdict_falls_when_its_threshold_is_reached_in_a_row() {
        let mut counter = Counter::new(&probe(2, 3));
        let verdicts: Vec<Option<bool>> = [true, true, false, false, true, false, false, false, false]
            .into_iter()
            .map(|outcome| counter.observe(outcome))
            .collect();
        let expected = [None, Some(true), None, None, None, None, None, Some(false), Some(false)];
        assert_eq!(verdicts, expected);
    }

    #[test]
    fn a_port_is_found_by_number_and_by_name() {
        let container = target().container;
        assert_eq!(port_number(&IntOrString::Int(9), &container), Ok(9));
        assert_eq!(port_number(&IntOrString::String("http".into()), &container), Ok(8080));
        assert_eq!(port_number(&IntOrString::String("81".into()), &container), Ok(81));
        assert!(port_number(&IntOrString::String("none".into()), &container).is_err());
    }

    #[tokio::test]
    async fn exec_succeeds_by_exit_code_and_sees_the_containers_environment() {
        let run = async |script: &str| {
            let words = ["/bin/sh", "-c", script].map(str::to_owned);
            exec(&words, &target(), Duration::from_secs(5)).await
        };
        assert_eq!(run("test $A = 1").await, Ok(()));
        assert!(run("echo no; exit 4").await.unwrap_err().ends_with("exited with 4: no"));
    }

    #[tokio::test]
    async fn exec_that_takes_too_long_is_killed() {
        let words = ["/bin/sleep", "600"].map(str::to_owned);
        let error = exec(&words, &target(), Duration::from_millis(50)).await.unwrap_err();
        assert!(error.contains("timed out") && error.ends_with("(137)"), "{error}");
    }

    #[tokio::test]
    async fn a_tcp_probe_succeeds_when_somebody_listens() {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = i32::from(listener.local_addr().unwrap().port());
        let probe = Probe {
            tcp_socket: Some(TCPSocketAction {
                port: IntOrString::Int(port),
                host: None,
            }),
            ..Probe::default()
        };
        assert_eq!(attempt(&probe, &target()).await, Ok(()));
        drop(listener);
        assert!(attempt(&probe, &target()).await.is_err());
    }
}
