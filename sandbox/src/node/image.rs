//! Image names and the local binaries that stand for them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The map from image names to binaries.
///
/// An image is looked up by its full name, then without tag and digest, then by the last part of its path alone:
/// `ghcr.io/x/flotilla-worker:v1` finds `flotilla-worker`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    binaries: BTreeMap<String, PathBuf>,
}

impl Images {
    /// Takes absolute paths of executables by image name.
    pub fn new(binaries: BTreeMap<String, PathBuf>) -> Self {
        Self { binaries }
    }

    /// The binary of `image`.
    pub fn resolve(&self, image: &str) -> Option<&Path> {
        let repository = repository(image);
        let short = repository.rsplit('/').next().unwrap_or(repository);
        [image, repository, short]
            .into_iter()
            .find_map(|name| self.binaries.get(name))
            .map(PathBuf::as_path)
    }
}

/// The name without tag and digest.
fn repository(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

/// The program and arguments of a container: `command` replaces the image's binary, but a first word that names the
/// binary's own file stands for it wherever the image would have it.
pub fn command_line(binary: &Path, command: &[String], args: &[String]) -> (PathBuf, Vec<String>) {
    let Some((first, rest)) = command.split_first() else {
        return (binary.to_owned(), args.to_vec());
    };
    let program = if Path::new(first).file_name() == binary.file_name() {
        binary.to_owned()
    } else {
        PathBuf::from(first)
    };
    (program, rest.iter().chain(args).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_digest_and_registry_do_not_matter_unless_they_are_in_the_map() {
        let images = Images::new(BTreeMap::from([
            ("worker".to_owned(), PathBuf::from("/w")),
            ("worker:special".to_owned(), PathBuf::from("/s")),
        ]));
        for image in [
            "worker",
            "worker:v1",
            "localhost:5000/a/worker:v1",
            "x/worker@sha256:00",
        ] {
            assert_eq!(images.resolve(image), Some(Path::new("/w")), "{image}");
        }
        assert_eq!(images.resolve("worker:special"), Some(Path::new("/s")));
        assert_eq!(images.resolve("localhost:5000/other"), None);
    }

    #[test]
    fn a_command_replaces_the_binary_unless_it_names_it() {
        let words = |list: &[&str]| -> Vec<String> { list.iter().map(|word| (*word).to_owned()).collect() };
        let binary = Path::new("/target/worker");
        assert_eq!(
            command_line(binary, &[], &words(&["run"])),
            (binary.to_owned(), words(&["run"]))
        );
        assert_eq!(
            command_line(binary, &words(&["/usr/bin/worker", "run"]), &words(&["-x"])),
            (binary.to_owned(), words(&["run", "-x"]))
        );
        assert_eq!(
            command_line(binary, &words(&["sh", "-c"]), &words(&["true"])),
            (PathBuf::from("sh"), words(&["-c", "true"]))
        );
    }
}
