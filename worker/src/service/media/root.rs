//! `file://` URLs below the one directory that the server's owner names.

use std::{
    fs::File,
    io::Read as _,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use reqwest::Url;

use super::LIMITS;

/// A directory whose files clients may have read, but nothing outside of it.
#[derive(Clone, Debug)]
pub struct MediaRoot(PathBuf);

impl MediaRoot {
    /// The directory, with its own links resolved.
    pub fn open(directory: &Path) -> std::io::Result<Self> {
        let root = directory.canonicalize()?;
        if root.is_dir() {
            Ok(Self(root))
        } else {
            Err(std::io::Error::other("not a directory"))
        }
    }

    /// Reads the file of a `file://` URL. Blocks.
    pub fn read(&self, url: &Url) -> Result<Vec<u8>, String> {
        // One message for what is outside and what is not there: nobody learns which files exist elsewhere.
        let missing = || "the file:// URL names no file below the media root of this server".to_owned();
        let path = url.to_file_path().map_err(|()| missing())?;
        let path = path.canonicalize().map_err(|_| missing())?;
        if !path.starts_with(&self.0) || !path.is_file() {
            return Err(missing());
        }
        let file = File::open(&path).map_err(|_| missing())?;
        if !self.contains(&file) {
            return Err(missing());
        }
        let limit = LIMITS.bytes as u64;
        let mut bytes = Vec::new();
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| format!("the file cannot be read: {error}"))?;
        if bytes.len() as u64 > limit {
            return Err(format!("the image has more than {limit} bytes"));
        }
        Ok(bytes)
    }

    /// Whether what was opened lies inside: a link may have been put in its way after the path was checked. Where the kernel
    /// does not tell, the check of the path has to do.
    fn contains(&self, file: &File) -> bool {
        let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        opened.map_or(true, |opened| opened.starts_with(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(root: &Path, path: &str) -> Result<Vec<u8>, String> {
        let url = Url::parse(&format!("file://{path}")).expect("a URL");
        MediaRoot::open(root).expect("a directory").read(&url)
    }

    #[test]
    fn a_file_below_the_root_is_read() {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(root.path().join("a b")).expect("creates");
        std::fs::write(root.path().join("a b/c.png"), b"x").expect("writes");
        let path = format!("{}/a%20b/c.png", root.path().display());
        assert_eq!(read(root.path(), &path).expect("reads"), b"x");
    }

    #[test]
    fn nothing_outside_is_read_by_dots_links_or_other_hosts() {
        let (root, outside) = (
            tempfile::tempdir().expect("a directory"),
            tempfile::tempdir().expect("a directory"),
        );
        let secret = outside.path().join("secret");
        std::fs::write(&secret, b"x").expect("writes");
        std::os::unix::fs::symlink(&secret, root.path().join("link")).expect("a link");
        std::os::unix::fs::symlink(outside.path(), root.path().join("folder")).expect("a link");
        let (root_path, secret) = (root.path().display(), secret.display());
        for path in [
            secret.to_string(),
            format!("{root_path}/link"),
            format!("{root_path}/folder/secret"),
            format!("{root_path}/../{secret}"),
            format!("{root_path}/%2e%2e/{secret}"),
            format!("host{root_path}/link"),
            format!("{root_path}"),
            format!("{root_path}/none"),
            "/dev/zero".to_owned(),
            "/%00".to_owned(),
        ] {
            assert!(read(root.path(), &path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_root_that_is_a_link_holds_what_it_points_to() {
        let (real, other) = (
            tempfile::tempdir().expect("a directory"),
            tempfile::tempdir().expect("a directory"),
        );
        std::fs::write(real.path().join("a.png"), b"x").expect("writes");
        let link = other.path().join("root");
        std::os::unix::fs::symlink(real.path(), &link).expect("a link");
        assert!(read(&link, &format!("{}/a.png", link.display())).is_ok());
    }
}
