//! Logs on standard error: text for people, JSON for collectors.

use std::{io::IsTerminal, sync::OnceLock};

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, fmt};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

impl LogFormat {
    /// As it is written on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// What [`init`] was given first.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// The format of this process's log, which processes that it starts take too.
pub fn format() -> LogFormat {
    FORMAT.get().copied().unwrap_or_default()
}

/// Installs the subscriber of the process; `RUST_LOG` filters it (default `info`).
pub fn init(format: LogFormat) {
    // As with the subscriber, the first one stays.
    let _ = FORMAT.set(format);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A line that cannot be written is lost: telling so on the same standard error would end the thread.
        .log_internal_errors(false)
        // Colours are for terminals; a log file shows them as noise.
        .with_ansi(std::io::stderr().is_terminal());
    // A second subscriber (tests, embedding) is no reason to stop.
    let _ = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
