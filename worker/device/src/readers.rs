//! Parts of a model read by several threads: one thread's copies are several times slower than a card takes them.

use std::{
    num::NonZero,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// More threads read no faster, and each of them holds a matrix.
const MOST: usize = 8;

/// What `read` gives for each index below `count`, in their order, by as many threads as there are processors, [`MOST`] at most. The
/// error of the first index that has one; later ones may not be read then.
pub(crate) fn in_order<P: Send, E: Send>(
    count: usize,
    read: impl Fn(usize) -> Result<P, E> + Sync,
) -> Result<Vec<P>, E> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MOST);
    let (next, fails) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    let parts = Mutex::new(Vec::with_capacity(count));
    let work = || loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= count.min(fails.load(Ordering::Relaxed)) {
            return;
        }
        let part = read(index);
        if part.is_err() {
            fails.fetch_min(index, Ordering::Relaxed);
        }
        parts.lock().unwrap_or_else(PoisonError::into_inner).push((index, part));
    };
    thread::scope(|scope| {
        // This thread is one of them.
        for _ in 1..threads.min(count) {
            scope.spawn(work);
        }
        work();
    });
    let mut parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    parts.sort_unstable_by_key(|(index, _)| *index);
    parts.into_iter().map(|(_, part)| part).collect()
}

/// Both, the first by a thread of its own.
pub(crate) fn beside<A: Send, B>(first: impl FnOnce() -> A + Send, second: impl FnOnce() -> B) -> (A, B) {
    thread::scope(|scope| {
        let first = scope.spawn(first);
        let second = second();
        match first.join() {
            Ok(first) => (first, second),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use super::*;

    #[test]
    fn parts_come_in_the_order_of_their_indices() {
        let late = |index: usize| {
            thread::sleep(Duration::from_millis(if index.is_multiple_of(3) { 3 } else { 0 }));
            Ok::<_, ()>(index * index)
        };
        assert_eq!(in_order(20, late), Ok((0..20).map(|index| index * index).collect()));
        assert_eq!(in_order(0, late), Ok(Vec::new()));
    }

    #[test]
    fn two_things_are_read_beside_one_another() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let heard = beside(move || receiver.recv(), || sender.send(7)).0;
        assert_eq!(heard, Ok(7));
    }

    #[test]
    fn the_error_of_the_first_part_that_has_one_is_told_and_every_part_before_it_is_read() {
        let seen = Mutex::new(HashSet::new());
        let told = in_order(50, |index| {
            seen.lock().expect("a set").insert(index);
            if index % 10 == 7 { Err(index) } else { Ok(()) }
        });
        assert_eq!(told, Err(7));
        assert!((0..=7).all(|index| seen.lock().expect("a set").contains(&index)));
    }
}
