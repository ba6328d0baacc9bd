//! Parts of a computation on threads, results in the order of the parts.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

/// Stack of a computing thread: the walk over a backward graph recurses as deep as the graph is.
pub const STACK_BYTES: usize = 64 << 20;

/// Computes every part on at most `threads` threads. Which thread takes which part depends on timing, the results do not:
/// they come back in the order of the parts, and of several errors the one of the first part.
pub fn map_parts<P: Sync, T: Send, E: Send>(
    threads: usize,
    parts: &[P],
    compute: impl Fn(&P) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let threads = threads.min(parts.len());
    if threads <= 1 {
        return parts.iter().map(compute).collect();
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Result<T, E>)>> = Mutex::new(Vec::with_capacity(parts.len()));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(index) else { break };
            let result = compute(part);
            results
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((index, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that cannot be had is not missed: the others take its parts.
            let spawned = std::thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, work);
            if let Err(error) = spawned {
                tracing::warn!(%error, "a compute thread could not be started");
            }
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_parts() {
        let parts: Vec<u64> = (0..50).collect();
        for threads in [1, 2, 7] {
            let doubled = map_parts(threads, &parts, |part| {
                std::thread::sleep(std::time::Duration::from_micros(50 - part));
                Ok::<_, ()>(part * 2)
            });
            assert_eq!(doubled, Ok((0..50).map(|part| part * 2).collect()));
        }
    }

    #[test]
    fn the_error_of_the_first_part_is_the_one_told() {
        let failed = map_parts(3, &[0, 1, 2, 3], |part| if *part >= 1 { Err(*part) } else { Ok(()) });
        assert_eq!(failed, Err(1));
    }
}
