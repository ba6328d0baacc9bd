//! How many squares go through the tower together.

/// From this many squares on, a part goes first.
const MANY: usize = 8;
/// It is the squares over this: long enough for the pixels of the others to be copied meanwhile.
const SHARE: usize = 4;

/// Squares of one turn after another: of many a part first, then at most `most` each time.
pub(super) fn turns(squares: usize, most: usize) -> Vec<usize> {
    let most = most.max(1);
    let first = if squares < MANY { 0 } else { (squares / SHARE).min(most) };
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
        let cases: [((usize, usize), &[usize]); 8] = [
            ((1, 44), &[1]),
            ((7, 44), &[7]),
            ((10, 44), &[2, 8]),
            ((32, 44), &[8, 24]),
            ((44, 44), &[11, 33]),
            ((100, 44), &[25, 44, 31]),
            ((9, 2), &[2, 2, 2, 2, 1]),
            ((0, 2), &[]),
        ];
        for ((squares, most), expected) in cases {
            assert_eq!(turns(squares, most), expected, "{squares} {most}");
        }
    }
}
