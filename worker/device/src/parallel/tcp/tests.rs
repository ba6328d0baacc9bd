use std::{io::Write as _, thread, time::Instant};

use flotilla_kernels::Float;
use half::bf16;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::parallel::Token;

fn member(rank: usize, size: usize) -> Membership {
    Membership {
        rank,
        size,
        token: Token::new("a token of the tests"),
        timeout: Duration::from_secs(10),
    }
}

/// What `work` gives at each rank of a group of threads.
fn group<R: Send>(members: Vec<Membership>, work: impl Fn(Tcp) -> R + Sync) -> Vec<Result<R, CollectiveError>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let (address, listener, work) = (&address, &listener, &work);
        let ranks = members.into_iter().map(|member| {
            scope.spawn(move || {
                let tcp = match member.rank {
                    0 => Tcp::host(listener, &member),
                    _ => Tcp::join(address, &member),
                };
                tcp.map(work)
            })
        });
        let ranks = ranks.collect::<Vec<_>>();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn whole<R: Send>(size: usize, work: impl Fn(Tcp) -> R + Sync) -> Vec<R> {
    let members = (0..size).map(|rank| member(rank, size)).collect();
    let done = group(members, work);
    done.into_iter().map(Result::unwrap).collect()
}

fn draw<T: Float>(rank: usize, length: usize) -> Vec<T> {
    let mut random = StdRng::seed_from_u64(rank as u64);
    (0..length)
        .map(|_| T::from_f32(random.random_range(-1.0..1.0) * 2f32.powi(random.random_range(-20..20))))
        .collect()
}

/// The sum in the order of ranks, rounded once.
fn expected<T: Float>(size: usize, length: usize) -> Vec<T> {
    let all = (0..size).map(|rank| draw::<T>(rank, length)).collect::<Vec<_>>();
    let sum = |at: usize| all.iter().map(|one| one[at].to_f32()).reduce(|sum, value| sum + value);
    (0..length).map(|at| T::from_f32(sum(at).unwrap())).collect()
}

#[test]
fn every_rank_gets_the_bits_of_the_sum_in_the_order_of_ranks() {
    // Without numbers, in one exchange, in two, with parts of different lengths, in frames that fill every buffer.
    for size in [1, 2, 3, 4] {
        for length in [0, 1, 2, 4096, 4097, 100_003, 1_500_000] {
            if length > 200_000 && size != 2 {
                continue;
            }
            let sums = whole(size, |mut tcp| {
                let (mut wide, mut narrow) = (draw::<f32>(tcp.rank(), length), draw::<bf16>(tcp.rank(), length));
                tcp.all_reduce_sum(&mut wide).unwrap();
                tcp.all_reduce_sum(&mut narrow).unwrap();
                (wide, narrow)
            });
            let (wide, narrow) = (expected::<f32>(size, length), expected::<bf16>(size, length));
            for (rank, (one, other)) in sums.into_iter().enumerate() {
                assert!(
                    one == wide && other == narrow,
                    "rank {rank} of {size}, {length} numbers"
                );
            }
        }
    }
}

#[test]
fn parts_are_gathered_in_the_order_of_ranks_and_one_rank_is_heard_by_all() {
    let heard = whole(3, |mut tcp| {
        let rank = u32::try_from(tcp.rank()).unwrap();
        let mut all = [0; 6];
        tcp.all_gather(&[rank, 10 * rank], &mut all).unwrap();
        let mut tokens = vec![rank; 50_000];
        tcp.broadcast(&mut tokens, 1).unwrap();
        tcp.barrier().unwrap();
        (all, tokens)
    });
    for (all, tokens) in heard {
        assert_eq!(all, [0, 0, 1, 10, 2, 20]);
        assert_eq!(tokens, vec![1; 50_000]);
    }
}

#[test]
fn ranks_that_come_later_than_the_timeout_are_waited_for_and_the_least_is_known_to_all() {
    let members = (0..3).map(|rank| Membership {
        timeout: Duration::from_millis(300),
        ..member(rank, 3)
    });
    let least = group(members.collect(), |mut tcp| {
        thread::sleep(Duration::from_millis(400 * tcp.rank() as u64));
        let least = tcp.least(10 - tcp.rank() as u64);
        (least, tcp.barrier())
    });
    for done in least {
        let (least, barrier) = done.unwrap();
        assert_eq!(least.unwrap(), 8);
        barrier.unwrap();
    }
}

#[test]
fn a_rank_that_ends_while_others_load_is_named_though_nobody_reads_from_it() {
    let errors = whole(3, |mut tcp| match tcp.rank() {
        2 => None,
        0 => Some(tcp.least(1).unwrap_err().to_string()),
        _ => {
            thread::sleep(Duration::from_millis(300));
            Some(tcp.least(1).unwrap_err().to_string())
        }
    });
    for error in errors.into_iter().flatten() {
        assert!(error.contains("failed at rank 2"), "{error}");
    }
}

