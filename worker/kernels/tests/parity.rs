//! Every kernel against its reference on the GPU of this machine: `make test-cuda`, never in CI.
#![cfg(feature = "cuda")]
#![allow(clippy::panic, clippy::expect_used, reason = "a test")]

use flotilla_kernels::{
    Gpu,
    check::{self, Draw},
};

#[test]
fn every_kernel_computes_what_its_reference_does() {
    let gpu = Gpu::new(0).expect("a GPU; without one this test cannot be run");
    let failures = check::all()
        .into_iter()
        .filter_map(|check| match (check.run)(&gpu, &mut Draw::new(1)) {
            Ok(distance) if distance.holds() => None,
            Ok(distance) => Some(format!("{}: {distance:?}", check.name)),
            Err(error) => Some(format!("{}: {error}", check.name)),
        });
    let failures = failures.collect::<Vec<_>>();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
