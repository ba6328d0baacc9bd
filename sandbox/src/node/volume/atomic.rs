//! Writing a volume's files so that a reader sees all old or all new ones, in the kubelet's layout: a directory of its
//! own for each version, the link `..data` to the present one, and a link for each top entry through `..data`.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use sha2::{Digest, Sha256};

use super::Payload;

const DATA: &str = "..data";

/// Makes `dir` hold exactly the files of `payload`; does nothing when it does already.
pub fn write(dir: &Path, payload: &Payload) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let version = format!("..{}", digest(payload));
    let before = fs::read_link(dir.join(DATA)).ok();
    if before.as_deref() == Some(Path::new(&version)) {
        return Ok(());
    }
    let target = dir.join(&version);
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    fs::create_dir(&target)?;
    for (path, (bytes, mode)) in payload {
        let file = target.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&file, bytes)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(*mode))?;
    }
    let link = dir.join("..data_tmp");
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&version, &link)?;
    fs::rename(&link, dir.join(DATA))?;
    link_entries(dir, payload)?;
    if let Some(old) = before {
        fs::remove_dir_all(dir.join(old))?;
    }
    Ok(())
}

fn link_entries(dir: &Path, payload: &Payload) -> io::Result<()> {
    let tops: std::collections::BTreeSet<_> = payload
        .keys()
        .filter_map(|path| path.components().next())
        .map(|part| part.as_os_str().to_owned())
        .collect();
    for top in &tops {
        if fs::symlink_metadata(dir.join(top)).is_err() {
            symlink(Path::new(DATA).join(top), dir.join(top))?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if !name.as_encoded_bytes().starts_with(b"..") && !tops.contains(&name) {
            fs::remove_file(dir.join(&name))?;
        }
    }
    Ok(())
}

fn digest(payload: &Payload) -> String {
    let mut hash = Sha256::new();
    for (path, (bytes, mode)) in payload {
        let path = path.as_os_str().as_encoded_bytes();
        hash.update(path.len().to_le_bytes());
        hash.update(path);
        hash.update(mode.to_le_bytes());
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    }
    hex::encode(&hash.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, text)| (PathBuf::from(path), (text.as_bytes().to_vec(), 0o600)))
            .collect()
    }

    #[test]
    fn files_are_there_with_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &payload(&[("a", "1"), ("d/b", "2")])).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.path().join("d/b")).unwrap(), "2");
        let mode = fs::metadata(dir.path().join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_change_replaces_adds_and_removes_files() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &payload(&[("a", "1"), ("b", "2")])).unwrap();
        write(dir.path(), &payload(&[("a", "3"), ("c", "4")])).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert_eq!(fs::read_to_string(dir.path().join("c")).unwrap(), "4");
        assert!(!dir.path().join("b").exists());
        let versions = fs::read_dir(dir.path())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_type().unwrap().is_dir());
        assert_eq!(versions.count(), 1);
    }
}
