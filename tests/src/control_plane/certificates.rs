//! One authority and what it signs. The names are what RBAC and the Node authorizer know callers by.

use std::path::Path;

use anyhow::Context;
use flotilla_sandbox::kubeconfig::write_private;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Who holds a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject {
    /// Serving certificate of etcd and of the API server.
    Server,
    /// Client of etcd.
    EtcdClient,
    /// May do everything.
    Administrator,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
    /// The API server as a client of nodes (logs).
    KubeletClient,
}

impl Subject {
    /// Everybody.
    pub const ALL: [Self; 6] = [
        Self::Server,
        Self::EtcdClient,
        Self::Administrator,
        Self::ControllerManager,
        Self::Scheduler,
        Self::KubeletClient,
    ];
    /// Those that talk to the API server.
    pub const CLIENTS: [Self; 3] = [Self::Administrator, Self::ControllerManager, Self::Scheduler];

    /// Stem of the files of its key and certificate.
    pub fn file(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::EtcdClient => "etcd-client",
            Self::Administrator => "admin",
            Self::ControllerManager => "controller-manager",
            Self::Scheduler => "scheduler",
            Self::KubeletClient => "kubelet-client",
        }
    }

    /// User (common name) and group (organisation).
    fn identity(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Server => ("kube-apiserver", None),
            Self::EtcdClient => ("kube-apiserver-etcd-client", None),
            Self::Administrator => ("flotilla-admin", Some("system:masters")),
            Self::ControllerManager => ("system:kube-controller-manager", None),
            Self::Scheduler => ("system:kube-scheduler", None),
            Self::KubeletClient => ("kube-apiserver-kubelet-client", Some("system:masters")),
        }
    }
}

/// The authority of one control plane.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    key_pem: String,
}

/// A key and its certificate, PEM.
pub struct Credentials {
    certificate: String,
    key: String,
}

/// The key that signs tokens of service accounts.
pub struct ServiceAccountKey(KeyPair);

impl Authority {
    /// A fresh one.
    pub fn generate() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "flotilla-test-control-plane");
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
        ];
        let key = KeyPair::generate()?;
        let (pem, key_pem) = (params.self_signed(&key)?.pem(), key.serialize_pem());
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
            key_pem,
        })
    }

    /// Writes `ca.crt` and `ca.key`: the controller manager signs the certificates of nodes.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        put(dir, "ca.crt", &self.pem)?;
        put(dir, "ca.key", &self.key_pem)
    }

    /// Key and certificate of `subject`.
    pub fn issue(&self, subject: Subject) -> anyhow::Result<Credentials> {
        let names: &[&str] = match subject {
            Subject::Server => &["localhost", "kubernetes.default.svc", "127.0.0.1"],
            _ => &[],
        };
        let mut params = CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())?;
        let (user, group) = subject.identity();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if subject == Subject::Server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Ok(Credentials {
            certificate: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }
}

impl Credentials {
    /// Writes `STEM.crt` and `STEM.key`.
    pub fn write(&self, dir: &Path, stem: &str) -> anyhow::Result<()> {
        put(dir, &format!("{stem}.crt"), &self.certificate)?;
        put(dir, &format!("{stem}.key"), &self.key)
    }
}

/// A fresh key for tokens.
pub fn service_account_key() -> anyhow::Result<ServiceAccountKey> {
    Ok(ServiceAccountKey(KeyPair::generate()?))
}

impl ServiceAccountKey {
    /// Writes `service-account.key` and `service-account.pub`.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        put(dir, "service-account.key", &self.0.serialize_pem())?;
        put(dir, "service-account.pub", &self.0.public_key_pem())
    }
}

fn put(dir: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = dir.join(name);
    write_private(&path, text).with_context(|| format!("write {}", path.display()))
}
