//! The bearer tokens of owners' pods, read once: a token never changes while its Secret lives.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::{
    error::{Error, Result},
    owner::Owner,
    worker_pod::read_token,
};

/// Tokens that are kept; past that all are read anew.
const MANY: usize = 16_384;

/// Tokens by the UID of the owner.
#[derive(Default)]
pub struct Tokens(Mutex<HashMap<String, String>>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// The token of `owner`'s pods, from memory or from its Secret; None where there is none.
    pub async fn of(&self, client: &Client, owner: &Owner, secret: &str) -> Result<Option<String>> {
        if let Some(token) = self.lock().get(&owner.uid) {
            return Ok(Some(token.clone()));
        }
        let api: Api<Secret> = Api::namespaced(client.clone(), &owner.namespace);
        let found = api.get_opt(secret).await;
        let found = found.map_err(Error::api(format!("get Secret {}/{secret}", owner.namespace)))?;
        let token = found.filter(|found| owner.controls(&found.metadata));
        let token = token.as_ref().and_then(read_token);
        if let Some(token) = &token {
            self.remember(owner, token.clone());
        }
        Ok(token)
    }

    /// Remembers a token that was just made.
    pub fn remember(&self, owner: &Owner, token: String) {
        let mut tokens = self.lock();
        if tokens.len() >= MANY {
            tokens.clear();
        }
        tokens.insert(owner.uid.clone(), token);
    }

    /// Forgets the token of an owner that is finished, or whose pods refused it.
    pub fn forget(&self, owner: &Owner) {
        self.lock().remove(&owner.uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
