//! Ids to text, piece by piece: whole characters only, and nothing of a stop string.

use flotilla_model::Tokenizer;

/// What one token added.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Piece {
    /// Text that is certain by now.
    pub text: String,
    /// A stop string was met; the text ends before it.
    pub stopped: bool,
}

/// Turns the ids of one sample into text as they come.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character whose other bytes have not come yet.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// The text that an id adds; empty while a character is incomplete. Special tokens add none, and bytes that are no UTF-8
    /// become U+FFFD.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> String {
        match tokenizer.token_bytes(id) {
            Some(token) if !token.special => self.push_bytes(&token.bytes),
            _ => String::new(),
        }
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let complete = complete_len(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// What is left at the end, an incomplete character as U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Bytes before a character that lacks its end; all if there is none.
fn complete_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(_) => return bytes.len(),
            Err(error) => {
                at += error.valid_up_to();
                match error.error_len() {
                    Some(wrong) => at += wrong,
                    None => return at,
                }
            }
        }
    }
}

/// Looks for stop strings in text that comes in pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// For these strings, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        let held = String::new();
        Self { stops, held }
    }

    /// Hands out what cannot belong to a stop string any more.
    pub fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(end) = found {
            self.held.truncate(end);
            let text = std::mem::take(&mut self.held);
            return Piece { text, stopped: true };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        let text = std::mem::replace(&mut self.held, rest);
        Piece { text, stopped: false }
    }

    /// What was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` with which `stop` begins.
fn overlap(text: &str, stop: &str) -> usize {
    (1..=text.len().min(stop.len()))
        .rev()
        .find(|length| stop.is_char_boundary(*length) && text.ends_with(&stop[..*length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let piece = matcher.push(piece);
            text.push_str(&piece.text);
            if piece.stopped {
                return (text, true);
            }
        }
        text.push_str(&matcher.finish());
        (text, false)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        assert_eq!(feed(&["END"], &["abE", "N", "Dcd"]), ("ab".to_owned(), true));
        assert_eq!(feed(&["END", "b"], &["abE", "N", "Dcd"]), ("a".to_owned(), true));
    }

    #[test]
    fn a_beginning_that_is_no_stop_string_is_handed_out() {
        assert_eq!(feed(&["END"], &["abEN", "x"]), ("abENx".to_owned(), false));
        assert_eq!(feed(&["END"], &["abEN"]), ("abEN".to_owned(), false));
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        assert_eq!(StopMatcher::default().push("é").text, "é");
    }

    proptest! {
        #[test]
        fn bytes_in_pieces_give_the_text_of_the_whole(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..24),
                "[a-zé中\\u{1F600}]{0,8}".prop_map(String::into_bytes),
            ],
            cuts in prop::collection::vec(0usize..24, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut detokenizer = Detokenizer::default();
            let mut text = String::new();
            for pair in cuts.windows(2) {
                text.push_str(&detokenizer.push_bytes(&bytes[pair[0]..pair[1]]));
                prop_assert!(detokenizer.pending.len() < 4, "a character has at most four bytes");
            }
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn pieces_give_what_the_whole_gives(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,3}", 0..3),
            cuts in prop::collection::vec(0usize..60, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
            cuts.extend([0, text.len()]);
            cuts.retain(|cut| *cut <= text.len());
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let end = stops.iter().filter_map(|stop| text.find(stop)).min();
            let (got, stopped) = feed(&stops, &pieces);
            // In pieces a longer stop string may complete after a shorter one that begins later: both end the text, and
            // nothing past the first complete one is ever handed out.
            match end {
                Some(end) => prop_assert!(stopped && got.len() >= end && text.starts_with(&got)),
                None => prop_assert_eq!(got, text),
            }
        }
    }
}
