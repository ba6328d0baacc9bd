//! Probes of a worker. A trainer on two busy cores may answer late: liveness is patient, and nobody routes to it.

use flotilla_api::names::HTTP_PORT_NAME;
use k8s_openapi::{
    api::core::v1::{HTTPGetAction, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};

/// The HTTP server must listen within five minutes of the start (image start, claim mounts); it does before it loads anything.
pub fn startup() -> Probe {
    Probe {
        period_seconds: Some(1),
        failure_threshold: Some(300),
        timeout_seconds: Some(5),
        ..get("/healthz")
    }
}

/// A server takes requests once its model is loaded; a run is as ready as it is alive.
pub fn readiness(serves: bool) -> Probe {
    Probe {
        period_seconds: Some(2),
        failure_threshold: Some(3),
        timeout_seconds: Some(5),
        ..get(if serves { "/readyz" } else { "/healthz" })
    }
}

/// Two minutes without an answer: the process hangs.
pub fn liveness() -> Probe {
    Probe {
        period_seconds: Some(10),
        failure_threshold: Some(12),
        timeout_seconds: Some(10),
        ..get("/healthz")
    }
}

fn get(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(HTTP_PORT_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    }
}
