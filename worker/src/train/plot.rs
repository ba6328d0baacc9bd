//! Curves of the run as SVG: reward (or loss), accuracy of each held-out set, KL.

use std::path::Path;

use flotilla_api::evaluation::Score;
use flotilla_artifacts::publish::replace_file;
use plotters::{
    coord::Shift,
    prelude::{
        BLACK, ChartBuilder, Circle, Color, DrawingArea, IntoDrawingArea, LineSeries, PathElement, RGBColor,
        SVGBackend, SeriesLabelPosition, WHITE,
    },
};

use super::{error::TrainError, journal::Line};

/// Width and height in pixels.
const SIZE: (u32, u32) = (860, 900);
/// Colours that differ for readers who do not see red and green apart (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// One curve.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
    dots: bool,
}

/// One picture of several curves over steps.
struct Panel {
    title: &'static str,
    curves: Vec<Curve>,
    /// Bounds of the values; None takes them from the data.
    bounds: Option<(f64, f64)>,
}

/// Draws what the lines and scores tell and replaces the file.
pub fn write(path: &Path, lines: &[Line], scores: &[Score]) -> Result<(), TrainError> {
    let text = draw(lines, scores)?;
    Ok(replace_file(path, text.as_bytes())?)
}

fn draw(lines: &[Line], scores: &[Score]) -> Result<String, TrainError> {
    let panels = panels(lines, scores);
    let last = lines
        .iter()
        .map(|line| line.step)
        .chain(scores.iter().map(|score| score.step))
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let areas = root.split_evenly((panels.len().max(1), 1));
        for (panel, area) in panels.iter().zip(&areas) {
            draw_panel(panel, area, f64::from(last.max(1)))?;
        }
        root.present().map_err(failed)?;
    }
    Ok(text)
}

fn panels(lines: &[Line], scores: &[Score]) -> Vec<Panel> {
    let metric = |name: &str, label: &str| Curve {
        name: label.to_owned(),
        points: lines
            .iter()
            .filter_map(|line| Some((f64::from(line.step), *line.metrics.get(name)?)))
            .collect(),
        dots: false,
    };
    let mut sets: Vec<&str> = scores.iter().map(|score| score.set.as_str()).collect();
    sets.sort_unstable();
    sets.dedup();
    let accuracy = |set: &str, value: &dyn Fn(&Score) -> Option<f64>, label: String| Curve {
        name: label,
        points: scores
            .iter()
            .filter(|score| score.set == set)
            .filter_map(|score| Some((f64::from(score.step), value(score)?)))
            .collect(),
        dots: true,
    };
    let mut held_out: Vec<Curve> = sets
        .iter()
        .map(|set| accuracy(set, &|score| Some(score.accuracy), format!("{set} accuracy")))
        .collect();
    held_out.extend(
        sets.iter()
            .map(|set| accuracy(set, &|score| score.swap_consistency, format!("{set} swap consistency"))),
    );
    let all = [
        Panel {
            title: "reward of the rollouts",
            curves: vec![
                metric("reward/overall", "overall"),
                metric("reward/preference", "preference"),
                metric("reward/exactMatch", "exact match"),
                metric("reward/format", "format"),
            ],
            bounds: Some((0.0, 1.0)),
        },
        Panel {
            title: "loss",
            curves: vec![metric("loss", "cross-entropy")],
            bounds: None,
        },
        Panel {
            title: "held-out rows, greedy",
            curves: held_out,
            bounds: Some((0.0, 1.0)),
        },
        Panel {
            title: "KL (k3) to the frozen initial model",
            curves: vec![metric("actor/kl_loss", "KL per token")],
            bounds: None,
        },
    ];
    let drawable = |mut panel: Panel| {
        panel.curves.retain(|curve| !curve.points.is_empty());
        (!panel.curves.is_empty()).then_some(panel)
    };
    all.into_iter().filter_map(drawable).collect()
}

fn draw_panel(panel: &Panel, area: &DrawingArea<SVGBackend<'_>, Shift>, last: f64) -> Result<(), TrainError> {
    let largest = panel
        .curves
        .iter()
        .flat_map(|curve| &curve.points)
        .map(|point| point.1)
        .fold(0.0, f64::max);
    let (low, high) = panel
        .bounds
        .unwrap_or((0.0, if largest > 0.0 { largest * 1.05 } else { 1.0 }));
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(32)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..last, low..high)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (index, curve) in panel.curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))
            .map_err(failed)?
            .label(curve.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        if curve.dots {
            chart
                .draw_series(curve.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))
                .map_err(failed)?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> TrainError {
    TrainError::Plot(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_that_has_values_is_named_in_the_plot() {
        let line = |step: u32| Line {
            step,
            metrics: [("reward/overall".to_owned(), 0.5), ("actor/kl_loss".to_owned(), 0.01)].into(),
        };
        let score = |step: u32| Score {
            set: "critic".into(),
            step,
            accuracy: 0.7,
            format_rate: 1.0,
            swap_consistency: Some(0.4),
            prompts: 10,
        };
        let text = draw(&[line(1), line(2)], &[score(0), score(2)]).expect("drawn");
        for name in ["overall", "critic accuracy", "critic swap consistency", "KL per token"] {
            assert!(text.contains(name), "{name} is not in the plot");
        }
        assert!(!text.contains("cross-entropy"));
    }

    #[test]
    fn a_run_without_values_gives_an_empty_plot() {
        assert!(draw(&[], &[]).expect("drawn").contains("<svg"));
    }
}
