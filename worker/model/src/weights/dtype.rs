//! Types of elements as safetensors names them.

use std::fmt;

use candle_core::DType;
use serde::{Deserialize, Deserializer};

/// The type of a tensor's elements on disk. Only floating-point numbers become parameters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ElementType {
    /// A type that weights are read from and written as: F64, F32, F16 or BF16.
    Float(DType),
    /// Any other, by its name in the file: integers, eight bits and fewer, unknown ones.
    Other(String),
}

/// Names of the format and their bits.
const OTHERS: [(&str, u64); 18] = [
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("I16", 16),
    ("U16", 16),
    ("I32", 32),
    ("U32", 32),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F4", 4),
];

impl ElementType {
    /// The type of that name.
    pub fn parse(name: &str) -> Self {
        match name {
            "F64" => Self::Float(DType::F64),
            "F32" => Self::Float(DType::F32),
            "F16" => Self::Float(DType::F16),
            "BF16" => Self::Float(DType::BF16),
            other => Self::Other(other.to_owned()),
        }
    }

    /// The type of tensors of `dtype`.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 | DType::F32 | DType::F16 | DType::BF16 => Self::Float(dtype),
            other => Self::Other(other.as_str().to_uppercase()),
        }
    }

    /// Bits of an element, None for a type that the format does not know.
    pub fn bits(&self) -> Option<u64> {
        match self {
            Self::Float(dtype) => Some(8 * dtype.size_in_bytes() as u64),
            Self::Other(name) => OTHERS.iter().find(|(other, _)| other == name).map(|(_, bits)| *bits),
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => f.write_str(&dtype.as_str().to_uppercase()),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for ElementType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Ok(Self::parse(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_written_as_it_is_read() {
        for name in ["F64", "F32", "F16", "BF16", "I64", "F8_E4M3", "NEW"] {
            assert_eq!(ElementType::parse(name).to_string(), name);
        }
        assert_eq!(ElementType::parse("BF16"), ElementType::Float(DType::BF16));
        assert_eq!(
            (ElementType::parse("I64").bits(), ElementType::parse("NEW").bits()),
            (Some(64), None)
        );
    }
}
