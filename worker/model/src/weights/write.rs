//! Weights to safetensors files as the hub has them: streamed, the same bytes for the same values, visible when whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use candle_core::{DType, Device, Tensor, Var};

use super::{INDEX_FILE, SINGLE_FILE, dtype::ElementType, index};
use crate::{ModelError, Result};

/// Elements that are converted at once.
const BLOCK: usize = 1 << 20;
/// Header lengths are multiples of it, so that the data are aligned.
const ALIGNMENT: usize = 8;

/// Variables by name.
pub(super) type Named<'a> = (&'a str, &'a Var);

/// Writes one file, of elements of `dtype` or those that the variables have.
pub(super) fn write_file(path: &Path, tensors: &[Named<'_>], dtype: Option<DType>) -> Result<()> {
    let header = header(tensors, dtype)?;
    replace(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out, &header, tensors, dtype, path)?;
        out.flush().map_err(ModelError::file(path))
    })
}

/// The bytes of such a file.
pub(super) fn to_bytes(tensors: &[Named<'_>], dtype: Option<DType>) -> Result<Vec<u8>> {
    let header = header(tensors, dtype)?;
    let data = tensors.iter().map(|(_, var)| bytes_of(var, dtype)).sum::<u64>();
    let capacity = header.len() + usize::try_from(data).unwrap_or(0);
    let mut out = Vec::with_capacity(capacity);
    write(&mut out, &header, tensors, dtype, Path::new("memory"))?;
    Ok(out)
}

/// Writes shards of at most `max_bytes` (one tensor at least) and their index, or a single file where all fits into one, and
/// removes weight files that are not part of it.
pub(super) fn write_sharded(dir: &Path, tensors: &[Named<'_>], max_bytes: u64, dtype: Option<DType>) -> Result<()> {
    let shards = split(tensors, max_bytes, dtype);
    let mut written = BTreeSet::new();
    if let [whole] = shards.as_slice() {
        write_file(&dir.join(SINGLE_FILE), whole, dtype)?;
        written.insert(SINGLE_FILE.to_owned());
    } else {
        let mut places = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
            write_file(&dir.join(&name), shard, dtype)?;
            places.extend(shard.iter().map(|(tensor, _)| ((*tensor).to_owned(), name.clone())));
            written.insert(name);
        }
        let elements = tensors.iter().map(|(_, var)| var.elem_count() as u64).sum();
        let bytes = tensors.iter().map(|(_, var)| bytes_of(var, dtype)).sum();
        let text = index::to_bytes(&places, elements, bytes)?;
        let path = dir.join(INDEX_FILE);
        replace(&path, |file| file.write_all(&text).map_err(ModelError::file(&path)))?;
        written.insert(INDEX_FILE.to_owned());
    }
    remove_others(dir, &written).map_err(ModelError::file(dir))
}

/// Groups of consecutive tensors, by the rule of the library that writes the hub's checkpoints: one that is larger than
/// `max_bytes` is alone, the others fill a shard in their order.
fn split<'a>(tensors: &[Named<'a>], max_bytes: u64, dtype: Option<DType>) -> Vec<Vec<Named<'a>>> {
    let (mut shards, mut open, mut open_bytes) = (Vec::new(), Vec::new(), 0);
    for tensor in tensors {
        let bytes = bytes_of(tensor.1, dtype);
        if bytes > max_bytes {
            shards.push(vec![*tensor]);
            continue;
        }
        if open_bytes + bytes > max_bytes {
            shards.push(std::mem::take(&mut open));
            open_bytes = 0;
        }
        open.push(*tensor);
        open_bytes += bytes;
    }
    if !open.is_empty() || shards.is_empty() {
        shards.push(open);
    }
    shards
}

