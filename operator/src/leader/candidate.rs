//! Reads and writes the Lease: campaigns, holds a term, lets go.

use std::time::Duration;

use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::ObjectReference},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};

use super::{
    claim::{Seen, Step, held, holder, released, step},
    config::ElectionConfig,
    guard::WriteGuard,
    moment::Moment,
};
use crate::error::{Error, Result};

/// A process that wants to lead.
#[derive(Clone)]
pub struct Candidate {
    leases: Api<Lease>,
    config: ElectionConfig,
    guard: WriteGuard,
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Why a term ended.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Lost {
    /// No renewal succeeded in time: the API server did not answer, or this process stood still.
    #[error("lease {namespace}/{name} was not renewed for {silent:?} (renew deadline {deadline:?})")]
    Deadline {
        /// Namespace of the Lease.
        namespace: String,
        /// Name of the Lease.
        name: String,
        /// Time since the last renewal that succeeded.
        silent: Duration,
        /// The limit.
        deadline: Duration,
    },
    /// Somebody else holds the Lease, or cleared it.
    #[error("lease {namespace}/{name} is held by {holder}")]
    Taken {
        /// Namespace of the Lease.
        namespace: String,
        /// Name of the Lease.
        name: String,
        /// Who holds it.
        holder: String,
    },
}

impl Candidate {
    /// A candidate that writes the Lease with `client`, which no guard may stand before, and opens `guard` while it leads.
    pub fn new(client: Client, config: ElectionConfig, guard: WriteGuard) -> Self {
        Self {
            leases: Api::namespaced(client, &config.namespace),
            config,
            guard,
        }
    }

    /// Its settings.
    pub fn config(&self) -> &ElectionConfig {
        &self.config
    }

