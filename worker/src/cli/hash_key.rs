//! `hash-key`: a key for the API into the line by which a server knows it.

use std::io::Read as _;

use clap::Args;

use crate::{
    access::{KeyLine, Rate},
    error::WorkerError,
};

pub(super) const EXAMPLE: &str = "Example:\n  \
    openssl rand -hex 32 | tee key.txt | flotilla-worker hash-key --name alice --rate 10/s --concurrency 4 >> keys.txt\n  \
    flotilla-worker serve --model ./checkpoint --api-key-file keys.txt\n  \
    curl 127.0.0.1:8000/v1/models -H \"authorization: Bearer $(cat key.txt)\"\n\
    The server reads the file again within seconds when it changes.";

/// The fewest characters of a key: the hash of a shorter one can be guessed.
const MIN_KEY: usize = 16;
/// Bytes of standard input that are read.
const MAX_KEY: u64 = 4096;

/// Arguments of `hash-key`.
#[derive(Args, Debug)]
pub struct HashKeyArguments {
    /// Name of the key, for logs and metrics.
    #[arg(long)]
    pub name: String,
    /// Requests that it may send: 10/s, 600/m or 1000/h.
    #[arg(long)]
    pub rate: Option<Rate>,
    /// Requests that may be answered for it at once.
    #[arg(long, value_name = "REQUESTS")]
    pub concurrency: Option<std::num::NonZeroU32>,
}

pub(super) fn run(arguments: &HashKeyArguments) -> Result<(), WorkerError> {
    let mut key = String::new();
    let read = std::io::stdin().lock().take(MAX_KEY).read_to_string(&mut key);
    read.map_err(|error| WorkerError::permanent("failed to read the key from standard input", error))?;
    println!("{}", line(arguments, key.trim())?);
    Ok(())
}

fn line(arguments: &HashKeyArguments, key: &str) -> Result<KeyLine, WorkerError> {
    if key.chars().count() < MIN_KEY || key.contains(char::is_whitespace) {
        return Err(WorkerError::invalid(format!(
            "a key has at least {MIN_KEY} characters and no white space: make one with openssl rand -hex 32"
        )));
    }
    let mut line = KeyLine::of(&arguments.name, key).map_err(WorkerError::invalid)?;
    (line.rate, line.concurrency) = (arguments.rate, arguments.concurrency);
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_line_admits_the_key_and_a_short_key_is_refused() {
        let arguments = HashKeyArguments {
            name: "alice".to_owned(),
            rate: Some("10/s".parse().expect("a rate")),
            concurrency: None,
        };
        let text = line(&arguments, "0123456789abcdef").expect("a line").to_string();
        assert!(
            text.starts_with("alice sha256:") && text.ends_with(" rate=10/s"),
            "{text}"
        );
        let keys = crate::access::Keys::parse(&text).expect("parses");
        assert!(keys.find("0123456789abcdef").is_some());
        for key in ["", "0123456789abcde", "0123456789 abcdef"] {
            assert!(line(&arguments, key).is_err(), "{key}");
        }
    }
}
