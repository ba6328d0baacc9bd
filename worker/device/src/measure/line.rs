//! One line of the table.

use serde::Serialize;

use super::Floor;

/// What was measured once, beside its floor.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What was measured.
    pub what: String,
    /// What a second brings of it.
    pub rate: f64,
    /// What the rate counts: tokens, pictures.
    pub unit: &'static str,
    /// Milliseconds of one step, or of the whole where there are no steps.
    pub milliseconds: f64,
    /// Milliseconds that memory or arithmetic set as the least, by the ceilings measured before.
    pub floor: f64,
    /// What sets the floor.
    pub bound: &'static str,
    /// Milliseconds in which the card had nothing to do: scheduling, and what is done with the tokens.
    pub host: Option<f64>,
}

impl Line {
    /// `count` of `unit` in so many seconds.
    pub fn new(what: String, (count, unit): (usize, &'static str), seconds: f64, floor: Floor) -> Self {
        Self {
            what,
            rate: count as f64 / seconds,
            unit,
            milliseconds: seconds * 1e3,
            floor: floor.seconds * 1e3,
            bound: floor.bound,
            host: None,
        }
    }

    /// With the seconds in which the card had nothing to do.
    #[must_use]
    pub fn with_host(self, seconds: f64) -> Self {
        Self {
            host: Some(seconds * 1e3),
            ..self
        }
    }

    /// Share of the floor's speed that is reached.
    pub fn share(&self) -> f64 {
        self.floor / self.milliseconds
    }
}
