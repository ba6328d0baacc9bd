//! Texts with `{name}` placeholders, by the rules of Python's `str.format`: `{{` and `}}` are braces. Many published
//! prompts are in this form.

/// A piece of such a text.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Piece {
    Text(String),
    Name(String),
}

/// A text with placeholders.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Placeholders(Vec<Piece>);

/// Why a text has no readable placeholders.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PlaceholderError {
    /// A brace that opens nothing or closes nothing.
    #[error("line {line}: a single {brace} is neither a placeholder nor a brace; write {brace}{brace} for a brace")]
    Single {
        /// Where.
        line: usize,
        /// Which.
        brace: char,
    },
    /// What stands between braces is no name.
    #[error(
        "line {line}: {{{name}}} is no placeholder, which are names such as {{question}}; write {{{{{name}}}}} for text in \
         braces"
    )]
    Name {
        /// Where.
        line: usize,
        /// What stands there.
        name: String,
    },
}

impl Placeholders {
    /// Reads a text.
    pub fn parse(text: &str) -> Result<Self, PlaceholderError> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut line = 1;
        let mut rest = text.chars();
        while let Some(character) = rest.next() {
            let doubled = rest.as_str().starts_with(character);
            match character {
                '{' | '}' if doubled => {
                    rest.next();
                    literal.push(character);
                }
                '{' => {
                    let Some((name, after)) = rest.as_str().split_once('}') else {
                        return Err(PlaceholderError::Single { line, brace: '{' });
                    };
                    if !is_name(name) {
                        let name = name.chars().take(40).collect();
                        return Err(PlaceholderError::Name { line, name });
                    }
                    pieces.push(Piece::Text(std::mem::take(&mut literal)));
                    pieces.push(Piece::Name(name.to_owned()));
                    rest = after.chars();
                }
                '}' => return Err(PlaceholderError::Single { line, brace: '}' }),
                _ => {
                    line += usize::from(character == '\n');
                    literal.push(character);
                }
            }
        }
        pieces.push(Piece::Text(literal));
        Ok(Self(pieces))
    }

    /// The names, each as often as it stands there.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|piece| match piece {
            Piece::Name(name) => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// The text with values in the places of their names; the name that has none, if there is one.
    pub fn fill(&self, value: impl Fn(&str) -> Option<String>) -> Result<String, &str> {
        let mut filled = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => filled.push_str(text),
                Piece::Name(name) => filled.push_str(&value(name).ok_or(name.as_str())?),
            }
        }
        Ok(filled)
    }
}

fn is_name(text: &str) -> bool {
    let mut characters = text.chars();
    characters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|character| character.is_ascii_alphanumeric() || character == '_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(text: &str) -> Result<String, String> {
        let placeholders = Placeholders::parse(text).map_err(|error| error.to_string())?;
        let value = |name: &str| (name == "a1").then(|| "{x}".to_owned());
        placeholders.fill(value).map_err(str::to_owned)
    }

    #[test]
    fn names_are_filled_and_doubled_braces_are_braces() {
        assert_eq!(fill("A: {a1}\n\\boxed{{}}").as_deref(), Ok("A: {x}\n\\boxed{}"));
        assert_eq!(fill("{a2}"), Err("a2".to_owned()));
    }

    #[test]
    fn what_python_would_refuse_is_refused_with_its_line() {
        for (text, reason) in [
            ("\n\\boxed{}", "line 2: {} is no placeholder"),
            ("{0}", "{0} is no placeholder"),
            ("{a1!r}", "{a1!r} is no placeholder"),
            ("x {", "line 1: a single {"),
            ("x }", "line 1: a single }"),
        ] {
            let error = fill(text).expect_err(reason);
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest! {
        #[test]
        fn text_with_doubled_braces_comes_out_as_it_was(text in "[a-z{} \\n]{0,40}") {
            let doubled = text.replace('{', "{{").replace('}', "}}");
            prop_assert_eq!(fill(&doubled), Ok(text));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = fill(&text);
        }
    }
}
