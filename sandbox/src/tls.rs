//! The server's certificate: a private authority and a leaf for loopback. Both live as long as the sandbox's directory,
//! so that clients outlive a restart of the server.

use std::{fs, io, path::Path, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::kubeconfig;

/// Name of the file: authority, leaf and the leaf's key, in this order. The authority's key is thrown away.
const FILE: &str = "tls.pem";
/// Last line of a certificate.
const END: &str = "-----END CERTIFICATE-----";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Making keys or certificates failed.
    #[error("make the certificates of the API server: {0}")]
    Certificate(#[from] rcgen::Error),
    /// rustls refused them.
    #[error("configure TLS of the API server: {0}")]
    Config(#[from] rustls::Error),
    /// The file is not what this program writes.
    #[error("tls.pem is damaged ({0}): remove it, and the next start makes a new one")]
    Damaged(String),
    /// The file could not be read or written.
    #[error("read or write tls.pem: {0}")]
    File(#[from] io::Error),
}

/// The authority and a server configuration with a leaf that it signed.
#[derive(Debug)]
pub struct Identity {
    /// The authority's certificate, for clients.
    pub authority_pem: String,
    /// For the acceptor; offers HTTP/2 and HTTP/1.1.
    pub server: Arc<rustls::ServerConfig>,
}

/// The authority's certificate in the text of a file.
fn authority(text: &str) -> Result<String, TlsError> {
    let end = text
        .find(END)
        .ok_or_else(|| TlsError::Damaged("no certificate".to_owned()))?;
    Ok(format!("{}{END}\n", &text[..end]))
}

/// The authority's certificate of a directory in which a server has been started.
pub fn authority_of_directory(directory: &Path) -> Result<String, TlsError> {
    authority(&fs::read_to_string(directory.join(FILE))?)
}

impl Identity {
    /// The identity of a directory; made at the first start.
    pub fn of_directory(directory: &Path, address: &str) -> Result<Self, TlsError> {
        let path = directory.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = generate(address)?;
                kubeconfig::write_private(&path, &text)?;
                text
            }
            Err(error) => return Err(error.into()),
        };
        Self::from_pem(&text)
    }

    fn from_pem(text: &str) -> Result<Self, TlsError> {
        let damaged = |what: &dyn std::fmt::Display| TlsError::Damaged(what.to_string());
        let authority_pem = authority(text)?;
        let mut certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(text.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| damaged(&error))?;
        let leaf = certificates.pop().ok_or_else(|| damaged(&"no certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| damaged(&error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf], key)?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            authority_pem,
            server: Arc::new(server),
        })
    }
}

/// A fresh authority, and a leaf for `localhost` and the address.
fn generate(address: &str) -> Result<String, TlsError> {
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

    let names = ["localhost", "kubernetes", "kubernetes.default.svc", address];
    let mut leaf = CertificateParams::new(names.map(str::to_owned))?;
    leaf.distinguished_name.push(DnType::CommonName, "flotilla-sandbox");
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let leaf_pem = leaf.signed_by(&key, &issuer)?.pem();
    Ok([authority_pem, leaf_pem, key.serialize_pem()].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_and_a_damaged_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let first = Identity::of_directory(directory.path(), "127.0.0.1").unwrap();
        let second = Identity::of_directory(directory.path(), "127.0.0.1").unwrap();
        assert_eq!(first.authority_pem, second.authority_pem);
        fs::write(directory.path().join(FILE), "x").unwrap();
        assert!(matches!(
            Identity::of_directory(directory.path(), "127.0.0.1"),
            Err(TlsError::Damaged(_))
        ));
    }
}
