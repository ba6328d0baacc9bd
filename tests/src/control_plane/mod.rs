//! The real control plane on loopback: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, built by
//! `tests/cluster/build.sh`, with certificates, data and logs in a directory of their own.
//!
//! RBAC and the Node authorizer are on, NodeRestriction and PodSecurity admit, and what the operator and users ask for is
//! audited. Nothing outlives its owner: a watchdog kills the programs when this process ends by whatever signal, and the
//! next start in the same directory kills what the one before may have left.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | `programs.rs` | where the built programs are |
//! | `certificates.rs` | one authority and what it signs |
//! | `access.rs` | kubeconfigs |
//! | `component.rs` | one program that runs: its log, its end |
//! | `arguments.rs` | pure: the command lines |

mod access;
mod arguments;
mod certificates;
mod component;
mod programs;

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use flotilla_sandbox::node::guard::Guard;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Api, Client};

pub use self::{
    access::{client_in, client_of, impatient_client_in},
    programs::{FOLDER_ENV, Programs},
};
use self::{
    arguments::Ports,
    certificates::{Authority, Subject},
    component::Component,
};
use crate::eventually;

/// Longest wait for one program.
const LIMIT: Duration = Duration::from_secs(120);

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    programs: Programs,
    components: Vec<Component>,
    // After the components: stops whatever they leave.
    _guard: Guard,
}

impl ControlPlane {
    /// Starts all four in `dir`, which loses what an earlier control plane left there, and waits until objects can be
    /// created: the default service account exists.
    pub async fn start(dir: &Path) -> anyhow::Result<Self> {
        let programs = Programs::build()?;
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir
            .canonicalize()
            .with_context(|| format!("resolve {}", dir.display()))?;
        component::sweep(&dir)?;
        for stale in ["etcd", "audit.jsonl", "kubeconfig"] {
            remove(&dir.join(stale))?;
        }
        let guard = Guard::start().context("start the watchdog")?;
        let ports = Ports {
            etcd_client: free_port()?,
            etcd_peer: free_port()?,
            api_server: free_port()?,
        };
        write_credentials(&dir, ports)?;
        let mut plane = Self {
            dir,
            programs,
            components: Vec::new(),
            _guard: guard,
        };
        plane.run("etcd", &arguments::etcd(&plane.dir, ports))?;
        plane.run("kube-apiserver", &arguments::api_server(&plane.dir, ports))?;
        plane.wait_for_api_server().await?;
        plane.run("kube-controller-manager", &arguments::controller_manager(&plane.dir))?;
        plane.run("kube-scheduler", &arguments::scheduler(&plane.dir))?;
        plane.wait_for_default_account().await?;
        // Last: whoever finds the file finds a control plane.
        access::publish(&plane.dir)?;
        Ok(plane)
    }

    /// Directory of everything.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Kubeconfig of an administrator (group `system:masters`).
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Audit log: one `audit.k8s.io/v1` Event a line, level Metadata, without the control plane's own requests.
    pub fn audit_log(&self) -> PathBuf {
        audit_log(&self.dir)
    }

    /// The built programs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// An administrator's client.
    pub async fn client(&self) -> anyhow::Result<Client> {
        client_of(&self.kubeconfig()).await
    }

    /// An error that names the program that ended, with the end of its log.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.components.iter_mut().try_for_each(Component::check)
    }

    /// Process number of `program`, for those who measure it.
    pub fn pid(&self, program: &str) -> Option<i32> {
        let component = self.components.iter().find(|component| component.name() == program);
        component.map(Component::pid)
    }

    /// Stops all, the API server before etcd.
    pub fn stop(mut self) -> anyhow::Result<()> {
        while let Some(component) = self.components.pop() {
            component.stop()?;
        }
        Ok(())
    }

    fn run(&mut self, name: &'static str, arguments: &[String]) -> anyhow::Result<()> {
        let program = self.programs.path(name);
        let component = Component::start(name, &program, arguments, &self.dir)?;
        self._guard.add(component.id());
        self.components.push(component);
        Ok(())
    }

    async fn wait_for_api_server(&mut self) -> anyhow::Result<()> {
        let client = client_of(&access::path(&self.dir, Subject::Administrator)).await?;
        let begun = std::time::Instant::now();
        loop {
            self.check()?;
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let Err(error) = client.request_text(request).await else {
                return Ok(());
            };
            if begun.elapsed() > LIMIT {
                bail!("kube-apiserver is not ready after {LIMIT:?}: {error}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn wait_for_default_account(&mut self) -> anyhow::Result<()> {
        let client = client_of(&access::path(&self.dir, Subject::Administrator)).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client, "default");
        let found = eventually("the default service account", LIMIT, || async {
            Ok(accounts.get_opt("default").await?)
        })
        .await;
        self.check()?;
        found.map(drop)
    }
}

/// Audit log of the control plane in `dir`.
pub fn audit_log(dir: &Path) -> PathBuf {
    dir.join("audit.jsonl")
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn write_credentials(dir: &Path, ports: Ports) -> anyhow::Result<()> {
    let authority = Authority::generate()?;
    authority.write(dir)?;
    for subject in Subject::ALL {
        authority.issue(subject)?.write(dir, subject.file())?;
    }
    certificates::service_account_key()?.write(dir)?;
    for subject in Subject::CLIENTS {
        access::write(dir, subject, ports.api_server)?;
    }
    arguments::write_files(dir)
}

/// A port that is free now. The kernel does not give it out again soon, and whoever loses it says so in its log.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
