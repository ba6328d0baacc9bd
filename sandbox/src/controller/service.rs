//! Addresses of services, their EndpointSlices and Endpoints, and which backends the proxy uses.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{
            EndpointAddress, EndpointPort as CorePort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
            ServicePort,
        },
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::OwnerReference, util::intstr::IntOrString},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams},
    core::ObjectMeta,
    runtime::watcher,
};
use serde_json::json;
use tokio::task::JoinSet;

use super::{
    RESYNC, RETRY,
    mirror::{Bell, mirror},
    proxy::Proxy,
};
use crate::node::{
    address::{AddressBlock, AddressPool},
    event::{EventRecorder, Severity, reference},
};

/// Field manager of endpoints.
const MANAGER: &str = "endpoint-controller";

/// Watches services and pods for ever.
pub async fn run(client: Client, addresses: Arc<AddressBlock>, events: EventRecorder) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let services = mirror(
        Api::<Service>::all(client.clone()),
        watcher::Config::default(),
        &bell,
        &mut tasks,
    );
    let pods = mirror(
        Api::<Pod>::all(client.clone()),
        watcher::Config::default(),
        &bell,
        &mut tasks,
    );
    let mut controller = Controller {
        client,
        addresses,
        events,
        pool: AddressPool::default(),
        proxy: Proxy::default(),
        applied: HashMap::new(),
    };
    loop {
        let well = controller.pass(&services.state(), &pods.state()).await;
        bell.wait(if well { RESYNC } else { RETRY }).await;
    }
}

struct Controller {
    client: Client,
    addresses: Arc<AddressBlock>,
    events: EventRecorder,
    pool: AddressPool,
    proxy: Proxy,
    /// Backends that were last written, by uid of the service.
    applied: HashMap<String, Vec<Backend>>,
}

/// One pod behind a service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Backend {
    pod: String,
    uid: String,
    node: Option<String>,
    ip: Ipv4Addr,
    ready: bool,
    /// Name and target port, in the order of the service's ports; none for a named port that the pod lacks.
    ports: Vec<(Option<String>, Option<u16>)>,
}

impl Controller {
    async fn pass(&mut self, services: &[Arc<Service>], pods: &[Arc<Pod>]) -> bool {
        let mut well = true;
        let mut routes: BTreeMap<SocketAddr, Vec<SocketAddr>> = BTreeMap::new();
        for service in services {
            self.reserve(service);
        }
        for service in services {
            if service.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let outcome = self.look_after(service, pods, &mut routes).await;
            well &= match outcome {
                Ok(()) => true,
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => false,
                Err(error) => {
                    tracing::warn!(service = service.name_any(), %error, "looking after a service");
                    false
                }
            };
        }
        let living: Vec<String> = services.iter().filter_map(|service| service.uid()).collect();
        let gone: Vec<String> = self
            .applied
            .keys()
            .filter(|uid| !living.contains(uid))
            .cloned()
            .collect();
        for uid in gone {
            self.applied.remove(&uid);
            self.pool.release(&uid);
        }
        for (address, error) in self.proxy.serve(routes).await {
            if let Some(service) = services
                .iter()
                .find(|service| cluster_ip(service) == Some(address.ip().to_string()))
            {
                let text = format!("listening on {address}: {error}");
                self.events
                    .record(reference(service.as_ref()), Severity::Warning, "FailedToListen", text);
            }
            well = false;
        }
        well
    }

    /// Takes note of an address that the service already has.
    fn reserve(&self, service: &Service) {
        let last = cluster_ip(service)
            .and_then(|ip| ip.parse::<Ipv4Addr>().ok())
            .map(|ip| ip.octets()[3]);
        if let (Some(last), Some(uid)) = (last, service.uid())
            && let Err(error) = self.pool.allocate(&uid, Some(last))
        {
            tracing::warn!(service = service.name_any(), %error, "noting the address of a service");
        }
    }

