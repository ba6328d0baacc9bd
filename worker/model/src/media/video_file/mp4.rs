//! The samples of the first video track of an MP4: where they are, when they are shown.
//!
//! Source: ISO/IEC 14496-12 (boxes and sample tables) and 14496-15 (`avcC`). Nothing is allocated from a number of the
//! file alone: the number of samples is held against the limit first, and every table against the bytes that it has.

use super::super::{limits::VideoLimits, video::problem};
use crate::Result;

/// What a decoder needs of the first video track.
#[derive(Debug)]
pub(super) struct Track {
    /// Pixels of a row, as the container says.
    pub width: usize,
    /// Rows, as the container says.
    pub height: usize,
    /// Sum of the durations of the samples.
    pub seconds: f64,
    /// Sequence and picture parameter sets, each behind a start code.
    pub parameter_sets: Vec<u8>,
    /// Bytes of the length before each unit of a sample.
    pub length_size: usize,
    /// In the order in which they are decoded; at least one.
    pub samples: Vec<Sample>,
}

/// One coded picture.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// First byte in the file.
    pub offset: usize,
    /// Bytes; they lie within the file.
    pub size: usize,
    /// When it is shown, in units of the track.
    pub shown_at: i64,
    /// Whether decoding can begin here.
    pub starts_group: bool,
}

impl Sample {
    /// Its bytes in the file.
    pub(super) fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        file.get(self.offset..self.offset + self.size).unwrap_or_default()
    }
}

/// Start code of a unit in a byte stream.
pub(super) const START_CODE: [u8; 4] = [0, 0, 0, 1];

impl Track {
    /// Reads the tables of the first video track that has samples.
    pub(super) fn read(file: &[u8], limits: &VideoLimits) -> Result<Self> {
        let movie = child(file, b"moov")?;
        let is_video =
            |media: &&[u8]| matches!(child(media, b"hdlr"), Ok(handler) if handler.get(8..12) == Some(b"vide"));
        let mut tracks = Boxes(movie).filter(|(kind, _)| kind == b"trak");
        let media = tracks.find_map(|(_, track)| child(track, b"mdia").ok().filter(|media| is_video(media)));
        let media = media.ok_or_else(|| problem("the MP4 has no video track"))?;
        let units_per_second = time_scale(child(media, b"mdhd")?)?;
        let table = child(child(media, b"minf")?, b"stbl")?;
        let mut track = Self::described(child(table, b"stsd")?)?;
        let sizes = sizes(child(table, b"stsz")?, limits)?;
        if sizes.is_empty() {
            let hint = if Boxes(file).any(|(kind, _)| &kind == b"moof") {
                ": it is fragmented, write it again with -movflags +faststart"
            } else {
                ""
            };
            return Err(problem(format!("the MP4 has no samples{hint}")));
        }
        let (starts, end) = starts(child(table, b"stts")?, sizes.len())?;
        track.seconds = end as f64 / f64::from(units_per_second);
        if let Some(reason) = limits.length_problem(sizes.len(), track.seconds) {
            return Err(problem(reason));
        }
        let offsets = offsets(table, &sizes)?;
        let delays = optional(table, b"ctts")
            .map(|delays| delays_of(delays, sizes.len()))
            .transpose()?;
        let groups = optional(table, b"stss")
            .map(|groups| Table::read(groups, 1))
            .transpose()?;
        let mut starts_group = vec![groups.is_none(); sizes.len()];
        for [number] in groups.iter().flat_map(Table::rows) {
            if let Some(starts_group) = starts_group.get_mut((number as usize).wrapping_sub(1)) {
                *starts_group = true;
            }
        }
        for (number, (size, offset)) in sizes.iter().zip(offsets).enumerate() {
            if offset.checked_add(*size).is_none_or(|end| end > file.len()) {
                return Err(problem(format!("sample {number} lies beyond the end of the file")));
            }
            let delay = delays.as_ref().map_or(0, |delays| delays[number]);
            track.samples.push(Sample {
                offset,
                size: *size,
                shown_at: starts[number].saturating_add(delay),
                starts_group: starts_group[number],
            });
        }
        Ok(track)
    }

