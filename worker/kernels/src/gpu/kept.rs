//! The folder of what is kept between processes: compiled kernels, and which way of a product was the fastest.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Names it; unset or empty: nothing is kept.
const VARIABLE: &str = "FLOTILLA_KERNEL_CACHE";

/// The folder that `FLOTILLA_KERNEL_CACHE` names, made for its owner alone if it is not there. None where none is named or it
/// cannot be made.
pub(super) fn folder() -> Option<PathBuf> {
    let named = env::var_os(VARIABLE).map(PathBuf::from);
    let folder = named.filter(|folder| !folder.as_os_str().is_empty())?;
    made(&folder).ok().map(|()| folder)
}

fn made(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_is_made_and_one_that_is_stays() {
        let folder = env::temp_dir()
            .join(format!("kept-{}", std::process::id()))
            .join("inner");
        made(&folder).expect("made");
        fs::write(folder.join("kernel.cubin"), "code").expect("written");
        made(&folder).expect("there already");
        assert!(folder.join("kernel.cubin").is_file());
        fs::remove_dir_all(folder.parent().expect("outer")).expect("removed");
    }
}