    async fn look_after(
        &mut self,
        service: &Service,
        pods: &[Arc<Pod>],
        routes: &mut BTreeMap<SocketAddr, Vec<SocketAddr>>,
    ) -> Result<(), kube::Error> {
        let spec = service.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            return Ok(());
        }
        let address = match cluster_ip(service) {
            Some(address) => address,
            None => self.assign(service).await?,
        };
        let Some(selector) = spec.selector.filter(|selector| !selector.is_empty()) else {
            return Ok(());
        };
        let ports = spec.ports.unwrap_or_default();
        let namespace = service.namespace();
        let chosen = pods
            .iter()
            .filter(|pod| pod.namespace() == namespace && selects(&selector, pod));
        let publish_all = spec.publish_not_ready_addresses == Some(true);
        let mut backends: Vec<Backend> = chosen.filter_map(|pod| backend(pod, &ports, publish_all)).collect();
        backends.sort_by(|left, right| left.pod.cmp(&right.pod));
        if let Ok(ip) = address.parse::<Ipv4Addr>() {
            for (index, port) in ports.iter().enumerate() {
                if let Ok(number) = u16::try_from(port.port) {
                    routes.insert(SocketAddr::from((ip, number)), targets(&backends, index));
                }
            }
        }
        let uid = service.uid().unwrap_or_default();
        if self.applied.get(&uid) != Some(&backends) {
            self.write(service, &ports, &backends).await?;
            self.applied.insert(uid, backends);
        }
        Ok(())
    }

    /// Gives the service an address.
    async fn assign(&self, service: &Service) -> Result<String, kube::Error> {
        let uid = service.uid().unwrap_or_default();
        let last = match self.pool.allocate(&uid, None) {
            Ok(last) => last,
            Err(error) => {
                self.events
                    .record(reference(service), Severity::Warning, "NoAddress", error.to_string());
                return Ok(String::new());
            }
        };
        let address = self.addresses.service(last).to_string();
        let patch = json!({"metadata": {"uid": uid}, "spec": {"clusterIP": address, "clusterIPs": [address]}});
        let api: Api<Service> = Api::namespaced(self.client.clone(), &service.namespace().unwrap_or_default());
        api.patch(&service.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        Ok(address)
    }

    async fn write(&self, service: &Service, ports: &[ServicePort], backends: &[Backend]) -> Result<(), kube::Error> {
        let namespace = service.namespace().unwrap_or_default();
        let params = PatchParams::apply(MANAGER).force();
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &namespace);
        let slice = endpoint_slice(service, ports, backends);
        slices.patch(&slice.name_any(), &params, &Patch::Apply(&slice)).await?;
        let all: Api<Endpoints> = Api::namespaced(self.client.clone(), &namespace);
        let endpoints = endpoints(service, ports, backends);
        all.patch(&endpoints.name_any(), &params, &Patch::Apply(&endpoints))
            .await?;
        Ok(())
    }
}

fn cluster_ip(service: &Service) -> Option<String> {
    service.spec.as_ref()?.cluster_ip.clone().filter(|ip| !ip.is_empty())
}

fn selects(selector: &BTreeMap<String, String>, pod: &Pod) -> bool {
    selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value))
}

/// The pod as a backend; `None` while it has no address or once it has ended.
fn backend(pod: &Pod, ports: &[ServicePort], publish_all: bool) -> Option<Backend> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    let leaving = pod.metadata.deletion_timestamp.is_some();
    Some(Backend {
        pod: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        ip: status.pod_ip.as_ref()?.parse().ok()?,
        ready: publish_all || (ready && !leaving),
        ports: ports
            .iter()
            .map(|port| (port.name.clone(), target_port(port, pod)))
            .collect(),
    })
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
            ports.find(|port| port.name.as_ref() == Some(name))?.container_port
        }
    };
    u16::try_from(number).ok()
}

fn targets(backends: &[Backend], port: usize) -> Vec<SocketAddr> {
    let ready = backends.iter().filter(|backend| backend.ready);
    ready
        .filter_map(|backend| Some(SocketAddr::from((backend.ip, backend.ports.get(port)?.1?))))
        .collect()
}

fn metadata(service: &Service, name: String) -> ObjectMeta {
    let owner: Option<OwnerReference> = service.controller_owner_ref(&());
    let labels = [
        ("kubernetes.io/service-name".to_owned(), service.name_any()),
        (
            "endpointslice.kubernetes.io/managed-by".to_owned(),
            "endpointslice-controller.k8s.io".to_owned(),
        ),
    ];
    ObjectMeta {
        name: Some(name),
        namespace: service.namespace(),
        labels: Some(BTreeMap::from(labels)),
        owner_references: owner.map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

fn pod_reference(service: &Service, backend: &Backend) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        name: Some(backend.pod.clone()),
        namespace: service.namespace(),
        uid: Some(backend.uid.clone()),
        ..ObjectReference::default()
    }
}

/// The target numbers of the ports: those of the first backend, for all pods of a service are alike.
fn numbers(ports: &[ServicePort], backends: &[Backend]) -> Vec<(ServicePort, Option<i32>)> {
    let of = |index: usize| {
        backends
            .iter()
            .find_map(|backend| backend.ports.get(index)?.1)
            .map(i32::from)
    };
    ports
        .iter()
        .enumerate()
        .map(|(index, port)| (port.clone(), of(index)))
        .collect()
}

