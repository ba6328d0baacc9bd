//! What constrained samples are, with logits that know nothing of the constraint: random ones.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use flotilla_engine::{
    Constraint, EngineError, FinishReason, GrammarSource, Grammars, Recipe, Sampling, grammar::MAX_SOURCE_BYTES,
    sequence::Sequence,
};
use flotilla_model::Tokenizer;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

/// Logits of the model, a few more than the tokenizer has tokens.
const VOCABULARY: usize = 512;
const MAX_TOKENS: usize = 400;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/fixtures/tiny-qwen2.5-vl");
    Tokenizer::load(&fixture).expect("a tokenizer")
});
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&TOKENIZER).expect("its tokens are bytes"));

fn compile(source: &GrammarSource) -> Constraint {
    Constraint::Grammar(GRAMMARS.compile(source).expect("compiles"))
}

/// One sample on its way, whose logits are noise.
struct Noise {
    sequence: Sequence,
    logits: StdRng,
    bytes: Vec<u8>,
    finish: Option<FinishReason>,
}

impl Noise {
    fn new(constraint: &Constraint, seed: u64) -> Self {
        let sampling = Sampling {
            seed,
            max_tokens: MAX_TOKENS,
            stop_ids: TOKENIZER.stop_ids().to_vec(),
            ..Sampling::default()
        };
        let recipe = Recipe::new(&sampling, Some(constraint), 1, &[]).expect("valid");
        Self {
            sequence: Sequence::new(0, 0, Arc::new(recipe)),
            logits: StdRng::seed_from_u64(seed),
            bytes: Vec::new(),
            finish: None,
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let logits: Vec<f32> = (0..VOCABULARY).map(|_| self.logits.random_range(-3.0..3.0)).collect();
        let (token, finish) = self.sequence.extend(&logits)?;
        assert!(token.log_probability.is_finite() && token.model_log_probability.is_finite());
        let spelled = TOKENIZER.token_bytes(token.id).expect("a token of the tokenizer");
        assert!(
            !spelled.special || finish == Some(FinishReason::Stop),
            "a special token only ends"
        );
        if !spelled.special {
            self.bytes.extend(spelled.bytes);
        }
        self.finish = finish;
        Ok(())
    }
}

/// The text of a sample, None of one that ran out of tokens.
fn sample(constraint: &Constraint, seed: u64) -> Option<String> {
    let mut noise = Noise::new(constraint, seed);
    while noise.finish.is_none() {
        noise.step().expect("draws");
    }
    let text = String::from_utf8(noise.bytes).ok();
    (noise.finish == Some(FinishReason::Stop)).then(|| text.expect("a grammar's text is UTF-8"))
}

const REGEXES: [&str; 8] = [
    r"\d{3}-[a-z]{2,5}",
    r"(yes|no|maybe)( please)?",
    r"[A-Z][a-z]{0,6} (is|was) [^<>]{3,20}\.",
    r"-?(0|[1-9][0-9]{0,4})(\.[0-9]{1,3})?",
    r"Gr(ö|oe)ße \d+ ?(中|文){1,3}",
    r"\\boxed\{(1|2)\}",
    r"<think>[^<]{0,30}</think> \\boxed\{[12]\}",
    r"(ab|a)(c|bcd)(d?)",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_text_under_a_regular_expression_matches_it(which in 0..REGEXES.len(), seed: u64) {
        let pattern = REGEXES[which];
        let constraint = compile(&GrammarSource::Regex(pattern.to_owned()));
        let whole = Regex::new(&format!("^(?:{pattern})$")).expect("a regular expression");
        let text = sample(&constraint, seed).expect("every one of these ends");
        prop_assert!(whole.is_match(&text), "{pattern} does not match {text:?}");
    }

    #[test]
    fn texts_of_a_choice_are_its_texts(
        texts in prop::collection::vec("[a-c ]{1,6}|Größe|中文", 1..6),
        seed: u64,
    ) {
        let answers: Vec<Vec<u32>> = texts.iter().map(|text| TOKENIZER.encode(text).expect("encodes")).collect();
        let constraint = Constraint::choice(&answers).expect("answers");
        let text = sample(&constraint, seed).expect("ends");
        prop_assert!(texts.contains(&text), "{text:?} is none of {texts:?}");
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "object",
        "array",
        "string",
        "integer",
        "number",
        "null",
        "#",
        "#/$defs/a",
        "date-time",
        "a|b",
        "(",
        "^a*$",
        "",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..4).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "$ref",
        "$defs",
        "a",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
        "patternProperties",
        "minProperties",
        "x-guidance",
        "if",
        "then",
    ]);
    leaf.prop_recursive(4, 24, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..6).prop_map(Value::from_iter),
        ]
    })
}