    /// Waits until this process leads.
    pub async fn campaign(self) -> Term {
        let mut seen = None;
        let mut rival = String::new();
        loop {
            let begun = Moment::now();
            let wait = match self.attempt(&mut seen).await {
                Ok(None) => {
                    if let Some(lease) = seen.take().map(|seen| seen.lease) {
                        return Term::begin(self, lease, begun);
                    }
                    self.config.retry_period
                }
                Ok(Some(wait)) => {
                    let now = seen.as_ref().and_then(|seen| holder(&seen.lease)).unwrap_or_default();
                    if now != rival {
                        tracing::info!(leader = now, "waiting as a standby");
                        now.clone_into(&mut rival);
                    }
                    wait
                }
                Err(error) => {
                    tracing::warn!(%error, "election, trying again");
                    self.config.retry_period
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// One look at the Lease. None: it is held by this process now.
    async fn attempt(&self, seen: &mut Option<Seen>) -> Result<Option<Duration>> {
        let lease = self.bounded("read", self.leases.get_opt(&self.config.name)).await?;
        let now = Moment::now();
        *seen = lease.map(|lease| Seen::next(seen.take(), lease, now));
        let written = match step(seen.as_ref(), &self.config, now) {
            Step::Wait(wait) => return Ok(Some(wait)),
            Step::Create => self.create().await,
            Step::Take => self.replace(seen.as_ref().map(|seen| &seen.lease)).await,
        };
        match written {
            Ok(lease) => {
                *seen = Some(Seen::next(None, lease, now));
                Ok(None)
            }
            // Another candidate was faster: look again, and wait for it.
            Err(error) if error.class() == "conflict" => {
                Ok(Some(self.config.retry_period.min(Duration::from_millis(200))))
            }
            Err(error) => Err(error),
        }
    }

    async fn create(&self) -> Result<Lease> {
        let lease = held(None, &self.config, Timestamp::now());
        self.bounded("create", self.leases.create(&PostParams::default(), &lease))
            .await
    }

    async fn replace(&self, known: Option<&Lease>) -> Result<Lease> {
        let lease = held(known, &self.config, Timestamp::now());
        let (name, params) = (&self.config.name, PostParams::default());
        self.bounded("write", self.leases.replace(name, &params, &lease)).await
    }

    /// An answer that takes longer than half the renew deadline would leave no time for a second try.
    async fn bounded<T>(&self, verb: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T> {
        let what = || format!("{verb} Lease {}/{}", self.config.namespace, self.config.name);
        match tokio::time::timeout(self.config.renew_deadline / 2, request).await {
            Ok(answer) => answer.map_err(Error::api(what())),
            Err(_) => Err(Error::Timeout { action: what() }),
        }
    }
}

/// The time in which this process leads.
#[derive(Debug)]
pub struct Term {
    candidate: Candidate,
    lease: Lease,
    /// Begin of the last renewal that succeeded: the API server may have recorded it at any time after.
    renewed: Moment,
}

impl Term {
    fn begin(candidate: Candidate, lease: Lease, renewed: Moment) -> Self {
        let term = Self {
            candidate,
            lease,
            renewed,
        };
        term.candidate.guard.permit(term.deadline());
        term
    }

    /// The Lease, for events about it.
    pub fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            name: self.lease.metadata.name.clone(),
            namespace: self.lease.metadata.namespace.clone(),
            uid: self.lease.metadata.uid.clone(),
            ..ObjectReference::default()
        }
    }

    fn deadline(&self) -> Moment {
        self.renewed.after(self.candidate.config.renew_deadline)
    }

    /// Renews until that fails for too long. From then on the guard refuses writes, whether or not anybody reads the answer.
    pub async fn hold(&mut self) -> Lost {
        loop {
            let left = self.deadline().since(Moment::now());
            tokio::time::sleep(self.candidate.config.retry_period.min(left)).await;
            if let Err(lost) = self.renew().await {
                self.candidate.guard.revoke();
                return lost;
            }
        }
    }

    async fn renew(&mut self) -> Result<(), Lost> {
        let begun = Moment::now();
        if begun >= self.deadline() {
            // No request: after a deadline that passed unnoticed even the Lease is no longer this process' to write.
            return Err(self.silent(begun));
        }
        let config = &self.candidate.config;
        match self.candidate.replace(Some(&self.lease)).await {
            Ok(lease) => {
                self.lease = lease;
                self.renewed = begun;
                self.candidate.guard.permit(self.deadline());
                Ok(())
            }
            Err(error) if error.class() == "conflict" => self.look().await,
            Err(error) if error.is_not_found() => {
                // Deleted by hand: whoever makes it again first leads.
                tracing::warn!(name = config.name, "the lease was deleted, making it again");
                match self.candidate.create().await {
                    Ok(lease) => {
                        self.lease = lease;
                        self.renewed = begun;
                        self.candidate.guard.permit(self.deadline());
                        Ok(())
                    }
                    Err(_) => self.look().await,
                }
            }
            Err(error) => {
                tracing::warn!(%error, "renewal failed, trying again");
                Ok(())
            }
        }
    }

    /// Somebody wrote the Lease: a label, or themselves.
    async fn look(&mut self) -> Result<(), Lost> {
        let config = &self.candidate.config;
        let read = self.candidate.leases.get_opt(&config.name);
        match self.candidate.bounded("read", read).await {
            Ok(Some(lease)) if holder(&lease) == Some(config.identity.as_str()) => {
                self.lease = lease;
                Ok(())
            }
            Ok(lease) => Err(Lost::Taken {
                namespace: config.namespace.clone(),
                name: config.name.clone(),
                holder: lease.as_ref().and_then(holder).unwrap_or("nobody").to_owned(),
            }),
            Err(error) => {
                tracing::warn!(%error, "renewal failed, trying again");
                Ok(())
            }
        }
    }

    fn silent(&self, now: Moment) -> Lost {
        let config = &self.candidate.config;
        Lost::Deadline {
            namespace: config.namespace.clone(),
            name: config.name.clone(),
            silent: now.since(self.renewed),
            deadline: config.renew_deadline,
        }
    }

    /// Lets go, so that a standby takes over at once. Only after the last pass ended.
    pub async fn release(self) {
        self.candidate.guard.revoke();
        if Moment::now() >= self.deadline() {
            return;
        }
        let lease = released(&self.lease, Timestamp::now());
        let (name, params) = (&self.candidate.config.name, PostParams::default());
        let written = self.candidate.leases.replace(name, &params, &lease);
        match self.candidate.bounded("release", written).await {
            Ok(_) => tracing::info!("lease released"),
            Err(error) => tracing::warn!(%error, "lease not released, a standby waits until it runs out"),
        }
    }
}

#[cfg(test)]
mod tests;