fn endpoint_slice(service: &Service, ports: &[ServicePort], backends: &[Backend]) -> EndpointSlice {
    let endpoint = |backend: &Backend| Endpoint {
        addresses: vec![backend.ip.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(backend.ready),
            serving: Some(backend.ready),
            ..EndpointConditions::default()
        }),
        node_name: backend.node.clone(),
        target_ref: Some(pod_reference(service, backend)),
        ..Endpoint::default()
    };
    let port = |(port, number): (ServicePort, Option<i32>)| EndpointPort {
        name: Some(port.name.unwrap_or_default()),
        port: number,
        protocol: Some(port.protocol.unwrap_or_else(|| "TCP".to_owned())),
        app_protocol: port.app_protocol,
    };
    EndpointSlice {
        address_type: "IPv4".to_owned(),
        endpoints: Some(backends.iter().map(endpoint).collect()),
        metadata: metadata(service, format!("{}-sandbox", service.name_any())),
        ports: Some(numbers(ports, backends).into_iter().map(port).collect()),
    }
}

fn endpoints(service: &Service, ports: &[ServicePort], backends: &[Backend]) -> Endpoints {
    let address = |backend: &Backend| EndpointAddress {
        ip: backend.ip.to_string(),
        node_name: backend.node.clone(),
        target_ref: Some(pod_reference(service, backend)),
        ..EndpointAddress::default()
    };
    let of = |ready: bool| -> Option<Vec<EndpointAddress>> {
        let list: Vec<_> = backends
            .iter()
            .filter(|backend| backend.ready == ready)
            .map(address)
            .collect();
        (!list.is_empty()).then_some(list)
    };
    let port = |(port, number): (ServicePort, Option<i32>)| {
        Some(CorePort {
            name: port.name,
            port: number?,
            protocol: Some(port.protocol.unwrap_or_else(|| "TCP".to_owned())),
            app_protocol: port.app_protocol,
        })
    };
    let subset = EndpointSubset {
        addresses: of(true),
        not_ready_addresses: of(false),
        ports: Some(numbers(ports, backends).into_iter().filter_map(port).collect()),
    };
    Endpoints {
        metadata: metadata(service, service.name_any()),
        subsets: (!backends.is_empty()).then(|| vec![subset]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ip: &str, ready: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": name, "labels": {"app": "x"}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": ready}]}
        }))
        .unwrap()
    }

    fn ports(target: &serde_json::Value) -> Vec<ServicePort> {
        serde_json::from_value(json!([{"name": "web", "port": 80, "targetPort": target}])).unwrap()
    }

    #[test]
    fn only_ready_pods_get_connections_and_named_ports_are_found() {
        let ports = ports(&json!("http"));
        let backends: Vec<Backend> = [pod("a", "127.9.0.2", "True"), pod("b", "127.9.0.3", "False")]
            .iter()
            .filter_map(|pod| backend(pod, &ports, false))
            .collect();
        assert_eq!(targets(&backends, 0), ["127.9.0.2:8080".parse().unwrap()]);
    }

    #[test]
    fn a_pod_that_is_being_deleted_or_has_ended_gets_none() {
        let ports = ports(&json!(8080));
        let mut leaving = pod("a", "127.9.0.2", "True");
        leaving.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            jiff::Timestamp::UNIX_EPOCH,
        ));
        assert_eq!(targets(&[backend(&leaving, &ports, false).unwrap()], 0), []);
        let mut ended = pod("a", "127.9.0.2", "True");
        ended.status.as_mut().unwrap().phase = Some("Failed".to_owned());
        assert_eq!(backend(&ended, &ports, false), None);
    }

    #[test]
    fn endpoints_tell_ready_and_unready_addresses_apart() {
        let ports = ports(&json!("http"));
        let service: Service = serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n"}})).unwrap();
        let backends: Vec<Backend> = [pod("a", "127.9.0.2", "True"), pod("b", "127.9.0.3", "False")]
            .iter()
            .filter_map(|pod| backend(pod, &ports, false))
            .collect();
        let subset = &endpoints(&service, &ports, &backends).subsets.unwrap()[0];
        assert_eq!(subset.addresses.as_ref().unwrap()[0].ip, "127.9.0.2");
        assert_eq!(subset.not_ready_addresses.as_ref().unwrap()[0].ip, "127.9.0.3");
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        let slice = endpoint_slice(&service, &ports, &backends);
        assert_eq!(
            slice.endpoints.unwrap()[1].conditions.as_ref().unwrap().ready,
            Some(false)
        );
    }
}
