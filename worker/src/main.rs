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
        single_threaded_kernels();
    }
    telemetry::init(cli.log_format);
    flotilla_worker::main(cli.command, cli.cache_dir)
}

/// Gives each matrix product one thread unless the user says otherwise. The products of a small model are too short to
/// share: two threads slow a decode step of 16 rows by half. Roles use the other cores by splitting batches.
fn single_threaded_kernels() {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: nothing has started a thread yet, so nothing reads the environment at the same time.
        #[allow(unsafe_code, reason = "the only way to tell gemm before its first product")]
        unsafe {
            std::env::set_var(VARIABLE, "1");
        }
    }
}
