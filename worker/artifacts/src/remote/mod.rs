//! Models that lie elsewhere: on the Hugging Face hub or in a bucket. [`fetch`] gives a directory of this machine.
//!
//! Only what a checkpoint needs is fetched, into a cache that several processes may share: resumed after an interruption,
//! compared with the digests that the source tells, visible when whole. A version that is there is not fetched again.
//!
//! | file | what |
//! |---|---|
//! | `address.rs` | URIs, taken apart and checked |
//! | `plan.rs` | which files make a model |
//! | `origin.rs` | hub or bucket behind one face |
//! | `hub.rs` | the hub's protocol |
//! | `bucket.rs` | S3, Google Cloud Storage, Azure |
//! | `transport.rs` | HTTP, TLS, proxies |
//! | `file.rs` | a file's size and digest, as announced and as received |
//! | `download.rs` | several files at once, resumed and compared |
//! | `cache.rs` | where models are kept |
//! | `error.rs` | why not, and what to do |

mod address;
mod bucket;
mod cache;
mod download;
mod error;
mod file;
mod hub;
mod origin;
mod plan;
#[cfg(test)]
mod tests;
mod transport;

use std::{
    io::IsTerminal,
    path::PathBuf,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use object_store::{BackoffConfig, RetryConfig};

pub use self::{
    address::{Address, Service},
    error::RemoteError,
    hub::{HubSettings, Secret},
};
use self::{
    bucket::Bucket,
    cache::{Place, Shelf},
    download::{Counters, Download, persist},
    hub::Hub,
    origin::{Origin, Version},
};

/// How often the progress is told to the caller and the terminal.
const TOLD_EVERY: Duration = Duration::from_millis(500);
/// How often it is told to the log.
const LOGGED_EVERY: Duration = Duration::from_secs(10);
/// First pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// How models are fetched.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where they are kept; by default the first place that can be written of the user's cache directory,
    /// `/var/cache/flotilla` and a directory below the one for temporary files.
    pub cache: Option<PathBuf>,
    /// The hub, and who asks it.
    pub hub: HubSettings,
    /// First pause after a failure; each further one is twice as long.
    pub pause: Duration,
}

impl Settings {
    /// Keeps models in `cache`; the rest as the environment says.
    pub fn from_environment(cache: Option<PathBuf>) -> Self {
        Self {
            cache,
            hub: HubSettings::from_environment(),
            pause: FIRST_PAUSE,
        }
    }
}

/// How far a fetch is.
#[derive(Clone, Debug, PartialEq)]
pub struct Transfer {
    /// Bytes of all files.
    pub total: u64,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes that came per second.
    pub per_second: f64,
}

impl Transfer {
    /// Seconds that the rest takes at this speed.
    pub fn seconds_left(&self) -> Option<u64> {
        let rest = self.total.saturating_sub(self.done) as f64;
        (self.per_second > 0.0).then(|| (rest / self.per_second).ceil() as u64)
    }
}

impl std::fmt::Display for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let (done, total) = (megabytes(self.done), megabytes(self.total));
        write!(f, "{done:.1} of {total:.1} MB, {:.1} MB/s", self.per_second / 1e6)?;
        match self.seconds_left() {
            Some(seconds) => write!(f, ", {seconds} s left"),
            None => Ok(()),
        }
    }
}

/// The directory of this machine that holds the model of an address; fetches what is not there yet and tells `report` how far
/// it is. Dropping the future ends the fetch; the next one goes on where it was.
///
/// # Errors
/// The source refuses or cannot be reached, a file is not what was announced, or the disk is full.
pub async fn fetch(
    address: &Address,
    settings: &Settings,
    report: &(dyn Fn(&Transfer) + Sync),
) -> Result<PathBuf, RemoteError> {
    let origin = origin(address, settings)?;
    fetch_from(&origin, address, settings, report).await
}

