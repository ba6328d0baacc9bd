//! Which part of each packed weight a rank holds.
//!
//! A layer needs two sums over all ranks: attention is split by heads and the MLP by its inner width, so that the first
//! matrix of each is cut by outputs, the second by inputs, and nothing between them is exchanged. A rank holds whole groups
//! of query heads with the key and value head that they share; where there are fewer such heads than ranks, several ranks
//! hold the same one and share its queries. Norms are held by all.
//!
//! The two tables are cut by rows of the vocabulary. A token's embedding is looked up where its row is and is zero
//! elsewhere, so that the sum over all ranks is it exactly: one short sum more a step, which has 2 per layer anyway. It
//! keeps a tied table in one layout, leaves each card a share of 5 GB at 72B, and lets a decode step read a share of the
//! head. The logits of all ranks side by side are all logits.

use std::ops::Range;

use flotilla_kernels::Element;

use crate::shape::TextShape;

/// Why a model cannot be cut into so many parts.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ShardError {
    /// No such rank.
    #[error("rank {rank} of {size} ranks")]
    Rank {
        /// The rank.
        rank: usize,
        /// Ranks.
        size: usize,
    },
    /// A width that the number of ranks does not divide.
    #[error("{size} ranks cannot share {count} {what}: {size} does not divide {count}")]
    Uneven {
        /// What is cut.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// Ranks.
        size: usize,
    },
    /// Key and value heads that ranks cannot share evenly.
    #[error(
        "{size} ranks cannot share {kv_heads} key and value heads: neither divides the other, so that some ranks would \
         hold more than others"
    )]
    KeyHeads {
        /// Key and value heads.
        kv_heads: usize,
        /// Ranks.
        size: usize,
    },
    /// More ranks than key and value heads, and queries that cannot be shared.
    #[error(
        "{size} ranks cannot share {heads} query heads: {copies} ranks hold each of the {kv_heads} key and value heads, \
         and cannot share its {group} query heads evenly"
    )]
    Replicated {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Query heads of each.
        group: usize,
        /// Ranks that hold the same one.
        copies: usize,
        /// Ranks.
        size: usize,
    },
}

/// What one rank of a group holds of a language model.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    whole: TextShape,
    rank: usize,
    size: usize,
}

impl Shard {
    /// The part of `rank` among `size` ranks.
    pub fn new(shape: &TextShape, rank: usize, size: usize) -> Result<Self, ShardError> {
        if rank >= size {
            return Err(ShardError::Rank { rank, size });
        }
        let (heads, kv_heads) = (shape.heads, shape.kv_heads);
        if size <= kv_heads {
            if !kv_heads.is_multiple_of(size) {
                return Err(ShardError::KeyHeads { kv_heads, size });
            }
        } else {
            if !size.is_multiple_of(kv_heads) {
                return Err(ShardError::KeyHeads { kv_heads, size });
            }
            let (group, copies) = (heads / kv_heads, size / kv_heads);
            if !group.is_multiple_of(copies) {
                return Err(ShardError::Replicated {
                    heads,
                    kv_heads,
                    group,
                    copies,
                    size,
                });
            }
        }
        let widths = [
            ("columns of the MLP", shape.intermediate),
            ("rows of the vocabulary", shape.vocabulary),
        ];
        if let Some((what, count)) = widths.into_iter().find(|(_, count)| !count.is_multiple_of(size)) {
            return Err(ShardError::Uneven { what, count, size });
        }
        Ok(Self {
            whole: shape.clone(),
            rank,
            size,
        })
    }

