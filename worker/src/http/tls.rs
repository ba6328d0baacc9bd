//! The server's certificate, read from files and again whenever they change.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use flotilla_api::role::TlsFiles;
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{WorkerError, chain},
    watched::WatchedFiles,
};

/// The certificate of now: handshakes that begin later see a new one, connections that exist go on.
#[derive(Debug)]
struct Certificate(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Takes connections with the certificate of these files, and follows the files until `stop`.
pub fn acceptor(files: &TlsFiles, interval: Duration, stop: CancellationToken) -> Result<TlsAcceptor, WorkerError> {
    let (certificate_file, key_file) = (PathBuf::from(&files.certificate_file), PathBuf::from(&files.key_file));
    let read = |what, path: &Path| {
        std::fs::read(path).map_err(|source| WorkerError::ReadFile {
            what,
            path: path.to_owned(),
            source,
        })
    };
    let pems = [read("certificate", &certificate_file)?, read("private key", &key_file)?];
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certified = certified(&pems, &provider).map_err(|fault| {
        let (certificate, key) = (certificate_file.display(), key_file.display());
        WorkerError::invalid(format!("TLS files {certificate} and {key}: {fault}"))
    })?;
    let certificate = Arc::new(Certificate(RwLock::new(Arc::new(certified))));
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| WorkerError::permanent("failed to set up TLS", error))?
        .with_no_client_auth()
        .with_cert_resolver(certificate.clone());
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let watched = WatchedFiles::new("the TLS files", vec![certificate_file, key_file]);
    tokio::spawn(watched.follow(interval, stop, move |pems| {
        let next = Arc::new(certified_of(pems, &provider)?);
        let mut now = certificate.0.write().unwrap_or_else(PoisonError::into_inner);
        if now.cert != next.cert {
            tracing::info!("a new TLS certificate is in use");
        }
        *now = next;
        Ok(())
    }));
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certified_of(pems: &[Vec<u8>], provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    match pems {
        [certificate, key] => certified(&[certificate.clone(), key.clone()], provider),
        _ => Err(format!("{} files, not a certificate and a key", pems.len())),
    }
}

/// A chain and its key as PEM; a key that belongs to another certificate is refused.
fn certified([certificate, key]: &[Vec<u8>; 2], provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let chained = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>();
    let chained = chained.map_err(|error| format!("the certificate is not PEM: {error}"))?;
    if chained.is_empty() {
        return Err("there is no certificate".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key is not PEM: {error}"))?;
    CertifiedKey::from_der(chained, key, provider).map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;

    use super::*;

    fn pems(name: &str) -> [Vec<u8>; 2] {
        let made = generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
        [
            made.cert.pem().into_bytes(),
            made.signing_key.serialize_pem().into_bytes(),
        ]
    }

    #[test]
    fn a_certificate_needs_its_own_key() {
        let provider = rustls::crypto::ring::default_provider();
        let (one, other) = (pems("one.test"), pems("other.test"));
        assert!(certified(&one, &provider).is_ok());
        assert!(certified(&[one[0].clone(), other[1].clone()], &provider).is_err());
        assert!(certified(&[one[1].clone(), one[1].clone()], &provider).is_err());
        assert!(certified(&[one[0].clone(), b"nothing".to_vec()], &provider).is_err());
    }
}