/// One rank may run ahead of the others by as many broadcasts as it likes.
#[test]
fn a_speaker_ahead_of_its_hearers_waits_for_nobody_and_nothing_is_lost() {
    let sums = whole(3, |mut tcp| {
        let mut sum = 0u64;
        for number in 0..300 {
            let mut values = vec![if tcp.rank() == 0 { number } else { 0 }; 1000];
            tcp.broadcast(&mut values, 0).unwrap();
            sum += values.iter().sum::<u64>();
        }
        let mut one = [tcp.rank() as f32];
        tcp.all_reduce_sum(&mut one).unwrap();
        (sum, one)
    });
    assert_eq!(sums, vec![(1000 * 299 * 150, [3.0]); 3]);
}

#[test]
fn a_rank_that_leaves_is_named_by_all_others_at_once() {
    let begin = Instant::now();
    let errors = whole(4, |mut tcp| {
        let mut values = vec![1f32; 100_000];
        tcp.all_reduce_sum(&mut values).unwrap();
        if tcp.rank() == 2 {
            return None;
        }
        let error = tcp.all_reduce_sum(&mut values).unwrap_err();
        let later = tcp.barrier().unwrap_err();
        Some((error.to_string(), later.to_string()))
    });
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    for (rank, error) in errors.into_iter().enumerate() {
        let Some((error, later)) = error else { continue };
        assert!(
            error.starts_with(&format!("rank {rank}: all-reduce 2 failed at rank")),
            "{error}"
        );
        assert!(error.contains("rank 2 (127.0.0.1:"), "{error}");
        assert!(error.ends_with("it closed its connection"), "{error}");
        assert!(
            later.contains("the group failed before") && later.contains("rank 2 ("),
            "{later}"
        );
    }
}

#[test]
fn what_a_rank_sent_before_it_gave_up_and_why_it_did_are_heard_though_it_left_something_unread() {
    let errors = whole(2, |mut tcp| {
        let mut values = vec![1f32; 50_000];
        if tcp.rank() == 1 {
            thread::sleep(Duration::from_millis(50));
            // More than a connection takes whose other end does not read.
            tcp.broadcast(&mut values, 1).unwrap();
            tcp.give_up("no memory");
            return String::new();
        }
        let mut unread = &tcp.peers[1].as_ref().unwrap().stream;
        unread.write_all(&[0; 100]).unwrap();
        thread::sleep(Duration::from_millis(200));
        tcp.broadcast(&mut values, 1).unwrap();
        tcp.barrier().unwrap_err().to_string()
    });
    assert!(errors[0].ends_with("it gave up: rank 1: no memory"), "{}", errors[0]);
}

#[test]
fn a_rank_that_stops_is_named_after_the_timeout() {
    let members = (0..2).map(|rank| Membership {
        timeout: Duration::from_secs(1),
        ..member(rank, 2)
    });
    let errors = group(members.collect(), |mut tcp| {
        if tcp.rank() == 1 {
            thread::sleep(Duration::from_secs(2));
            // The other's part of the barrier has come; what comes next says that it gave up.
            tcp.barrier().unwrap();
            return tcp.barrier().unwrap_err().to_string();
        }
        tcp.barrier().unwrap_err().to_string()
    });
    let errors = errors.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    assert!(errors[0].contains("failed at rank 1 (127.0.0.1:"), "{}", errors[0]);
    assert!(errors[0].ends_with("it sent nothing for 1s"), "{}", errors[0]);
    assert!(
        errors[1].contains("at rank 0") && errors[1].contains("it gave up: rank 0: barrier 1"),
        "{}",
        errors[1]
    );
}

#[test]
fn ranks_that_are_in_different_operations_are_told_so() {
    let errors = whole(2, |mut tcp| {
        let done = match tcp.rank() {
            0 => tcp.all_reduce_sum(&mut [1f32, 2.0]),
            _ => tcp.barrier(),
        };
        done.unwrap_err().to_string()
    });
    assert!(
        errors[0].contains("all-reduce 1 failed at rank 1") && errors[0].contains("it is in barrier 1"),
        "{errors:?}"
    );
    assert!(errors[1].contains("barrier 1 failed at rank 0"), "{errors:?}");

    let errors = whole(2, |mut tcp| {
        let mut values = vec![0f32; 3 + tcp.rank()];
        tcp.all_reduce_sum(&mut values).unwrap_err().to_string()
    });
    assert!(
        errors
            .iter()
            .any(|error| error.contains("bytes are needed") || error.contains("are needed")),
        "{errors:?}"
    );
}

#[test]
fn a_look_sees_a_rank_that_left_and_does_not_wait_for_one_that_did_not() {
    let looks = whole(2, |mut tcp| {
        if tcp.rank() == 1 {
            tcp.barrier().unwrap();
            return String::new();
        }
        tcp.look().unwrap();
        tcp.barrier().unwrap();
        let begin = Instant::now();
        loop {
            match tcp.look() {
                Err(error) => return error.to_string(),
                Ok(()) => assert!(begin.elapsed() < Duration::from_secs(5)),
            }
        }
    });
    assert!(
        looks[0].contains("rank 1 (") && looks[0].ends_with("it closed its connection"),
        "{}",
        looks[0]
    );
}

