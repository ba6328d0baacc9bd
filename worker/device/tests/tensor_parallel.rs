//! A model of several processes, which this test starts from its own executable: their logits are those of one process.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    error::Error,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use flotilla_device::{
    TextShape,
    parallel::{Collective, Membership, Shard, Tcp, Token, reference::HostModel},
};

const PROMPT: [u32; 12] = [3, 59, 0, 14, 15, 9, 2, 6, 5, 35, 8, 63];

/// A small model of the architecture; two key heads, so that four ranks hold each twice.
fn shape() -> TextShape {
    TextShape {
        hidden: 48,
        layers: 3,
        heads: 8,
        kv_heads: 2,
        head_dim: 12,
        intermediate: 80,
        vocabulary: 64,
        eps: 1e-6,
        theta: 1e6,
        sections: [6, 0, 0],
        tied: false,
    }
}

/// What a rank is asked to do, in the environment of its process.
struct Task<'a> {
    rank: usize,
    size: usize,
    seed: u64,
    /// Repeats the prompt until something fails.
    forever: bool,
    timeout: Duration,
    address: &'a str,
    results: &'a Path,
}

impl Task<'_> {
    fn start(&self) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "rank_of_a_group", "--ignored", "--nocapture"])
            .env("RANK", self.rank.to_string())
            .env("SIZE", self.size.to_string())
            .env("SEED", self.seed.to_string())
            .env("FOREVER", self.forever.to_string())
            .env("TIMEOUT_MS", self.timeout.as_millis().to_string())
            .env("ADDRESS", self.address)
            .env("RESULTS", self.results)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    }
}

/// What the processes do; started by the other tests.
#[test]
#[ignore = "a part of the other tests"]
fn rank_of_a_group() -> Result<(), Box<dyn Error>> {
    let read = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    if read("RANK").is_err() {
        return Ok(());
    }
    let (rank, size) = (read("RANK")?.parse()?, read("SIZE")?.parse()?);
    let membership = Membership {
        rank,
        size,
        token: Token::new("of this test"),
        timeout: Duration::from_millis(read("TIMEOUT_MS")?.parse()?),
    };
    let mut group = if rank == 0 {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        println!("\nlistening {}", listener.local_addr()?);
        Tcp::host(&listener, &membership)?
    } else {
        Tcp::join(&read("ADDRESS")?, &membership)?
    };
    let shard = Shard::new(&shape(), rank, size)?;
    let model = HostModel::random(&shape(), read("SEED")?.parse()?).shard(&shard);
    let forever = read("FOREVER")?.parse::<bool>()?;
    for round in 0.. {
        let logits = model.logits_of_group(&shard, &PROMPT, &mut group);
        // For whoever reads the output: the error as a user sees it.
        let logits = logits.inspect_err(|error| eprintln!("\nerror: {error}"))?;
        if !forever {
            let bytes = logits.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
            std::fs::write(Path::new(&read("RESULTS")?).join(format!("rank-{rank}")), bytes)?;
            return Ok(group.barrier()?);
        }
        if round == 0 {
            println!("\nrunning");
        }
    }
    Ok(())
}

/// Processes of a group, ended with the test whatever becomes of it.
struct Group(Vec<Child>);

impl Drop for Group {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Group {
    fn start(task: &Task<'_>) -> Self {
        let mut first = task.start();
        let address = line(&mut first, "listening ");
        let mut children = Self(vec![first]);
        for rank in 1..task.size {
            let address = &address;
            children.0.push(Task { rank, address, ..*task }.start());
        }
        children
    }
}

/// The rest of the next line that begins so.
fn line(child: &mut Child, begin: &str) -> String {
    let out = child.stdout.as_mut().unwrap();
    let lines = BufReader::with_capacity(1, out).lines();
    let mut rest = lines.filter_map(|line| Some(line.unwrap().strip_prefix(begin)?.to_owned()));
    rest.next().unwrap()
}

fn end(child: &mut Child, limit: Duration) -> (ExitStatus, String) {
    // Its output is read on: a full pipe would hold it.
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || std::io::read_to_string(out));
    let errors = std::thread::spawn(move || std::io::read_to_string(err));
    let begin = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(begin.elapsed() < limit, "still running after {limit:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    reader.join().unwrap().unwrap();
    (status, errors.join().unwrap().unwrap())
}

fn task(size: usize, results: &Path) -> Task<'_> {
    Task {
        rank: 0,
        size,
        seed: 11,
        forever: false,
        timeout: Duration::from_secs(20),
        address: "",
        results,
    }
}

#[test]
fn processes_compute_what_one_process_computes_bit_for_bit() {
    for size in [2, 4] {
        let results = tempfile::tempdir().unwrap();
        let mut group = Group::start(&task(size, results.path()));
        for child in &mut group.0 {
            let (status, errors) = end(child, Duration::from_secs(60));
            assert!(status.success(), "{errors}");
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let model = HostModel::random(&shape(), 11);
        let in_parts = bits(&model.logits(&PROMPT, size));
        for rank in 0..size {
            let bytes = std::fs::read(results.path().join(format!("rank-{rank}"))).unwrap();
            let (values, _) = bytes.as_chunks::<4>();
            let logits = values
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect::<Vec<_>>();
            assert!(bits(&logits) == in_parts, "rank {rank} of {size}");
            // And what the model is, whichever way it is added up.
            let whole = model.logits(&PROMPT, 1);
            let apart = whole
                .iter()
                .zip(&logits)
                .map(|(one, other)| (one - other).abs())
                .fold(0.0, f32::max);
            assert!(apart < 1e-4, "{apart}");
        }
    }
}

/// Starts an endless group of two and returns it once both are at work.
fn at_work(timeout: Duration, results: &Path) -> Group {
    let mut group = Group::start(&Task {
        forever: true,
        timeout,
        ..task(2, results)
    });
    group.0.iter_mut().for_each(|child| drop(line(child, "running")));
    group
}

#[test]
fn a_process_that_is_killed_is_named_by_the_other_at_once() {
    let results = tempfile::tempdir().unwrap();
    let mut group = at_work(Duration::from_secs(30), results.path());
    group.0[1].kill().unwrap();
    let begin = Instant::now();
    let (status, errors) = end(&mut group.0[0], Duration::from_secs(10));
    assert!(!status.success());
    assert!(errors.contains("error: rank 0: "), "{errors}");
    assert!(
        errors.contains("failed at rank 1 (127.0.0.1:") && errors.contains("it closed its connection"),
        "{errors}"
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[cfg(unix)]
#[test]
fn a_process_that_hangs_is_named_by_the_other_after_the_timeout() {
    let results = tempfile::tempdir().unwrap();
    let mut group = at_work(Duration::from_secs(2), results.path());
    let stopped = Command::new("kill")
        .args(["-STOP", &group.0[1].id().to_string()])
        .status();
    assert!(stopped.unwrap().success());
    let (status, errors) = end(&mut group.0[0], Duration::from_secs(10));
    assert!(!status.success());
    assert!(
        errors.contains("failed at rank 1 (127.0.0.1:") && errors.contains("it sent nothing for 2s"),
        "{errors}"
    );
}
