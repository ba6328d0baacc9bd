//! Pictures and videos to normalized squares.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::anyres::{Anyres, pinpoints, released_pinpoints};
use crate::{
    ModelError, Result,
    media::{Canvas, Levels, Medium, MediumSize, Picture, PreprocessorFile, Resampler, Video},
    tokenizer::optional_json,
    visual::{Layout, Visual, VisualProcessor},
};

/// The rule of the reference's class where a configuration names none.
const DEFAULT_RULE: &str = "anyres_max_9";

/// How pictures and videos become squares.
#[derive(Clone, Debug, PartialEq)]
pub struct OneVisionVisualProcessor {
    anyres: Anyres,
    pictures: Levels,
    videos: Levels,
    /// Around a picture that is one of several.
    fill: [u8; 3],
}

/// The fields of `config.json` that geometry depends on.
#[derive(Debug, Deserialize)]
struct Geometry {
    vision_config: Vision,
    image_grid_pinpoints: Option<Value>,
    #[serde(alias = "image_aspect_ratio")]
    vision_aspect_ratio: Option<String>,
    vision_feature_select_strategy: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Vision {
    image_size: usize,
    patch_size: usize,
}

impl OneVisionVisualProcessor {
    /// Reads the geometry from `config.json`, pixel values from `preprocessor_config.json` and
    /// `video_preprocessor_config.json`; what they leave out has the defaults of the reference. Files that contradict each
    /// other (the reference then fails on its first picture) or ask for what is not implemented are an error.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = std::fs::read(&path).map_err(ModelError::file(&path))?;
        let geometry: Geometry = serde_json::from_slice(&bytes).map_err(|error| ModelError::Parse {
            path,
            reason: error.to_string(),
        })?;
        let side = geometry.vision_config.image_size;
        let grid = side / geometry.vision_config.patch_size.max(1);
        let canvases = match &geometry.image_grid_pinpoints {
            Some(value) => pinpoints(value, side)?,
            None => released_pinpoints(),
        };
        let rule = geometry.vision_aspect_ratio.as_deref().unwrap_or(DEFAULT_RULE);
        if let Some(strategy) = geometry
            .vision_feature_select_strategy
            .filter(|strategy| strategy != "full")
        {
            return Err(ModelError::Config(format!(
                "vision_feature_select_strategy is {strategy:?}, only \"full\" is supported: the tower has no class token"
            )));
        }
        check_processor(dir, rule, grid * grid)?;
        let (pictures, videos) = (PreprocessorFile::of_pictures(dir)?, PreprocessorFile::of_videos(dir)?);
        if let Some(value) = pictures.get("image_grid_pinpoints")
            && pinpoints(value, side)? != canvases
        {
            return Err(pictures.problem("image_grid_pinpoints is not that of config.json"));
        }
        for file in [&pictures, &videos] {
            check_file(file, side)?;
        }
        Ok(Self {
            anyres: Anyres::new(canvases, rule, side, grid)?,
            pictures: pictures.levels(Resampler::Pillow)?,
            videos: videos.levels(Resampler::Torchvision)?,
            fill: pictures.mean()?.map(|mean| (mean * 255.0) as u8),
        })
    }

    /// How pictures are cut and their features joined.
    pub fn anyres(&self) -> &Anyres {
        &self.anyres
    }

    fn layout(&self, size: &MediumSize, alone: bool) -> Result<Layout> {
        match *size {
            MediumSize::Picture { width, height } if width == 0 || height == 0 => {
                Err(ModelError::Image(format!("{width}x{height} pixels")))
            }
            MediumSize::Picture { width, height } if alone => Ok(Layout::Anyres {
                tiles: self.anyres.plan(height, width)?.tiles(),
                height,
                width,
            }),
            MediumSize::Picture { .. } => Ok(Layout::Square),
            MediumSize::Video {
                frames, width, height, ..
            } if frames == 0 || width == 0 || height == 0 => {
                Err(ModelError::Video(format!("{frames} frames of {width}x{height} pixels")))
            }
            MediumSize::Video { frames, .. } => Ok(Layout::Frames { frames }),
        }
    }

    fn visual(&self, medium: &Medium, alone: bool) -> Result<Visual> {
        let values = match medium {
            Medium::Picture(picture) if alone => self.tiles(picture)?,
            Medium::Picture(picture) => self.square(picture),
            Medium::Video(video) => self.frames(video)?,
        };
        Ok(Visual {
            values,
            layout: self.layout(&medium.size(), alone)?,
        })
    }

