//! The server's certificate: a private authority that lives as long as the sandbox directory, and a leaf for loopback.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Why no certificate could be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Making keys or certificates failed.
    #[error("make the certificates of the API server: {0}")]
    Certificate(#[from] rcgen::Error),
    /// rustls refused them.
    #[error("configure TLS of the API server: {0}")]
    Config(#[from] rustls::Error),
}

/// A fresh authority and a server configuration with a leaf that it signed.
#[derive(Debug)]
pub struct Identity {
    /// The authority's certificate, for clients.
    pub authority_pem: String,
    /// For the acceptor; offers HTTP/2 and HTTP/1.1.
    pub server: Arc<rustls::ServerConfig>,
}

impl Identity {
    /// Makes an identity for `localhost` and the addresses given. Keys stay in memory: each start has new ones.
    pub fn generate(addresses: &[String]) -> Result<Self, TlsError> {
        let mut authority = CertificateParams::new(Vec::<String>::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority
            .distinguished_name
            .push(DnType::CommonName, "flotilla-sandbox-ca");
        authority.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
        ];
        let authority_key = KeyPair::generate()?;
        let authority_pem = authority.self_signed(&authority_key)?.pem();
        let issuer = Issuer::new(authority, authority_key);

        let names: Vec<String> = [
            "localhost".to_owned(),
            "kubernetes".to_owned(),
            "kubernetes.default.svc".to_owned(),
        ]
        .into_iter()
        .chain(addresses.iter().cloned())
        .collect();
        let mut leaf = CertificateParams::new(names)?;
        leaf.distinguished_name.push(DnType::CommonName, "flotilla-sandbox");
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = leaf.signed_by(&key, &issuer)?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            authority_pem,
            server: Arc::new(server),
        })
    }
}
