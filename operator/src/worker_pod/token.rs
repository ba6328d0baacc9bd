//! The bearer token that guards a worker's `/progress`: one per owner, drawn once, read by name only.

use std::collections::BTreeMap;

use flotilla_api::names::TOKEN_FILE;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use rand::RngCore as _;

use crate::owner::Owner;

/// Bytes of randomness.
const BYTES: usize = 32;

/// A Secret `name` with a fresh token. Only for creation: applying it again would change the token under running pods.
pub fn secret(owner: &Owner, name: String, role: &str) -> Secret {
    let mut bytes = [0_u8; BYTES];
    rand::rng().fill_bytes(&mut bytes);
    Secret {
        metadata: owner.child(name, role),
        type_: Some("Opaque".to_owned()),
        immutable: Some(true),
        data: Some(BTreeMap::from([(
            TOKEN_FILE.to_owned(),
            ByteString(hex::encode(bytes).into_bytes()),
        )])),
        ..Secret::default()
    }
}

/// The token in a Secret.
pub fn read(secret: &Secret) -> Option<String> {
    let bytes = secret.data.as_ref()?.get(TOKEN_FILE)?;
    String::from_utf8(bytes.0.clone())
        .ok()
        .filter(|token| !token.is_empty())
}
