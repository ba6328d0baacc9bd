//! `preprocessor_config.json` and `video_preprocessor_config.json` of a checkpoint.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    levels::{Levels, Normalization},
    resample::Resampler,
};
use crate::{ModelError, Result, tokenizer::optional_json};

/// Mean of the reference's classes where a file names none.
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of the reference's classes where a file names none.
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// The number of bicubic interpolation in Pillow's `Resampling`.
const BICUBIC: u64 = 3;

/// The fields that a checkpoint gives for pictures or for videos.
#[derive(Clone, Debug, PartialEq)]
pub struct PreprocessorFile {
    name: &'static str,
    fields: Map<String, Value>,
}

/// The field `size`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SizeFields {
    /// Rows.
    pub height: Option<usize>,
    /// Pixels of a row.
    pub width: Option<usize>,
    /// Shorter side, or fewest pixels.
    pub shortest_edge: Option<usize>,
    /// Longer side, or most pixels.
    pub longest_edge: Option<usize>,
}

impl PreprocessorFile {
    /// `preprocessor_config.json`, or else `image_processor` of `processor_config.json`, where later versions of the
    /// reference write it; without either no field.
    pub fn of_pictures(dir: &Path) -> Result<Self> {
        Self::first(
            dir,
            &[
                ("preprocessor_config.json", None),
                ("processor_config.json", Some("image_processor")),
            ],
        )
    }

    /// `video_preprocessor_config.json`, or else the fields for pictures, as the reference falls back.
    pub fn of_videos(dir: &Path) -> Result<Self> {
        Self::first(
            dir,
            &[
                ("video_preprocessor_config.json", None),
                ("preprocessor_config.json", None),
                ("processor_config.json", Some("video_processor")),
            ],
        )
    }

    fn first(dir: &Path, places: &[(&'static str, Option<&str>)]) -> Result<Self> {
        for (name, part) in places {
            let Some(mut json) = optional_json(&dir.join(name))? else {
                continue;
            };
            if let Some(part) = part {
                json = json.get_mut(part).map_or(Value::Null, Value::take);
            }
            match json {
                Value::Null if part.is_some() => {}
                Value::Object(fields) => return Ok(Self { name, fields }),
                _ => return Err(ModelError::Config(format!("{name} is not an object"))),
            }
        }
        let name = places.first().map_or("", |(name, _)| name);
        let fields = Map::new();
        Ok(Self { name, fields })
    }

    /// An error that names the file.
    pub fn problem(&self, what: impl std::fmt::Display) -> ModelError {
        ModelError::Config(format!("{}: {what}", self.name))
    }

    /// A field that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// A whole number that is not negative.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.problem(format_args!("{key} is {value}, not a whole number"))),
        }
    }

