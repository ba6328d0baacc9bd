//! Which copies of blocks a card can do at once.

/// Pairs of a source and a target, copied one after the other, in parts that may be copied in any order each: no block is both
/// source and target in a part, and none is twice a target.
pub fn at_once(pairs: &[(u32, u32)]) -> Vec<&[(u32, u32)]> {
    let mut parts = Vec::new();
    let mut first = 0;
    for (index, (from, to)) in pairs.iter().enumerate() {
        let part = &pairs[first..index];
        let waits = |(source, target): &(u32, u32)| target == from || target == to || source == to;
        if part.iter().any(waits) {
            parts.push(part);
            first = index;
        }
    }
    if first < pairs.len() {
        parts.push(&pairs[first..]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_block_that_was_copied_and_given_away_in_one_step_waits() {
        assert_eq!(at_once(&[(0, 1), (2, 3), (0, 4)]).len(), 1);
        assert_eq!(at_once(&[(0, 1), (2, 0)]), [&[(0, 1)][..], &[(2, 0)]]);
        assert_eq!(at_once(&[(0, 1), (1, 2)]), [&[(0, 1)][..], &[(1, 2)]]);
        assert_eq!(at_once(&[(0, 1), (2, 1)]), [&[(0, 1)][..], &[(2, 1)]]);
        assert!(at_once(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn parts_in_any_order_within_give_what_one_after_the_other_does(
            pairs in prop::collection::vec((0u32..6, 0u32..6), 0..12), backwards in any::<bool>()
        ) {
            let mut wanted = [0, 1, 2, 3, 4, 5];
            pairs.iter().for_each(|(from, to)| wanted[*to as usize] = wanted[*from as usize]);
            let mut found = [0, 1, 2, 3, 4, 5];
            for part in at_once(&pairs) {
                // All at once: sources are read as they were.
                let before = found;
                let copy = |(from, to): &(u32, u32)| found[*to as usize] = before[*from as usize];
                match backwards {
                    true => part.iter().rev().for_each(copy),
                    false => part.iter().for_each(copy),
                }
            }
            prop_assert_eq!(found, wanted);
        }
    }
}
