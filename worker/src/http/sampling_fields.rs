//! How tokens are drawn, as the bodies of chat and completions say it.

use std::collections::BTreeMap;

use flotilla_engine::{GrammarSource, Sampling};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::service::wanted::{Form, Shape, Wanted};

/// Completions of one request.
pub const MAX_N: usize = 128;
/// Stop strings of one request, as OpenAI has it.
const MAX_STOPS: usize = 4;
/// Bytes of a stop string.
const MAX_STOP_BYTES: usize = 1024;
/// Stop tokens, and tokens with a bias, of one request.
const MAX_IDS: usize = 1024;
/// Texts of a choice.
const MAX_CHOICES: usize = 1024;
/// Bytes of all texts of a choice.
const MAX_CHOICE_BYTES: usize = 128 << 10;

/// Fields that change the answer of other servers and are not supported here, with the values that ask for nothing else than
/// what is done anyway.
const REFUSED: [(&str, &[&str]); 28] = [
    ("tools", &["[]"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("audio", &[]),
    ("modalities", &["[]", "[\"text\"]"]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("best_of", &["1"]),
    ("suffix", &["\"\""]),
    ("echo", &["false"]),
    ("bad_words", &["[]"]),
    ("allowed_token_ids", &[]),
    ("logits_processors", &["[]"]),
    ("use_beam_search", &["false"]),
    ("length_penalty", &["1", "1.0"]),
    ("prompt_logprobs", &[]),
    ("truncate_prompt_tokens", &[]),
    ("include_stop_str_in_output", &["false"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("add_generation_prompt", &["true"]),
    ("continue_final_message", &["false"]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &["{}"]),
    ("documents", &["[]"]),
    ("prompt_embeds", &[]),
    ("guided_whitespace_pattern", &[]),
];

/// How tokens are drawn. Everything may be absent or null.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct SamplingFields {
    /// Completions; 1 if absent. All of them share one pass over the prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<usize>,
    /// Divides the logits: 0 takes the most likely token; 1 if absent.
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    /// Draws from the smallest set of most likely tokens that reaches this share of probability; 1 if absent.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Draws from so many most likely tokens; 0 (or -1) or absent: from all. An extension.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Draws from tokens at least this share as likely as the most likely one; 0 if absent. An extension.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens of prompt and completion; 1 if absent. An extension.
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the completion has.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logits of tokens for each time that the completion has them.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens: token ids as strings, values -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Tokens before which neither a stop token nor a stop string ends a completion. An extension.
    pub min_tokens: Option<usize>,
    /// The same seed gives the same tokens; choice `i` uses stream `i` of it. Drawn anew if absent.
    pub seed: Option<i64>,
    /// One string or up to four of them that end a completion; the text never contains them.
    pub stop: Option<Stop>,
    /// Token ids that end a completion, beside the model's own. An extension.
    #[schema(max_items = 1024)]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on after the tokens that end a turn. An extension.
    pub ignore_eos: Option<bool>,
    /// What the text must be.
    pub response_format: Option<ResponseFormat>,
    /// A JSON schema that the text must satisfy. An extension.
    #[schema(value_type = Option<Object>)]
    pub guided_json: Option<Value>,
    /// A regular expression that the whole text must match. An extension.
    pub guided_regex: Option<String>,
    /// Texts of which the completion must be one. An extension.
    #[schema(min_items = 1, max_items = 1024)]
    pub guided_choice: Option<Vec<String>>,
    /// A grammar in Lark's notation. An extension.
    pub guided_grammar: Option<String>,
    /// One of the four above, under the name that newer clients use. An extension.
    pub structured_outputs: Option<StructuredOutputs>,
    /// Whether pieces are sent as they come.
    pub stream: Option<bool>,
    /// How.
    pub stream_options: Option<StreamOptions>,
    /// A name for the user; not looked at.
    pub user: Option<String>,
    /// Fields that are not known here. Some are refused, see the documentation; the others are ignored.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: BTreeMap<String, Value>,
}

/// One string or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Tell the token counts in a last piece that has no choices.
    pub include_usage: Option<bool>,
}

/// What the text must be, as OpenAI has it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with a name.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// For people; not looked at.
    pub name: Option<String>,
    /// The schema. It is followed whether `strict` is set or not.
    #[schema(value_type = Object)]
    pub schema: Value,
}

/// What the text must be, as vLLM has it: exactly one of these.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Option<Object>)]
    pub json: Option<Value>,
    /// A regular expression.
    pub regex: Option<String>,
    /// Texts to choose from.
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    pub grammar: Option<String>,
    /// Any JSON object.
    pub json_object: Option<bool>,
}

impl SamplingFields {
    /// Whether pieces are sent as they come.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the token counts.
    pub fn streams_usage(&self) -> bool {
        let options = self.stream_options;
        options.and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// Checks every field. `max_tokens` is checked here and set once the prompt is known.
    pub fn into_wanted(mut self, max_tokens: Option<usize>, top_log_probabilities: usize) -> Result<Wanted, ApiError> {
        refuse(&self.rest)?;
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_N).contains(&n) {
            return Err(ApiError::invalid("n", format!("n is {n}, not 1 to {MAX_N}")));
        }
        if max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "max_tokens is 0, not at least 1"));
        }
        let stops = self.stops()?;
        let form = self.form()?;
        let penalty = |field, value: Option<f32>| match value.unwrap_or(0.0) {
            value if (-2.0..=2.0).contains(&value) => Ok(value),
            value => Err(ApiError::invalid(field, format!("{field} is {value}, not -2 to 2"))),
        };
        let stop_ids = self.stop_token_ids.take().unwrap_or_default();
        if stop_ids.len() > MAX_IDS {
            let message = format!("stop_token_ids has {} ids, the limit is {MAX_IDS}", stop_ids.len());
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: top_k(self.top_k)?,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: penalty("presence_penalty", self.presence_penalty)?,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)?,
            logit_bias: bias(self.logit_bias.take().unwrap_or_default())?,
            max_tokens: max_tokens.unwrap_or(usize::MAX),
            min_tokens: self.min_tokens.unwrap_or(0),
            seed: self.seed.map_or_else(rand::random, i64::cast_unsigned),
            stop_ids,
            watched_ids: Vec::new(),
            top_log_probabilities,
        };
        if let Some((field, message)) = sampling.fault() {
            return Err(ApiError::invalid(field, message));
        }
        Ok(Wanted {
            n,
            sampling,
            max_tokens,
            stops,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            form,
        })
    }

    fn stops(&mut self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop.take() {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stops)) => stops,
        };
        let message = if stops.len() > MAX_STOPS {
            format!("stop has {} strings, the limit is {MAX_STOPS}", stops.len())
        } else if let Some(stop) = stops.iter().find(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len())) {
            format!("a stop string has {} bytes, not 1 to {MAX_STOP_BYTES}", stop.len())
        } else {
            return Ok(stops);
        };
        Err(ApiError::invalid("stop", message))
    }

    /// What the text must be, if one field says so.
    fn form(&mut self) -> Result<Option<Form>, ApiError> {
        let mut forms: Vec<(&'static str, Shape)> = Vec::new();
        let schema = |schema| Shape::Grammar(GrammarSource::JsonSchema(schema));
        let regex = |text| Shape::Grammar(GrammarSource::Regex(text));
        let lark = |text| Shape::Grammar(GrammarSource::Lark(text));
        let object = || Shape::Grammar(GrammarSource::json_object());
        match self.response_format.take() {
            None | Some(ResponseFormat::Text) => {}
            Some(ResponseFormat::JsonObject) => forms.push(("response_format", object())),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                forms.push((
                    "response_format",
                    schema(written_out("response_format", json_schema.schema)?),
                ));
            }
        }
        if let Some(value) = self.guided_json.take() {
            forms.push(("guided_json", schema(written_out("guided_json", value)?)));
        }
        forms.extend(self.guided_regex.take().map(|text| ("guided_regex", regex(text))));
        forms.extend(
            self.guided_choice
                .take()
                .map(|texts| ("guided_choice", Shape::Choice(texts))),
        );
        forms.extend(self.guided_grammar.take().map(|text| ("guided_grammar", lark(text))));
        if let Some(outputs) = self.structured_outputs.take() {
            const FIELD: &str = "structured_outputs";
            if let Some(value) = outputs.json {
                forms.push((FIELD, schema(written_out(FIELD, value)?)));
            }
            forms.extend(outputs.regex.map(|text| (FIELD, regex(text))));
            forms.extend(outputs.choice.map(|texts| (FIELD, Shape::Choice(texts))));
            forms.extend(outputs.grammar.map(|text| (FIELD, lark(text))));
            forms.extend(outputs.json_object.filter(|wanted| *wanted).map(|_| (FIELD, object())));
        }
        let mut forms = forms.into_iter();
        let first = forms.next();
        if let (Some((first, _)), Some((second, _))) = (&first, forms.next()) {
            let message = format!("{first} and {second} both say what the text must be: send one of them");
            return Err(ApiError::invalid(second, message));
        }
        let Some((field, shape)) = first else { return Ok(None) };
        if let Shape::Choice(texts) = &shape {
            let bytes: usize = texts.iter().map(String::len).sum();
            if !(1..=MAX_CHOICES).contains(&texts.len())
                || bytes > MAX_CHOICE_BYTES
                || texts.iter().any(String::is_empty)
            {
                let message = format!(
                    "{field} has {} texts of {bytes} bytes: it takes 1 to {MAX_CHOICES}, none of them empty, of {MAX_CHOICE_BYTES} bytes in all",
                    texts.len()
                );
                return Err(ApiError::invalid(field, message));
            }
        }
        Ok(Some(Form { field, shape }))
    }
}

