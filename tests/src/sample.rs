//! The digits sample, cut down to seconds: the same manifests, data and model shape, fewer steps and rows.

use flotilla_cli::manifest::{self, Manifest};
use serde_json::json;

use crate::root;

/// Steps of both runs of the small sample.
pub const STEPS: u32 = 6;

/// The sample with `STEPS` steps a run and a handful of rows.
pub fn small() -> anyhow::Result<Vec<Manifest>> {
    let mut manifests = manifest::load(&[root().join("manifests/samples/critic-digits")])?;
    manifests
        .iter_mut()
        .filter(|manifest| manifest.kind.kind == "TrainingJob")
        .for_each(shrink);
    Ok(manifests)
}

fn shrink(manifest: &mut Manifest) {
    let spec = &mut manifest.object.data["spec"];
    if let Some(sft) = spec.pointer_mut("/algorithm/sft") {
        sft["steps"] = json!(STEPS);
        sft["batchSize"] = json!(16);
    }
    if let Some(grpo) = spec.pointer_mut("/algorithm/grpo") {
        grpo["steps"] = json!(STEPS);
        grpo["rowsPerStep"] = json!(4);
        grpo["groupSize"] = json!(4);
        grpo["miniBatches"] = json!(2);
    }
    if let Some(evaluation) = spec.get_mut("evaluation") {
        evaluation["everySteps"] = json!(0);
        evaluation.as_object_mut().map(|plan| plan.remove("guard"));
        for set in evaluation["sets"].as_array_mut().into_iter().flatten() {
            set["maxRows"] = json!(8);
        }
    }
    spec["checkpoint"]["everySteps"] = json!(1);
    spec["checkpoint"]["keepLast"] = json!(2);
}

/// Only the manifests that `keep` says yes to.
pub fn only(manifests: Vec<Manifest>, keep: impl Fn(&Manifest) -> bool) -> Vec<Manifest> {
    manifests.into_iter().filter(keep).collect()
}