    /// The whole picture squeezed into a square, then the squares of its canvas row by row.
    fn tiles(&self, picture: &Picture) -> Result<Vec<f32>> {
        let (plan, side) = (self.anyres.plan(picture.height, picture.width)?, self.anyres.side());
        let mut values = Vec::with_capacity(plan.tiles() * 3 * side * side);
        push_square(&mut values, &picture.resize(side, side), (0, 0), side, &self.pictures);
        let fitted = picture.resize(plan.fitted.1, plan.fitted.0);
        let canvas = fitted.on_canvas(
            Canvas::around(&fitted, plan.canvas, [0; 3]),
            plan.canvas.1,
            plan.canvas.0,
        );
        for row in 0..plan.squares.0 {
            for column in 0..plan.squares.1 {
                push_square(&mut values, &canvas, (row * side, column * side), side, &self.pictures);
            }
        }
        Ok(values)
    }

    /// The picture in the middle of a square of the mean colour.
    fn square(&self, picture: &Picture) -> Vec<f32> {
        let (side, longer) = (self.anyres.side(), picture.height.max(picture.width));
        let square = picture.on_canvas(Canvas::around(picture, (longer, longer), self.fill), side, side);
        let mut values = Vec::with_capacity(3 * side * side);
        push_square(&mut values, &square, (0, 0), side, &self.pictures);
        values
    }

    /// Each frame squeezed into a square.
    fn frames(&self, video: &Video) -> Result<Vec<f32>> {
        video.check()?;
        let side = self.anyres.side();
        let mut values = Vec::with_capacity(video.frames.len() * 3 * side * side);
        for frame in &video.frames {
            let square = frame.resize_with(Resampler::Torchvision, side, side);
            push_square(&mut values, &square, (0, 0), side, &self.videos);
        }
        Ok(values)
    }
}

/// Whether a picture is the only one of its sample: only then it is cut.
fn alone(pictures: impl Iterator<Item = bool>) -> bool {
    pictures.filter(|is_picture| *is_picture).count() == 1
}

impl VisualProcessor for OneVisionVisualProcessor {
    fn plan(&self, sizes: &[MediumSize]) -> Result<Vec<Layout>> {
        let alone = alone(sizes.iter().map(|size| matches!(size, MediumSize::Picture { .. })));
        sizes.iter().map(|size| self.layout(size, alone)).collect()
    }

    fn process(&self, media: &[Medium]) -> Result<Vec<Visual>> {
        let sizes = media.iter().map(Medium::size).collect::<Vec<_>>();
        self.plan(&sizes)?;
        let alone = alone(media.iter().map(|medium| matches!(medium, Medium::Picture(_))));
        media.iter().map(|medium| self.visual(medium, alone)).collect()
    }

    fn make(&self, medium: &Medium, layout: &Layout) -> Result<Visual> {
        self.visual(medium, !matches!(layout, Layout::Square))
    }

    fn tokens(&self, layout: &Layout) -> usize {
        match *layout {
            // A layout of `plan` has a size that fits.
            Layout::Anyres { height, width, .. } => self.anyres.tokens(height, width).unwrap_or(0),
            Layout::Square => self.anyres.square_tokens(),
            Layout::Frames { frames } => self.anyres.video_tokens(frames),
            Layout::Patches { .. } => 0,
        }
    }
}

