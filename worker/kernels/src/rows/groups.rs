//! Tokens sorted by their ids, on the host.

/// The tokens of each id of a sequence: what [`embedding_gradient`](super::reference::embedding_gradient) sums over.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Groups {
    /// The distinct ids, ascending.
    pub ids: Vec<u32>,
    /// Where the tokens of each id start in `order`, and at the end its length.
    pub starts: Vec<u32>,
    /// Indices of tokens: those of the first id ascending, then those of the second, and so on.
    pub order: Vec<u32>,
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
        let mut groups = Self::default();
        for (at, (id, token)) in (0u32..).zip(pairs) {
            if groups.ids.last() != Some(&id) {
                groups.ids.push(id);
                groups.starts.push(at);
            }
            groups.order.push(token);
        }
        groups
            .starts
            .push(u32::try_from(groups.order.len()).unwrap_or(u32::MAX));
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_an_id_are_together_and_ascend() {
        let groups = Groups::of(&[7, 3, 7, 9, 3, 7], |id| id != 9);
        assert_eq!(groups.ids, [3, 7]);
        assert_eq!(groups.starts, [0, 2, 5]);
        assert_eq!(groups.order, [1, 4, 0, 2, 5]);
    }

    #[test]
    fn no_token_is_no_group() {
        let groups = Groups::of(&[], |_| true);
        assert!(groups.ids.is_empty() && groups.order.is_empty());
        assert_eq!(groups.starts, [0]);
    }
}
