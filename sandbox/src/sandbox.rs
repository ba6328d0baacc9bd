//! Start and stop of the API server.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kube::config::{KubeConfigOptions, Kubeconfig};
use rand::RngCore;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    fault::FaultPlan,
    kubeconfig,
    server::{ApiServer, ServerSettings, connection, kind::event, log::PodLogs},
    store::{Store, StoreError, persist::PersistError},
    tls::{Identity, TlsError},
};

/// Where and how the API server runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of its state, token and kubeconfig.
    pub directory: PathBuf,
    /// Port on 127.0.0.1; 0 takes the one used last here, else a free one.
    pub port: u16,
    /// Time between bookmarks.
    pub bookmark_period: Duration,
}

impl Settings {
    /// Any port, and a bookmark a minute.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            port: 0,
            bookmark_period: Duration::from_secs(60),
        }
    }
}

/// Why the API server did not start.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A file of the directory.
    #[error("{action} {path}: {source}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Another process has the port.
    #[error("listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The answer.
        source: io::Error,
    },
    /// Another sandbox uses the directory.
    #[error("{0} is in use by another sandbox")]
    InUse(PathBuf),
    /// The state could not be read.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// The state could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The kubeconfig that was written cannot be used.
    #[error("read back the kubeconfig: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// No client can be built.
    #[error("build a client: {0}")]
    Client(#[from] kube::Error),
}

/// A running API server.
#[derive(Debug)]
pub struct Sandbox {
    server: Arc<ApiServer>,
    address: SocketAddr,
    directory: PathBuf,
    kubeconfig: Kubeconfig,
    // A sandbox that is dropped stops, too.
    shutdown: DropGuard,
    task: JoinHandle<()>,
    // Held for its lock, which ends with it.
    _lock: fs::File,
}

impl Sandbox {
    /// Loads the state, listens, and writes `kubeconfig`.
    pub async fn start(settings: Settings) -> Result<Self, SandboxError> {
        let directory = settings.directory;
        let file = |action: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| SandboxError::File { action, path, source }
        };
        fs::create_dir_all(&directory).map_err(file("create directory", &directory))?;
        let lock = lock(&directory)?;
        let token = token(&directory)?;
        let listener = listen(&directory, settings.port).await?;
        let address = listener.local_addr().map_err(file("read the address of", &directory))?;
        let port_path = directory.join("port");
        fs::write(&port_path, address.port().to_string()).map_err(file("write", &port_path))?;

        let identity = Identity::of_directory(&directory, &address.ip().to_string())?;
        let text = kubeconfig::kubeconfig(&format!("https://{address}"), &identity.authority_pem, &token);
        let text = serde_yaml::to_string(&text).map_err(io::Error::other);
        let kubeconfig_path = directory.join("kubeconfig");
        let text = text.map_err(file("write", &kubeconfig_path))?;
        let kubeconfig = Kubeconfig::from_yaml(&text)?;

        let shutdown = CancellationToken::new();
        let store = Store::open(&directory.join("apiserver"))?;
        let server_settings = ServerSettings {
            token,
            address: address.to_string(),
            bookmark_period: settings.bookmark_period,
        };
        let server = ApiServer::new(store, server_settings, shutdown.clone())?;
        let task = tokio::spawn(connection::serve(server.clone(), listener, identity.server));
        // Last: whoever finds the file finds a server.
        kubeconfig::write_private(&kubeconfig_path, &text).map_err(file("write", &kubeconfig_path))?;
        tracing::info!(%address, kubeconfig = %kubeconfig_path.display(), "the API server listens");
        tokio::spawn(event::expire(server.clone()));
        Ok(Self {
            server,
            address,
            directory,
            kubeconfig,
            shutdown: shutdown.drop_guard(),
            task,
            _lock: lock,
        })
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The kubeconfig file.
    #[must_use]
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Configuration of a client.
    pub async fn client_config(&self) -> Result<kube::Config, SandboxError> {
        Ok(kube::Config::from_custom_kubeconfig(self.kubeconfig.clone(), &KubeConfigOptions::default()).await?)
    }

    /// A client.
    pub async fn client(&self) -> Result<kube::Client, SandboxError> {
        Ok(kube::Client::try_from(self.client_config().await?)?)
    }

    /// Says who reads container logs.
    pub fn set_pod_logs(&self, logs: Arc<dyn PodLogs>) {
        self.server.set_pod_logs(logs);
    }

    /// Failures on demand.
    #[must_use]
    pub fn faults(&self) -> &FaultPlan {
        &self.server.faults
    }

    /// Ends all watches; clients come back.
    pub fn drop_watches(&self) {
        self.server.store.drop_watches();
    }

    /// Forgets the history: watches from before are answered with 410.
    pub fn compact(&self) {
        self.server.store.compact();
    }

    /// Newest resource version.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.server.store.revision()
    }

    /// Ends watches and logs, finishes requests in flight, and writes the state compactly.
    pub async fn shutdown(self) -> Result<(), SandboxError> {
        self.shutdown.disarm().cancel();
        if let Err(error) = self.task.await {
            tracing::warn!(%error, "the API server's task ended badly");
        }
        self.server.store.checkpoint()?;
        Ok(())
    }
}

/// One server a directory: two would write the same file.
fn lock(directory: &Path) -> Result<fs::File, SandboxError> {
    let path = directory.join("lock");
    let file = fs::File::create(&path).map_err(|source| SandboxError::File {
        action: "create",
        path,
        source,
    })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(SandboxError::InUse(directory.to_owned())),
    }
}

/// The token of the directory; made at the first start.
fn token(directory: &Path) -> Result<String, SandboxError> {
    let path = directory.join("token");
    match fs::read_to_string(&path) {
        Ok(text) if text.trim().len() >= 32 => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(SandboxError::File {
                action: "read",
                path,
                source: error,
            });
        }
        _ => {}
    }
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    let text = hex::encode(bytes);
    kubeconfig::write_private(&path, &text).map_err(|source| SandboxError::File {
        action: "write",
        path,
        source,
    })?;
    Ok(text)
}

/// The port asked for; without one, the port of the last start if it is free, so that kubeconfigs stay valid.
async fn listen(directory: &Path, port: u16) -> Result<TcpListener, SandboxError> {
    let at = |port: u16| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    if port == 0 {
        let last = fs::read_to_string(directory.join("port"))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        if let Some(last) = last
            && let Ok(listener) = TcpListener::bind(at(last)).await
        {
            return Ok(listener);
        }
    }
    TcpListener::bind(at(port))
        .await
        .map_err(|source| SandboxError::Listen {
            address: at(port),
            source,
        })
}
