//! What a buffer holds.

use half::bf16;

/// Floating-point formats of activations and weights.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Dtype {
    /// 32 bits.
    F32,
    /// 16 bits with the exponent of `f32`.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Plain numbers that a GPU and a host see alike.
pub trait Element: Copy + Default + Send + Sync + std::fmt::Debug + 'static {
    /// A value that no kernel writes by accident: a NaN or a pattern. Buffers are filled with it before a checked launch.
    const POISON: Self;
}

/// Numbers that kernels compute with.
pub trait Float: Element + PartialEq {
    /// Which they are.
    const DTYPE: Dtype;
    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Exact.
    fn from_bf16(value: bf16) -> Self;
    /// Rounded to nearest, ties to even.
    fn to_bf16(self) -> bf16;
}

impl Element for f32 {
    const POISON: Self = f32::NAN;
}

impl Float for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }

    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }

    fn to_bf16(self) -> bf16 {
        bf16::from_f32(self)
    }
}

impl Element for bf16 {
    const POISON: Self = bf16::NAN;
}

impl Float for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_bf16(value: bf16) -> Self {
        value
    }

    fn to_bf16(self) -> bf16 {
        self
    }
}

impl Element for u8 {
    const POISON: Self = 0xa5;
}

impl Element for i8 {
    const POISON: Self = -91;
}

impl Element for u32 {
    const POISON: Self = 0xa5a5_a5a5;
}

impl Element for i32 {
    const POISON: Self = -0x5a5a_5a5b;
}

impl Element for u64 {
    const POISON: Self = 0xa5a5_a5a5_a5a5_a5a5;
}