    /// Size and parameter sets of the first sample description, which must be H.264.
    fn described(descriptions: &[u8]) -> Result<Self> {
        let first = Boxes(descriptions.get(8..).unwrap_or_default()).next();
        let (kind, entry) = first.ok_or_else(truncated)?;
        if &kind != b"avc1" && &kind != b"avc3" {
            let codec = String::from_utf8_lossy(&kind).into_owned();
            return Err(problem(format!(
                "the codec is {codec:?}, only H.264 is supported: convert the file with ffmpeg -c:v libx264"
            )));
        }
        let side = |at: usize| u16_at(entry, at).map(usize::from);
        let config = child(entry.get(78..).unwrap_or_default(), b"avcC")?;
        let (length_size, parameter_sets) = parameter_sets(config)?;
        Ok(Self {
            width: side(24)?,
            height: side(26)?,
            seconds: 0.0,
            parameter_sets,
            length_size,
            samples: Vec::new(),
        })
    }
}

/// Kind and content of the boxes of some bytes; ends at the first that does not fit.
struct Boxes<'a>(&'a [u8]);

impl<'a> Iterator for Boxes<'a> {
    type Item = ([u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let kind = self.0.get(4..8)?.try_into().ok()?;
        let (header, size) = match u32_at(self.0, 0).ok()? {
            0 => (8, self.0.len()),
            1 => (16, usize::try_from(u64_at(self.0, 8).ok()?).ok()?),
            size => (8, size as usize),
        };
        let content = self.0.get(header..size)?;
        self.0 = &self.0[size..];
        Some((kind, content))
    }
}

fn optional<'a>(bytes: &'a [u8], kind: &[u8; 4]) -> Option<&'a [u8]> {
    Boxes(bytes)
        .find(|(found, _)| found == kind)
        .map(|(_, content)| content)
}

fn child<'a>(bytes: &'a [u8], kind: &[u8; 4]) -> Result<&'a [u8]> {
    optional(bytes, kind).ok_or_else(|| {
        let kind = String::from_utf8_lossy(kind).into_owned();
        problem(format!("the MP4 has no {kind} box where one is needed, or is cut off"))
    })
}

/// Rows of 32-bit numbers behind version, flags and their count.
struct Table<'a> {
    version: u8,
    rows: &'a [u8],
}

impl<'a> Table<'a> {
    fn read(content: &'a [u8], columns: usize) -> Result<Self> {
        let count = u32_at(content, 4)? as usize;
        let rows = content
            .get(8..)
            .and_then(|rows| rows.get(..count.checked_mul(4 * columns)?));
        Ok(Self {
            version: *content.first().ok_or_else(truncated)?,
            rows: rows.ok_or_else(truncated)?,
        })
    }

    fn rows<const COLUMNS: usize>(&self) -> impl Iterator<Item = [u32; COLUMNS]> + use<'a, COLUMNS> {
        let number = |row: &[u8], at: usize| u32::from_be_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
        let rows = self.rows.chunks_exact(4 * COLUMNS);
        rows.map(move |row| std::array::from_fn(|column| number(row, 4 * column)))
    }
}

/// Units per second of a media header.
fn time_scale(header: &[u8]) -> Result<u32> {
    let at = if header.first() == Some(&1) { 20 } else { 12 };
    match u32_at(header, at)? {
        0 => Err(problem("the MP4's time scale is 0")),
        scale => Ok(scale),
    }
}

/// Bytes of each sample.
fn sizes(content: &[u8], limits: &VideoLimits) -> Result<Vec<usize>> {
    let (equal, count) = (u32_at(content, 4)? as usize, u32_at(content, 8)? as usize);
    if let Some(reason) = limits.length_problem(count, 0.0) {
        return Err(problem(reason));
    }
    if equal != 0 {
        return Ok(vec![equal; count]);
    }
    let table = Table::read(content.get(4..).ok_or_else(truncated)?, 1)?;
    Ok(table.rows().map(|[size]| size as usize).collect())
}

/// When each of `count` samples is decoded, and the end of the last.
fn starts(content: &[u8], count: usize) -> Result<(Vec<i64>, i64)> {
    let (mut starts, mut time) = (Vec::with_capacity(count), 0i64);
    for [samples, duration] in Table::read(content, 2)?.rows() {
        for _ in 0..(samples as usize).min(count - starts.len()) {
            starts.push(time);
            time = time.saturating_add(i64::from(duration));
        }
    }
    if starts.len() < count || time <= 0 {
        return Err(problem("the MP4's table of times does not cover its samples"));
    }
    Ok((starts, time))
}

/// How much later than decoded each of `count` samples is shown.
fn delays_of(content: &[u8], count: usize) -> Result<Vec<i64>> {
    let table = Table::read(content, 2)?;
    let mut delays = Vec::with_capacity(count);
    for [samples, delay] in table.rows() {
        let delay = if table.version == 0 {
            i64::from(delay)
        } else {
            i64::from(delay as i32)
        };
        let samples = (samples as usize).min(count - delays.len());
        delays.extend(std::iter::repeat_n(delay, samples));
    }
    delays.resize(count, 0);
    Ok(delays)
}

