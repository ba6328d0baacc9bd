//! The learner against the model in f64, against autograd and against the engine, on the GPU of this machine: `make test-cuda`.
#![cfg(feature = "cuda")]
#![allow(clippy::panic, clippy::expect_used, reason = "a test")]

use flotilla_device::learner::check;
use flotilla_kernels::{Gpu, check::Draw};

#[test]
fn the_learner_computes_what_its_references_do() {
    let gpu = Gpu::new(0).expect("a GPU; without one this test cannot be run");
    let failures = check::checks()
        .into_iter()
        .filter_map(|check| match (check.run)(&gpu, &mut Draw::new(1)) {
            Ok(distance) if distance.holds() => None,
            Ok(distance) => Some(format!("{}: {distance:?}", check.name)),
            Err(error) => Some(format!("{}: {error}", check.name)),
        });
    let failures = failures.collect::<Vec<_>>();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
