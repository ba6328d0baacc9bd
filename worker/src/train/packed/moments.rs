//! The optimiser's moments on disk, in files of a bounded size.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};

use crate::train::error::TrainError;

/// A file is written once it holds so many bytes.
const FILE_BYTES: usize = 1 << 30;

fn file(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("optimizer-{number:05}.safetensors"))
}

/// Writes moments one after another: those of a large model never lie in memory together.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    limit: usize,
    files: usize,
    held: HashMap<String, Tensor>,
    bytes: usize,
}

impl Writer {
    /// Into this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            limit: FILE_BYTES,
            files: 0,
            held: HashMap::new(),
            bytes: 0,
        }
    }

    /// Takes the moments of one weight.
    pub fn put(&mut self, name: &str, values: Vec<u8>) -> Result<(), TrainError> {
        let length = values.len();
        self.held
            .insert(name.to_owned(), Tensor::from_vec(values, length, &Device::Cpu)?);
        self.bytes += length;
        if self.bytes >= self.limit {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is held.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.files += 1;
        self.bytes = 0;
        let held = std::mem::take(&mut self.held);
        Ok(candle_core::safetensors::save(&held, file(&self.dir, self.files))?)
    }
}

/// Reads what a [`Writer`] has written, in the same order.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    files: usize,
    held: HashMap<String, Tensor>,
}

impl Reader {
    /// From this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            files: 0,
            held: HashMap::new(),
        }
    }

    /// The moments of this name.
    pub fn get(&mut self, name: &str) -> Result<Vec<u8>, TrainError> {
        loop {
            if let Some(values) = self.held.remove(name) {
                return Ok(values.to_vec1()?);
            }
            let next = file(&self.dir, self.files + 1);
            if !next.exists() {
                return Err(TrainError::Invalid(format!("the checkpoint has no moments {name}")));
            }
            self.held = candle_core::safetensors::load(&next, &Device::Cpu)?;
            self.files += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_come_back_from_several_files_in_their_order() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut writer = Writer {
            limit: 5,
            ..Writer::new(dir.path())
        };
        let parts = [
            ("layers.0.m", vec![1, 2, 3]),
            ("layers.0.v", vec![4, 5]),
            ("norm.m", vec![6]),
        ];
        for (name, values) in &parts {
            writer.put(name, values.clone()).expect("written");
        }
        writer.flush().expect("written");
        assert!(file(dir.path(), 2).exists() && !file(dir.path(), 3).exists());
        let mut reader = Reader::new(dir.path());
        for (name, values) in &parts {
            assert_eq!(&reader.get(name).expect("read"), values);
        }
        let error = reader.get("head.m").expect_err("nothing").to_string();
        assert!(error.contains("head.m"), "{error}");
    }
}