/// Where each sample begins: chunks lie anywhere, samples of a chunk follow each other.
fn offsets(table: &[u8], sizes: &[usize]) -> Result<Vec<usize>> {
    let chunks: Vec<u64> = match optional(table, b"stco") {
        Some(chunks) => Table::read(chunks, 1)?
            .rows()
            .map(|[offset]| u64::from(offset))
            .collect(),
        None => {
            let rows = Table::read(child(table, b"co64")?, 2)?;
            rows.rows()
                .map(|[high, low]| u64::from(high) << 32 | u64::from(low))
                .collect()
        }
    };
    let runs = Table::read(child(table, b"stsc")?, 3)?.rows::<3>().collect::<Vec<_>>();
    let mut offsets = Vec::with_capacity(sizes.len());
    let mut run = 0;
    for (number, chunk) in chunks.into_iter().enumerate() {
        while runs.get(run + 1).is_some_and(|next| next[0] as usize <= number + 1) {
            run += 1;
        }
        let samples = runs.get(run).map_or(0, |run| run[1] as usize);
        let mut offset = usize::try_from(chunk).unwrap_or(usize::MAX);
        for _ in 0..samples.min(sizes.len() - offsets.len()) {
            let size = sizes[offsets.len()];
            offsets.push(offset);
            offset = offset.saturating_add(size);
        }
    }
    if offsets.len() < sizes.len() {
        return Err(problem("the MP4's chunks do not hold all of its samples"));
    }
    Ok(offsets)
}

/// Bytes of a unit's length, and the parameter sets as a byte stream.
fn parameter_sets(config: &[u8]) -> Result<(usize, Vec<u8>)> {
    let byte = |at: usize| config.get(at).copied().ok_or_else(truncated);
    let length_size = usize::from(byte(4)? & 3) + 1;
    let (mut sets, mut at) = (Vec::new(), 6);
    for kind in 0..2 {
        // Sequence parameter sets are counted in five bits, picture parameter sets in a byte of their own.
        let count = if kind == 0 {
            byte(5)? & 31
        } else {
            at += 1;
            byte(at - 1)?
        };
        for _ in 0..count {
            let size = usize::from(u16_at(config, at)?);
            let set = config.get(at + 2..at + 2 + size).ok_or_else(truncated)?;
            sets.extend(START_CODE);
            sets.extend(set);
            at += 2 + size;
        }
    }
    Ok((length_size, sets))
}

fn truncated() -> crate::ModelError {
    problem("a table of the MP4 is cut off")
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let part = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
    part.copied().ok_or_else(truncated)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    array_at(bytes, at).map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    array_at(bytes, at).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(version: u8, numbers: &[u32]) -> Vec<u8> {
        let numbers = numbers.iter().flat_map(|n| n.to_be_bytes());
        [version, 0, 0, 0].into_iter().chain(numbers).collect()
    }

    #[test]
    fn a_table_that_claims_more_rows_than_it_has_bytes_is_refused() {
        assert!(starts(&table(0, &[u32::MAX, 1, 1]), 3).is_err());
        assert!(sizes(&table(0, &[0, 1 << 16, 5]), &VideoLimits::DEFAULT).is_err());
    }

    #[test]
    fn samples_of_equal_size_are_counted_before_they_are_listed() {
        let error = sizes(&table(0, &[7, u32::MAX]), &VideoLimits::DEFAULT).unwrap_err();
        assert_eq!(error.to_string(), "video: more than 108000 frames");
        assert_eq!(sizes(&table(0, &[7, 3]), &VideoLimits::DEFAULT).unwrap(), [7; 3]);
    }

    #[test]
    fn times_and_delays_are_runs() {
        assert_eq!(starts(&table(0, &[2, 2, 10, 9, 5]), 3).unwrap(), (vec![0, 10, 20], 25));
        assert!(starts(&table(0, &[1, 2, 10]), 3).is_err());
        let minus_two = u32::MAX - 1;
        assert_eq!(delays_of(&table(1, &[2, 1, 4, 1, minus_two]), 3).unwrap(), [4, -2, 0]);
    }

    #[test]
    fn a_box_that_is_larger_than_its_parent_is_not_found() {
        let file = [&[0, 0, 0, 9][..], b"moov", &[1], &[0, 0, 0, 99], b"trak"].concat();
        assert_eq!(child(&file, b"moov").unwrap(), [1]);
        assert!(child(&file, b"trak").is_err());
    }
}
