//! One line of a key file: `name sha256:<hex> [rate=10/s] [concurrency=4]`.

use std::{collections::HashSet, fmt, num::NonZeroU32, str::FromStr, time::Duration};

use sha2::{Digest as _, Sha256};

/// Bytes of a key file that are read; more is no key file.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// Bytes of a key's name.
const MAX_NAME: usize = 63;

/// Requests in a period. So many may come at once; after that they are spread over the period.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// Requests.
    pub requests: NonZeroU32,
    /// The period.
    pub period: Duration,
}

/// One key: its name for logs, its hash, and what it may ask for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyLine {
    /// Name, for logs and metrics.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// Requests in a period; without limit if None.
    pub rate: Option<Rate>,
    /// Requests at once; without limit if None.
    pub concurrency: Option<NonZeroU32>,
}

impl KeyLine {
    /// The line of a key, without limits.
    pub fn of(name: &str, key: &str) -> Result<Self, String> {
        Ok(Self {
            name: checked_name(name)?,
            hash: hash(key),
            rate: None,
            concurrency: None,
        })
    }
}

/// SHA-256 of a key.
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || "the rate is not of the form 10/s, 10/m or 10/h".to_owned();
        let (requests, unit) = text.split_once('/').ok_or_else(fault)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(fault()),
        };
        Ok(Self {
            requests: requests.parse().map_err(|_| fault())?,
            period: Duration::from_secs(seconds),
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.period.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.requests)
    }
}

/// What is wrong is said without repeating the line, which may hold a key that somebody forgot to hash.
impl FromStr for KeyLine {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let name = checked_name(words.next().unwrap_or_default())?;
        let digest = words.next().and_then(|word| word.strip_prefix("sha256:"));
        let digest = digest.ok_or("the second word is not sha256:<hex> (flotilla-worker hash-key prints it)")?;
        let mut key = Self {
            name,
            hash: [0; 32],
            rate: None,
            concurrency: None,
        };
        hex::decode_to_slice(digest, &mut key.hash).map_err(|_| "the hash is not 64 hexadecimal digits")?;
        for word in words {
            match word.split_once('=') {
                Some(("rate", rate)) if key.rate.is_none() => key.rate = Some(rate.parse()?),
                Some(("concurrency", limit)) if key.concurrency.is_none() => {
                    let limit = limit
                        .parse()
                        .map_err(|_| "the concurrency is not a number of at least 1")?;
                    key.concurrency = Some(limit);
                }
                _ => return Err("only rate= and concurrency= may follow the hash, each once".to_owned()),
            }
        }
        Ok(key)
    }
}

impl fmt::Display for KeyLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sha256:{}", self.name, hex::encode(self.hash))?;
        if let Some(rate) = self.rate {
            write!(f, " rate={rate}")?;
        }
        match self.concurrency {
            Some(limit) => write!(f, " concurrency={limit}"),
            None => Ok(()),
        }
    }
}

fn checked_name(name: &str) -> Result<String, String> {
    let valid = |character: char| character.is_ascii_alphanumeric() || "._-@".contains(character);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(valid) {
        return Err(format!(
            "a name has 1 to {MAX_NAME} letters, digits, '.', '_', '-' and '@'"
        ));
    }
    Ok(name.to_owned())
}

/// The keys of a file. Empty lines and those that begin with `#` say nothing. At least one key must be there: a file that
/// was truncated on its way must not be taken for one that lets nobody in.
pub fn parse(text: &str) -> Result<Vec<KeyLine>, String> {
    let mut keys: Vec<KeyLine> = Vec::new();
    let (mut names, mut hashes) = (HashSet::new(), HashSet::new());
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let fault = |fault: String| format!("line {}: {fault}", number + 1);
        let key: KeyLine = line.parse().map_err(fault)?;
        if !names.insert(key.name.clone()) {
            return Err(fault(format!("the name {} is there twice", key.name)));
        }
        if !hashes.insert(key.hash) {
            return Err(fault(format!("{} has the key of another name", key.name)));
        }
        keys.push(key);
    }
    if keys.is_empty() {
        return Err("the file holds no keys".to_owned());
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_file_with_comments_and_limits_is_read() {
        let alice = KeyLine::of("alice", "secret").expect("a key");
        let text = format!(
            "# staff\n\n{alice} rate=10/s concurrency=4\n  bob@lab sha256:{} rate=3/h\n",
            "a".repeat(64)
        );
        let keys = parse(&text).expect("parses");
        assert_eq!((keys[0].name.as_str(), keys[0].hash), ("alice", hash("secret")));
        assert_eq!(keys[0].rate.expect("a rate").to_string(), "10/s");
        assert_eq!(keys[0].concurrency.map(NonZeroU32::get), Some(4));
        assert_eq!(keys[1].rate.expect("a rate").period, Duration::from_secs(3600));
        assert_eq!(keys[1].hash, [0xaa; 32]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_without_the_key() {
        let hash = "a".repeat(64);
        for (line, fault) in [
            ("alice sk-secret", "sha256:<hex>"),
            ("alice", "sha256:<hex>"),
            ("alice sha256:sk-secret", "64 hexadecimal"),
            (&format!("ali/ce sha256:{hash}"), "a name has"),
            (&format!("alice sha256:{hash} rate=0/s"), "10/s"),
            (&format!("alice sha256:{hash} rate=1/d"), "10/s"),
            (&format!("alice sha256:{hash} concurrency=0"), "at least 1"),
            (&format!("alice sha256:{hash} rate=1/s rate=2/s"), "each once"),
            (&format!("alice sha256:{hash} sk-secret"), "each once"),
            (&format!("a sha256:{hash}\na sha256:{hash}"), "twice"),
            (&format!("a sha256:{hash}\nb sha256:{hash}"), "key of another"),
        ] {
            let error = parse(&format!("# first\n{line}")).expect_err(line);
            assert!(error.contains(fault) && error.starts_with("line "), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(parse("# nobody\n").is_err());
    }

    proptest! {
        #[test]
        fn a_line_survives_being_written(
            name in "[a-zA-Z0-9._@-]{1,63}",
            key in "\\PC{0,40}",
            requests in 1u32..,
            unit in "[smh]",
            concurrency in prop::option::of(1u32..),
        ) {
            let mut line = KeyLine::of(&name, &key).expect("a name");
            line.rate = Some(format!("{requests}/{unit}").parse().expect("a rate"));
            line.concurrency = concurrency.and_then(NonZeroU32::new);
            prop_assert_eq!(line.to_string().parse::<KeyLine>(), Ok(line));
        }

        #[test]
        fn no_file_panics(text in "(\\PC|\n|sha256:|rate=|concurrency=){0,60}") {
            let _ = parse(&text);
        }
    }
}
