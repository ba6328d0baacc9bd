//! Keys and values of rows that are being decoded, in storage that is allocated once.

use candle_core::{DType, Device, Tensor};

use crate::{ModelError, Result};

/// Keys and values of every layer for rows of different lengths.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// Per layer keys and values, each `[rows, capacity, kv_heads * head_dim]`.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    pub(crate) lengths: Vec<usize>,
    pub(crate) next_positions: Vec<u32>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for the rows that [`crate::Vlm::prefill`] will fill.
    pub(crate) fn new(lengths: Vec<usize>, next_positions: Vec<u32>, capacity: usize) -> Self {
        Self {
            layers: Vec::new(),
            lengths,
            next_positions,
            capacity,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens that a row can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that each row holds.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.layers.iter().map(|(k, v)| size(k) + size(v)).sum()
    }

    /// Keeps the rows at `indices`, in that order; an index may repeat. The storage of the others is given back.
    pub fn keep(&mut self, indices: &[usize]) -> Result<()> {
        if let Some(index) = indices.iter().find(|i| **i >= self.rows()) {
            return Err(ModelError::Input(format!(
                "no row {index} in a cache of {} rows",
                self.rows()
            )));
        }
        if indices.len() == self.rows() && indices.iter().enumerate().all(|(at, index)| at == *index) {
            return Ok(());
        }
        if let Some((first, _)) = self.layers.first() {
            let ids = indices.iter().map(|i| *i as u32).collect::<Vec<_>>();
            let ids = Tensor::from_vec(ids, indices.len(), first.device())?;
            for (k, v) in &mut self.layers {
                *k = k.index_select(&ids, 0)?;
                *v = v.index_select(&ids, 0)?;
            }
        }
        self.lengths = indices.iter().map(|i| self.lengths[*i]).collect();
        self.next_positions = indices.iter().map(|i| self.next_positions[*i]).collect();
        Ok(())
    }

    /// Adds the rows of `other` after these; both get the larger capacity.
    pub fn append(&mut self, other: Self) -> Result<()> {
        if self.layers.len() != other.layers.len() {
            let counts = (self.layers.len(), other.layers.len());
            return Err(ModelError::Input(format!(
                "caches of {} and {} layers",
                counts.0, counts.1
            )));
        }
        let capacity = self.capacity.max(other.capacity);
        for ((k, v), (other_k, other_v)) in self.layers.iter_mut().zip(&other.layers) {
            *k = Tensor::cat(&[widen(k, capacity)?, widen(other_k, capacity)?], 0)?;
            *v = Tensor::cat(&[widen(v, capacity)?, widen(other_v, capacity)?], 0)?;
        }
        self.capacity = capacity;
        self.lengths.extend(other.lengths);
        self.next_positions.extend(other.next_positions);
        Ok(())
    }

    /// Gives every row room for `capacity` tokens.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        if capacity > self.capacity {
            for (k, v) in &mut self.layers {
                *k = widen(k, capacity)?;
                *v = widen(v, capacity)?;
            }
            self.capacity = capacity;
        }
        Ok(())
    }

    /// Refuses a step for which some row has no room.
    pub(crate) fn check_room(&self, rows: usize) -> Result<()> {
        if rows != self.rows() {
            return Err(ModelError::Input(format!(
                "{rows} ids for a cache of {} rows",
                self.rows()
            )));
        }
        match self.lengths.iter().position(|length| *length >= self.capacity) {
            Some(row) => {
                let capacity = self.capacity;
                Err(ModelError::Input(format!(
                    "row {row} of the cache is full: {capacity} tokens"
                )))
            }
            None => Ok(()),
        }
    }
}

/// The same rows with room for `capacity` tokens.
fn widen(tensor: &Tensor, capacity: usize) -> Result<Tensor> {
    let (rows, width, size) = tensor.dims3()?;
    if width == capacity {
        return Ok(tensor.clone());
    }
    fill(tensor, rows, capacity, size, tensor.dtype(), tensor.device())
}

/// Storage of `[rows, capacity, size]` that begins with `tensor`, `[rows, width, size]`.
pub(crate) fn fill(
    tensor: &Tensor,
    rows: usize,
    capacity: usize,
    size: usize,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let storage = Tensor::zeros((rows, capacity, size), dtype, device)?;
    storage.slice_set(&tensor.contiguous()?, 1, 0)?;
    Ok(storage)
}
