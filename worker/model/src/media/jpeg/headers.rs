//! Markers: tables, frame, scans, EXIF.

use super::{
    super::limits::Deadline,
    bits::{Bits, Huffman},
    problem,
    scan::{Scan, ScanComponent},
};
use crate::Result;

/// Place in a block of each coefficient of the zigzag.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];
/// Scans that a file may have; encoders make about ten.
const MOST_SCANS: usize = 500;

/// What the next marker of interest is.
pub(super) enum Found {
    /// The size and the components are known.
    Frame,
    /// Entropy-coded data follow.
    Scan,
    /// Nothing follows.
    End,
    /// Another decoder has to try.
    Unsupported,
}

/// One colour component.
#[derive(Debug)]
pub(super) struct Component {
    pub id: u8,
    /// Samples for each of the coarsest, across and down.
    pub h: usize,
    pub v: usize,
    /// Samples of a row, and rows, that belong to the picture.
    pub width: usize,
    pub height: usize,
    /// Blocks of a row, and rows of blocks, that the coefficients have room for.
    pub columns: usize,
    pub rows: usize,
    pub coefficients: Vec<i16>,
    /// The table when its first scan began.
    pub quantization: Option<[u16; 64]>,
    table: usize,
}

/// The state of a file that is being read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    pub width: usize,
    pub height: usize,
    pub components: Vec<Component>,
    /// Largest factors of a component.
    pub h_most: usize,
    pub v_most: usize,
    pub exif: Option<Vec<u8>>,
    pub is_jfif: bool,
    /// Colour transform of an Adobe marker.
    pub adobe: Option<u8>,
    progressive: bool,
    quantization: [Option<[u16; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    restart_interval: usize,
    scan: Option<Scan>,
    scans: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 2,
            width: 0,
            height: 0,
            components: Vec::new(),
            h_most: 1,
            v_most: 1,
            exif: None,
            is_jfif: false,
            adobe: None,
            progressive: false,
            quantization: [None; 4],
            dc: [const { None }; 4],
            ac: [const { None }; 4],
            restart_interval: 0,
            scan: None,
            scans: 0,
        }
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// Reads up to the next marker of interest.
    pub(super) fn advance(&mut self) -> Result<Found> {
        loop {
            let Some(kind) = self.marker() else {
                return if self.is_complete() {
                    Ok(Found::End)
                } else {
                    Err(problem("the file is cut off"))
                };
            };
            match kind {
                0xD9 => return Ok(Found::End),
                0x01 | 0xD0..=0xD8 => continue,
                _ => {}
            }
            let segment = self.segment()?;
            match kind {
                0xC0..=0xC2 if segment.first() != Some(&8) => return Ok(Found::Unsupported),
                0xC0..=0xC2 => {
                    self.frame(segment, kind == 0xC2)?;
                    return Ok(Found::Frame);
                }
                0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => return Ok(Found::Unsupported),
                0xC4 => self.huffman(segment)?,
                0xDB => self.quantization(segment)?,
                0xDD => self.restart_interval = usize::from(u16_at(segment, 0)?),
                0xDA => {
                    self.scan_header(segment)?;
                    return Ok(Found::Scan);
                }
                0xE0 if segment.starts_with(b"JFIF\0") => self.is_jfif = true,
                0xE1 if self.exif.is_none() => self.exif = segment.strip_prefix(b"Exif\0\0").map(<[u8]>::to_vec),
                0xEE if segment.starts_with(b"Adobe") => self.adobe = segment.get(11).copied(),
                _ => {}
            }
        }
    }

    /// The next marker's kind; what stands before it is skipped.
    fn marker(&mut self) -> Option<u8> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let found = rest
            .windows(2)
            .position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xFF));
        let found = found?;
        self.at += found + 2;
        Some(rest[found + 1])
    }

    /// Whether all components were scanned, so that only the end marker is missing, as Pillow accepts.
    fn is_complete(&self) -> bool {
        let scanned = |component: &Component| component.quantization.is_some();
        !self.progressive && !self.components.is_empty() && self.components.iter().all(scanned)
    }

    fn segment(&mut self) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let size = usize::from(u16_at(rest, 0)?);
        let segment = rest.get(2..size).ok_or_else(truncated)?;
        self.at += size;
        Ok(segment)
    }

    fn frame(&mut self, segment: &[u8], progressive: bool) -> Result<()> {
        if !self.components.is_empty() {
            return Err(problem("it has two frames"));
        }
        self.progressive = progressive;
        self.height = usize::from(u16_at(segment, 1)?);
        self.width = usize::from(u16_at(segment, 3)?);
        let count = usize::from(*segment.get(5).ok_or_else(truncated)?);
        let rows = segment.get(6..6 + 3 * count).ok_or_else(truncated)?;
        if !matches!(count, 1 | 3 | 4) || self.width == 0 || self.height == 0 {
            let (width, height) = self.size();
            return Err(problem(format!("{count} components of {width}x{height} pixels")));
        }
        for row in rows.chunks_exact(3) {
            let (h, v) = (usize::from(row[1] >> 4), usize::from(row[1] & 15));
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) || row[2] > 3 {
                return Err(problem(format!(
                    "a component with factors {h}x{v} and table {}",
                    row[2]
                )));
            }
            self.components.push(Component {
                id: row[0],
                h,
                v,
                width: 0,
                height: 0,
                columns: 0,
                rows: 0,
                coefficients: Vec::new(),
                quantization: None,
                table: usize::from(row[2]),
            });
        }
        self.h_most = self.components.iter().map(|c| c.h).max().unwrap_or(1);
        self.v_most = self.components.iter().map(|c| c.v).max().unwrap_or(1);
        if self
            .components
            .iter()
            .any(|c| !self.h_most.is_multiple_of(c.h) || !self.v_most.is_multiple_of(c.v))
        {
            return Err(problem("components whose factors do not divide each other"));
        }
        Ok(())
    }

    /// Makes room for the coefficients: call it once the size is known to be allowed.
    pub(super) fn allocate(&mut self) {
        let (across, down) = self.units();
        for component in &mut self.components {
            component.width = (self.width * component.h).div_ceil(self.h_most);
            component.height = (self.height * component.v).div_ceil(self.v_most);
            component.columns = across * component.h;
            component.rows = down * component.v;
            component.coefficients = vec![0; component.columns * component.rows * 64];
        }
    }

    /// Units of interleaved blocks, across and down.
    fn units(&self) -> (usize, usize) {
        (
            self.width.div_ceil(8 * self.h_most),
            self.height.div_ceil(8 * self.v_most),
        )
    }

    fn huffman(&mut self, mut segment: &[u8]) -> Result<()> {
        while let Some((place, rest)) = segment.split_first() {
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or_else(truncated)?;
            let count = counts.iter().map(|count| usize::from(*count)).sum::<usize>();
            let (symbols, rest) = rest.split_at_checked(count).ok_or_else(truncated)?;
            let tables = if place >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            let table = tables.get_mut(usize::from(place & 15));
            *table.ok_or_else(|| problem("a fifth Huffman table"))? = Some(Huffman::new(counts, symbols)?);
            segment = rest;
        }
        Ok(())
    }

    fn quantization(&mut self, mut segment: &[u8]) -> Result<()> {
        while let Some((place, rest)) = segment.split_first() {
            let bytes = if place >> 4 == 0 { 1 } else { 2 };
            let (numbers, rest) = rest.split_at_checked(64 * bytes).ok_or_else(truncated)?;
            let mut table = [0; 64];
            for (number, at) in numbers.chunks_exact(bytes).zip(ZIGZAG) {
                table[usize::from(at)] = number.iter().fold(0, |n, byte| (n << 8) | u16::from(*byte));
            }
            let place = self.quantization.get_mut(usize::from(place & 15));
            *place.ok_or_else(|| problem("a fifth quantization table"))? = Some(table);
            segment = rest;
        }
        Ok(())
    }

    fn scan_header(&mut self, segment: &[u8]) -> Result<()> {
        self.scans += 1;
        if self.scans > MOST_SCANS {
            return Err(problem(format!("it has more than {MOST_SCANS} scans")));
        }
        let count = usize::from(*segment.first().ok_or_else(truncated)?);
        let rows = segment.get(1..1 + 2 * count).ok_or_else(truncated)?;
        let (first, last, bits) = match segment.get(1 + 2 * count..) {
            Some([first, last, bits, ..]) => (usize::from(*first), usize::from(*last), *bits),
            _ => return Err(truncated()),
        };
        let mut components = Vec::<ScanComponent>::new();
        for row in rows.chunks_exact(2) {
            let number = self.components.iter().position(|component| component.id == row[0]);
            let number = number.ok_or_else(|| problem("a scan of a component that the frame does not have"))?;
            if components.iter().any(|component| component.number == number) {
                return Err(problem("a scan with a component twice"));
            }
            let component = &mut self.components[number];
            if component.quantization.is_none() {
                component.quantization = self.quantization[component.table];
            }
            components.push(ScanComponent {
                number,
                dc: usize::from(row[1] >> 4),
                ac: usize::from(row[1] & 15),
            });
        }
        let scan = Scan {
            components,
            progressive: self.progressive,
            first: if self.progressive { first } else { 0 },
            last: if self.progressive { last } else { 63 },
            high: if self.progressive { u32::from(bits >> 4) } else { 0 },
            low: if self.progressive { u32::from(bits & 15) } else { 0 },
            units: self.units(),
            restart_interval: self.restart_interval,
        };
        scan.check()?;
        self.scan = Some(scan);
        Ok(())
    }

    /// Decodes the scan that was found.
    pub(super) fn scan(&mut self, deadline: Deadline) -> Result<()> {
        let Some(scan) = self.scan.take() else {
            return Ok(());
        };
        let data = self.bytes.get(self.at..).unwrap_or_default();
        let mut bits = Bits::new(data);
        scan.decode(&mut bits, &mut self.components, &self.dc, &self.ac, deadline)?;
        self.at += bits.end_of_data();
        Ok(())
    }
}

fn truncated() -> crate::ModelError {
    problem("a segment is cut off")
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    match bytes.get(at..) {
        Some([high, low, ..]) => Ok(u16::from_be_bytes([*high, *low])),
        _ => Err(truncated()),
    }
}
