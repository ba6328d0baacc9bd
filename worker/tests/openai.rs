//! The endpoints that OpenAI's clients call, over a tiny random model.

#![allow(clippy::expect_used, reason = "helpers of tests")]

mod support;

use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{Server, ask, data_url, png, spec, with_image};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What a prefix that was computed before may change in a log-probability: the order of some sums.
const CLOSE: f64 = 1e-4;

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// The fields of `more` on top of `body`.
fn with(mut body: Value, more: &Value) -> Value {
    let more = more.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(more);
    body
}

async fn answer(server: &Server, path: &str, body: &Value) -> Value {
    let (status, answer) = server.post(path, body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

/// The chunks of a streamed answer, which must end as such answers do.
async fn stream(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let body = with(
        body.clone(),
        &json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let request = server.client.post(server.url(path)).json(&body);
    let response = request.send().await.expect("answers");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.expect("a body");
    let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.into_iter()
        .map(|chunk| serde_json::from_str(chunk).expect("JSON"))
        .collect()
}

fn text(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    let content = choice["message"]["content"].as_str().or(choice["text"].as_str());
    content.expect("text")
}

#[tokio::test]
async fn a_stream_greets_first_and_gives_its_reason_last() {
    let server = Server::ready(spec()).await;
    let body = with(ask("Hello"), &json!({"n": 3, "max_tokens": 20}));
    let chunks = stream(&server, CHAT, &body).await;
    for index in 0..3 {
        let of_choice = chunks.iter().filter_map(|chunk| chunk["choices"].get(0));
        let choices: Vec<&Value> = of_choice.filter(|choice| choice["index"] == index).collect();
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
        let (last, before) = choices.split_last().expect("chunks");
        assert!(
            last["finish_reason"].is_string() && last["weight_version"]["ended"].is_string(),
            "{last}"
        );
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
        assert!(before[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
    }
    assert!(chunks.last().expect("chunks")["usage"]["completion_tokens"].is_number());
}

#[tokio::test]
async fn log_probabilities_have_bytes_ids_and_alternatives() {
    let server = Server::ready(spec()).await;
    let fields = json!({"logprobs": true, "top_logprobs": 3, "temperature": 0, "max_tokens": 30});
    let answer = answer(&server, CHAT, &with(ask("Hello"), &fields)).await;
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
    let mut bytes = Vec::new();
    for token in tokens {
        let top = token["top_logprobs"].as_array().expect("alternatives");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token_id"], token["token_id"], "the most likely token was taken");
        assert_eq!(top[0]["logprob"], token["logprob"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        let own = token["bytes"].as_array().expect("bytes");
        bytes.extend(own.iter().map(|byte| byte.as_u64().expect("a byte") as u8));
    }
    let said = String::from_utf8_lossy(&bytes).into_owned();
    assert!(said.starts_with(text(&answer)), "{said:?} and {:?}", text(&answer));
}

#[tokio::test]
async fn temperature_changes_what_is_drawn_and_not_the_model_s_own_log_probability() {
    let server = Server::ready(spec()).await;
    let logprobs = async |fields: Value| {
        let body = with(with(ask("Hello"), &json!({"logprobs": true, "max_tokens": 1})), &fields);
        answer(&server, CHAT, &body).await["choices"][0]["logprobs"]["content"][0].clone()
    };
    let plain = logprobs(json!({"temperature": 1})).await;
    assert_eq!(plain["logprob"], plain["sampling_logprob"]);
    let biased = logprobs(json!({"logit_bias": {plain["token_id"].to_string(): 100}})).await;
    assert_eq!(biased["token_id"], plain["token_id"]);
    let difference = number(&biased["logprob"]) - number(&plain["logprob"]);
    assert!(difference.abs() < CLOSE, "{difference}");
    assert!(biased["sampling_logprob"].as_f64().expect("a number") > -1e-3);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_tokens_and_another_one_others() {
    let server = Server::ready(spec()).await;
    let of = async |fields: Value| {
        let body = with(ask("Hello"), &json!({"max_tokens": 20, "n": 2}));
        answer(&server, CHAT, &with(body, &fields)).await["choices"].clone()
    };
    let fields = json!({"seed": 7, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.5,
        "repetition_penalty": 1.1, "frequency_penalty": 0.1});
    assert_eq!(of(fields.clone()).await, of(fields).await);
    assert_ne!(of(json!({"seed": 7})).await, of(json!({"seed": 8})).await);
}

#[tokio::test]
async fn constrained_answers_are_what_they_must_be() {
    let server = Server::ready(spec()).await;
    let schema = json!({
        "type": "object",
        "properties": {"verdict": {"enum": ["one", "two"]}, "sure": {"type": "boolean"}},
        "required": ["verdict", "sure"],
        "additionalProperties": false
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": true}});
    for fields in [
        json!({"response_format": format, "n": 3}),
        json!({"guided_json": schema}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        let body = with(with(ask("Which?"), &json!({"max_tokens": 200})), &fields);
        let answer = answer(&server, CHAT, &body).await;
        for choice in answer["choices"].as_array().expect("choices") {
            let said = choice["message"]["content"].as_str().expect("text");
            let value: Value = serde_json::from_str(said).expect("JSON");
            assert!(
                ["one", "two"].contains(&value["verdict"].as_str().expect("text")),
                "{said}"
            );
            assert!(
                value["sure"].is_boolean() && choice["finish_reason"] == "stop",
                "{choice}"
            );
        }
    }
    for (fields, texts) in [
        (
            json!({"guided_choice": ["yes", "no", "not yet"]}),
            &["yes", "no", "not yet"][..],
        ),
        (json!({"structured_outputs": {"choice": ["a"]}}), &["a"]),
        (json!({"guided_regex": "(7|8)!?"}), &["7", "8", "7!", "8!"]),
        (json!({"guided_grammar": "start: \"x\" \"y\""}), &["xy"]),
    ] {
        for seed in 0..4 {
            let body = with(with(ask("Which?"), &json!({"seed": seed, "max_tokens": 12})), &fields);
            let answer = answer(&server, CHAT, &body).await;
            assert!(texts.contains(&text(&answer)), "{answer}");
            assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        }
    }
}

#[tokio::test]
async fn what_a_text_must_be_is_refused_where_it_cannot_be() {
    let server = Server::ready(spec()).await;
    for (fields, param, reason) in [
        (
            json!({"guided_regex": "(a"}),
            "guided_regex",
            "the regular expression cannot be used",
        ),
        (json!({"guided_json": {"type": "nonsense"}}), "guided_json", "nonsense"),
        (
            json!({"guided_choice": ["a ".repeat(40)]}),
            "guided_choice",
            "max_tokens is 8",
        ),
        (
            json!({"guided_choice": ["<|im_end|>"]}),
            "guided_choice",
            "special token",
        ),
        (
            json!({"guided_regex": "a", "ignore_eos": true}),
            "ignore_eos",
            "contradicts guided_regex",
        ),
        (
            json!({"guided_regex": "a", "min_tokens": 2}),
            "guided_regex",
            "min_tokens is 2",
        ),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias", "99999"),
        (json!({"stop_token_ids": [99999]}), "stop_token_ids", "99999"),
        (json!({"tools": [{"type": "function"}]}), "tools", "not supported"),
        (json!({"top_logprobs": 2}), "top_logprobs", "needs logprobs"),
    ] {
        let body = with(ask("Hello"), &fields);
        let (status, answer) = server.post(CHAT, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
        let message = answer["error"]["message"].as_str().expect("a message");
        assert!(message.contains(reason), "{message}");
    }
}

#[tokio::test]
async fn stop_tokens_end_a_text_before_them_and_min_tokens_hold_them_off() {
    let server = Server::ready(spec()).await;
    let plain = with(
        ask("Hello"),
        &json!({"max_tokens": 30, "logprobs": true, "ignore_eos": true}),
    );
    let whole = answer(&server, CHAT, &plain).await;
    let tokens = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("tokens")
        .clone();
    assert_eq!(tokens.len(), 30, "nothing else ends it");
    let id = &tokens[6]["token_id"];
    let first = tokens.iter().position(|token| token["token_id"] == *id).expect("there");
    let stopped = answer(&server, CHAT, &with(plain.clone(), &json!({"stop_token_ids": [id]}))).await;
    let choice = &stopped["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(
        choice["logprobs"]["content"].as_array().expect("tokens").len(),
        first + 1
    );
    assert!(text(&whole).starts_with(text(&stopped)), "{stopped}");
    let held = with(plain, &json!({"stop_token_ids": [id], "min_tokens": 12}));
    let held = answer(&server, CHAT, &held).await;
    let tokens = held["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
    assert!(tokens.len() > 12);
    assert!(tokens[..12].iter().all(|token| token["token_id"] != *id));
}

#[tokio::test]
async fn completions_continue_texts_and_token_ids() {
    let server = Server::ready(spec()).await;
    let of = async |prompt: Value| {
        let body = json!({"prompt": prompt, "max_tokens": 6, "seed": 3, "temperature": 0});
        answer(&server, COMPLETIONS, &body).await
    };
    let one = of(json!("Which digit")).await;
    assert_eq!(one["object"], "text_completion");
    assert!(one["choices"][0]["weight_version"]["begun"].is_string());
    let both = of(json!(["Which digit", "The"])).await;
    assert_eq!(both["choices"].as_array().expect("choices").len(), 2);
    assert_eq!(both["choices"][0]["text"], one["choices"][0]["text"]);
    assert_eq!(both["choices"][1]["index"], 1);
    let ids = of(json!([14, 15, 16])).await;
    assert_eq!(ids["usage"]["prompt_tokens"], 3);
    let lists = of(json!([[14, 15, 16], [14]])).await;
    assert_eq!(lists["choices"][0]["text"], ids["choices"][0]["text"]);
    assert_eq!(lists["usage"]["prompt_tokens"], 4);
}

#[tokio::test]
async fn streamed_completions_are_the_whole_ones() {
    let server = Server::ready(spec()).await;
    let body = json!({"prompt": ["Which", "The"], "n": 2, "max_tokens": 24, "seed": 3, "logprobs": 2});
    let whole = answer(&server, COMPLETIONS, &body).await;
    let chunks = stream(&server, COMPLETIONS, &body).await;
    for index in 0..4 {
        let pieces = chunks.iter().filter_map(|chunk| chunk["choices"].get(0));
        let pieces: Vec<&Value> = pieces.filter(|choice| choice["index"] == index).collect();
        let said: String = pieces.iter().filter_map(|piece| piece["text"].as_str()).collect();
        let choice = &whole["choices"][index];
        assert_eq!(choice["text"], said);
        assert_eq!(choice["finish_reason"], pieces.last().expect("pieces")["finish_reason"]);
        let logprobs = |list: &str| {
            let lists = pieces.iter().filter_map(|piece| piece["logprobs"][list].as_array());
            json!(lists.flatten().cloned().collect::<Vec<_>>())
        };
        for list in ["tokens", "token_ids", "text_offset"] {
            assert_eq!(choice["logprobs"][list], logprobs(list), "{list}");
        }
        for list in ["token_logprobs", "top_logprobs"] {
            let count = |list: &Value| list.as_array().expect("a list").len();
            assert_eq!(count(&choice["logprobs"][list]), count(&logprobs(list)), "{list}");
        }
    }
    assert_eq!(chunks.last().expect("chunks")["usage"], whole["usage"]);
}

#[tokio::test]
async fn prompts_that_cannot_be_continued_are_refused_by_name() {
    let server = Server::ready(spec()).await;
    for (fields, param, reason) in [
        (json!({"prompt": ""}), "prompt", "no tokens"),
        (json!({"prompt": []}), "prompt", "0 prompts"),
        (json!({"prompt": [99999]}), "prompt", "99999"),
        (
            json!({"prompt": ["a", "b", "c"], "n": 60}),
            "prompt",
            "3 prompts with n = 60",
        ),
        (json!({"prompt": "a <|image_pad|>"}), "prompt", "placeholders"),
        (json!({"prompt": "a", "echo": true}), "echo", "not supported"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix", "not supported"),
        (json!({"prompt": "a", "best_of": 2}), "best_of", "not supported"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs", "21"),
    ] {
        let (status, answer) = server.post(COMPLETIONS, &fields).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert!(
            answer["error"]["message"].as_str().expect("a message").contains(reason),
            "{answer}"
        );
    }
    let long = json!({"prompt": "digit ".repeat(2000)});
    let message = server
        .refusal(COMPLETIONS, &long, StatusCode::BAD_REQUEST, "context_length_exceeded")
        .await;
    assert!(message.contains("16 more"), "{message}");
}

#[tokio::test]
async fn the_model_is_listed_and_found_by_its_name() {
    let server = Server::ready(spec()).await;
    let (status, list) = server.get("/v1/models").await;
    assert_eq!(status, StatusCode::OK);
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let (status, model) = server.get("/v1/models/tiny").await;
    assert_eq!(status, StatusCode::OK);
    let model: Value = serde_json::from_str(&model).expect("JSON");
    assert_eq!(list["data"], json!([model]));
    let (status, other) = server.get("/v1/models/gpt-4").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(other.contains("model_not_found"), "{other}");
}

#[tokio::test]
async fn a_picture_changes_the_answer() {
    let server = Server::ready(spec()).await;
    let of = async |side: u32| {
        let body = with_image(&data_url(&png(side, side)));
        let body = with(body, &json!({"logprobs": true, "temperature": 0}));
        let answer = answer(&server, CHAT, &body).await;
        let tokens = answer["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
        tokens
            .iter()
            .map(|token| number(&token["logprob"]))
            .collect::<Vec<f64>>()
    };
    let largest = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let first = of(8).await;
    assert!(largest(&first, &of(8).await) < CLOSE, "the same picture");
    assert!(largest(&first, &of(24).await) > CLOSE, "another picture");
}
