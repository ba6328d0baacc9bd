//! Objects below a prefix of S3, Google Cloud Storage or Azure, with the credentials that the environment of the pod has:
//! keys, a token file of the cloud (IRSA, workload identity), or what the machine's metadata service gives.

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt, TryStreamExt};
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, path::Path,
};

use super::{
    address::{Address, Service},
    error::{RemoteError, too_many_files},
    file::{Reading, RemoteFile},
    plan::MAX_FILES,
    transport::Connector,
};
use crate::digest::sha256_hex;

/// Objects below a prefix.
#[derive(Debug)]
pub(super) struct Bucket {
    store: Arc<dyn ObjectStore>,
    service: Service,
    prefix: Path,
    name: String,
}

impl Bucket {
    /// The objects of an address; nothing is asked yet.
    pub fn new(service: Service, bucket: &str, prefix: &str, retries: RetryConfig) -> Result<Self, RemoteError> {
        let name = Address::Bucket {
            service,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        };
        let name = name.to_string();
        let store = match service {
            Service::S3 => AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retries)
                .build()
                .map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
            Service::Google => GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retries)
                .build()
                .map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
            Service::Azure => MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retries)
                .build()
                .map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
        };
        let invalid = |reason: String| RemoteError::Invalid {
            source_name: name.clone(),
            reason,
        };
        let store = store.map_err(|error| invalid(format!("{error}: {}", credentials(service))))?;
        let prefix = Path::parse(prefix).map_err(|error| invalid(error.to_string()))?;
        Ok(Self::of(store, service, prefix, name))
    }

    /// The objects of a store.
    pub fn of(store: Arc<dyn ObjectStore>, service: Service, prefix: Path, name: String) -> Self {
        Self {
            store,
            service,
            prefix,
            name,
        }
    }

    /// The model as messages name it.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Every object below the prefix by its path there.
    pub async fn files(&self) -> Result<BTreeMap<String, RemoteFile>, RemoteError> {
        let mut listed = self.store.list(Some(&self.prefix));
        let mut files = BTreeMap::new();
        let depth = self.prefix.parts().count();
        while let Some(object) = listed.next().await {
            let object = object.map_err(|error| self.failed(&error))?;
            let parts = object.location.parts().skip(depth);
            let name = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            if files.len() == MAX_FILES {
                return Err(too_many_files(&self.name));
            }
            let file = RemoteFile {
                name: name.clone(),
                size: object.size,
                digest: None,
                tag: object.e_tag,
            };
            files.insert(name, file);
        }
        if files.is_empty() {
            return Err(RemoteError::Refused {
                source_name: self.name.clone(),
                status: "an empty list".to_owned(),
                advice: "nothing lies below that prefix: check bucket and prefix".to_owned(),
            });
        }
        Ok(files)
    }

    /// Begins to read an object at `begin`.
    pub async fn read(&self, file: &RemoteFile, begin: u64) -> Result<Reading, RemoteError> {
        let location = Path::parse(format!("{}/{}", self.prefix, file.name));
        let location = location.map_err(|error| self.invalid(error.to_string()))?;
        let options = GetOptions {
            if_match: file.tag.clone(),
            range: (begin > 0).then_some(GetRange::Offset(begin)),
            ..GetOptions::default()
        };
        let found = self.store.get_opts(&location, options).await;
        let found = found.map_err(|error| self.failed(&error))?;
        let begin = found.range.start;
        let name = self.name.clone();
        let broken = move |error: Error| RemoteError::Unreachable {
            source_name: name.clone(),
            reason: error.to_string(),
        };
        Ok(Reading {
            begin,
            stream: found.into_stream().map_err(broken).boxed(),
        })
    }

    fn failed(&self, error: &Error) -> RemoteError {
        let refused = |status: u16, advice: String| RemoteError::Refused {
            source_name: self.name.clone(),
            status: status.to_string(),
            advice,
        };
        match error {
            Error::Precondition { .. } => {
                return RemoteError::Differs {
                    source_name: self.name.clone(),
                    file: "a file".to_owned(),
                    expected: "the version that was listed".to_owned(),
                    found: "another one, which was written meanwhile".to_owned(),
                };
            }
            Error::InvalidPath { .. } => return self.invalid(error.to_string()),
            _ => {}
        }
        let advice = credentials(self.service);
        match status(error) {
            Some(status @ (401 | 403)) => refused(
                status,
                format!("the credentials are not valid or may not list and read it. {advice}"),
            ),
            Some(404) => refused(
                404,
                "there is no such bucket or prefix: check both, and the region".to_owned(),
            ),
            Some(status @ 400..=499) if !matches!(status, 408 | 429) => refused(status, format!("{error}. {advice}")),
            _ => RemoteError::Unreachable {
                source_name: self.name.clone(),
                reason: format!("{error}. {advice}"),
            },
        }
    }

    fn invalid(&self, reason: String) -> RemoteError {
        RemoteError::Invalid {
            source_name: self.name.clone(),
            reason,
        }
    }
}

/// A name of exactly these versions of these files.
pub(super) fn fingerprint<'a>(files: impl IntoIterator<Item = &'a RemoteFile>) -> String {
    let line = |file: &RemoteFile| format!("{} {} {}\n", file.name, file.size, file.tag.as_deref().unwrap_or("-"));
    let text = files.into_iter().map(line).collect::<String>();
    sha256_hex(text.as_bytes()).chars().take(40).collect()
}

/// The status of an answer that was an error. The library tells that of a list in its message only.
fn status(error: &Error) -> Option<u16> {
    match error {
        Error::NotFound { .. } => Some(404),
        Error::Unauthenticated { .. } => Some(401),
        Error::PermissionDenied { .. } => Some(403),
        other => {
            let message = other.to_string();
            let (_, rest) = message.split_once("status code: ")?;
            rest.get(..3)?.parse().ok()
        }
    }
}

/// How a service learns who asks.
fn credentials(service: Service) -> &'static str {
    match service {
        Service::S3 => {
            "Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from the pod's service account (IRSA, EKS Pod \
             Identity); AWS_REGION and AWS_ENDPOINT_URL say where, AWS_SKIP_SIGNATURE=true reads public buckets, and \
             AWS_ALLOW_HTTP=true allows plain HTTP"
        }
        Service::Google => {
            "Credentials come from GOOGLE_SERVICE_ACCOUNT (a key file), GOOGLE_APPLICATION_CREDENTIALS or workload identity"
        }
        Service::Azure => {
            "Credentials come from AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, or from \
             workload identity"
        }
    }
}
