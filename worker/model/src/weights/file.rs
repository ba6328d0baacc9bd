//! One safetensors file, memory-mapped: nothing that its header says is believed before it was compared with the file.

use std::{fs::File, ops::Range, path::Path};

use memmap2::Mmap;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

use super::dtype::ElementType;

/// Longest header, the limit of the format itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Bytes before the header: its length.
const LENGTH_BYTES: u64 = 8;
/// The key of a header that names no tensor.
const METADATA: &str = "__metadata__";

/// Why a file is no safetensors file, or not a whole one.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileFault {
    #[error("is not there")]
    Absent,
    #[error("is not a regular file")]
    NotRegular,
    #[error("cannot be read: {0}")]
    Unreadable(#[from] std::io::Error),
    #[error("is cut off: it should have at least {expected} bytes and has {found}; copy or download it again")]
    Truncated { expected: u64, found: u64 },
    #[error(
        "says that its header has {declared} bytes, more than the {MAX_HEADER_BYTES} that the format allows: it is no safetensors file"
    )]
    HeaderTooLong { declared: u64 },
    #[error("has a header that is not what safetensors asks for: {0}")]
    Header(serde_json::Error),
    #[error("gives {name:?} the bytes {begin}..{end}, which end before they begin")]
    Reversed { name: String, begin: u64, end: u64 },
    #[error("gives {name:?} a shape that no memory can hold: {shape:?}")]
    Overflow { name: String, shape: Vec<usize> },
    #[error("gives {name:?} {found} bytes, but {shape:?} of {dtype} takes {expected}")]
    Size {
        name: String,
        shape: Vec<usize>,
        dtype: String,
        expected: u64,
        found: u64,
    },
    #[error("gives bytes of {first:?} to {second:?} too")]
    Overlap { first: String, second: String },
    #[error("has {bytes} bytes at {begin} that belong to no tensor")]
    Unused { begin: u64, bytes: u64 },
}

/// A tensor as the header of its file describes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Entry {
    /// Name in the file.
    pub name: String,
    /// Type of the elements.
    pub dtype: ElementType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Bytes after the header.
    pub bytes: Range<u64>,
}

/// A file whose header is in order. Only the pages that are read take memory, and the kernel may drop them again.
#[derive(Debug)]
pub(super) struct MappedFile {
    /// Its tensors in the order of the header; names may repeat.
    pub entries: Vec<Entry>,
    map: Mmap,
    data: u64,
}

impl MappedFile {
    /// Maps a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, FileFault> {
        let metadata = match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(FileFault::Absent),
            metadata => metadata?,
        };
        // Opening a pipe would wait for its writer.
        if !metadata.is_file() {
            return Err(FileFault::NotRegular);
        }
        let map = map(&File::open(path)?)?;
        let (entries, data) = parse(&map)?;
        Ok(Self { entries, map, data })
    }

    /// The bytes of a tensor of this file.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        let place = |offset: u64| usize::try_from(self.data + offset).unwrap_or(usize::MAX);
        self.map
            .get(place(entry.bytes.start)..place(entry.bytes.end))
            .unwrap_or_default()
    }
}

#[expect(unsafe_code, reason = "memory-mapping has no safe form")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read only. Whoever overwrites a weight file in place while it is being read makes the values
    // undefined, or ends this process if the file becomes shorter; writers of this project replace files by renaming.
    unsafe { Mmap::map(file) }
}

