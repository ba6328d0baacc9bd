//! Pictures and videos to rows of patches.

use std::path::Path;

use super::VisionConfig;
use crate::{
    ModelError, Result,
    media::{Levels, Medium, MediumSize, Picture, PreprocessorFile, Resampler},
    visual::{Grid, Layout, Visual, VisualProcessor},
};

/// Longest side over shortest side that the reference accepts.
const MAX_ASPECT: f64 = 200.0;
/// Most pixels that a checkpoint may make of a small picture.
const MOST_MIN_PIXELS: usize = 64 << 20;

/// How the seconds between two time slices of a video become positions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TimeStep {
    /// `temporal_patch_size / fps * tokens_per_second`, as EasyR1 and transformers 5 compute it.
    #[default]
    Float,
    /// The seconds are cut to a whole number before they are multiplied, as transformers 4.57 does: a rate above
    /// `temporal_patch_size` frames a second then gives all slices one time.
    Integer,
}

/// Fewest and most pixels of a frame after resizing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum FrameBudget {
    /// `size` of the checkpoint's video preprocessor, whatever the number of frames, as the reference does.
    #[default]
    Checkpoint,
    /// As qwen-vl-utils 0.0.14 does before it hands frames to the reference: 128 to 768 tokens a frame, and fewer than
    /// 768 where so many frames would exceed nine tenths of a context of so many tokens.
    Context(usize),
}

/// Fewest and most pixels after resizing.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bounds {
    min: f64,
    max: f64,
}

/// What a preprocessor file says of pictures or of frames.
#[derive(Clone, Debug, PartialEq)]
struct Preparation {
    resize: bool,
    bounds: Bounds,
    levels: Levels,
    resampler: Resampler,
}

/// How pictures and videos become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct QwenVisualProcessor {
    /// How seconds become positions.
    pub time_step: TimeStep,
    /// How large frames become.
    pub frame_budget: FrameBudget,
    pictures: Preparation,
    videos: Preparation,
    patch: usize,
    merge: usize,
    slice: usize,
    tokens_per_second: f64,
}

impl QwenVisualProcessor {
    /// Reads `preprocessor_config.json` and `video_preprocessor_config.json` (which falls back to the former); what they
    /// leave out has the defaults of the reference. Fields that contradict `config.json` or ask for what is not
    /// implemented are an error.
    pub fn load(dir: &Path, vision: &VisionConfig) -> Result<Self> {
        let (pictures, videos) = (PreprocessorFile::of_pictures(dir)?, PreprocessorFile::of_videos(dir)?);
        for file in [&pictures, &videos] {
            file.refuse_unsupported()?;
            for (key, expected) in [
                ("patch_size", vision.patch_size),
                ("merge_size", vision.spatial_merge_size),
                ("temporal_patch_size", vision.temporal_patch_size),
            ] {
                if let Some(found) = file.number(key)?.filter(|found| *found != expected) {
                    return Err(file.problem(format_args!("{key} is {found}, config.json says {expected}")));
                }
            }
        }
        Ok(Self {
            time_step: TimeStep::default(),
            frame_budget: FrameBudget::default(),
            pictures: Preparation::read(&pictures, (56 * 56, 28 * 28 * 1280), Resampler::Pillow)?,
            videos: Preparation::read(&videos, (128 * 28 * 28, 768 * 28 * 28), Resampler::Torchvision)?,
            patch: vision.patch_size,
            merge: vision.spatial_merge_size,
            slice: vision.temporal_patch_size,
            tokens_per_second: vision.tokens_per_second,
        })
    }

    /// Resizes pictures as torchvision does instead of Pillow: what the reference's "fast" processor gives, which
    /// `AutoProcessor` of transformers 4.57 chooses where torchvision is installed.
    pub fn resample_pictures(&mut self, dir: &Path, resampler: Resampler) -> Result<()> {
        let file = PreprocessorFile::of_pictures(dir)?;
        self.pictures.levels = file.levels(resampler)?;
        self.pictures.resampler = resampler;
        Ok(())
    }

