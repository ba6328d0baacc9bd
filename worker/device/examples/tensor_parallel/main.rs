//! Tensor parallelism by hand:
//!
//! ```text
//! tensor_parallel plan                          memory of the released models on one to eight cards
//! tensor_parallel cpu SIZE                      SIZE processes of a small model on the CPU, compared with one process
//! tensor_parallel gpu SIZE                      SIZE processes with a GPU each: sums by NCCL and a small model, checked;
//!                                               sums and a large model, measured
//! tensor_parallel engine SIZE DIR               the engine over SIZE GPUs beside the host: random weights of a
//!                                               configuration
//! ```
//!
//! All but `plan` start the other ranks themselves, from this executable. GPUs need `--features nccl`.

#[cfg(feature = "nccl")]
mod gpu;
#[cfg(feature = "nccl")]
mod model;

use std::{error::Error, net::TcpListener, process::Command, time::Duration};

use flotilla_device::{
    TextShape,
    parallel::{Collective, Membership, Shard, Tcp, Token, reference::HostModel},
    plan::Serving,
    shape::NAMES,
};

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    match arguments.as_slice() {
        ["plan"] => {
            let cards = [("80 GB", 80_000_000_000), ("141 GB", 141_000_000_000)];
            print!("{}", Serving::default().table(&NAMES, &cards, &[1, 2, 4, 8]));
            Ok(())
        }
        [what @ ("cpu" | "gpu"), size] => start(what, size.parse()?, ""),
        ["engine", size, dir] => start("engine", size.parse()?, dir),
        // What `start` calls.
        ["rank", what, size, rank, address, dir] => {
            let membership = membership(rank.parse()?, size.parse()?)?;
            work(what, Tcp::join(address, &membership)?, dir)
        }
        _ => Err("tensor_parallel plan | cpu SIZE | gpu SIZE | engine SIZE DIR".into()),
    }
}

/// The processes share a token through their environment.
const TOKEN: &str = "FLOTILLA_GROUP_TOKEN";

fn membership(rank: usize, size: usize) -> Result<Membership, Box<dyn Error>> {
    Ok(Membership {
        rank,
        size,
        token: Token::new(std::env::var(TOKEN)?),
        timeout: Duration::from_secs(30),
    })
}

/// Rank 0, which starts the others.
fn start(what: &str, size: usize, dir: &str) -> Outcome {
    let token = format!("{:032x}", rand::random::<u128>());
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let others = (1..size).map(|rank| {
        let arguments = ["rank", what, &size.to_string(), &rank.to_string(), &address, dir];
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).env(TOKEN, &token).spawn()
    });
    let others = others.collect::<Result<Vec<_>, _>>()?;
    let membership = Membership {
        rank: 0,
        size,
        token: Token::new(token),
        timeout: Duration::from_secs(30),
    };
    let group = if size == 1 {
        Tcp::alone()
    } else {
        Tcp::host(&listener, &membership)?
    };
    let worked = work(what, group, dir);
    for mut other in others {
        let status = other.wait()?;
        if !status.success() {
            eprintln!("a rank ended with {status}");
        }
    }
    worked
}

fn work(what: &str, group: Tcp, dir: &str) -> Outcome {
    match what {
        "cpu" => cpu(group),
        #[cfg(feature = "nccl")]
        "engine" => model::engine(group, dir),
        #[cfg(feature = "nccl")]
        _ => gpu::run(group),
        #[cfg(not(feature = "nccl"))]
        _ => {
            let _ = dir;
            Err("this executable was built without the feature nccl".into())
        }
    }
}

fn cpu(mut group: Tcp) -> Outcome {
    let shape = TextShape {
        hidden: 256,
        layers: 4,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        intermediate: 768,
        vocabulary: 512,
        eps: 1e-6,
        theta: 1e6,
        sections: [16, 0, 0],
        tied: false,
    };
    let prompt = (0..24).map(|token| token * 21 % 512).collect::<Vec<_>>();
    let (rank, size) = (group.rank(), group.size());
    let shard = Shard::new(&shape, rank, size)?;
    let whole = HostModel::random(&shape, 5);
    let begin = std::time::Instant::now();
    let logits = whole.shard(&shard).logits_of_group(&shard, &prompt, &mut group)?;
    let seconds = begin.elapsed().as_secs_f64();
    let (alone, in_parts) = (whole.logits(&prompt, 1), whole.logits(&prompt, size));
    let apart = alone
        .iter()
        .zip(&logits)
        .map(|(one, other)| (one - other).abs())
        .fold(0.0, f32::max);
    let same = logits
        .iter()
        .zip(&in_parts)
        .all(|(one, other)| one.to_bits() == other.to_bits());
    println!(
        "rank {rank} of {size}: {} logits in {seconds:.3} s; bits of one process that adds in {size} parts: {same}; \
         largest distance from one that adds in one: {apart:.1e}",
        logits.len()
    );
    group.barrier()?;
    if same { Ok(()) } else { Err("the logits differ".into()) }
}