/// The tensors of a file's bytes, and where their data begin.
fn parse(file: &[u8]) -> Result<(Vec<Entry>, u64), FileFault> {
    let found = file.len() as u64;
    let truncated = |expected| FileFault::Truncated { expected, found };
    let length = file
        .first_chunk::<{ LENGTH_BYTES as usize }>()
        .ok_or(truncated(LENGTH_BYTES))?;
    let declared = u64::from_le_bytes(*length);
    if declared > MAX_HEADER_BYTES {
        return Err(FileFault::HeaderTooLong { declared });
    }
    let data = LENGTH_BYTES + declared;
    let header = usize::try_from(data)
        .ok()
        .and_then(|data| file.get(LENGTH_BYTES as usize..data));
    let header: Header = serde_json::from_slice(header.ok_or(truncated(data))?).map_err(FileFault::Header)?;
    let entries = header.0;
    for entry in &entries {
        check_size(entry)?;
    }
    let end = entries.iter().map(|entry| entry.bytes.end).max().unwrap_or(0);
    let expected = data.saturating_add(end);
    if expected > found {
        return Err(truncated(expected));
    }
    check_cover(&entries, found - data)?;
    Ok((entries, data))
}

/// Shape, type and byte range of a tensor agree. The size of elements of a type that is not known is not either.
fn check_size(entry: &Entry) -> Result<(), FileFault> {
    let (begin, end) = (entry.bytes.start, entry.bytes.end);
    let name = entry.name.clone();
    if end < begin {
        return Err(FileFault::Reversed { name, begin, end });
    }
    let shape = entry.shape.clone();
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, size| product.checked_mul(*size as u64));
    let bits = elements.and_then(|elements| elements.checked_mul(entry.dtype.bits().unwrap_or(1)));
    let Some(bits) = bits else {
        return Err(FileFault::Overflow { name, shape });
    };
    let (expected, found) = (bits.div_ceil(8), end - begin);
    if entry.dtype.bits().is_some() && expected != found {
        return Err(FileFault::Size {
            name,
            shape,
            dtype: entry.dtype.to_string(),
            expected,
            found,
        });
    }
    Ok(())
}

/// Every byte of the data belongs to exactly one tensor, as the format demands.
fn check_cover(entries: &[Entry], data: u64) -> Result<(), FileFault> {
    let mut sorted = entries.iter().collect::<Vec<_>>();
    sorted.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    let mut reached = 0;
    let mut last = None::<&Entry>;
    for entry in sorted {
        if entry.bytes.start < reached {
            return Err(FileFault::Overlap {
                first: last.map(|last| last.name.clone()).unwrap_or_default(),
                second: entry.name.clone(),
            });
        }
        unused(reached, entry.bytes.start)?;
        reached = entry.bytes.end;
        last = Some(entry);
    }
    unused(reached, data)
}

fn unused(begin: u64, end: u64) -> Result<(), FileFault> {
    if begin == end {
        return Ok(());
    }
    Err(FileFault::Unused {
        begin,
        bytes: end - begin,
    })
}

/// The entries of a header in their order, repeated names included.
struct Header(Vec<Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Vec<Entry>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<std::collections::BTreeMap<String, String>>()?;
                        continue;
                    }
                    let described = map.next_value::<Described>()?;
                    let (begin, end) = described.data_offsets;
                    entries.push(Entry {
                        name,
                        dtype: described.dtype,
                        shape: described.shape.0,
                        bytes: begin..end,
                    });
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(Entries).map(Header)
    }
}

/// What a header says of one tensor.
#[derive(Deserialize)]
struct Described {
    dtype: ElementType,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// At most [`MAX_RANK`] sizes: two bytes of a hostile header must not become eight of memory each.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;

        impl<'de> Visitor<'de> for Sizes {
            type Value = Vec<usize>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "at most {MAX_RANK} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = seq.next_element()? {
                    if sizes.len() == MAX_RANK {
                        return Err(serde::de::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    sizes.push(size);
                }
                Ok(sizes)
            }
        }

