//! Which rows attend to each other.

/// Runs of rows that attend within themselves.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Segments {
    /// Start and length of each run; runs do not overlap and are in ascending order.
    pub runs: Vec<(usize, usize)>,
    /// Whether a row sees only itself and earlier rows of its run.
    pub causal: bool,
    /// Rows of the tensor, in runs or not.
    pub rows: usize,
}

impl Segments {
    /// The rows of a right-padded rectangle `[lengths.len(), width]`, causal.
    pub fn padded(lengths: &[usize], width: usize) -> Self {
        Self {
            runs: lengths
                .iter()
                .enumerate()
                .map(|(row, length)| (row * width, *length))
                .collect(),
            causal: true,
            rows: lengths.len() * width,
        }
    }

    /// Runs that follow each other without gaps, not causal.
    pub fn consecutive(lengths: &[usize]) -> Self {
        let mut start = 0;
        let mut runs = Vec::new();
        for length in lengths.iter().copied().filter(|length| *length > 0) {
            runs.push((start, length));
            start += length;
        }
        Self {
            runs,
            causal: false,
            rows: start,
        }
    }

    /// The same runs, each row of which sees only itself and earlier ones.
    #[must_use]
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// Rows of the longest run.
    pub fn longest(&self) -> usize {
        self.runs.iter().map(|(_, length)| *length).max().unwrap_or(0)
    }

    /// Groups of runs of one length, by ascending length: `(length, starts)`.
    pub fn by_length(&self) -> Vec<(usize, Vec<usize>)> {
        let mut groups = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        for (start, length) in &self.runs {
            groups.entry(*length).or_default().push(*start);
        }
        groups.into_iter().collect()
    }
}
