//! The pictures of a run.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use flotilla_artifacts::dataset::Dataset;
use flotilla_model::{ImageLimits, Layout, Medium, Picture, Processor, Visual};

use super::{error::TrainError, examples::ExampleSet};

/// Pictures of a run, and what makes patches of them and text of tokens.
#[derive(Debug)]
pub struct Gallery {
    /// Tokenizer, template and image processor of the model.
    pub processor: Processor,
    /// The pictures.
    pub images: Images,
}

impl Gallery {
    /// What the vision tower reads of the picture of this key.
    pub fn visual(&self, key: &str) -> Result<Visual, TrainError> {
        self.images.visual(&self.processor, key)
    }

    /// Text of a completion with its special tokens, without the token that ended it.
    pub fn text(&self, ids: &[u32]) -> Result<String, TrainError> {
        let tokenizer = self.processor.tokenizer();
        let kept = match ids.split_last() {
            Some((last, rest)) if tokenizer.stop_ids().contains(last) => rest,
            _ => ids,
        };
        Ok(tokenizer.decode_with_special(kept)?)
    }
}

/// The pictures that the rows of a run show.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Their keys.
    pub names: BTreeSet<String>,
    /// Tokens of the largest.
    pub largest: usize,
}

impl Shown {
    /// Those of several sets.
    pub fn by<'a>(sets: impl IntoIterator<Item = &'a ExampleSet>) -> Self {
        let mut shown = Self::default();
        for set in sets {
            shown.names.append(&mut set.image_names());
            let spans = set.examples.iter().flat_map(|example| &example.prompt.spans);
            let tokens = spans.map(|(_, tokens)| *tokens).max().unwrap_or_default();
            shown.largest = shown.largest.max(tokens);
        }
        shown
    }
}

/// Ends the key of a picture that is one of several in its sample, where the family then cuts it otherwise.
const ONE_OF_SEVERAL: &str = "@square";

/// The key of a picture: pictures of one key have the same features.
pub fn key(name: &str, layout: Layout) -> String {
    match layout {
        Layout::Square => format!("{name}{ONE_OF_SEVERAL}"),
        _ => name.to_owned(),
    }
}

/// Pictures by name. Names are digests of the encoded bytes, so the same picture of two datasets is one.
#[derive(Debug, Default)]
pub struct Images {
    paths: BTreeMap<String, PathBuf>,
}

impl Images {
    /// A picture of a dataset, whose place is remembered.
    pub fn picture(&mut self, dataset: &Dataset, name: &str) -> Result<Picture, TrainError> {
        self.paths
            .entry(name.to_owned())
            .or_insert_with(|| dataset.image_path(name));
        self.decode(name)
    }

    fn decode(&self, name: &str) -> Result<Picture, TrainError> {
        let Some(path) = self.paths.get(name) else {
            return Err(TrainError::Invalid(format!(
                "no image {name} in the datasets of this run"
            )));
        };
        Ok(Picture::decode(&read(path)?, ImageLimits::default())?)
    }

    fn visual(&self, processor: &Processor, key: &str) -> Result<Visual, TrainError> {
        let (name, square) = match key.strip_suffix(ONE_OF_SEVERAL) {
            Some(name) => (name, true),
            None => (key, false),
        };
        let medium = Medium::Picture(self.decode(name)?);
        let layout = if square {
            Layout::Square
        } else {
            processor.visuals().plan(&[medium.size()])?.swap_remove(0)
        };
        Ok(processor.visuals().make(&medium, &layout)?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    std::fs::read(path).map_err(|error| TrainError::Invalid(format!("read image {}: {error}", path.display())))
}
