//! Tokens sorted by their ids, on the host.

/// From this many tokens on, the rows of an id are summed by several blocks.
const MANY: usize = 32;

/// The tokens of each id of a sequence: what [`embedding_gradient`](super::reference::embedding_gradient) sums over.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Groups {
    /// The distinct ids, those with most tokens first: long sums are begun before short ones.
    pub(super) ids: Vec<u32>,
    /// Where the tokens of each id start in `order`, and at the end its length.
    pub(super) starts: Vec<u32>,
    /// Indices of tokens: those of the first id ascending, then those of the second, and so on.
    pub(super) order: Vec<u32>,
}

impl Groups {
    /// Of those tokens whose id `is_embedded`: placeholders of images take their rows from elsewhere and give no gradient.
    pub fn of(ids: &[u32], is_embedded: impl Fn(u32) -> bool) -> Self {
        let mut pairs = (0u32..)
            .zip(ids)
            .filter(|(_, id)| is_embedded(**id))
            .map(|(token, id)| (*id, token))
            .collect::<Vec<_>>();
        pairs.sort_unstable();
        let mut of_ids = pairs.chunk_by(|a, b| a.0 == b.0).collect::<Vec<_>>();
        of_ids.sort_by_key(|tokens| std::cmp::Reverse(tokens.len()));
        let mut groups = Self::default();
        let mut start = 0;
        for tokens in of_ids {
            groups.ids.push(tokens[0].0);
            groups.starts.push(start);
            groups.order.extend(tokens.iter().map(|(_, token)| token));
            start += u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        }
        groups.starts.push(start);
        groups
    }

    /// How many of the ids, from the first on, have many tokens.
    pub fn many(&self) -> usize {
        let lengths = self.starts.windows(2).map(|span| (span[1] - span[0]) as usize);
        lengths.take_while(|length| *length >= MANY).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_an_id_are_together_and_ascend() {
        let groups = Groups::of(&[7, 3, 7, 9, 3, 7, 1], |id| id != 9);
        assert_eq!(groups.ids, [7, 3, 1]);
        assert_eq!(groups.starts, [0, 3, 5, 6]);
        assert_eq!(groups.order, [0, 2, 5, 1, 4, 6]);
    }

    #[test]
    fn many_are_the_long_groups() {
        let ids = [vec![5; MANY - 1], vec![4; MANY], vec![3; 3 * MANY]].concat();
        assert_eq!(Groups::of(&ids, |_| true).many(), 2);
    }

    #[test]
    fn no_token_is_no_group() {
        let groups = Groups::of(&[], |_| true);
        assert!(groups.ids.is_empty() && groups.order.is_empty());
        assert_eq!(groups.starts, [0]);
        assert_eq!(groups.many(), 0);
    }
}
