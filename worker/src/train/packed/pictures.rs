//! Pixels and digests of the pictures that prompts show, kept on the host within a number of bytes.

use std::{collections::HashMap, sync::Arc};

use flotilla_engine::prompt::{Digest, digest_visual};
use flotilla_model::Visual;

use crate::train::{error::TrainError, gallery::Gallery};

/// Bytes of pixels that are kept.
const KEPT_BYTES: usize = 4 << 30;

/// A picture as the tower reads it.
#[derive(Debug)]
pub struct Picture {
    /// Its pixels.
    pub visual: Visual,
    /// What tells it apart.
    pub digest: Digest,
}

/// Pictures by their keys.
#[derive(Debug, Default)]
pub struct Pictures {
    kept: HashMap<String, Arc<Picture>>,
    bytes: usize,
}

impl Pictures {
    /// The picture of this key, decoded unless it is kept. Once too much is kept all is forgotten: the pictures of one step
    /// are then decoded again.
    pub fn get(&mut self, gallery: &Gallery, key: &str) -> Result<Arc<Picture>, TrainError> {
        if let Some(kept) = self.kept.get(key) {
            return Ok(Arc::clone(kept));
        }
        let visual = gallery.visual(key)?;
        let picture = Arc::new(Picture {
            digest: digest_visual(&visual),
            visual,
        });
        let bytes = size_of_val(picture.visual.values.as_slice());
        if self.bytes + bytes > KEPT_BYTES {
            self.kept.clear();
            self.bytes = 0;
        }
        self.bytes += bytes;
        self.kept.insert(key.to_owned(), Arc::clone(&picture));
        Ok(picture)
    }
}
