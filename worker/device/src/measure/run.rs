//! All that is wanted of a shape, in order.

use flotilla_kernels::{Gpu, bench::ceilings};

use super::{
    Bench, Ceiling, Line, Options, Part, Report,
    bench::Shown,
    picture::{self, Size},
    vision,
};
use crate::{
    error::DeviceError,
    runner::Sharing,
    shape::{self, QwenVision, SiglipVision, TextShape, VisionShape},
    siglip,
};

/// Tokens of the prompt of groups, its picture included.
const PROMPT: usize = 1536;

/// Measures a released shape with random weights and says each result as it comes. What cannot be measured is said too, and
/// the rest goes on; an error is a shape that does not exist or does not fit.
pub fn run(gpu: &Gpu, name: &str, options: &Options, say: &mut dyn FnMut(Report)) -> Result<(), DeviceError> {
    let (Some(text), Some(vision)) = (TextShape::named(name), VisionShape::named(name)) else {
        return Err(DeviceError::Input(shape::unknown(name)));
    };
    let tower = match &vision {
        VisionShape::Qwen(tower) => Some(tower),
        VisionShape::Siglip(_) => None,
    };
    let ceiling = Ceiling::from(ceilings(gpu)?);
    say(Report::Begin {
        shape: name.to_owned(),
        card: gpu.card()?.name,
        ceiling,
    });
    let wanted = |part: &Part| options.parts.contains(part);
    let of_text = Part::ALL
        .into_iter()
        .filter(|part| *part != Part::Vision && wanted(part));
    let of_text = of_text.collect::<Vec<_>>();
    if !of_text.is_empty() {
        let bench = Bench::new(gpu, &text, ceiling)?;
        for part in of_text {
            bench.part(part, options, tower, say);
        }
    }
    match &vision {
        VisionShape::Qwen(tower) if wanted(&Part::Vision) => pictures(gpu, &ceiling, tower, say),
        VisionShape::Siglip(tower) if wanted(&Part::Vision) => visuals(gpu, &ceiling, tower, say),
        _ => {}
    }
    Ok(())
}

fn pictures(gpu: &Gpu, ceiling: &Ceiling, tower: &QwenVision, say: &mut dyn FnMut(Report)) {
    for count in [1, 4] {
        let line = vision(gpu, ceiling, tower, count, picture::SIDE);
        say(reported(&format!("vision {count}"), line.map(Report::Line)));
    }
}

/// Pictures and a video of LLaVA-OneVision.
fn visuals(gpu: &Gpu, ceiling: &Ceiling, tower: &SiglipVision, say: &mut dyn FnMut(Report)) {
    match siglip::measure::lines(gpu, ceiling, tower) {
        Ok(lines) => lines.into_iter().for_each(|line| say(Report::Line(line))),
        Err(error) => say(reported("vision", Err(error))),
    }
}

/// Takes a line, or why there is none, under what was to be measured.
type Say<'a> = dyn FnMut(String, Result<Line, DeviceError>) + 'a;

impl Bench {
    /// The picture in the prompts of requests, where its tower is that of Qwen2.5-VL.
    fn shown(&self, tower: Option<&QwenVision>) -> Result<Option<Shown>, DeviceError> {
        let sized = tower.and_then(|tower| Some((tower, Size::largest(tower, PROMPT)?)));
        sized
            .map(|(tower, size)| Shown::new(&self.gpu, tower, size))
            .transpose()
    }

    /// Samples of one prompt and of several, step by step.
    fn group_lines(&self, shown: Option<&Shown>, line: &mut Say<'_>) {
        let mut of = |groups: usize, n: usize, sharing| {
            let measured = self.groups((groups, n), PROMPT, sharing, shown);
            line(format!("{groups} groups of {n}"), measured);
        };
        for (groups, n) in [(1, 8), (1, 128), (16, 8)] {
            of(groups, n, Sharing::WhereItPays);
            of(groups, n, Sharing::Never);
        }
        // What one step of GRPO decodes at once.
        of(32, 8, Sharing::WhereItPays);
        for rows in [8, 128, 256] {
            line(format!("{rows} alone"), self.alone(rows, PROMPT, shown));
        }
    }

    /// Whole requests: of one prompt, the same with nothing shared, of one prompt of text, and of many.
    fn request_lines(&self, shown: Option<&Shown>, line: &mut Say<'_>) {
        let of_text = shown.is_some().then_some(None);
        for n in [8, 128] {
            for shown in [Some(shown), of_text].into_iter().flatten() {
                line(format!("request of {n}"), self.requests((1, n), PROMPT, 256, shown));
            }
            let alone = self.requests_alone(n, PROMPT, 256, shown);
            line(format!("requests {n}, nothing shared"), alone);
        }
        for count in [32, 128] {
            line(format!("requests {count}"), self.requests((count, 1), 1024, 128, None));
        }
    }

    fn part(&self, part: Part, options: &Options, tower: Option<&QwenVision>, say: &mut dyn FnMut(Report)) {
        let mut line = |what: String, line: Result<Line, DeviceError>| say(reported(&what, line.map(Report::Line)));
        match part {
            Part::Decode => {
                for rows in [1, 8, 32, 128, 256] {
                    line(format!("decode {rows}"), self.decode(rows, 1024));
                }
            }
            Part::Group | Part::Request => match self.shown(tower) {
                Ok(shown) if part == Part::Group => self.group_lines(shown.as_ref(), &mut line),
                Ok(shown) => self.request_lines(shown.as_ref(), &mut line),
                Err(error) => line(part.to_string(), Err(error)),
            },
            Part::Prefill => {
                for (rows, tokens) in [(1, 4096), (8, 2048)] {
                    line(format!("prefill {rows}"), self.prefill(rows, tokens));
                }
            }
            // No language model is beside them.
            Part::Vision => {}
            Part::BestOf => {
                let contest = self.best_of(options.best_of);
                say(reported("best of n", contest.map(Report::BestOf)));
            }
            Part::Grpo => {
                for step in &options.grpo {
                    let measured = self.grpo(step, tower);
                    say(reported(
                        &format!("grpo {}", step.lengths),
                        measured.map(|step| Report::Grpo(Box::new(step))),
                    ));
                }
            }
            Part::GrpoPeer => {
                let measured = self.grpo(&super::Grpo::of_peer(), tower);
                say(reported(
                    "grpo as the peer's",
                    measured.map(|step| Report::Grpo(Box::new(step))),
                ));
            }
        }
    }
}

fn reported(what: &str, measured: Result<Report, DeviceError>) -> Report {
    measured.unwrap_or_else(|error| Report::Failed {
        what: what.to_owned(),
        error: error.to_string(),
    })
}
