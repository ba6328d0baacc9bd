//! What the host does for a decode step before the card has it: order, groups and words, in microseconds.
//!
//! `cargo run -p flotilla-device --example layout`
//!
//! `NEW` orders the rows and finds their groups, `AGAIN` takes both from the step before, `WORDS` writes what the card reads.

#![allow(clippy::print_stdout, reason = "a program for people")]

use std::{hint::black_box, time::Instant};

use flotilla_device::step::{Mail, Piece, Step};

const BLOCK: usize = 16;
/// Blocks of a prompt.
const SHARED: usize = 96;
/// Blocks of a sample's own.
const OWN: usize = 8;
/// Blocks of a layer that a card's cache of 50 MB holds, with keys and values of 7B.
const CACHED: usize = 1600;
const TIMES: usize = 400;

/// The block table of each row; samples of the groups take turns, as they do in the engine.
fn tables(rows: usize, groups: usize) -> Vec<Vec<u32>> {
    let block = |at: usize| u32::try_from(at).unwrap_or_default();
    let table = |row: usize| {
        let prompt = row % groups * SHARED;
        let own = groups * SHARED + row * OWN;
        (prompt..prompt + SHARED).chain(own..own + OWN).map(block).collect()
    };
    (0..rows).map(table).collect()
}

fn microseconds(mut work: impl FnMut()) -> f64 {
    let mut all = (0..TIMES)
        .map(|_| {
            let begin = Instant::now();
            work();
            begin.elapsed().as_secs_f64() * 1e6
        })
        .collect::<Vec<_>>();
    all.sort_by(f64::total_cmp);
    all[TIMES / 2]
}

fn main() {
    println!("{:<28} {:>8} {:>8} {:>8}", "ROWS", "NEW", "AGAIN", "WORDS");
    for (rows, groups) in [(128, 1), (128, 16), (128, 128), (256, 1), (256, 32), (256, 256)] {
        let tables = tables(rows, groups);
        let piece = |table| Piece {
            ids: &[1],
            positions: &[[1600; 3]],
            stored: (SHARED + OWN) * BLOCK - 2,
            blocks: table,
            wanted: true,
            draw: None,
            from: None,
        };
        let pieces = tables.iter().map(|table| piece(table)).collect::<Vec<_>>();
        let step = Step::new(&pieces, Some(CACHED));
        let mail = Mail::new(step.size);
        let mut words = vec![0; mail.words];
        let new = microseconds(|| drop(black_box(Step::new(&pieces, Some(CACHED)))));
        let again = microseconds(|| drop(black_box(step.again(&pieces))));
        let write = microseconds(|| step.write(&pieces, BLOCK, &mail, black_box(&mut words)));
        println!(
            "{:<28} {new:>8.1} {again:>8.1} {write:>8.1}",
            format!("{rows} in {groups} groups")
        );
    }
}
