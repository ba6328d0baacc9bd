//! Which of the library's candidates was the fastest for a product, remembered between processes.
//!
//! Where it is remembered, processes on equal cards compute every product in the same way, to the last bit, and none of them
//! times it again.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use super::kept;

/// Between what a product is and the number of its candidate.
const SEPARATOR: &str = " = ";

/// Candidates by products, one a line of a file.
#[derive(Debug, Default)]
pub(super) struct Choices {
    file: Option<PathBuf>,
    known: HashMap<String, usize>,
}

impl Choices {
    /// Those of this kind of card and version of the library, in the folder of compiled kernels; nothing is remembered where
    /// there is none.
    pub fn of_card(name: &str, version: usize) -> Self {
        let card = name
            .chars()
            .map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' });
        let file = format!("products-{}-{version}.txt", card.collect::<String>());
        kept::folder().map_or_else(Self::default, |folder| Self::open(&folder.join(file)))
    }

    /// Reads a file; lines that are none of ours are passed over, and of two for a product the first counts. Nothing is kept in a
    /// file that cannot be read or written.
    fn open(file: &Path) -> Self {
        let known = File::options().append(true).create(true).read(true).open(file);
        match known.and_then(|mut file| parsed(&mut file)) {
            Ok((known, _)) => Self {
                file: Some(file.to_owned()),
                known,
            },
            Err(_) => Self::default(),
        }
    }

    /// Whether choices outlive the process.
    pub fn are_kept(&self) -> bool {
        self.file.is_some()
    }

    /// The candidate that was chosen for a product.
    pub fn get(&self, product: &str) -> Option<usize> {
        self.known.get(product).copied()
    }

    /// Remembers the candidate of a product, and gives back the one that is taken from now on: that of another process which
    /// was first, or the library's first where the file cannot be written any more, since no other process would learn of this
    /// one.
    pub fn put(&mut self, product: String, number: usize) -> usize {
        let taken = match &self.file {
            None => number,
            Some(file) => agreed(file, &product, number).unwrap_or_else(|_| {
                self.file = None;
                0
            }),
        };
        self.known.insert(product, taken);
        taken
    }
}

/// Candidates by products, and whether the last line is whole.
fn parsed(file: &mut File) -> io::Result<(HashMap<String, usize>, bool)> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut known = HashMap::new();
    for (product, number) in text.lines().filter_map(|line| line.rsplit_once(SEPARATOR)) {
        if let Ok(number) = number.parse() {
            known.entry(product.to_owned()).or_insert(number);
        }
    }
    Ok((known, text.is_empty() || text.ends_with('\n')))
}

/// What all processes take that share the file: the number that stands there, else this one, which then does.
fn agreed(path: &Path, product: &str, number: usize) -> io::Result<usize> {
    let mut file = File::options().append(true).read(true).open(path)?;
    // Let go of with the file.
    file.lock()?;
    let (known, is_whole) = parsed(&mut file)?;
    if let Some(number) = known.get(product) {
        return Ok(*number);
    }
    // After a line that was cut off.
    let start = if is_whole { "" } else { "\n" };
    file.write_all(format!("{start}{product}{SEPARATOR}{number}\n").as_bytes())?;
    file.sync_data()?;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn of_two_processes_that_choose_at_once_the_first_is_followed() {
        let folder = std::env::temp_dir().join(format!("choices-two-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("products.txt");
        let (mut one, mut other) = (Choices::open(&file), Choices::open(&file));
        assert_eq!(one.put("8x8x8".to_owned(), 3), 3);
        assert_eq!(other.put("8x8x8".to_owned(), 5), 3);
        assert_eq!(other.get("8x8x8"), Some(3));
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_line_that_was_cut_off_swallows_none_after_it() {
        let folder = std::env::temp_dir().join(format!("choices-torn-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("products.txt");
        fs::write(&file, b"8x8x8 = 3\n16x8x").expect("written");
        Choices::open(&file).put("4x4x4".to_owned(), 2);
        let again = Choices::open(&file);
        assert_eq!((again.get("8x8x8"), again.get("4x4x4")), (Some(3), Some(2)));
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn the_first_choice_for_a_product_is_remembered_and_broken_lines_are_passed_over() {
        let folder = std::env::temp_dir().join(format!("choices-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("products.txt");
        let mut choices = Choices::open(&file);
        assert!(choices.are_kept() && choices.get("8x8x8").is_none());
        choices.put("8x8x8".to_owned(), 3);
        choices.put("16x8x8 bias".to_owned(), 0);
        fs::write(
            &file,
            fs::read_to_string(&file).expect("text") + "8x8x8 = 5\nhalf a li\n4x4x4 = many\n",
        )
        .expect("written");
        let mut again = Choices::open(&file);
        assert_eq!((again.get("8x8x8"), again.get("16x8x8 bias")), (Some(3), Some(0)));
        assert_eq!(again.get("4x4x4"), None);
        fs::remove_dir_all(&folder).expect("removed");
        assert_eq!(again.put("2x2x2".to_owned(), 4), 0, "no other process would know");
        assert!(!again.are_kept());
    }

    #[test]
    fn a_file_that_cannot_be_written_keeps_nothing() {
        let nowhere = std::env::temp_dir().join(format!("no-folder-{}", std::process::id()));
        assert!(!Choices::open(&nowhere.join("products.txt")).are_kept());
    }

    #[test]
    fn without_a_folder_choices_end_with_the_process() {
        let mut choices = Choices::default();
        choices.put("8x8x8".to_owned(), 1);
        assert_eq!(choices.get("8x8x8"), Some(1));
        assert!(!choices.are_kept());
    }
}
