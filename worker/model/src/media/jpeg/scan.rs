//! One scan, sequential or progressive, to coefficients.

use super::{
    super::limits::Deadline,
    bits::{Bits, Huffman},
    headers::{Component, ZIGZAG},
    problem,
};
use crate::{ModelError, Result};

/// Which part of which components the bits of a scan are.
#[derive(Debug)]
pub(super) struct Scan {
    pub components: Vec<ScanComponent>,
    pub progressive: bool,
    /// First and last coefficient of the zigzag.
    pub first: usize,
    pub last: usize,
    /// The bit that was sent before (0: none), and the one that is sent now.
    pub high: u32,
    pub low: u32,
    /// Units of interleaved blocks, across and down.
    pub units: (usize, usize),
    /// Units between two restart markers, or 0.
    pub restart_interval: usize,
}

/// A component and its Huffman tables.
#[derive(Debug)]
pub(super) struct ScanComponent {
    pub number: usize,
    pub dc: usize,
    pub ac: usize,
}

/// What is remembered from block to block.
#[derive(Default)]
struct Memory {
    /// The last DC of each component of the scan.
    dc: [i32; 4],
    /// Blocks that follow without any new coefficient.
    empty_blocks: i32,
}

type Tables = [Option<Huffman>; 4];

impl Scan {
    /// Refuses what no encoder may write.
    pub(super) fn check(&self) -> Result<()> {
        let (first, last) = (self.first, self.last);
        let count = self.components.len();
        let range = first <= last && last < 64 && (first > 0 || last == 0 || !self.progressive);
        let one_component = first == 0 || !self.progressive || count == 1;
        let bits = self.low <= 13 && (self.high == 0 || self.high == self.low + 1);
        if (1..=4).contains(&count) && range && one_component && bits {
            return Ok(());
        }
        Err(problem(format!(
            "a scan of coefficients {first} to {last} of {count} components"
        )))
    }

