//! `flotilla-worker`: reads what it is to be and becomes it.

use std::process::ExitCode;

use clap::Parser;
use flotilla_worker::{
    cli::{Cli, Command},
    telemetry,
};

/// Training allocates and frees large tensors at every step; the system allocator gives them back to the kernel each
/// time and pays page faults for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::Run(_) | Command::Serve(_)) {
        settle_environment();
    }
    telemetry::init(cli.log_format);
    flotilla_worker::main(cli.command, cli.cache_dir)
}

/// What libraries read from the environment, unless the user says otherwise.
///
/// Each matrix product has one thread: the products of a small model are too short to share, two threads slow a decode step of
/// 16 rows by half. Roles use the other cores by splitting batches. GPUs that share a model are those of one machine, so that
/// nobody else needs to reach the ports that NCCL opens.
fn settle_environment() {
    for (variable, value) in [("RAYON_NUM_THREADS", "1"), ("NCCL_SOCKET_IFNAME", "=lo")] {
        if std::env::var_os(variable).is_none() {
            // SAFETY: nothing has started a thread yet, so nothing reads the environment at the same time.
            #[allow(unsafe_code, reason = "the only way to tell these libraries before their first use")]
            unsafe {
                std::env::set_var(variable, value);
            }
        }
    }
}
