//! Image features that are computed once while the vision tower is frozen.

use std::collections::{BTreeSet, HashMap};

use candle_core::Tensor;
use flotilla_model::{Pass, Vlm};

use crate::{
    rollout::IMAGES_PER_PASS,
    train::{error::TrainError, gallery::Gallery, parallel::map_parts},
};

/// Features by picture.
pub type Features = HashMap<String, Tensor>;

/// Features of the named pictures. The pictures of a pass follow from their sorted names alone, so the same names give the
/// same bytes.
pub fn encode(
    model: &Vlm,
    gallery: &Gallery,
    names: &BTreeSet<String>,
    pass: Pass,
    threads: usize,
) -> Result<Features, TrainError> {
    let names: Vec<&String> = names.iter().collect();
    let parts: Vec<&[&String]> = names.chunks(IMAGES_PER_PASS).collect();
    let encoded = map_parts(threads, &parts, |part| {
        let images = part
            .iter()
            .map(|key| gallery.visual(key))
            .collect::<Result<Vec<_>, _>>()?;
        Ok::<_, TrainError>(model.encode(&images.iter().collect::<Vec<_>>(), pass)?)
    })?;
    Ok(names.into_iter().cloned().zip(encoded.into_iter().flatten()).collect())
}

/// Where the features of a mini-batch come from.
#[derive(Clone, Copy, Debug)]
pub enum FeatureSource<'a> {
    /// Computed before, without gradient.
    Known(&'a Features),
    /// Computed with each shard, so that gradients reach the vision tower.
    Trained(&'a Gallery),
}

impl<'a> FeatureSource<'a> {
    /// Those that are known, else the gallery.
    pub fn new(known: Option<&'a Features>, gallery: &'a Gallery) -> Self {
        known.map_or(Self::Trained(gallery), Self::Known)
    }

    /// Features of the pictures of one shard.
    pub fn of(&self, model: &Vlm, names: &BTreeSet<String>) -> Result<Features, TrainError> {
        match self {
            Self::Known(known) => Ok(names
                .iter()
                .filter_map(|name| known.get(name).map(|features| (name.clone(), features.clone())))
                .collect()),
            Self::Trained(gallery) => encode(model, gallery, names, Pass::Train, 1),
        }
    }
}