    /// Pixels per side of a token.
    fn factor(&self) -> usize {
        self.patch * self.merge
    }

    /// Patches of `frames` frames of this size.
    fn grid(
        &self,
        preparation: &Preparation,
        bounds: Bounds,
        frames: usize,
        height: usize,
        width: usize,
    ) -> Result<Grid> {
        let factor = self.factor();
        let (rows, columns) = if preparation.resize {
            resized(height, width, factor, bounds)?
        } else if height > 0 && width > 0 && height.is_multiple_of(factor) && width.is_multiple_of(factor) {
            (height, width)
        } else {
            return Err(ModelError::Image(format!(
                "{width}x{height} pixels are no multiples of {factor}, and the checkpoint's do_resize is false"
            )));
        };
        Ok([frames.div_ceil(self.slice), rows / self.patch, columns / self.patch])
    }

    fn picture_layout(&self, height: usize, width: usize) -> Result<Layout> {
        Ok(Layout::Patches {
            grid: self.grid(&self.pictures, self.pictures.bounds, 1, height, width)?,
            time_step: 0.0,
            video: false,
        })
    }

    fn video_layout(&self, frames: usize, height: usize, width: usize, fps: f64) -> Result<Layout> {
        if frames == 0 {
            return Err(ModelError::Video("it has no frame".to_owned()));
        }
        if !(fps > 0.0 && fps.is_finite()) {
            return Err(ModelError::Video(format!("{fps} frames a second")));
        }
        let bounds = self.frame_bounds(frames);
        Ok(Layout::Patches {
            grid: self.grid(&self.videos, bounds, frames, height, width)?,
            time_step: self.seconds(fps) * self.tokens_per_second,
            video: true,
        })
    }

    /// Seconds between two time slices.
    fn seconds(&self, fps: f64) -> f64 {
        let seconds = self.slice as f64 / fps;
        match self.time_step {
            TimeStep::Float => seconds,
            TimeStep::Integer => seconds.trunc(),
        }
    }

    fn frame_bounds(&self, frames: usize) -> Bounds {
        match self.frame_budget {
            FrameBudget::Checkpoint => self.videos.bounds,
            FrameBudget::Context(tokens) => {
                let token = (self.factor() * self.factor()) as f64;
                let (min, most) = (128.0 * token, 768.0 * token);
                let total = tokens as f64 * token * 0.9;
                let max = most.min(total / frames as f64 * self.slice as f64);
                Bounds {
                    min,
                    max: max.max((min * 1.05).floor()),
                }
            }
        }
    }

    fn layout(&self, size: &MediumSize) -> Result<Layout> {
        match *size {
            MediumSize::Picture { width, height } => self.picture_layout(height, width),
            MediumSize::Video {
                frames,
                width,
                height,
                fps,
            } => self.video_layout(frames, height, width, fps),
        }
    }

    fn visual(&self, medium: &Medium) -> Result<Visual> {
        let (frames, preparation) = match medium {
            Medium::Picture(picture) => (std::slice::from_ref(picture), &self.pictures),
            Medium::Video(video) => {
                video.check()?;
                (video.frames.as_slice(), &self.videos)
            }
        };
        let layout = self.layout(&medium.size())?;
        let Layout::Patches { grid, .. } = layout else {
            return Err(ModelError::Input(format!("{layout:?} is no layout of patches")));
        };
        let resized = |frame: &Picture| {
            let (width, height) = (grid[2] * self.patch, grid[1] * self.patch);
            frame.resize_with(preparation.resampler, width, height)
        };
        let frames = frames.iter().map(resized).collect::<Vec<_>>();
        Ok(Visual {
            values: self.cut(&frames, &preparation.levels, grid),
            layout,
        })
    }