    /// Decodes all blocks of the scan.
    pub(super) fn decode(
        &self,
        bits: &mut Bits<'_>,
        components: &mut [Component],
        dc: &Tables,
        ac: &Tables,
        deadline: Deadline,
    ) -> Result<()> {
        let mut memory = Memory::default();
        let mut until_restart = self.restart_interval;
        let (across, down) = self.extent(components);
        for row in 0..down {
            deadline.check().map_err(|error| ModelError::Image(error.to_string()))?;
            for column in 0..across {
                if self.restart_interval > 0 {
                    if until_restart == 0 {
                        bits.restart();
                        memory = Memory::default();
                        until_restart = self.restart_interval;
                    }
                    until_restart -= 1;
                }
                for (place, part) in self.components.iter().enumerate() {
                    let component = &mut components[part.number];
                    let (h, v) = if self.components.len() == 1 {
                        (1, 1)
                    } else {
                        (component.h, component.v)
                    };
                    let tables = (
                        dc.get(part.dc).and_then(Option::as_ref),
                        ac.get(part.ac).and_then(Option::as_ref),
                    );
                    for y in row * v..(row + 1) * v {
                        for x in column * h..(column + 1) * h {
                            let start = (y * component.columns + x) * 64;
                            let block = component.coefficients.get_mut(start..start + 64);
                            let block = block.ok_or_else(|| problem("a scan before its frame"))?;
                            self.block(bits, block, tables, place, &mut memory)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Columns and rows of units; a component alone has no padding.
    fn extent(&self, components: &[Component]) -> (usize, usize) {
        match self.components.as_slice() {
            [only] => {
                let component = &components[only.number];
                (component.width.div_ceil(8), component.height.div_ceil(8))
            }
            _ => self.units,
        }
    }

    fn block(
        &self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        (dc, ac): (Option<&Huffman>, Option<&Huffman>),
        place: usize,
        memory: &mut Memory,
    ) -> Result<()> {
        let missing = || problem("a scan without its Huffman table");
        if self.first == 0 {
            if self.high > 0 {
                block[0] |= (bits.take(1)? << self.low) as i16;
            } else {
                let size = u32::from(dc.ok_or_else(missing)?.decode(bits)?);
                if size > 15 {
                    return Err(problem("a DC of more than 15 bits"));
                }
                memory.dc[place] = memory.dc[place].wrapping_add(bits.take_signed(size)?);
                block[0] = (memory.dc[place] << self.low) as i16;
            }
        }
        if self.last == 0 {
            return Ok(());
        }
        let ac = ac.ok_or_else(missing)?;
        match (self.progressive, self.high) {
            (false, _) => sequential(bits, block, ac),
            (true, 0) => self.begin(bits, block, ac, &mut memory.empty_blocks),
            (true, _) => self.refine(bits, block, ac, &mut memory.empty_blocks),
        }
    }

    /// The upper bits of some coefficients.
    fn begin(&self, bits: &mut Bits<'_>, block: &mut [i16], ac: &Huffman, empty_blocks: &mut i32) -> Result<()> {
        if *empty_blocks > 0 {
            *empty_blocks -= 1;
            return Ok(());
        }
        let mut k = self.first;
        while k <= self.last {
            let (run, size) = split(ac.decode(bits)?);
            if size > 0 {
                k += run;
                put(block, k, bits.take_signed(size)? << self.low)?;
            } else if run == 15 {
                k += 15;
            } else {
                *empty_blocks = (1 << run) - 1 + bits.take(run as u32)?;
                return Ok(());
            }
            k += 1;
        }
        Ok(())
    }

    /// One more bit of some coefficients.
    fn refine(&self, bits: &mut Bits<'_>, block: &mut [i16], ac: &Huffman, empty_blocks: &mut i32) -> Result<()> {
        let one = 1i16 << self.low;
        let mut k = self.first;
        while *empty_blocks == 0 && k <= self.last {
            let (mut run, size) = split(ac.decode(bits)?);
            let mut new = 0;
            if size > 0 {
                new = if bits.take(1)? == 1 { one } else { -one };
            } else if run < 15 {
                *empty_blocks = (1 << run) + bits.take(run as u32)?;
                break;
            }
            while k <= self.last {
                let value = &mut block[usize::from(ZIGZAG[k])];
                if *value != 0 {
                    correct(bits, value, one)?;
                } else if run == 0 {
                    *value = new;
                    k += 1;
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
        }
        if *empty_blocks > 0 {
            for at in ZIGZAG.iter().take(self.last + 1).skip(k) {
                let value = &mut block[usize::from(*at)];
                if *value != 0 {
                    correct(bits, value, one)?;
                }
            }
            *empty_blocks -= 1;
        }
        Ok(())
    }
}

/// One more bit of a coefficient that is not 0.
fn correct(bits: &mut Bits<'_>, value: &mut i16, one: i16) -> Result<()> {
    if bits.take(1)? == 1 && *value & one == 0 {
        *value = if *value >= 0 {
            value.wrapping_add(one)
        } else {
            value.wrapping_sub(one)
        };
    }
    Ok(())
}

fn sequential(bits: &mut Bits<'_>, block: &mut [i16], ac: &Huffman) -> Result<()> {
    let mut k = 1;
    while k < 64 {
        let (run, size) = split(ac.decode(bits)?);
        if size > 0 {
            k += run;
            put(block, k, bits.take_signed(size)?)?;
        } else if run == 15 {
            k += 15;
        } else {
            break;
        }
        k += 1;
    }
    Ok(())
}

/// Zeros before a coefficient, and its bits.
fn split(symbol: u8) -> (usize, u32) {
    (usize::from(symbol >> 4), u32::from(symbol & 15))
}

fn put(block: &mut [i16], k: usize, value: i32) -> Result<()> {
    let at = ZIGZAG
        .get(k)
        .ok_or_else(|| problem("a block has more than 64 coefficients"))?;
    block[usize::from(*at)] = value as i16;
    Ok(())
}