        deserializer.deserialize_seq(Sizes).map(Shape)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of a header and so many bytes of data.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 7);
        file
    }

    fn fault(header: &str, data: usize) -> String {
        parse(&file(header, data)).unwrap_err().to_string()
    }

    #[test]
    fn a_header_gives_names_types_shapes_and_places() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#;
        let (entries, data) = parse(&file(header, 8)).unwrap();
        assert_eq!(data, 8 + header.len() as u64);
        let found = entries.iter().map(|entry| (entry.name.as_str(), entry.bytes.clone()));
        assert_eq!(found.collect::<Vec<_>>(), [("b", 4..8), ("a", 0..4)]);
        assert_eq!(
            (entries[0].shape.as_slice(), entries[1].shape.len()),
            ([2].as_slice(), 0)
        );
    }

    #[test]
    fn a_cut_file_says_how_many_bytes_it_should_have() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let whole = 8 + header.len() + 8;
        let message = fault(header, 5);
        assert!(
            message.contains(&format!("at least {whole} bytes and has {}", whole - 3)),
            "{message}"
        );
        assert!(parse(&[1, 2, 3]).unwrap_err().to_string().contains("at least 8 bytes"));
        let short_header = &file(header, 0)[..20];
        let message = parse(short_header).unwrap_err().to_string();
        assert!(message.contains(&format!("at least {} bytes", whole - 8)), "{message}");
    }

    #[test]
    fn an_absurd_header_length_is_refused_before_anything_is_read() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend([0; 64]);
        let fault = parse(&bytes).unwrap_err();
        assert!(
            matches!(fault, FileFault::HeaderTooLong { declared: u64::MAX }),
            "{fault}"
        );
    }

    #[test]
    fn a_header_that_is_no_json_is_refused() {
        for header in [
            "",
            "[]",
            "{",
            "{\"a\":1}",
            "\u{7f}ELF",
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        ] {
            assert!(matches!(parse(&file(header, 4)), Err(FileFault::Header(_))), "{header}");
        }
        let rank = r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#;
        assert!(fault(rank, 1).contains("at most 8 sizes"));
    }

    #[test]
    fn shape_type_and_offsets_must_agree() {
        let one = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let message = fault(&one("[3]", "[0,8]"), 8);
        assert_eq!(message, "gives \"a\" 8 bytes, but [3] of F32 takes 12");
        assert!(fault(&one("[2]", "[8,0]"), 8).contains("end before they begin"));
        assert!(fault(&one("[4294967296,4294967296]", "[0,8]"), 8).contains("no memory can hold"));
        assert!(fault(&one("[1152921504606846976]", "[0,8]"), 8).contains("no memory can hold"));
    }

    #[test]
    fn every_byte_belongs_to_one_tensor() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        assert_eq!(fault(&two("[0,4]", "[2,6]"), 6), "gives bytes of \"a\" to \"b\" too");
        assert_eq!(
            fault(&two("[0,4]", "[6,10]"), 10),
            "has 2 bytes at 4 that belong to no tensor"
        );
        assert_eq!(
            fault(&two("[0,4]", "[4,8]"), 9),
            "has 1 bytes at 8 that belong to no tensor"
        );
        assert!(parse(&file(&two("[4,8]", "[0,4]"), 8)).is_ok());
    }

    #[test]
    fn a_directory_and_an_absent_file_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(MappedFile::open(dir.path()), Err(FileFault::NotRegular)));
        assert!(matches!(
            MappedFile::open(&dir.path().join("a")),
            Err(FileFault::Absent)
        ));
        let empty = dir.path().join("empty");
        std::fs::write(&empty, []).unwrap();
        assert!(matches!(
            MappedFile::open(&empty),
            Err(FileFault::Truncated { found: 0, .. })
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_accepted_lies_inside_the_file(
            header in r#"\{("(a|b)":\{"dtype":"(F32|U8|XX)","shape":\[[0-9]?\],"data_offsets":\[[0-9],[0-9]{1,2}\]\},?){0,3}\}"#,
            data in 0_usize..24,
        ) {
            let bytes = file(&header, data);
            if let Ok((entries, begin)) = parse(&bytes) {
                for entry in entries {
                    prop_assert!(begin + entry.bytes.end <= bytes.len() as u64);
                }
            }
        }
    }
}
