//! A file of a source, and how what was received is compared with what was announced.

use std::{fs::File, io::Read, path::Path};

use bytes::Bytes;
use futures::stream::BoxStream;
use sha1::{Digest as _, Sha1};

use super::error::{RemoteError, io};
use crate::digest::file_sha256;

/// A file of a source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct RemoteFile {
    /// Path below the model's directory.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Digest, where the source tells one.
    pub digest: Option<Digest>,
    /// What identifies this version of the file to the source.
    pub tag: Option<String>,
}

/// A digest that a source tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Digest {
    /// Hex SHA-256 of the bytes.
    Sha256(String),
    /// Hex SHA-1 of git's blob, that is of `blob <size>\0` and the bytes.
    GitBlob(String),
}

/// Bytes of a file from some place on.
pub(super) struct Reading {
    /// The place: the one asked for, or 0 where the source does not begin inside a file.
    pub begin: u64,
    /// The bytes.
    pub stream: BoxStream<'static, Result<Bytes, RemoteError>>,
}

impl Digest {
    /// What an entity tag means by its form; None for one that is no digest of the bytes.
    pub fn of_tag(tag: &str) -> Option<Self> {
        let text = tag.trim_start_matches("W/").trim_matches('"');
        let is_hex = text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match text.len() {
            64 if is_hex => Some(Self::Sha256(text.to_owned())),
            40 if is_hex => Some(Self::GitBlob(text.to_owned())),
            _ => None,
        }
    }

    /// The digest of the same kind of a file on disk.
    pub fn of_file(&self, path: &Path) -> Result<Self, RemoteError> {
        match self {
            Self::Sha256(_) => match file_sha256(path) {
                Ok((hex, _)) => Ok(Self::Sha256(hex)),
                Err(error) => Err(io("read", path)(std::io::Error::other(error))),
            },
            Self::GitBlob(_) => git_blob(path).map(Self::GitBlob).map_err(io("read", path)),
        }
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "sha256 {hex}"),
            Self::GitBlob(hex) => write!(f, "git blob {hex}"),
        }
    }
}

fn git_blob(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", file.metadata()?.len()));
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            read => hasher.update(&block[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_a_digest_by_its_form() {
        let sha256 = "a".repeat(64);
        assert_eq!(Digest::of_tag(&format!("\"{sha256}\"")), Some(Digest::Sha256(sha256)));
        let git = "0".repeat(40);
        assert_eq!(Digest::of_tag(&format!("W/\"{git}\"")), Some(Digest::GitBlob(git)));
        for tag in ["\"abc\"", "", &"g".repeat(64), "\"d41d8cd98f00b204e9800998ecf8427e-3\""] {
            assert_eq!(Digest::of_tag(tag), None);
        }
    }

    #[test]
    fn a_blob_has_the_digest_that_git_gives_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        std::fs::write(&path, "hello\n").expect("writes");
        let announced = Digest::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".to_owned());
        assert_eq!(announced.of_file(&path).expect("reads"), announced);
    }
}
