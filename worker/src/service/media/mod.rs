//! Image URLs to pictures, hostile ones refused before anything is opened or allocated for them.
//!
//! | file | what |
//! |---|---|
//! | [`data_url`] | `data:` URLs |
//! | [`hosts`] | the allow-list of hosts for `https://` and `http://` |
//! | [`resolver`], [`address`] | names to addresses, of which only public ones are connected to |
//! | [`fetch`] | one GET over a connection to a checked address, redirects by hand |
//! | [`root`] | `file://` below one directory |

pub mod address;
pub mod data_url;
pub mod fetch;
pub mod hosts;
pub mod resolver;
pub mod root;
#[cfg(test)]
mod tests;

use std::{path::Path, sync::Arc};

use axum::body::Bytes;
use flotilla_api::role::MediaSettings;
use flotilla_model::{ImageLimits, Picture};
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::Url;

use self::{
    fetch::{FetchError, Fetcher},
    hosts::HostPattern,
    root::MediaRoot,
};
use super::{
    ServiceError,
    metrics::{ImageOutcome, ImageSource, Metrics},
};
use crate::error::WorkerError;

/// What one picture of a request may cost.
pub const LIMITS: ImageLimits = ImageLimits {
    bytes: 20 << 20,
    pixels: 32 << 20,
    ..ImageLimits::DEFAULT
};

/// Pictures of one request.
pub const MAX_PICTURES: usize = 16;

/// Bytes that all pictures of one request may have that are not in its body.
const MAX_FETCHED_BYTES: usize = 64 << 20;

/// Pictures of one request that are fetched at once.
const FETCHED_AT_ONCE: usize = 4;

/// The field of a request that an error about a picture names.
const PARAM: &str = "image_url";

/// Where pictures may come from.
#[derive(Debug)]
pub struct Media {
    fetcher: Fetcher,
    root: Option<Arc<MediaRoot>>,
    upright: bool,
    metrics: Metrics,
}

/// A picture that was found but not decoded.
#[derive(Clone, Debug)]
pub enum Encoded {
    /// What follows `data:` in a URL.
    DataUrl(String),
    /// The bytes of a file.
    Bytes(Bytes),
}

impl Media {
    /// From a role's settings.
    pub fn new(settings: &MediaSettings, metrics: Metrics) -> Result<Self, WorkerError> {
        let hosts = settings.image_hosts.iter().map(|text| text.parse::<HostPattern>());
        let hosts = hosts.collect::<Result<Vec<_>, _>>();
        let hosts = hosts.map_err(|error| WorkerError::invalid(error.to_string()))?;
        let open = |directory: &String| {
            MediaRoot::open(Path::new(directory))
                .map(Arc::new)
                .map_err(|error| WorkerError::permanent(format!("failed to open the media root {directory:?}"), error))
        };
        Ok(Self {
            fetcher: Fetcher::new(hosts)?,
            root: settings.media_root.as_ref().map(open).transpose()?,
            upright: settings.upright,
            metrics,
        })
    }

    /// Finds the pictures of a request, in the order of their URLs; those of other hosts a few at a time.
    pub async fn collect(&self, urls: Vec<String>) -> Result<Vec<Encoded>, ServiceError> {
        if urls.len() > MAX_PICTURES {
            let message = format!("{} images, the limit is {MAX_PICTURES}", urls.len());
            return Err(ServiceError::invalid(PARAM, message));
        }
        let found: Vec<Encoded> = futures::stream::iter(urls.into_iter().map(|url| self.find(url)))
            .buffered(FETCHED_AT_ONCE)
            .try_collect()
            .await?;
        let fetched: usize = found.iter().map(Encoded::fetched_bytes).sum();
        if fetched > MAX_FETCHED_BYTES {
            let message = format!("the images have {fetched} bytes together, the limit is {MAX_FETCHED_BYTES}");
            return Err(ServiceError::invalid(PARAM, message));
        }
        Ok(found)
    }

    /// Decodes what was found. Blocks.
    pub fn decode(&self, encoded: &Encoded) -> Result<Picture, ServiceError> {
        let invalid = |message: String| ServiceError::invalid(PARAM, message);
        let decoded;
        let bytes = match encoded {
            Encoded::DataUrl(rest) => {
                decoded = data_url::decode(rest).map_err(invalid)?;
                &decoded
            }
            Encoded::Bytes(bytes) => bytes.as_ref(),
        };
        let picture = if self.upright {
            Picture::decode_upright(bytes, LIMITS)
        } else {
            Picture::decode(bytes, LIMITS)
        };
        picture.map_err(|error| invalid(error.to_string()))
    }

    async fn find(&self, url: String) -> Result<Encoded, ServiceError> {
        if let Some(rest) = after_scheme(&url, "data") {
            return Ok(Encoded::DataUrl(rest.to_owned()));
        }
        let source = match after_scheme(&url, "file") {
            Some(_) => ImageSource::File,
            None => ImageSource::Host,
        };
        let found = match source {
            ImageSource::File => self.open(&url).await,
            ImageSource::Host => self.fetch(&url).await,
        };
        let (outcome, bytes) = match &found {
            Ok(bytes) => (ImageOutcome::Ok, bytes.len()),
            Err(FetchError::Refused(_)) => (ImageOutcome::Refused, 0),
            Err(FetchError::Failed(_)) => (ImageOutcome::Failed, 0),
        };
        self.metrics.image(source, outcome, bytes);
        found
            .map(Encoded::Bytes)
            .map_err(|error| ServiceError::invalid(PARAM, error.to_string()))
    }

    async fn open(&self, url: &str) -> Result<Bytes, FetchError> {
        let Some(root) = self.root.clone() else {
            let reason = "file:// images are refused unless the server is given a directory for them (--media-root): \
                          send the image as a data URL (data:image/png;base64,...)";
            return Err(FetchError::Refused(reason.to_owned()));
        };
        let url = parse(url)?;
        let read = tokio::task::spawn_blocking(move || root.read(&url)).await;
        match read {
            Ok(read) => read.map(Bytes::from).map_err(FetchError::Refused),
            Err(error) => Err(FetchError::Failed(error.to_string())),
        }
    }

    async fn fetch(&self, url: &str) -> Result<Bytes, FetchError> {
        if after_scheme(url, "https").is_none() && after_scheme(url, "http").is_none() {
            let reason = format!("{:?} is not a data URL (data:image/png;base64,...)", shorten(url));
            return Err(FetchError::Refused(reason));
        }
        if self.fetcher.is_closed() {
            let reason = "this server opens no connections unless it is told to which hosts (--image-host example.com): \
                          send the image as a data URL (data:image/png;base64,...)";
            return Err(FetchError::Refused(reason.to_owned()));
        }
        self.fetcher.fetch(parse(url)?).await
    }
}

impl Encoded {
    fn fetched_bytes(&self) -> usize {
        match self {
            Self::DataUrl(_) => 0,
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

fn parse(url: &str) -> Result<Url, FetchError> {
    Url::parse(url).map_err(|error| FetchError::Refused(format!("{:?} is not a URL: {error}", shorten(url))))
}

/// What follows `scheme:`, in whatever case the scheme is written.
fn after_scheme<'a>(url: &'a str, scheme: &str) -> Option<&'a str> {
    let (found, rest) = url.split_once(':')?;
    found.eq_ignore_ascii_case(scheme).then_some(rest)
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}