    /// Rows in the order (time slice, row group, column group, row, column), each of channel, frame, y, x. The last frame
    /// is repeated to fill its slice.
    fn cut(&self, frames: &[Picture], levels: &Levels, [slices, rows, columns]: Grid) -> Vec<f32> {
        let (side, width) = (self.patch, columns * self.patch);
        let area = side * side;
        let mut patches = Vec::with_capacity(slices * rows * columns * 3 * self.slice * area);
        let places = super::window::patch_coordinates(rows, columns, self.merge);
        for slice in 0..slices {
            let first = slice * self.slice;
            let given = &frames[first..frames.len().min(first + self.slice)];
            for (row, column) in &places {
                for channel in 0..3 {
                    let levels = levels.channel(channel);
                    for frame in given {
                        for y in row * side..(row + 1) * side {
                            let start = (y * width + column * side) * 3;
                            let pixels = frame.rgb[start..start + side * 3].chunks_exact(3);
                            patches.extend(pixels.map(|pixel| levels[usize::from(pixel[channel])]));
                        }
                    }
                    for _ in given.len()..self.slice {
                        patches.extend_from_within(patches.len() - area..);
                    }
                }
            }
        }
        patches
    }
}

impl VisualProcessor for QwenVisualProcessor {
    fn plan(&self, sizes: &[MediumSize]) -> Result<Vec<Layout>> {
        sizes.iter().map(|size| self.layout(size)).collect()
    }

    fn process(&self, media: &[Medium]) -> Result<Vec<Visual>> {
        media.iter().map(|medium| self.visual(medium)).collect()
    }

    fn make(&self, medium: &Medium, _layout: &Layout) -> Result<Visual> {
        self.visual(medium)
    }

    fn tokens(&self, layout: &Layout) -> usize {
        match layout {
            Layout::Patches {
                grid: [time, rows, columns],
                ..
            } => time * (rows / self.merge) * (columns / self.merge),
            Layout::Anyres { .. } | Layout::Square | Layout::Frames { .. } => 0,
        }
    }
}

impl Preparation {
    /// `min_pixels` and `max_pixels`, or else the edges of `size`, or else the defaults of the reference's class. The
    /// reference's processor of pictures ignores `size` when it loads one; here it means what it says.
    fn read(file: &PreprocessorFile, (min, max): (usize, usize), resampler: Resampler) -> Result<Self> {
        let size = file.size()?;
        if (size.height, size.width) != (None, None) || size.shortest_edge.is_some() != size.longest_edge.is_some() {
            return Err(file.problem("size needs shortest_edge and longest_edge, the fewest and the most pixels"));
        }
        let min = file.number("min_pixels")?.or(size.shortest_edge).unwrap_or(min);
        let max = file.number("max_pixels")?.or(size.longest_edge).unwrap_or(max);
        if min > max || min > MOST_MIN_PIXELS {
            return Err(file.problem(format_args!(
                "min_pixels is {min}, more than max_pixels ({max}) or than {MOST_MIN_PIXELS}"
            )));
        }
        Ok(Self {
            resize: file.flag("do_resize", true)?,
            bounds: Bounds {
                min: min as f64,
                max: max as f64,
            },
            levels: file.levels(resampler)?,
            resampler,
        })
    }
}

/// Height and width, both multiples of `factor`, near the given ones and within the pixel bounds.
///
/// Source: `smart_resize` of the reference; halves round to even, as Python's `round` does.
pub fn smart_resize(height: usize, width: usize, factor: usize, min: usize, max: usize) -> Result<(usize, usize)> {
    let bounds = Bounds {
        min: min as f64,
        max: max as f64,
    };
    resized(height, width, factor, bounds)
}

