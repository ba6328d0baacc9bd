//! Which rows are the newest tokens of which sequence, and where the older ones lie.

/// Rows of a packed batch that are the newest tokens of one sequence. Its keys and values, theirs included, lie in blocks
/// of a pool: token `i` in slot `i % block_size` of block `blocks[i / block_size]`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PagedSpan<'a> {
    /// The rows.
    pub length: usize,
    /// Tokens of the sequence before them.
    pub stored: usize,
    /// Blocks of the sequence, in its order.
    pub blocks: &'a [u32],
}

/// What the attention of a span is done by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum SpanKind {
    /// Nothing is stored before it: it attends within itself.
    Fresh,
    /// One token after others.
    Next,
    /// Several tokens after others.
    Chunk,
}

impl PagedSpan<'_> {
    /// Tokens of the sequence, these rows included.
    pub fn seen(&self) -> usize {
        self.stored + self.length
    }

    pub(super) fn kind(&self) -> SpanKind {
        match (self.stored, self.length) {
            (0, _) => SpanKind::Fresh,
            (_, 1) => SpanKind::Next,
            _ => SpanKind::Chunk,
        }
    }

    /// The slots of the rows in a pool of blocks of this size.
    pub fn slots(&self, block_size: usize) -> impl Iterator<Item = u32> {
        let slot = move |i: usize| self.blocks[i / block_size] * block_size as u32 + (i % block_size) as u32;
        (self.stored..self.seen()).map(slot)
    }
}