    /// The whole model's shape.
    pub fn whole(&self) -> &TextShape {
        &self.whole
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The shape with which this rank computes and stores: its heads, its part of the MLP, its rows of the tables; the
    /// residual stream is as wide as ever. Kernels, key and value pools and graphs take it as if it were a model.
    pub fn local(&self) -> TextShape {
        TextShape {
            heads: self.heads().len(),
            kv_heads: self.kv_heads().len(),
            intermediate: self.whole.intermediate / self.size,
            vocabulary: self.whole.vocabulary / self.size,
            ..self.whole.clone()
        }
    }

    /// Query heads.
    pub fn heads(&self) -> Range<usize> {
        part(self.whole.heads, self.rank, self.size)
    }

    /// Key and value heads: those of the query heads.
    pub fn kv_heads(&self) -> Range<usize> {
        if self.size <= self.whole.kv_heads {
            part(self.whole.kv_heads, self.rank, self.size)
        } else {
            let head = self.rank / self.copies();
            head..head + 1
        }
    }

    /// How many ranks hold the same key and value heads.
    pub fn copies(&self) -> usize {
        (self.size / self.whole.kv_heads).max(1)
    }

    /// Rows of both tables: the tokens whose embeddings and logits are here.
    pub fn tokens(&self) -> Range<usize> {
        part(self.whole.vocabulary, self.rank, self.size)
    }

    /// Rows of the matrix of queries before it is packed, and elements of its bias.
    pub fn query_rows(&self) -> Range<usize> {
        scaled(&self.heads(), self.whole.head_dim)
    }

    /// Rows of the matrices of keys and of values before they are packed, and elements of their bias.
    pub fn key_rows(&self) -> Range<usize> {
        scaled(&self.kv_heads(), self.whole.head_dim)
    }

    /// Rows of the packed queries, keys and values, and elements of their bias, in the order in which the rank packs them.
    pub fn qkv_rows(&self) -> [Range<usize>; 3] {
        let (queries, keys) = (self.whole.query_width(), self.whole.key_width());
        let behind = |rows: Range<usize>, before: usize| before + rows.start..before + rows.end;
        [
            self.query_rows(),
            behind(self.key_rows(), queries),
            behind(self.key_rows(), queries + keys),
        ]
    }

    /// Columns of the attention's output matrix.
    pub fn output_columns(&self) -> Range<usize> {
        self.query_rows()
    }

    /// Rows of the packed gate and the other half.
    pub fn gate_up_rows(&self) -> [Range<usize>; 2] {
        let inner = self.down_columns();
        let other = self.whole.intermediate + inner.start..self.whole.intermediate + inner.end;
        [inner, other]
    }

    /// Columns of the MLP's second matrix.
    pub fn down_columns(&self) -> Range<usize> {
        part(self.whole.intermediate, self.rank, self.size)
    }

    /// This rank's part of packed queries, keys and values `[packed, hidden]`.
    pub fn qkv<T: Element>(&self, whole: &[T]) -> Vec<T> {
        rows(whole, self.whole.hidden, &self.qkv_rows())
    }

    /// This rank's part of their bias `[packed]`.
    pub fn qkv_bias<T: Element>(&self, whole: &[T]) -> Vec<T> {
        rows(whole, 1, &self.qkv_rows())
    }

    /// This rank's part of the attention's output matrix `[hidden, query width]`.
    pub fn output<T: Element>(&self, whole: &[T]) -> Vec<T> {
        columns(whole, self.whole.query_width(), &self.output_columns())
    }

    /// This rank's part of packed gate and other half `[2 * intermediate, hidden]`.
    pub fn gate_up<T: Element>(&self, whole: &[T]) -> Vec<T> {
        rows(whole, self.whole.hidden, &self.gate_up_rows())
    }

    /// This rank's part of the MLP's second matrix `[hidden, intermediate]`.
    pub fn down<T: Element>(&self, whole: &[T]) -> Vec<T> {
        columns(whole, self.whole.intermediate, &self.down_columns())
    }

    /// This rank's part of a table `[vocabulary, hidden]`.
    pub fn table<T: Element>(&self, whole: &[T]) -> Vec<T> {
        rows(whole, self.whole.hidden, &[self.tokens()])
    }
}

/// One of `parts` equal parts.
fn part(length: usize, index: usize, parts: usize) -> Range<usize> {
    length / parts * index..length / parts * (index + 1)
}

fn scaled(range: &Range<usize>, factor: usize) -> Range<usize> {
    range.start * factor..range.end * factor
}

/// Some rows of a matrix, one range after the other.
fn rows<T: Element>(matrix: &[T], width: usize, ranges: &[Range<usize>]) -> Vec<T> {
    let parts = ranges
        .iter()
        .map(|range| &matrix[range.start * width..range.end * width]);
    parts.flatten().copied().collect()
}

/// Some columns of a matrix.
fn columns<T: Element>(matrix: &[T], width: usize, range: &Range<usize>) -> Vec<T> {
    let rows = matrix.chunks_exact(width);
    rows.flat_map(|row| &row[range.clone()]).copied().collect()
}

#[cfg(test)]
mod tests;