fn resized(height: usize, width: usize, factor: usize, bounds: Bounds) -> Result<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if height == 0 || width == 0 || h.max(w) / h.min(w) > MAX_ASPECT {
        return Err(ModelError::Image(format!(
            "{width}x{height} pixels: the aspect ratio exceeds {MAX_ASPECT}"
        )));
    }
    let round = |side: f64| (side / f).round_ties_even() * f;
    let (mut new_h, mut new_w) = (round(h), round(w));
    if new_h * new_w > bounds.max {
        let beta = (h * w / bounds.max).sqrt();
        let shrink = |side: f64| ((side / beta / f).floor() * f).max(f);
        (new_h, new_w) = (shrink(h), shrink(w));
    } else if new_h * new_w < bounds.min {
        let beta = (bounds.min / (h * w)).sqrt();
        let grow = |side: f64| (side * beta / f).ceil() * f;
        (new_h, new_w) = (grow(h), grow(w));
    }
    if new_h < f || new_w < f {
        return Err(ModelError::Image(format!(
            "{width}x{height} pixels: a side is less than half of {factor} pixels, a token's side"
        )));
    }
    Ok((new_h as usize, new_w as usize))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::media::Video;

    #[test]
    fn resized_sides_are_those_of_the_reference() {
        let bounds = [(3136, 12_845_056), (224 * 224, 1280 * 784), (262_144, 4_194_304)];
        let cases = [
            ((480, 640), [(476, 644); 3]),
            ((28, 28), [(56, 56), (224, 224), (532, 532)]),
            ((1080, 1920), [(1092, 1932), (728, 1316), (1092, 1932)]),
            ((100, 3000), [(112, 2996); 3]),
            ((1000, 1000), [(1008, 1008), (980, 980), (1008, 1008)]),
            ((37, 53), [(56, 84), (196, 280), (448, 616)]),
            ((4032, 3024), [(4032, 3024), (1148, 840), (2352, 1764)]),
        ];
        for ((height, width), expected) in cases {
            for ((min, max), expected) in bounds.iter().zip(expected) {
                assert_eq!(
                    smart_resize(height, width, 28, *min, *max).unwrap(),
                    expected,
                    "{height}x{width}"
                );
            }
        }
    }

    #[test]
    fn a_half_rounds_to_the_even_multiple() {
        assert_eq!(smart_resize(70, 98, 28, 1, 1 << 20).unwrap(), (56, 112));
    }

    #[test]
    fn a_strip_is_refused() {
        assert!(
            smart_resize(1, 201, 28, 3136, 1 << 20)
                .unwrap_err()
                .to_string()
                .contains("aspect ratio")
        );
    }

    fn processor() -> QwenVisualProcessor {
        let config = VisionConfig::from_json(Some(&json!({
            "depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "tokens_per_second": 2
        })));
        QwenVisualProcessor::load(Path::new("/nowhere"), &config.unwrap()).unwrap()
    }

    fn picture(width: usize, height: usize) -> Picture {
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| [1, 2, 3].map(|k| ((y + x) * k % 256) as u8)));
        Picture {
            width,
            height,
            rgb: rgb.collect(),
        }
    }

    fn process(medium: Medium) -> Visual {
        processor().process(&[medium]).unwrap().remove(0)
    }

    #[test]
    fn pixels_of_a_gradient_are_those_of_the_reference() {
        let image = process(Medium::Picture(picture(70, 50)));
        let layout = Layout::Patches {
            grid: [1, 4, 4],
            time_step: 0.0,
            video: false,
        };
        assert_eq!((image.layout, image.values.len()), (layout, 16 * 1176));
        let count = image.values.len() as f64;
        let mean = image.values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = image.values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / (count - 1.0);
        assert!((mean + 0.153_079_4).abs() < 1e-4, "{mean}");
        assert!((variance.sqrt() - 0.946_957_6).abs() < 1e-4, "{}", variance.sqrt());
        let first = [-1.792_262_5, -1.777_664_1, -1.748_467_2, -1.733_868_8];
        let last = [-0.200_413_8, -0.143_533_5, -0.086_653_3];
        for (got, want) in image
            .values
            .iter()
            .zip(first)
            .chain(image.values[16 * 1176 - 3..].iter().zip(last))
        {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn both_frames_of_a_picture_are_equal() {
        let image = process(Medium::Picture(picture(56, 56)));
        let row = &image.values[..1176];
        assert!((0..3).all(|c| row[c * 392..c * 392 + 196] == row[c * 392 + 196..(c + 1) * 392]));
    }

    fn video(frames: usize, fps: f64) -> Video {
        let frame = |level: usize| Picture {
            rgb: vec![level as u8; 400 * 300 * 3],
            width: 400,
            height: 300,
        };
        Video {
            frames: (0..frames).map(frame).collect(),
            fps,
        }
    }

    #[test]
    fn the_last_frame_of_an_odd_number_is_repeated() {
        let visual = process(Medium::Video(video(3, 2.0)));
        let layout = Layout::Patches {
            grid: [2, 22, 28],
            time_step: 2.0,
            video: true,
        };
        assert_eq!(visual.layout, layout);
        let last = &visual.values[visual.values.len() - 1176..];
        assert!(last[..392].iter().all(|value| *value == last[0]));
        assert_ne!(visual.values[0], visual.values[196]);
    }

    #[test]
    fn time_steps_are_floats_or_whole_seconds() {
        let step = |time_step, fps| {
            let processor = QwenVisualProcessor {
                time_step,
                ..processor()
            };
            let size = MediumSize::Video {
                frames: 4,
                width: 400,
                height: 300,
                fps,
            };
            match processor.plan(&[size]).unwrap()[0] {
                Layout::Patches { time_step, .. } => time_step,
                _ => f64::NAN,
            }
        };
        assert_eq!([1.0, 2.0, 4.0].map(|fps| step(TimeStep::Float, fps)), [4.0, 2.0, 1.0]);
        assert_eq!([1.0, 1.5, 4.0].map(|fps| step(TimeStep::Integer, fps)), [4.0, 2.0, 0.0]);
    }

    #[test]
    fn many_frames_share_the_context() {
        let grid = |budget, frames| {
            let processor = QwenVisualProcessor {
                frame_budget: budget,
                ..processor()
            };
            let size = MediumSize::Video {
                frames,
                width: 1920,
                height: 1080,
                fps: 2.0,
            };
            match processor.plan(&[size]).unwrap()[0] {
                Layout::Patches { grid, .. } => grid,
                _ => [0; 3],
            }
        };
        let [_, rows, columns] = grid(FrameBudget::Checkpoint, 768);
        assert_eq!(grid(FrameBudget::Checkpoint, 8), [4, rows, columns]);
        let [_, rows, columns] = grid(FrameBudget::Context(128_000), 768);
        assert!(rows * columns / 4 <= 300, "{rows}x{columns}");
        assert_eq!(grid(FrameBudget::Context(128_000), 8), grid(FrameBudget::Checkpoint, 8));
    }

    #[test]
    fn videos_without_frames_or_rate_and_uneven_frames_are_refused() {
        let refusal = |video| processor().process(&[Medium::Video(video)]).unwrap_err().to_string();
        assert_eq!(refusal(video(0, 2.0)), "video: it has no frame");
        assert_eq!(refusal(video(2, 0.0)), "video: 0 frames a second");
        let mut uneven = video(2, 2.0);
        uneven.frames.push(picture(8, 8));
        assert!(refusal(uneven).contains("frame 2 has 8x8 pixels"));
    }

    proptest! {
        #[test]
        fn what_is_planned_is_made(width in 1usize..400, height in 1usize..400, frames in 0usize..4, fps in 0.1f64..9.0) {
            let medium = match frames {
                0 => Medium::Picture(picture(width, height)),
                _ => Medium::Video(Video { frames: vec![picture(width, height); frames], fps }),
            };
            let processor = processor();
            match (processor.plan(&[medium.size()]), processor.process(&[medium])) {
                (Ok(layouts), Ok(visuals)) => {
                    prop_assert_eq!(layouts[0], visuals[0].layout);
                    prop_assert_eq!(processor.tokens(&layouts[0]) * 4 * 1176, visuals[0].values.len());
                }
                (plan, made) => prop_assert!(plan.is_err() && made.is_err()),
            }
        }
    }
}
