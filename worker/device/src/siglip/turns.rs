//! How many squares go through the tower together.

/// With fewer than this many times the squares that would go first, they all go together.
const MANY: usize = 4;

/// Squares of one turn after another: first `ahead` of many, since what comes later is copied to the card meanwhile, then at most
/// `most` each time.
pub(super) fn turns(squares: usize, ahead: usize, most: usize) -> Vec<usize> {
    let most = most.max(1);
    let first = if squares >= MANY * ahead { ahead.min(most) } else { 0 };
    let others = squares - first;
    let mut turns = vec![most; others / most];
    turns.insert(0, first);
    turns.push(others % most);
    turns.retain(|squares| *squares > 0);
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_squares_go_together_and_many_after_a_start() {
        let cases: [((usize, usize, usize), &[usize]); 8] = [
            ((10, 4, 44), &[10]),
            ((16, 4, 44), &[4, 12]),
            ((32, 4, 44), &[4, 28]),
            ((48, 4, 44), &[4, 44]),
            ((100, 4, 44), &[4, 44, 44, 8]),
            ((32, 0, 44), &[32]),
            ((5, 4, 2), &[2, 2, 1]),
            ((0, 4, 2), &[]),
        ];
        for ((squares, ahead, most), expected) in cases {
            assert_eq!(turns(squares, ahead, most), expected, "{squares} {ahead} {most}");
        }
    }
}
