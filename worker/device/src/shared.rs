//! Which sequences of a step begin with the same blocks: their common keys and values are read once for all of them.

/// Consecutive rows whose tables begin with the same blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Group {
    /// First of them.
    pub first: usize,
    /// How many.
    pub rows: usize,
    /// Leading blocks that all of them have.
    pub blocks: usize,
}

/// Groups of at least two rows that share at least `least` blocks, in order; no row is in two.
///
/// A row joins the group before it as long as that saves reads: the blocks that all members then share, times the members
/// that need not read them, must not become fewer.
pub fn groups(tables: &[&[u32]], least: usize) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut first = 0;
    while first < tables.len() {
        let mut group = Group {
            first,
            rows: 1,
            blocks: tables[first].len(),
        };
        for row in first + 1..tables.len() {
            let blocks = common(tables[row - 1], tables[row]).min(group.blocks);
            let saved = |blocks: usize, rows: usize| blocks * (rows - 1);
            if blocks < least.max(1) || saved(blocks, group.rows + 1) <= saved(group.blocks, group.rows) {
                break;
            }
            group.rows += 1;
            group.blocks = blocks;
        }
        first += group.rows;
        if group.rows > 1 {
            groups.push(group);
        }
    }
    groups
}

/// Reads of blocks that sharing saves, from which on it pays although the cache of the card holds the prefixes: 32 rows over 96
/// blocks save 2,976 of them, 4 groups of 8 rows 2,688.
const MANY: usize = 2_500;

/// The same where no more rows share than [`FEW`]: a decode step of 8 rows took 1.9 ms longer with its prefix read once, as
/// long as so many reads take.
const VERY_MANY: usize = 15_000;
const FEW: usize = 16;

/// Whether reading shared prefixes once is faster than reading them for every row. While they all stay in the level 2 cache,
/// which holds `cached` blocks of a layer, memory is not what their rows wait for, and merging costs more than it saves unless
/// rows are many: measured, docs/experiments.md. Without a cache it always is.
pub fn pays(groups: &[Group], cached: usize) -> bool {
    let rows: usize = groups.iter().map(|group| group.rows).sum();
    let distinct: usize = groups.iter().map(|group| group.blocks).sum();
    let saved: usize = groups.iter().map(|group| group.blocks * (group.rows - 1)).sum();
    match rows {
        0 => false,
        _ if cached == 0 => true,
        1..=FEW => saved >= VERY_MANY,
        _ => 2 * distinct >= cached || saved >= MANY,
    }
}

/// Blocks with which both begin.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn samples_of_two_prompts_are_two_groups() {
        let tables: [&[u32]; 5] = [&[1, 2, 3, 9], &[1, 2, 3, 8], &[1, 2, 3], &[4, 5, 6], &[4, 5, 7]];
        let found = groups(&tables, 2);
        let group = |first, rows, blocks| Group { first, rows, blocks };
        assert_eq!(found, [group(0, 3, 3), group(3, 2, 2)]);
    }

    #[test]
    fn a_row_that_shares_little_does_not_take_from_a_group_what_it_shares() {
        let long: Vec<u32> = (0..100).collect();
        let short: Vec<u32> = (0..4).chain([200, 201]).collect();
        let found = groups(&[&long, &long, &short], 2);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].rows, found[0].blocks), (2, 100));
    }

    #[test]
    fn prefixes_that_the_cache_holds_are_left_to_it() {
        let group = |rows, blocks| Group { first: 0, rows, blocks };
        assert!(!pays(&[group(8, 96)], 1600));
        assert!(pays(&[group(8, 96); 16], 1600));
        assert!(pays(&[group(32, 96)], 1600));
        assert!(pays(&[group(8, 96); 4], 1600));
        assert!(!pays(&[group(32, 8)], 1600));
        assert!(!pays(&[group(8, 1000); 2], 1600));
        assert!(pays(&[group(16, 1000)], 1600));
        assert!(!pays(&[], 1600));
    }

    proptest! {
        #[test]
        fn every_group_shares_what_it_says(
            tables in prop::collection::vec((0u32..3, 0usize..6, 0usize..4), 0..12),
            least in 0usize..4,
        ) {
            // Blocks of a prompt, then blocks of the row's own.
            let own = |row: usize, count: usize| (0..count).map(move |index| (1000 + row * 10 + index) as u32);
            let tables = tables.iter().enumerate().map(|(row, (prompt, shared, count))| {
                (0..*shared as u32).map(|index| prompt * 100 + index).chain(own(row, *count)).collect::<Vec<_>>()
            }).collect::<Vec<_>>();
            let borrowed = tables.iter().map(Vec::as_slice).collect::<Vec<_>>();
            let mut next = 0;
            for group in groups(&borrowed, least) {
                prop_assert!(group.first >= next && group.rows > 1 && group.blocks >= least.max(1));
                next = group.first + group.rows;
                prop_assert!(next <= tables.len());
                for row in group.first..next {
                    prop_assert_eq!(&tables[row][..group.blocks], &tables[group.first][..group.blocks]);
                }
            }
        }
    }
}
