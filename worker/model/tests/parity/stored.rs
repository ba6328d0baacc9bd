//! Where the fixtures lie, and how a tensor is held against what is stored of it. The worker's own tests share this file.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde_json::Value;

/// Largest difference in f32, relative to the largest value of the tensor.
pub const TOLERANCE: f32 = 1e-4;

/// `tests/parity/fixtures` of the repository, from any crate of it; for a program that was carried to another machine, from the
/// working directory.
pub fn fixtures() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut places = built.chain([Path::new("")]);
    let dir = places.find_map(|dir| Some(dir.join("tests/parity/fixtures")).filter(|dir| dir.is_dir()));
    dir.unwrap()
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A copy of a checkpoint that a test may change.
pub fn copy_of(checkpoint: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    dir
}

/// Holds `[rows, width]` against what is stored of the tensor `name`: some rows, and the products of all with drawn
/// vectors. Differences are relative to the largest value.
pub fn check(tensors: &HashMap<String, Tensor>, name: &str, got: &Tensor, what: &str) {
    let got = got.to_device(&Device::Cpu).unwrap();
    let (count, width) = got.dims2().unwrap();
    let values = &tensors[&format!("{name}.values")];
    let rows: Vec<i64> = tensors[&format!("{name}.rows")].to_vec1().unwrap();
    let expected = (*rows.last().unwrap() as usize + 1, values.dim(1).unwrap());
    assert_eq!((count, width), expected, "{what}: shape of {name}");
    let scale = largest(values);
    let index = Tensor::new(rows, &Device::Cpu).unwrap();
    let difference = worst(&got.index_select(&index, 0).unwrap(), values) / scale;
    assert!(
        difference < TOLERANCE,
        "{what}: {name} differs by {difference} of the largest value"
    );
    let products = &tensors[&format!("{name}.products")];
    let count = products.dim(1).unwrap();
    let probes = (0..count).flat_map(|k| draw(&format!("probe/{k}"), width));
    let probes = Tensor::from_vec(probes.collect::<Vec<_>>(), (count, width), &Device::Cpu).unwrap();
    let difference = worst(&got.matmul(&probes.t().unwrap()).unwrap(), products) / scale;
    // Independent errors of the elements add up like this.
    let allowed = TOLERANCE * (width as f32).sqrt();
    assert!(
        difference < allowed,
        "{what}: products of {name} differ by {difference} of the largest value"
    );
}

/// Numbers in [-0.5, 0.5), multiples of 2^-24, from a hash of the name and the index; `compact.py` has the same.
pub fn draw(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0x811C_9DC5u32, |seed, byte| {
        (seed ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
        x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
        x ^= x >> 16;
        (f64::from(x >> 8) / f64::from(1 << 24) - 0.5) as f32
    };
    (0..count).map(number).collect()
}

/// Largest absolute value; infinite if one is no number.
pub fn largest(tensor: &Tensor) -> f32 {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    let larger = |largest: f32, value: f32| {
        if value.is_nan() {
            f32::INFINITY
        } else {
            largest.max(value.abs())
        }
    };
    values.into_iter().fold(0.0, larger)
}

/// Largest absolute difference.
pub fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    largest(&(a - b).unwrap())
}