fn top_k(given: Option<i64>) -> Result<usize, ApiError> {
    match given.unwrap_or(0) {
        -1 => Ok(0),
        given => usize::try_from(given)
            .map_err(|_| ApiError::invalid("top_k", format!("top_k is {given}, not 0 (from all) or more"))),
    }
}

/// A schema is sent as an object or as the text of one.
fn written_out(field: &'static str, schema: Value) -> Result<Value, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid(field, format!("the JSON schema is not JSON: {error}")))?,
        schema => schema,
    };
    match schema {
        Value::Object(_) => Ok(schema),
        other => Err(ApiError::invalid(
            field,
            format!("the JSON schema is {other}, not an object"),
        )),
    }
}

fn bias(given: BTreeMap<String, f32>) -> Result<Vec<(u32, f32)>, ApiError> {
    let invalid = |message: String| ApiError::invalid("logit_bias", message);
    if given.len() > MAX_IDS {
        return Err(invalid(format!(
            "logit_bias has {} tokens, the limit is {MAX_IDS}",
            given.len()
        )));
    }
    let of = |(id, bias): (String, f32)| {
        let id: u32 = id
            .parse()
            .map_err(|_| invalid(format!("logit_bias names token {id:?}, not a token id")))?;
        match (-100.0..=100.0).contains(&bias) {
            true => Ok((id, bias)),
            false => Err(invalid(format!("logit_bias of token {id} is {bias}, not -100 to 100"))),
        }
    };
    given.into_iter().map(of).collect()
}

