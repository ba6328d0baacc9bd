//! JSON schemas, regular expressions and grammars, compiled for a tokenizer.

use std::sync::{Arc, Mutex, PoisonError};

use flotilla_model::Tokenizer;
use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::InferenceCapabilities,
};
use serde_json::{Value, json};
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::error::EngineError;

/// Bytes of the longest source that is compiled.
pub const MAX_SOURCE_BYTES: usize = 128 << 10;
/// White space that a JSON text may have between two of its tokens. Unbounded, an unsure model writes nothing else.
const JSON_BLANK: &str = r"[ \n\r\t]{1,20}";

/// What a text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSource {
    /// JSON that a JSON schema describes.
    JsonSchema(Value),
    /// Whole text of a regular expression.
    Regex(String),
    /// Text of a grammar in Lark's notation, as llguidance reads it.
    Lark(String),
}

impl GrammarSource {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    fn size(&self) -> usize {
        match self {
            Self::JsonSchema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
        }
    }

    fn noun(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
        }
    }

    fn top_level(&self) -> TopLevelGrammar {
        match self {
            Self::JsonSchema(schema) => {
                let mut schema = schema.clone();
                if let Some(object) = schema.as_object_mut() {
                    // What a client may say there changes how, not what, is compiled: it is not passed on.
                    object.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_BLANK}));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        }
    }
}

/// Compiles grammars for one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammars(..)")
    }
}

impl Grammars {
    /// Lays the bytes of all tokens into a trie. For a vocabulary of 150 000 that takes a good part of a second: once for a
    /// tokenizer.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, EngineError> {
        let refused = |reason: &dyn std::fmt::Display| {
            EngineError::InvalidRequest(format!("this model's tokenizer takes no constraints: {reason}"))
        };
        let vocabulary = Vocabulary::new(tokenizer).map_err(|reason| refused(&reason))?;
        let environment: TokEnv = Arc::new(vocabulary);
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| refused(&error))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// Compiles a source. Sources that are wrong, too long or too costly are refused with the reason. Blocks for some
    /// milliseconds; the work is bounded by steps and not by time.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, EngineError> {
        let (noun, size) = (source.noun(), source.size());
        if size > MAX_SOURCE_BYTES {
            let fault = format!("the {noun} has {size} bytes, the limit is {MAX_SOURCE_BYTES}");
            return Err(EngineError::InvalidRequest(fault));
        }
        let refused =
            |reason: &str| EngineError::InvalidRequest(format!("the {noun} cannot be used: {}", first_line(reason)));
        let matcher = Matcher::new(self.factory.create_parser(source.top_level()));
        if let Some(reason) = matcher.get_error() {
            return Err(refused(&reason));
        }
        // The first mask shows whether there is any text at all.
        let first = matcher.clone().compute_mask();
        first.map_err(|error| refused(&error.to_string()))?;
        Ok(Grammar(Arc::new(Mutex::new(matcher))))
    }
}

/// A compiled grammar. Cloning shares it, and samples share what they find out about it.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar(..)")
    }
}

/// How far one sample has come in a grammar.
#[derive(Clone)]
pub struct Matching(Matcher);

impl std::fmt::Debug for Matching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Matching").field(&self.0.stop_reason()).finish()
    }
}

impl Matching {
    /// Before the first token.
    pub fn new(grammar: &Grammar) -> Self {
        let matcher = grammar.0.lock().unwrap_or_else(PoisonError::into_inner);
        Self(matcher.clone())
    }

    /// Makes tokens that cannot come next impossible in logits `[vocabulary]`; ids that the tokenizer does not have are among
    /// them. Fails where the grammar is too complex to say.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| too_complex(&error))?;
        let words = mask.as_slice().iter().copied().chain(std::iter::repeat(0));
        for (word, logits) in words.zip(logits.chunks_mut(u32::BITS as usize)) {
            match word {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes a token that the mask left.
    pub fn push(&mut self, id: u32) -> Result<(), EngineError> {
        self.0.consume_token(id).map_err(|error| too_complex(&error))
    }

    /// Whether nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.0.is_stopped()
    }
}

fn too_complex(error: &impl std::fmt::Display) -> EngineError {
    let reason = error.to_string();
    EngineError::InvalidRequest(format!("the grammar cannot be followed: {}", first_line(&reason)))
}

/// What people need of a compiler's message: neither its state nor a backtrace.
fn first_line(reason: &str) -> &str {
    reason.lines().next().unwrap_or_default()
}

/// The tokens of a tokenizer as bytes, and how it cuts a text that is certain into tokens.
struct Vocabulary {
    tokenizer: Tokenizer,
    trie: TokTrie,
}

impl Vocabulary {
    fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        if !tokenizer.is_byte_level() {
            return Err("its tokens are not sequences of bytes".to_owned());
        }
        let words = (0..tokenizer.id_limit()).map(|id| match tokenizer.token_bytes(id) {
            Some(token) if token.special => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.bytes.as_slice()].concat(),
            Some(token) => token.bytes,
            None => Vec::new(),
        });
        let words: Vec<Vec<u8>> = words.collect();
        let stops = tokenizer.stop_ids().iter().copied();
        let stops: Vec<u32> = stops.filter(|id| (*id as usize) < words.len()).collect();
        let Some(first) = stops.first() else {
            return Err("it has no token that ends a completion".to_owned());
        };
        let info = TokRxInfo::new(tokenizer.id_limit(), *first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&stops);
        Ok(Self {
            tokenizer: tokenizer.clone(),
            trie,
        })
    }

    /// The tokenizer's own cut, unless it changes the text (by normalizing it, or by reading a special token in it).
    fn encode(&self, text: &str) -> Vec<TokenId> {
        let ids = self.tokenizer.encode(text).unwrap_or_default();
        if self.trie.decode_raw(&ids) == text.as_bytes() {
            ids
        } else {
            self.trie.greedy_tokenize(text.as_bytes())
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }
}
