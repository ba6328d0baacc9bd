//! Which of the library's candidates was the fastest for a product, remembered between processes.
//!
//! Where it is remembered, processes on equal cards compute every product in the same way, to the last bit, and none of them
//! times it again.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{self, Write},
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
    /// file that cannot be written.
    fn open(file: &Path) -> Self {
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut known = HashMap::new();
        for (product, number) in text.lines().filter_map(|line| line.rsplit_once(SEPARATOR)) {
            if let Ok(number) = number.parse() {
                known.entry(product.to_owned()).or_insert(number);
            }
        }
        let file = append(file, "").is_ok().then(|| file.to_owned());
        Self { file, known }
    }

    /// Whether choices outlive the process.
    pub fn are_kept(&self) -> bool {
        self.file.is_some()
    }

    /// The candidate that was chosen for a product.
    pub fn get(&self, product: &str) -> Option<usize> {
        self.known.get(product).copied()
    }

    /// Remembers the candidate of a product, and gives back the one that is taken from now on: the library's first where the
    /// file cannot be written any more, since no other process would learn of this one.
    pub fn put(&mut self, product: String, number: usize) -> usize {
        let line = format!("{product}{SEPARATOR}{number}\n");
        let written = self.file.as_ref().map(|file| append(file, &line).is_ok());
        if written == Some(false) {
            self.file = None;
        }
        let taken = if written == Some(false) { 0 } else { number };
        self.known.insert(product, taken);
        taken
    }
}

fn append(file: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(file)?;
    file.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

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