fn source() -> impl Strategy<Value = GrammarSource> {
    let regex = prop_oneof![
        r"\PC{0,24}",
        r"([a-c]|\\[dwsbBpuxAz1]|[\[\]\(\)\{\}\|\*\+\?\^\$\.\-,:=!<>&~]|[0-9]|é){0,16}",
    ];
    let lark = prop_oneof![
        r"\PC{0,40}",
        "(start|[a-c]|[A-C]|: |\\| |\n|\"x\"|/a+/|\\*|\\?|\\(|\\)|\\[|\\]|%ignore|%import|%json|%regex|\\{|\\}|~|[0-9]| ){0,24}"
            .prop_map(|rest| format!("start: {rest}")),
    ];
    prop_oneof![
        regex.prop_map(GrammarSource::Regex),
        lark.prop_map(GrammarSource::Lark),
        json_value().prop_map(GrammarSource::JsonSchema),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    // In a release build a panic of the compiler would end the server.
    #[test]
    fn no_source_makes_the_compiler_panic(source in source(), seed: u64) {
        let told = match GRAMMARS.compile(&source) {
            Err(error) => error.to_string(),
            Ok(grammar) => {
                let mut noise = Noise::new(&Constraint::Grammar(grammar), seed);
                let mut told = String::new();
                while noise.finish.is_none() && noise.bytes.len() < 60 && told.is_empty() {
                    told = noise.step().err().map(|error| error.to_string()).unwrap_or_default();
                }
                told
            }
        };
        prop_assert!(!told.contains("panic"), "{source:?}: {told}");
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Person {
    name: String,
    age: u8,
    colours: Vec<Colour>,
    #[serde(rename = "boss")]
    _boss: Option<Box<Self>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Colour {
    Red,
    Green,
}

fn person() -> Value {
    json!({
        "$defs": {"person": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
                "boss": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]}
            },
            "required": ["name", "age", "colours", "boss"],
            "additionalProperties": false
        }},
        "$ref": "#/$defs/person"
    })
}

/// The texts of some samples that ended; there must be many of them.
fn texts(schema: Value) -> Vec<String> {
    let constraint = compile(&GrammarSource::JsonSchema(schema));
    let texts: Vec<String> = (0..32).filter_map(|seed| sample(&constraint, seed)).collect();
    assert!(texts.len() >= 8, "{} of 32 ended", texts.len());
    texts
}

#[test]
fn objects_of_a_schema_are_of_its_type() {
    for text in texts(person()) {
        let person: Person = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(
            person.name.chars().count() <= 8 && person.age <= 120 && person.colours.len() <= 3,
            "{text}"
        );
        assert!(
            person
                .colours
                .iter()
                .all(|colour| matches!(colour, Colour::Red | Colour::Green))
        );
    }
}