    /// A truth value.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.problem(format_args!("{key} is {value}, not true or false"))),
        }
    }

    /// The field `size`, a number or named sides; no side if it is missing.
    pub fn size(&self) -> Result<SizeFields> {
        let sides = match self.get("size") {
            None => return Ok(SizeFields::default()),
            Some(Value::Number(_)) => {
                let side = self.number("size")?;
                return Ok(SizeFields {
                    height: side,
                    width: side,
                    ..SizeFields::default()
                });
            }
            Some(Value::Object(sides)) => Self {
                name: self.name,
                fields: sides.clone(),
            },
            Some(value) => return Err(self.problem(format_args!("size is {value}, not an object"))),
        };
        Ok(SizeFields {
            height: sides.number("height")?,
            width: sides.number("width")?,
            shortest_edge: sides.number("shortest_edge")?,
            longest_edge: sides.number("longest_edge")?,
        })
    }

    /// Refuses what would change pixels and is not implemented: a crop, and interpolation other than bicubic.
    pub fn refuse_unsupported(&self) -> Result<()> {
        if self.flag("do_center_crop", false)? {
            return Err(self.problem("do_center_crop is not supported"));
        }
        match self.get("resample") {
            Some(value) if value.as_u64() != Some(BICUBIC) => Err(self.problem(format_args!(
                "resample is {value}, only {BICUBIC} (bicubic) is supported"
            ))),
            _ => Ok(()),
        }
    }

    /// Mean of each channel, of values from 0 to 1.
    pub fn mean(&self) -> Result<[f64; 3]> {
        self.channels("image_mean", CLIP_MEAN)
    }

    /// `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std` as a table.
    pub fn levels(&self, arithmetic: Resampler) -> Result<Levels> {
        let scale = match self.get("rescale_factor") {
            None => 1.0 / 255.0,
            Some(value) => match value.as_f64() {
                Some(scale) if scale > 0.0 => scale,
                _ => return Err(self.problem(format_args!("rescale_factor is {value}, not a positive number"))),
            },
        };
        let std = self.channels("image_std", CLIP_STD)?;
        if let Some(std) = std.iter().find(|std| **std <= 0.0) {
            return Err(self.problem(format_args!("image_std has {std}, which is not positive")));
        }
        let normalization = Normalization {
            scale: self.flag("do_rescale", true)?.then_some(scale),
            channels: self.flag("do_normalize", true)?.then_some((self.mean()?, std)),
        };
        Ok(Levels::new(&normalization, arithmetic))
    }

    /// Three numbers, or one for all channels.
    fn channels(&self, key: &str, default: [f64; 3]) -> Result<[f64; 3]> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        if let Some(number) = value.as_f64() {
            return Ok([number; 3]);
        }
        serde_json::from_value(value.clone())
            .map_err(|_| self.problem(format_args!("{key} is {value}, not three numbers")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str) -> PreprocessorFile {
        PreprocessorFile {
            name: "preprocessor_config.json",
            fields: serde_json::from_str(json).unwrap(),
        }
    }

    #[test]
    fn wrong_fields_are_named_with_their_file() {
        let problems = [
            (
                r#"{"image_mean": [0.5, 0.5]}"#,
                "image_mean is [0.5,0.5], not three numbers",
            ),
            (r#"{"image_std": 0}"#, "image_std has 0, which is not positive"),
            (
                r#"{"rescale_factor": "1/255"}"#,
                "rescale_factor is \"1/255\", not a positive number",
            ),
            (r#"{"do_rescale": 1}"#, "do_rescale is 1, not true or false"),
        ];
        for (json, problem) in problems {
            let error = file(json).levels(Resampler::Pillow).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("model configuration: preprocessor_config.json: {problem}")
            );
        }
        for json in [r#"{"resample": 2}"#, r#"{"do_center_crop": true}"#] {
            assert!(file(json).refuse_unsupported().is_err(), "{json}");
        }
        assert!(file(r#"{"size": {"height": -1}}"#).size().is_err());
    }

    #[test]
    fn one_number_stands_for_all_channels_and_for_both_sides() {
        assert_eq!(file(r#"{"image_mean": 0.5}"#).mean().unwrap(), [0.5; 3]);
        let size = file(r#"{"size": 384}"#).size().unwrap();
        assert_eq!((size.height, size.width), (Some(384), Some(384)));
    }

    #[test]
    fn videos_fall_back_to_the_fields_of_pictures() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            PreprocessorFile::of_videos(dir.path()).unwrap().number("a").unwrap(),
            None
        );
        let nested = r#"{"image_processor": {"a": 1}, "video_processor": {"a": 2}}"#;
        std::fs::write(dir.path().join("processor_config.json"), nested).unwrap();
        let both = || {
            let files = [
                PreprocessorFile::of_pictures(dir.path()),
                PreprocessorFile::of_videos(dir.path()),
            ];
            files.map(|file| file.unwrap().number("a").unwrap())
        };
        assert_eq!(both(), [Some(1), Some(2)]);
        std::fs::write(dir.path().join("preprocessor_config.json"), r#"{"a": 3}"#).unwrap();
        assert_eq!(both(), [Some(3), Some(3)]);
        std::fs::write(dir.path().join("video_preprocessor_config.json"), r#"{"a": 4}"#).unwrap();
        assert_eq!(both(), [Some(3), Some(4)]);
    }
}