/// `processor_config.json` counts placeholders: by other numbers than the model's they would not match its features.
fn check_processor(dir: &Path, rule: &str, features: usize) -> Result<()> {
    let name = "processor_config.json";
    let json = optional_json(&dir.join(name))?.unwrap_or(Value::Null);
    let expected = [
        ("vision_aspect_ratio", Value::from(rule)),
        ("num_image_tokens", Value::from(features)),
        ("vision_feature_select_strategy", Value::from("full")),
    ];
    for (key, expected) in expected {
        match json.get(key) {
            Some(found) if !found.is_null() && *found != expected => {
                return Err(ModelError::Config(format!(
                    "{name}: {key} is {found}, config.json says {expected}"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_file(file: &PreprocessorFile, side: usize) -> Result<()> {
    file.refuse_unsupported()?;
    if !file.flag("do_resize", true)? {
        return Err(file.problem("do_resize false is not supported"));
    }
    let size = file.size()?;
    let sides = [size.height, size.width, size.shortest_edge];
    if let Some(found) = sides.into_iter().flatten().find(|found| *found != side) {
        return Err(file.problem(format_args!("size has {found}, config.json says image_size {side}")));
    }
    Ok(())
}

/// Appends the square at (row, column) of a picture, channel by channel.
fn push_square(values: &mut Vec<f32>, picture: &Picture, (top, left): (usize, usize), side: usize, levels: &Levels) {
    for channel in 0..3 {
        let levels = levels.channel(channel);
        for y in top..top + side {
            let start = (y * picture.width + left) * 3;
            let row = picture.rgb[start..start + side * 3].chunks_exact(3);
            values.extend(row.map(|pixel| levels[usize::from(pixel[channel])]));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn directory(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"vision_config": {"image_size": 384, "patch_size": 14}});
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let half = json!({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]});
        std::fs::write(dir.path().join("preprocessor_config.json"), half.to_string()).unwrap();
        for (name, json) in files {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        dir
    }

    fn processor() -> OneVisionVisualProcessor {
        OneVisionVisualProcessor::load(directory(&[]).path()).unwrap()
    }

    fn gradient(width: usize, height: usize) -> Picture {
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| [1, 2, 3].map(|k| ((y + x) * k % 256) as u8)));
        Picture {
            width,
            height,
            rgb: rgb.collect(),
        }
    }

    #[test]
    fn a_picture_alone_has_the_pixels_of_the_reference() {
        let visuals = processor().process(&[Medium::Picture(gradient(70, 50))]).unwrap();
        let layout = Layout::Anyres {
            tiles: 2,
            height: 50,
            width: 70,
        };
        assert_eq!((visuals.len(), visuals[0].layout), (1, layout));
        let values = &visuals[0].values;
        assert_eq!(values.len(), 2 * 3 * 384 * 384);
        let count = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / (count - 1.0);
        assert!((mean + 0.297_887_38).abs() < 1e-6, "{mean}");
        assert!((variance.sqrt() - 0.529_381_8).abs() < 1e-6, "{}", variance.sqrt());
    }

    #[test]
    fn a_picture_alone_has_black_bars_and_one_of_several_grey_ones() {
        let strip = || {
            Medium::Picture(Picture {
                width: 8,
                height: 2,
                rgb: vec![255; 48],
            })
        };
        let alone = processor().process(&[strip()]).unwrap();
        let corner = |values: &[f32]| values[values.len() - 1];
        assert_eq!(corner(&alone[0].values), -1.0);
        let several = processor().process(&[strip(), strip()]).unwrap();
        assert_eq!(several[0].layout, Layout::Square);
        assert!((corner(&several[1].values) - (127.0 / 127.5 - 1.0)).abs() < 1e-6);
    }

    #[test]
    fn a_picture_beside_a_video_is_cut() {
        let picture = MediumSize::Picture {
            width: 640,
            height: 480,
        };
        let video = MediumSize::Video {
            frames: 3,
            width: 640,
            height: 480,
            fps: 1.0,
        };
        let layouts = processor().plan(&[video, picture]).unwrap();
        let tokens = layouts
            .iter()
            .map(|layout| processor().tokens(layout))
            .collect::<Vec<_>>();
        assert_eq!(tokens, [3 * 196 + 1, 2929]);
        let layouts = processor().plan(&[picture, video, picture]).unwrap();
        assert_eq!(layouts[0], Layout::Square);
        assert_eq!(processor().tokens(&layouts[0]), 730);
    }

    #[test]
    fn files_that_contradict_each_other_are_refused() {
        let cases = [
            (
                "processor_config.json",
                json!({"num_image_tokens": 576}),
                "num_image_tokens is 576, config.json says 729",
            ),
            (
                "processor_config.json",
                json!({"vision_aspect_ratio": "anyres_max_4"}),
                "vision_aspect_ratio",
            ),
            (
                "preprocessor_config.json",
                json!({"image_grid_pinpoints": [[384, 384]]}),
                "image_grid_pinpoints",
            ),
            (
                "preprocessor_config.json",
                json!({"size": {"height": 336, "width": 384}}),
                "size has 336",
            ),
            (
                "video_preprocessor_config.json",
                json!({"do_resize": false}),
                "do_resize false",
            ),
        ];
        for (name, json, expected) in cases {
            let error = OneVisionVisualProcessor::load(directory(&[(name, json)]).path())
                .unwrap_err()
                .to_string();
            assert!(error.contains(name) && error.contains(expected), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_planned_is_made(sizes in proptest::collection::vec((1usize..900, 1usize..900, 0usize..3), 1..4)) {
            let medium = |(width, height, frames): &(usize, usize, usize)| match frames {
                0 => Medium::Picture(gradient(*width, *height)),
                _ => Medium::Video(Video { frames: vec![gradient(*width, *height); *frames], fps: 2.0 }),
            };
            let media = sizes.iter().map(medium).collect::<Vec<_>>();
            let plan = processor().plan(&media.iter().map(Medium::size).collect::<Vec<_>>());
            match (plan, processor().process(&media)) {
                (Ok(layouts), Ok(visuals)) => for (layout, visual) in layouts.iter().zip(&visuals) {
                    prop_assert_eq!(*layout, visual.layout);
                    let squares = match layout {
                        Layout::Anyres { tiles, .. } => *tiles,
                        Layout::Frames { frames } => *frames,
                        _ => 1,
                    };
                    prop_assert_eq!(visual.values.len(), squares * 3 * 384 * 384);
                },
                (plan, made) => prop_assert!(plan.is_err() && made.is_err()),
            }
        }
    }
}