/// Refuses fields that would change the answer.
fn refuse(rest: &BTreeMap<String, Value>) -> Result<(), ApiError> {
    for (field, harmless) in REFUSED {
        let given = rest.get(field).filter(|value| !value.is_null());
        if given.is_some_and(|value| !harmless.contains(&value.to_string().as_str())) {
            return Err(ApiError::invalid(
                field,
                format!("{field} is not supported: leave it out"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: &Value) -> Result<Wanted, String> {
        let fields: SamplingFields = serde_json::from_value(body.clone()).map_err(|error| error.to_string())?;
        let wanted = fields.into_wanted(None, 0);
        wanted.map_err(|error| error.json()["error"]["message"].as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn every_field_reaches_the_sampling() {
        let wanted = parse(&json!({
            "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5,
            "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": -100, "7": 1.5}, "min_tokens": 4,
            "seed": -1, "stop": "END", "stop_token_ids": [9], "ignore_eos": true, "user": "u", "unheard": {"of": 1},
        }));
        let wanted = wanted.expect("valid");
        let sampling = Sampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 7,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(5, -100.0), (7, 1.5)],
            max_tokens: usize::MAX,
            min_tokens: 4,
            seed: u64::MAX,
            stop_ids: vec![9],
            ..Sampling::default()
        };
        assert_eq!(wanted.sampling, sampling);
        assert_eq!((wanted.n, wanted.ignore_eos, wanted.form), (3, true, None));
        assert_eq!(wanted.stops, ["END"]);
    }

    #[test]
    fn what_is_out_of_range_is_refused_with_field_and_value() {
        for (field, value, said) in [
            ("n", json!(0), "0"),
            ("n", json!(129), "129"),
            ("temperature", json!(-1), "-1"),
            ("temperature", json!(1e40), "inf"),
            ("top_p", json!(0), "0"),
            ("top_p", json!(1.5), "1.5"),
            ("top_k", json!(-2), "-2"),
            ("min_p", json!(2), "2"),
            ("repetition_penalty", json!(0), "0"),
            ("presence_penalty", json!(2.5), "2.5"),
            ("frequency_penalty", json!(-3), "-3"),
            ("logit_bias", json!({"a": 1}), "\"a\""),
            ("logit_bias", json!({"3": 101}), "101"),
            ("stop", json!([""]), "0 bytes"),
            ("stop", json!(["a", "b", "c", "d", "e"]), "5"),
            ("guided_choice", json!([]), "0 texts"),
            ("guided_choice", json!(["a", ""]), "none of them empty"),
        ] {
            let message = parse(&json!({field: value})).expect_err(field);
            assert!(
                message.contains(field.trim_end_matches("_ids")) && message.contains(said),
                "{field}: {message}"
            );
        }
    }

    #[test]
    fn what_would_change_the_answer_and_is_not_supported_is_refused_by_name() {
        for (field, harmless) in REFUSED {
            let message = parse(&json!({field: {"some": "thing"}})).expect_err(field);
            assert!(message.contains(field), "{field}: {message}");
            assert!(parse(&json!({field: null})).is_ok());
            for value in harmless {
                let value: Value = serde_json::from_str(value).expect("JSON");
                assert!(parse(&json!({field: value})).is_ok(), "{field}");
            }
        }
        assert!(parse(&json!({"skip_special_tokens": false})).is_err());
    }

    #[test]
    fn one_field_at_most_says_what_the_text_must_be() {
        let form = |body: Value| parse(&body).map(|wanted| wanted.form);
        let schema = json!({"type": "integer"});
        let grammar = || Shape::Grammar(GrammarSource::JsonSchema(schema.clone()));
        for (field, body) in [
            (
                "response_format",
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}}}),
            ),
            ("guided_json", json!({"guided_json": schema})),
            ("guided_json", json!({"guided_json": schema.to_string()})),
            ("structured_outputs", json!({"structured_outputs": {"json": schema}})),
        ] {
            let shape = grammar();
            assert_eq!(form(body).expect("valid"), Some(Form { field, shape }));
        }
        assert_eq!(form(json!({"response_format": {"type": "text"}})), Ok(None));
        let shape = Shape::Choice(vec!["yes".to_owned(), "no".to_owned()]);
        let choice = Form {
            field: "guided_choice",
            shape,
        };
        assert_eq!(form(json!({"guided_choice": ["yes", "no"]})), Ok(Some(choice)));
        let both = form(json!({"guided_regex": "a", "response_format": {"type": "json_object"}}));
        assert!(both.expect_err("refused").contains("response_format and guided_regex"));
        assert!(
            form(json!({"guided_json": "{"}))
                .expect_err("refused")
                .contains("not JSON")
        );
        assert!(
            form(json!({"guided_json": [1]}))
                .expect_err("refused")
                .contains("not an object")
        );
        assert!(form(json!({"response_format": {"type": "xml"}})).is_err());
    }
}
