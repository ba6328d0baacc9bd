//! Entropy-coded bits and Huffman codes.

use super::problem;
use crate::Result;

/// Bits that are looked up at once.
const LOOKUP: u32 = 9;

/// Bits of a scan. A marker ends them: what is missing then is 0, as in libjpeg; at the end of the file it is an error.
#[derive(Debug)]
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    held: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            held: 0,
            count: 0,
        }
    }

    fn fill(&mut self) {
        while self.count <= 48 {
            let Some(byte) = self.data.get(self.at) else {
                return;
            };
            if *byte == 0xFF {
                match self.data.get(self.at + 1) {
                    Some(0) => self.at += 2,
                    _ => return,
                }
            } else {
                self.at += 1;
            }
            self.held = (self.held << 8) | u64::from(*byte);
            self.count += 8;
        }
    }

    /// The next bits, zeros behind the last.
    fn peek(&mut self, bits: u32) -> u32 {
        if self.count < bits {
            self.fill();
        }
        let value = if self.count >= bits {
            self.held >> (self.count - bits)
        } else {
            self.held << (bits - self.count)
        };
        (value & ((1 << bits) - 1)) as u32
    }

    fn skip(&mut self, bits: u32) -> Result<()> {
        if self.count >= bits {
            self.count -= bits;
            return Ok(());
        }
        if self.at >= self.data.len() {
            return Err(problem("the file is cut off"));
        }
        self.count = 0;
        self.held = 0;
        Ok(())
    }

    /// A number of up to 16 bits.
    pub(super) fn take(&mut self, bits: u32) -> Result<i32> {
        if bits == 0 {
            return Ok(0);
        }
        let value = self.peek(bits);
        self.skip(bits)?;
        Ok(value as i32)
    }

    /// A number of a magnitude category: the upper half positive, the lower half negative.
    pub(super) fn take_signed(&mut self, bits: u32) -> Result<i32> {
        let value = self.take(bits)?;
        Ok(if bits > 0 && value < 1 << (bits - 1) {
            value - (1 << bits) + 1
        } else {
            value
        })
    }

    /// Drops what is left of the last byte and the restart marker that follows, if one does.
    pub(super) fn restart(&mut self) {
        self.held = 0;
        self.count = 0;
        self.at = self.end_of_data();
        if matches!(self.data.get(self.at + 1), Some(0xD0..=0xD7)) {
            self.at += 2;
        }
    }

    /// Where the next marker is (that which follows fill bytes), or the end of the file.
    pub(super) fn end_of_data(&self) -> usize {
        let mut at = self.at;
        while let Some(byte) = self.data.get(at) {
            if *byte == 0xFF && !matches!(self.data.get(at + 1), Some(0 | 0xFF)) {
                return at;
            }
            at += 1;
        }
        at
    }
}

/// One table of codes.
#[derive(Clone, Debug)]
pub(super) struct Huffman {
    /// Length (0 if longer than the lookup) and symbol by the next bits.
    fast: Vec<(u8, u8)>,
    /// First code behind those of each length, as 16 bits.
    ends: [u32; 17],
    /// What to add to a code of each length to find its symbol.
    shifts: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    /// From the number of codes of each length and their symbols.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self> {
        let mut table = Self {
            fast: vec![(0, 0); 1 << LOOKUP],
            ends: [0; 17],
            shifts: [0; 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            table.shifts[length as usize] = index as i32 - code as i32;
            for symbol in symbols
                .get(index..index + count)
                .ok_or_else(|| problem("a Huffman table is cut off"))?
            {
                if length <= LOOKUP {
                    let first = (code << (LOOKUP - length)) as usize;
                    let entries = table.fast.get_mut(first..first + (1 << (LOOKUP - length)));
                    entries.ok_or_else(overfull)?.fill((length as u8, *symbol));
                }
                code += 1;
            }
            if code > 1 << length {
                return Err(overfull());
            }
            index += count;
            table.ends[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(table)
    }

    /// The next symbol.
    pub(super) fn decode(&self, bits: &mut Bits<'_>) -> Result<u8> {
        let next = bits.peek(16);
        let (length, symbol) = self.fast[(next >> (16 - LOOKUP)) as usize];
        if length > 0 {
            bits.skip(u32::from(length))?;
            return Ok(symbol);
        }
        let length = (LOOKUP as usize + 1..=16).find(|length| next < self.ends[*length]);
        let length = length.ok_or_else(|| problem("a code is in no Huffman table"))?;
        bits.skip(length as u32)?;
        let index = (next >> (16 - length)) as i32 + self.shifts[length];
        let symbol = usize::try_from(index).ok().and_then(|index| self.symbols.get(index));
        symbol.copied().ok_or_else(|| problem("a code is in no Huffman table"))
    }
}

fn overfull() -> crate::ModelError {
    problem("a Huffman table has more codes than fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_codes_are_found() {
        // Codes 0, 10 and, of eleven bits, 11000000000.
        let mut counts = [0; 16];
        (counts[0], counts[1], counts[10]) = (1, 1, 1);
        let table = Huffman::new(&counts, &[7, 8, 9]).unwrap();
        let mut bits = Bits::new(&[0b0101_1000, 0b0000_0001, 0b0111_1111, 0xFF, 0xD9]);
        let symbols = [(); 5].map(|()| table.decode(&mut bits).unwrap());
        assert_eq!(symbols, [7, 8, 9, 7, 8]);
    }

    #[test]
    fn missing_bits_are_zero_before_a_marker_and_an_error_at_the_end() {
        assert_eq!(Bits::new(&[0xF0, 0xFF, 0xD9]).take(12).unwrap(), 0xF00);
        assert!(Bits::new(&[0xF0]).take(12).is_err());
        let mut stuffed = Bits::new(&[0xFF, 0, 0x12]);
        assert_eq!(stuffed.take(16).unwrap(), 0xFF12);
    }

    #[test]
    fn too_many_codes_are_refused() {
        let mut counts = [0; 16];
        counts[0] = 3;
        assert!(Huffman::new(&counts, &[1, 2, 3]).is_err());
        assert!(Huffman::new(&counts, &[1]).is_err());
    }
}