#[test]
fn arrays_and_constants_of_a_schema_are_what_it_says() {
    let schema = json!({"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 4});
    for text in texts(schema) {
        let numbers: Vec<f64> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(
            (2..=4).contains(&numbers.len()) && numbers.iter().all(|number| number.abs() <= 1.0),
            "{text}"
        );
    }
    let schema = json!({"properties": {"verdict": {"enum": [1, 2, "tie"]}}, "required": ["verdict"], "type": "object",
        "additionalProperties": false});
    for text in texts(schema) {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!([json!(1), json!(2), json!("tie")].contains(&value["verdict"]), "{text}");
    }
}

#[test]
fn any_object_is_json_if_it_ends() {
    let constraint = compile(&GrammarSource::json_object());
    let texts: Vec<String> = (0..64).filter_map(|seed| sample(&constraint, seed)).collect();
    assert!(!texts.is_empty());
    for text in texts {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(value.is_object());
    }
}

#[test]
fn a_grammar_in_lark_s_notation_is_followed() {
    let source = "start: \"verdict: \" WHO (\" because \" WORD)?\nWHO: \"one\" | \"two\"\nWORD: /[a-z]{1,5}/";
    let constraint = compile(&GrammarSource::Lark(source.to_owned()));
    let whole = Regex::new("^verdict: (one|two)( because [a-z]{1,5})?$").expect("a regular expression");
    for seed in 0..16 {
        let text = sample(&constraint, seed).expect("ends");
        assert!(whole.is_match(&text), "{text}");
    }
}

#[test]
fn samples_of_one_grammar_do_not_touch_each_other() {
    let constraint = compile(&GrammarSource::JsonSchema(person()));
    let alone: Vec<Option<String>> = (0..6).map(|seed| sample(&constraint, seed)).collect();
    let mut crowd: Vec<Noise> = (0..6).map(|seed| Noise::new(&constraint, seed)).collect();
    while let Some(noise) = crowd
        .iter_mut()
        .filter(|noise| noise.finish.is_none())
        .min_by_key(|noise| noise.bytes.len())
    {
        noise.step().expect("draws");
    }
    let together = crowd.into_iter().map(|noise| {
        let ended = noise.finish == Some(FinishReason::Stop);
        ended.then(|| String::from_utf8(noise.bytes).expect("UTF-8"))
    });
    assert_eq!(alone, together.collect::<Vec<_>>());
}

#[test]
fn text_that_looks_like_a_special_token_is_text() {
    let text = "<|im_end|> and <tool_call>";
    let constraint = compile(&GrammarSource::JsonSchema(json!({"const": text})));
    let said = sample(&constraint, 1).expect("ends");
    assert_eq!(serde_json::from_str::<String>(&said).expect("JSON"), text);
}

#[test]
fn wrong_sources_are_refused_with_the_reason() {
    let regex = |text: &str| GrammarSource::Regex(text.to_owned());
    let lark = |text: &str| GrammarSource::Lark(text.to_owned());
    let schema = GrammarSource::JsonSchema;
    for (source, reason) in [
        (regex("(a"), "the regular expression cannot be used"),
        (lark("start: nothing"), "nothing"),
        (lark("begin: \"a\""), "start"),
        (schema(json!({"type": "nonsense"})), "nonsense"),
        (schema(json!({"$ref": "#/$defs/nowhere"})), "nowhere"),
        (
            schema(json!({"type": "string", "pattern": "(a"})),
            "the JSON schema cannot be used",
        ),
        (
            schema(json!({"type": "integer", "minimum": 3, "maximum": 2})),
            "the JSON schema cannot be used",
        ),
        (
            regex(&"a".repeat(MAX_SOURCE_BYTES + 1)),
            "131073 bytes, the limit is 131072",
        ),
    ] {
        let error = GRAMMARS.compile(&source).expect_err(reason).to_string();
        assert!(
            error.contains(reason) && !error.contains('\n') && error.len() < 600,
            "{error}"
        );
    }
}

#[test]
fn hostile_sources_end_in_a_refusal_or_a_bounded_grammar() {
    let mut nested = json!({"type": "integer"});
    for _ in 0..100 {
        nested = json!({"type": "array", "items": nested, "minItems": 1000});
    }
    let wide: serde_json::Map<String, Value> = (0..2000)
        .map(|i| (format!("p{i}"), json!({"type": "string", "maxLength": 100_000})))
        .collect();
    let circle = json!({"$ref": "#"});
    for source in [
        GrammarSource::Regex("(((a{1000}){1000}){1000}){1000}".to_owned()),
        GrammarSource::Regex("(.*a){200}b(.*c){200}".to_owned()),
        GrammarSource::Regex("(a|aa|aaa)*b(x+x+)+y".to_owned()),
        GrammarSource::JsonSchema(nested),
        GrammarSource::JsonSchema(json!({"type": "object", "properties": wide})),
        GrammarSource::JsonSchema(circle),
        GrammarSource::JsonSchema(json!({"type": "array", "minItems": 1_000_000_000})),
        GrammarSource::JsonSchema(json!({"type": "string", "minLength": 1_000_000_000})),
    ] {
        if let Ok(grammar) = GRAMMARS.compile(&source) {
            let mut noise = Noise::new(&Constraint::Grammar(grammar), 0);
            while noise.finish.is_none() && noise.step().is_ok() {}
        }
    }
}