/// Length and JSON of a header.
fn header(tensors: &[Named<'_>], dtype: Option<DType>) -> Result<Vec<u8>> {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut offset = 0;
    for (name, var) in tensors {
        let element = ElementType::of(dtype.unwrap_or(var.dtype()));
        if let ElementType::Other(other) = element {
            let message = format!("weights are written as f64, f32, f16 or bf16, and {name} would be {other}");
            return Err(ModelError::Input(message));
        }
        let (begin, shape) = (offset, var.dims());
        offset += bytes_of(var, dtype);
        let name = serde_json::Value::from(*name);
        let shape = serde_json::Value::from(shape);
        json.push_str(&format!(
            r#",{name}:{{"dtype":"{element}","shape":{shape},"data_offsets":[{begin},{offset}]}}"#
        ));
    }
    json.push('}');
    let length = json.len().next_multiple_of(ALIGNMENT);
    let mut header = (length as u64).to_le_bytes().to_vec();
    header.extend(json.bytes());
    header.resize(ALIGNMENT + length, b' ');
    Ok(header)
}

fn bytes_of(var: &Var, dtype: Option<DType>) -> u64 {
    (var.elem_count() * dtype.unwrap_or(var.dtype()).size_in_bytes()) as u64
}

fn write(out: &mut impl Write, header: &[u8], tensors: &[Named<'_>], dtype: Option<DType>, path: &Path) -> Result<()> {
    out.write_all(header).map_err(ModelError::file(path))?;
    for (name, var) in tensors {
        let flat = var.as_detached_tensor().flatten_all()?;
        let mut begin = 0;
        while begin < flat.elem_count() {
            let size = BLOCK.min(flat.elem_count() - begin);
            let block = flat.narrow(0, begin, size)?;
            let bytes = block_bytes(name, &block, dtype.unwrap_or(flat.dtype()))?;
            out.write_all(&bytes).map_err(ModelError::file(path))?;
            begin += size;
        }
    }
    Ok(())
}

/// The elements of a block as they lie in a file.
fn block_bytes(name: &str, block: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        let mut out = vec![0; values.len() * N];
        for (place, value) in out.chunks_exact_mut(N).zip(values) {
            place.copy_from_slice(&bytes(*value));
        }
        out
    }
    let converted = block.to_dtype(dtype)?.to_device(&Device::Cpu)?;
    Ok(match dtype {
        DType::F64 => little_endian(&converted.to_vec1()?, f64::to_le_bytes),
        DType::F32 => little_endian(&converted.to_vec1()?, f32::to_le_bytes),
        DType::BF16 => little_endian(&converted.to_vec1()?, half::bf16::to_le_bytes),
        DType::F16 => {
            let values = converted.to_vec1::<half::f16>()?;
            if block.dtype() != DType::F16 && values.iter().any(|value| value.is_infinite()) {
                let message = format!("{name} has values beyond 65504, which f16 does not hold: write bf16 or f32");
                return Err(ModelError::Input(message));
            }
            little_endian(&values, half::f16::to_le_bytes)
        }
        other => return Err(ModelError::Input(format!("{name} cannot be written as {other:?}"))),
    })
}

/// Writes a file beside its place, flushes it and renames it: readers and maps of the old one keep the old bytes.
fn replace(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".tmp-{}-{name}", std::process::id()));
    let attempt = || {
        let mut file = File::create(&temporary).map_err(ModelError::file(&temporary))?;
        fill(&mut file)?;
        file.sync_all().map_err(ModelError::file(&temporary))?;
        std::fs::rename(&temporary, path).map_err(ModelError::file(path))
    };
    attempt().inspect_err(|_| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Removes weight files of an earlier save that the new one did not replace.
fn remove_others(dir: &Path, written: &BTreeSet<String>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_weight_file(&name) && !written.contains(&name) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a name is one that [`write_sharded`] gives.
fn is_weight_file(name: &str) -> bool {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name
        .strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"));
    name == SINGLE_FILE
        || name == INDEX_FILE
        || numbers.is_some_and(|(number, count)| is_number(number) && is_number(count))
}
