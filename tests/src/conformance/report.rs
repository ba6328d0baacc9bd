//! What a server holds and what it does not, as a table and as a verdict.

use std::{fmt, time::Duration};

use anyhow::ensure;

use super::check::{Finding, Outcome};

/// What came of all checks.
#[derive(Debug)]
pub struct Report {
    /// One for each check, in the order of the suite.
    pub findings: Vec<Finding>,
    /// How long the suite took.
    pub time: Duration,
}

impl Report {
    /// An error that names each check that failed, or held although it is listed as a difference.
    pub fn verdict(&self) -> anyhow::Result<()> {
        let bad: Vec<String> = self
            .findings
            .iter()
            .filter(|finding| !finding.outcome.is_good())
            .map(|finding| match &finding.outcome {
                Outcome::HoldsUnexpectedly(reason) => {
                    format!(
                        "{} holds, but is listed as a difference ({reason}): take it off the list",
                        finding.name
                    )
                }
                Outcome::Fails(why) => format!("{}: {why}", finding.name),
                _ => finding.name.to_owned(),
            })
            .collect();
        ensure!(
            bad.is_empty(),
            "{} of {} checks failed:\n{}",
            bad.len(),
            self.findings.len(),
            bad.join("\n")
        );
        ensure!(!self.findings.is_empty(), "no check was run");
        Ok(())
    }

    /// How many checks hold.
    #[must_use]
    pub fn holding(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Holds))
    }

    fn count(&self, is: impl Fn(&Outcome) -> bool) -> usize {
        self.findings.iter().filter(|finding| is(&finding.outcome)).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let (word, why) = match &finding.outcome {
                Outcome::Holds => ("holds", String::new()),
                Outcome::Fails(why) => ("FAILS", format!(": {why}")),
                Outcome::Differs(reason) => ("differs", format!(": {reason}")),
                Outcome::HoldsUnexpectedly(_) => ("HOLDS, though listed as a difference", String::new()),
                Outcome::Skipped(reason) => ("skipped", format!(": {reason}")),
            };
            let (topic, name) = (finding.topic, finding.name);
            writeln!(
                f,
                "{topic:<12} {:>6.2}s  {name} {word}{why}",
                finding.time.as_secs_f32()
            )?;
        }
        write!(
            f,
            "{} of {} checks hold, {} known differences, {} skipped, in {:.1} s",
            self.holding(),
            self.findings.len(),
            self.count(|outcome| matches!(outcome, Outcome::Differs(_))),
            self.count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            self.time.as_secs_f32()
        )
    }
}