fn origin(address: &Address, settings: &Settings) -> Result<Origin, RemoteError> {
    match address {
        Address::Hub { repo, revision } => {
            Hub::new(settings.hub.clone(), repo, revision).map(|hub| Origin::Hub(Box::new(hub)))
        }
        Address::Bucket {
            service,
            bucket,
            prefix,
        } => {
            let retries = RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: settings.pause,
                    ..BackoffConfig::default()
                },
                max_retries: 3,
                retry_timeout: Duration::from_secs(60),
            };
            Bucket::new(*service, bucket, prefix, retries).map(Origin::Bucket)
        }
    }
}

async fn fetch_from(
    origin: &Origin,
    address: &Address,
    settings: &Settings,
    report: &(dyn Fn(&Transfer) + Sync),
) -> Result<PathBuf, RemoteError> {
    let shelf = Shelf::of(&cache::directory(settings.cache.as_deref())?, address);
    if let Origin::Hub(hub) = origin
        && let Some(place) = hub.pinned().map(|commit| shelf.place(commit))
        && place.whole.is_dir()
    {
        return Ok(place.whole);
    }
    let version = match persist(settings.pause, || origin.version()).await {
        Ok(version) => version,
        Err(error) => return last_known(&shelf, address, error),
    };
    let place = shelf.place(&version.id);
    if !place.whole.is_dir() {
        let _held = place.lock().await?;
        // Another process may have fetched it in the meantime.
        if !place.whole.is_dir() {
            fetch_version(origin, &version, &place, settings, report).await?;
        }
    }
    if let Address::Hub { revision, .. } = address {
        shelf.remember(revision, &version.id)?;
    }
    Ok(place.whole)
}

/// The version of a moving name that is here, when nobody can say which it is now: a pod starts again although the hub is down.
fn last_known(shelf: &Shelf, address: &Address, error: RemoteError) -> Result<PathBuf, RemoteError> {
    match (address, &error) {
        (Address::Hub { revision, .. }, RemoteError::Unreachable { .. }) => match shelf.last(revision) {
            Some(place) => {
                tracing::warn!(path = %place.whole.display(), "{error}; using the version that was fetched before");
                Ok(place.whole)
            }
            None => Err(error),
        },
        _ => Err(error),
    }
}

async fn fetch_version(
    origin: &Origin,
    version: &Version,
    place: &Place,
    settings: &Settings,
    report: &(dyn Fn(&Transfer) + Sync),
) -> Result<(), RemoteError> {
    let counters = Counters::default();
    let download = Download {
        origin,
        version,
        dir: &place.partial,
        pause: settings.pause,
        counters: &counters,
    };
    tracing::info!(model = origin.name(), version = version.id, "fetching");
    let begin = Instant::now();
    let mut teller = Teller::new(origin.name());
    let work = download.run();
    tokio::pin!(work);
    let mut ticks = tokio::time::interval(TOLD_EVERY);
    loop {
        tokio::select! {
            outcome = &mut work => {
                outcome?;
                break;
            }
            _ = ticks.tick() => {
                let transfer = transfer(&counters, begin.elapsed());
                if transfer.total > 0 {
                    report(&transfer);
                    teller.tell(&transfer);
                }
            }
        }
    }
    place.finish()?;
    let transfer = transfer(&counters, begin.elapsed());
    report(&transfer);
    tracing::info!(model = origin.name(), bytes = transfer.total, path = %place.whole.display(), "fetched");
    Ok(())
}

fn transfer(counters: &Counters, elapsed: Duration) -> Transfer {
    let value = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (done, before) = (value(&counters.done), value(&counters.before));
    Transfer {
        total: value(&counters.total),
        done,
        per_second: done.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(1e-3),
    }
}

/// Tells the progress to a terminal as a bar, to a log as a line now and then.
struct Teller {
    bar: Option<ProgressBar>,
    model: String,
    logged: Instant,
}

impl Teller {
    fn new(model: String) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        Self {
            bar,
            model,
            logged: Instant::now(),
        }
    }

    fn tell(&mut self, transfer: &Transfer) {
        if let Some(bar) = &self.bar {
            bar.set_length(transfer.total);
            bar.set_position(transfer.done);
        } else if self.logged.elapsed() >= LOGGED_EVERY {
            self.logged = Instant::now();
            tracing::info!(model = self.model, "{transfer}");
        }
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