#[test]
fn an_idle_rank_outwaits_the_timeout_and_sees_the_other_leave() {
    let members = (0..2).map(|rank| Membership {
        timeout: Duration::from_millis(700),
        ..member(rank, 2)
    });
    let heard = group(members.collect(), |mut tcp| {
        if tcp.rank() == 0 {
            thread::sleep(Duration::from_millis(1500));
            tcp.broadcast(&mut [7u8], 0).unwrap();
            return String::new();
        }
        let mut heard = [0u8];
        tcp.idle(0).unwrap();
        tcp.broadcast(&mut heard, 0).unwrap();
        assert_eq!(heard, [7]);
        tcp.idle(0).unwrap_err().to_string()
    });
    let error = heard[1].as_ref().unwrap();
    assert!(
        error.contains("rank 0 (") && error.ends_with("it closed its connection"),
        "{error}"
    );
}

#[test]
fn arguments_that_do_not_fit_break_nothing() {
    let done = whole(2, |mut tcp| {
        let gathered = tcp.all_gather(&[1u8, 2], &mut [0; 3]).unwrap_err().to_string();
        let heard = tcp.broadcast(&mut [0u8], 2).unwrap_err().to_string();
        tcp.barrier().unwrap();
        (gathered, heard)
    });
    assert!(
        done[0].0.contains("3 numbers are no room for 2 parts of 2"),
        "{}",
        done[0].0
    );
    assert!(done[0].1.contains("no rank 2"), "{}", done[0].1);
}

fn errors_of(members: Vec<Membership>) -> Vec<String> {
    let ranks = group(members, |_| ());
    let errors = ranks
        .into_iter()
        .map(|rank| rank.err().map_or_else(String::new, |error| error.to_string()));
    errors.collect()
}

fn hasty(rank: usize, size: usize) -> Membership {
    Membership {
        timeout: Duration::from_millis(1500),
        ..member(rank, size)
    }
}

#[test]
fn a_rank_with_another_token_is_sent_away() {
    let stranger = Membership {
        token: Token::new("another"),
        ..hasty(1, 2)
    };
    let errors = errors_of(vec![hasty(0, 2), stranger]);
    assert!(
        errors[0].contains("ranks [1] of 2 did not come within 1.5s"),
        "{}",
        errors[0]
    );
    assert!(
        errors[0].contains("was sent away: its token is another"),
        "{}",
        errors[0]
    );
    assert!(
        errors[1].contains("did not let it in: its token is another"),
        "{}",
        errors[1]
    );
}

#[test]
fn ranks_that_disagree_about_the_group_are_told_so() {
    let errors = errors_of(vec![hasty(0, 2), hasty(1, 3)]);
    assert!(
        errors[1].contains("it takes the group to have 3 ranks, not 2"),
        "{}",
        errors[1]
    );
    // Two ranks 1: whoever comes second is sent away.
    let errors = errors_of(vec![hasty(0, 3), hasty(1, 3), hasty(1, 3)]);
    let second = errors.iter().filter(|error| error.contains("rank 1 is there already"));
    assert!(second.count() >= 1, "{errors:?}");
    // Those who came learn who did not.
    let errors = errors_of(vec![hasty(0, 3), hasty(1, 3)]);
    assert!(
        errors[1].contains("ranks [2] of 3 did not come") || errors[1].contains("never said"),
        "{}",
        errors[1]
    );
}

#[test]
fn a_stray_connection_keeps_nobody_out() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut stray = TcpStream::connect(address).unwrap();
    io::Write::write_all(&mut stray, b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n").unwrap();
    thread::scope(|scope| {
        let other = scope.spawn(|| Tcp::join(&address.to_string(), &member(1, 2)).map(|mut tcp| tcp.barrier()));
        let mut first = Tcp::host(&listener, &member(0, 2)).unwrap();
        first.barrier().unwrap();
        other.join().unwrap().unwrap().unwrap();
    });
}

#[test]
fn impossible_memberships_are_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let empty = Membership {
        token: Token::new(""),
        ..member(0, 2)
    };
    for (membership, fault) in [
        (member(2, 2), "rank 2 of 2"),
        (member(0, 65), "at most 64"),
        (empty, "the token is empty"),
        (member(1, 2), "rank 0 is the one that the others come to"),
    ] {
        let error = Tcp::host(&listener, &membership).unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
}

#[test]
fn a_group_of_one_needs_nobody() {
    let mut tcp = Tcp::alone();
    let mut values = [1.5f32, -0.0];
    tcp.all_reduce_sum(&mut values).unwrap();
    assert_eq!(values.map(f32::to_bits), [1.5f32, -0.0].map(f32::to_bits));
    let mut whole = [0f32; 2];
    tcp.all_gather(&values, &mut whole).unwrap();
    tcp.broadcast(&mut whole, 0).unwrap();
    tcp.barrier().unwrap();
    assert_eq!(whole, values);
}
