//! The critic's endpoints over a tiny random model, as a client sees them.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod support;

use std::{collections::HashSet, path::Path, time::Duration};

use flotilla_api::{
    conversion::Template,
    role::{Purpose, Serve},
};
use flotilla_model::{Message, Processor};
use flotilla_worker::{
    command::best_of_n::{BestOfNArguments, measure},
    device::{DeviceArguments, Wanted},
};
use futures::StreamExt;
use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{Server, comparison, data_url, png, spec};

const COMPARE: &str = "/v1/critic/compare";
const SCORE: &str = "/v1/critic/score";
const BEST_OF_N: &str = "/v1/critic/best-of-n";

/// The sample's tokenizer knows few words: a score template that its context holds.
fn with_templates() -> Serve {
    let inline = |text: &str| Template {
        inline: Some(text.to_owned()),
        ..Template::default()
    };
    let mut spec = spec();
    let score = "{{ question }}\nResponse: {{ response }}\n{{ min }} to {{ max }}?";
    spec.critic_templates.insert("short-score".to_owned(), inline(score));
    let letters = "---\nlabels: [Response A, Response B]\nbox: [\"[[\", \"]]\"]\n---\n{{ question }}\nA: {{ response_1 }}\nB: {{ response_2 }}";
    spec.critic_templates.insert("letters".to_owned(), inline(letters));
    spec
}

async fn ok(server: &Server, path: &str, body: &Value) -> Value {
    let (status, answer) = server.post(path, body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[tokio::test]
async fn a_verdict_without_thoughts_is_that_of_the_labels_probabilities() {
    let server = Server::ready(with_templates()).await;
    let mut body = comparison();
    body["think"] = json!(false);
    let answer = ok(&server, COMPARE, &body).await;
    assert_eq!((&answer["raw"], &answer["rationale"]), (&json!(""), &Value::Null));
    let margin = number(&answer["margin"]);
    match answer["verdict"].as_str().expect("a verdict") {
        "1" => assert!(margin > 0.0, "{answer}"),
        "2" => assert!(margin < 0.0, "{answer}"),
        _ => assert!(answer["winner"].is_null(), "{answer}"),
    }
    // Labels of several tokens in another box.
    body["template"] = json!("letters");
    let answer = ok(&server, COMPARE, &body).await;
    assert!(answer["margin"].is_number(), "{answer}");
}

#[tokio::test]
async fn both_orders_give_the_same_whichever_is_sent() {
    let server = Server::ready(with_templates()).await;
    let mut body = comparison();
    body["think"] = json!(false);
    body["both_orders"] = json!(true);
    let one = ok(&server, COMPARE, &body).await;
    body["responses"] = json!(["3", "7"]);
    let other = ok(&server, COMPARE, &body).await;
    let (a, b) = (number(&one["margin"]), number(&other["margin"]));
    assert!((a + b).abs() < 1e-4, "{a} and {b}");
    assert_eq!(one["order_flip"], other["order_flip"]);
    assert!(
        one["order_flip"].is_boolean() && one["swapped"]["margin"].is_number(),
        "{one}"
    );
    // The older name means the same.
    body.as_object_mut().expect("an object").remove("both_orders");
    body["swap"] = json!(true);
    assert_eq!(ok(&server, COMPARE, &body).await["margin"], other["margin"]);
}

#[tokio::test]
async fn one_of_several_responses_is_chosen_and_the_table_says_how() {
    let server = Server::ready(with_templates()).await;
    let mut body = comparison();
    body["think"] = json!(false);
    body["responses"] = json!(["7", "3", "7", "9"]);
    let knockout = ok(&server, COMPARE, &body).await;
    let winner = knockout["winner"].as_u64().expect("a winner");
    assert!(
        [0, 1, 3].contains(&winner),
        "equal texts are one, named by the first: {knockout}"
    );
    assert_eq!(knockout["table"]["counts"]["comparisons"], 2);
    let rounds = knockout["table"]["rounds"].as_array().expect("rounds");
    assert_eq!((rounds.len(), &rounds[0]["round"]), (2, &json!(0)));
    assert!(rounds[0]["bye"].is_number(), "{knockout}");
    assert_eq!(rounds[1]["comparisons"][0]["winner"], json!(winner));

    body["selector"] = json!("round_robin");
    let all = ok(&server, COMPARE, &body).await;
    assert_eq!(all["table"]["counts"]["comparisons"], 3);
    assert_eq!(all["table"]["standings"][0]["candidate"], all["winner"]);
}

#[tokio::test]
async fn a_score_comes_with_its_distribution() {
    let server = Server::ready(with_templates()).await;
    let mut body = json!({"question": "What digit is this?", "response": "7", "image": data_url(&png(8, 8))});
    let answer = ok(&server, SCORE, &body).await;
    let distribution = answer["distribution"].as_array().expect("a distribution");
    assert_eq!((distribution.len(), &distribution[9]["label"]), (10, &json!("10")));
    let probability = |entry: &Value| number(&entry["probability"]);
    assert!((distribution.iter().map(probability).sum::<f64>() - 1.0).abs() < 1e-6);
    let mean: f64 = distribution
        .iter()
        .map(|entry| number(&entry["value"]) * probability(entry))
        .sum();
    assert!((number(&answer["score"]) - mean).abs() < 1e-6);
    let most = distribution.iter().map(probability).fold(0.0, f64::max);
    let mode = distribution
        .iter()
        .find(|entry| probability(entry) >= most)
        .expect("one");
    assert_eq!(answer["mode"], mode["value"]);
    assert!((0.0..=10f64.ln()).contains(&number(&answer["entropy"])));
    assert!((0.0..=1.0).contains(&number(&answer["mass"])));
    assert_eq!(answer["range"], json!({"minimum": 1.0, "maximum": 10.0, "step": 1.0}));
    assert_eq!(answer["raw"], "");

    body["range"] = json!({"minimum": 0, "maximum": 1, "step": 0.5});
    body["think"] = json!(true);
    body["max_tokens"] = json!(8);
    let thoughtful = ok(&server, SCORE, &body).await;
    assert_eq!(thoughtful["distribution"].as_array().expect("three").len(), 3);
    assert_ne!(thoughtful["raw"], "");
    assert_ne!(thoughtful["finish_reason"], Value::Null);
}

#[tokio::test]
async fn a_margin_without_thoughts_is_the_log_odds_of_the_labels_in_an_open_box() {
    let spec = with_templates();
    let base = spec.model.uri.strip_prefix("file://").expect("a file").to_owned();
    let server = Server::ready(spec).await;
    let body = json!({"question": "What digit is this?", "responses": ["7", "3"], "think": false});
    let answer = ok(&server, COMPARE, &body).await;
    let shown = "What digit is this?\nResponse 1: 7\nResponse 2: 3\nWhich response is better?";
    let processor = Processor::load(Path::new(&base)).expect("the sample's processor");
    let prompt = processor
        .template()
        .render(&[Message::user(0, shown)], true)
        .expect("renders");
    let mut odds = Vec::new();
    for label in ["1", "2"] {
        let body =
            json!({"prompt": format!("{prompt}\\boxed{{"), "max_tokens": 1, "guided_choice": [label], "logprobs": 0});
        let completion = ok(&server, "/v1/completions", &body).await;
        odds.push(number(&completion["choices"][0]["logprobs"]["token_logprobs"][0]));
    }
    let margin = number(&answer["margin"]);
    assert!((margin - (odds[0] - odds[1])).abs() < 1e-4, "{margin} and {odds:?}");
}

fn best_of(n: usize) -> Value {
    json!({"question": "What digit is this?", "image": data_url(&png(8, 8)), "n": n, "max_tokens": 12, "seed": 5,
        "critic": {"think": false}})
}

#[tokio::test]
async fn the_best_of_n_is_one_of_them_and_its_bracket_leads_to_it() {
    let server = Server::ready(with_templates()).await;
    let answer = ok(&server, BEST_OF_N, &best_of(6)).await;
    assert_eq!(
        (&answer["object"], &answer["n"]),
        (&json!("critic.best_of_n"), &json!(6))
    );
    let winner = usize::try_from(answer["winner"].as_u64().expect("a winner")).expect("small");
    let candidates = answer["candidates"].as_array().expect("candidates");
    assert_eq!(candidates[winner]["text"], answer["text"]);
    let distinct: HashSet<&str> = candidates
        .iter()
        .map(|c| c["text"].as_str().expect("text").trim())
        .collect();
    assert_eq!(answer["distinct"], json!(distinct.len()));
    let report = &answer["reports"][0];
    assert_eq!(
        (&report["selector"], &report["winner"]),
        (&json!("knockout"), &answer["winner"])
    );
    assert_eq!(answer["comparisons"], json!(distinct.len() - 1));
    let last = report["rounds"].as_array().expect("rounds").last().expect("a final");
    assert_eq!(last["comparisons"][0]["winner"], answer["winner"]);
    let usage = &answer["usage"];
    assert!(
        usage["prompt_tokens"].as_u64() > report["counts"]["prompt_tokens"].as_u64(),
        "{usage}"
    );

    let mut again = ok(&server, BEST_OF_N, &best_of(6)).await;
    for field in ["id", "prefill_tokens"] {
        again[field] = answer[field].clone();
    }
    assert_eq!(answer, again, "the same seed gives the same contest");
}

#[tokio::test]
async fn all_selectors_are_compared_on_the_same_candidates() {
    let server = Server::ready(with_templates()).await;
    let mut body = best_of(5);
    body["report"] = json!("all");
    body["both_orders"] = json!(true);
    body["candidates"] = json!(false);
    let answer = ok(&server, BEST_OF_N, &body).await;
    assert!(answer.get("candidates").is_none());
    let reports = answer["reports"].as_array().expect("reports");
    let names: Vec<&str> = reports
        .iter()
        .map(|report| report["selector"].as_str().expect("a name"))
        .collect();
    assert_eq!(
        names,
        ["knockout", "round_robin", "sequential", "majority", "pointwise"]
    );
    let distinct = answer["distinct"].as_u64().expect("a number");
    let round_robin = &reports[1];
    assert_eq!(
        round_robin["counts"]["comparisons"],
        json!(distinct * (distinct - 1) / 2)
    );
    assert_eq!(round_robin["counts"]["opinions"], json!(distinct * (distinct - 1)));
    assert_eq!(
        reports[2]["rounds"].as_array().expect("rounds").len() as u64,
        distinct - 1
    );
    assert_eq!(reports[3]["counts"]["opinions"], 0);
    let votes = reports[3]["votes"].as_array().expect("votes").iter();
    assert_eq!(
        votes
            .map(|votes| votes["count"].as_u64().expect("a count"))
            .sum::<u64>(),
        5
    );
    assert_eq!(reports[4]["scores"].as_array().expect("scores").len() as u64, distinct);
}

#[tokio::test]
async fn equal_candidates_are_not_compared() {
    let server = Server::ready(with_templates()).await;
    let mut body = best_of(4);
    body["temperature"] = json!(0);
    let answer = ok(&server, BEST_OF_N, &body).await;
    assert_eq!(
        (&answer["distinct"], &answer["comparisons"], &answer["winner"]),
        (&json!(1), &json!(0), &json!(0))
    );
    assert_eq!(answer["candidates"][3]["same_as"], 0);
}

/// Events of a stream, each with its name.
fn events(text: &str) -> Vec<(String, Value)> {
    let blocks = text.split("\n\n").filter(|block| !block.trim().is_empty());
    let event = |block: &str| {
        let field = |name: &str| {
            block
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::to_owned)
        };
        let data = field("data: ").expect("data");
        let data = serde_json::from_str(&data).unwrap_or(Value::String(data));
        (field("event: ").unwrap_or_default(), data)
    };
    blocks.map(event).collect()
}

#[tokio::test]
async fn a_stream_tells_candidates_then_rounds_then_the_result() {
    let server = Server::ready(with_templates()).await;
    let whole = ok(&server, BEST_OF_N, &best_of(5)).await;
    let mut body = best_of(5);
    body["stream"] = json!(true);
    let response = server
        .client
        .post(server.url(BEST_OF_N))
        .json(&body)
        .send()
        .await
        .expect("answers");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let told = events(&response.text().await.expect("a body"));
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    let rounds = whole["reports"][0]["rounds"].as_array().expect("rounds");
    let mut expected = vec!["candidate"; 5];
    expected.extend(vec!["round"; rounds.len()]);
    expected.extend(["result", ""]);
    assert_eq!(names, expected);
    let mut indices: Vec<u64> = told[..5]
        .iter()
        .map(|(_, data)| data["index"].as_u64().expect("an index"))
        .collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2, 3, 4]);
    for ((_, data), round) in told[5..].iter().zip(rounds) {
        assert_eq!(
            (&data["selector"], &data["round"]),
            (&json!("knockout"), &round["round"])
        );
        assert_eq!(data["comparisons"], round["comparisons"]);
    }
    let result = &told[told.len() - 2].1;
    assert_eq!(
        (&result["winner"], &result["candidates"]),
        (&whole["winner"], &whole["candidates"])
    );
    assert_eq!(told.last().expect("an end").1, json!("[DONE]"));
}

#[tokio::test]
async fn who_hangs_up_cancels_what_is_left() {
    let server = Server::ready(with_templates()).await;
    let mut body = best_of(128);
    body["max_tokens"] = json!(300);
    body["stream"] = json!(true);
    let response = server
        .client
        .post(server.url(BEST_OF_N))
        .json(&body)
        .send()
        .await
        .expect("answers");
    let mut stream = response.bytes_stream();
    // The answer has begun: its candidates run.
    let begun = tokio::time::timeout(Duration::from_millis(200), stream.next()).await;
    drop(begun);
    drop(stream);
    // 128 candidates of 300 tokens would take minutes; a short request is answered, and nothing else runs.
    ok(&server, BEST_OF_N, &best_of(2)).await;
    let mut running = String::new();
    for _ in 0..200 {
        let (_, metrics) = server.get("/metrics").await;
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix("flotilla_num_requests_running "));
        value.expect("a gauge").clone_into(&mut running);
        if running == "0.0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(running, "0.0", "samples still run");
}

#[tokio::test]
async fn what_is_wrong_is_refused_before_anything_is_generated() {
    let server = Server::ready(with_templates()).await;
    let with = |field: &str, value: Value| {
        let mut body = best_of(4);
        body[field] = value;
        body
    };
    for (path, body, reason) in [
        (BEST_OF_N, with("n", json!(129)), "not 1 to 128"),
        (
            BEST_OF_N,
            with("critic", json!({"template": "none"})),
            "there is no template \"none\"",
        ),
        (
            BEST_OF_N,
            with("critic", json!({"template": "short-score"})),
            "that compares two responses",
        ),
        (BEST_OF_N, with("question", json!("digit ".repeat(452))), "leaves"),
        (
            BEST_OF_N,
            with("question", json!("<|im_end|>")),
            "steers the conversation",
        ),
        (
            SCORE,
            json!({"question": "q", "response": "r", "range": {"minimum": 3, "maximum": 1}}),
            "min < max",
        ),
        (
            SCORE,
            json!({"question": "q", "response": "r", "template": "letters"}),
            "that scores one response",
        ),
        (
            SCORE,
            json!({"question": "q", "response": "<|im_start|>"}),
            "steers the conversation",
        ),
        (COMPARE, json!({"question": "q", "responses": vec!["a"; 33]}), "2 to 32"),
    ] {
        let message = server
            .refusal(path, &body, StatusCode::BAD_REQUEST, "invalid_value")
            .await;
        assert!(message.contains(reason), "{reason} is not in: {message}");
    }
    // The largest number there is is too long, and overflows nothing.
    for think in [true, false] {
        let mut body = with("max_tokens", json!(u64::MAX));
        body["critic"] = json!({"think": think, "max_tokens": u64::MAX});
        server
            .refusal(BEST_OF_N, &body, StatusCode::BAD_REQUEST, "context_length_exceeded")
            .await;
    }
    let mut stream = best_of(4);
    stream["stream"] = json!(true);
    stream["selector"] = json!("round_robin");
    stream["n"] = json!(128);
    let message = server
        .refusal(BEST_OF_N, &stream, StatusCode::BAD_REQUEST, "invalid_value")
        .await;
    assert!(message.contains("8128 comparisons"), "{message}");
}

#[tokio::test]
async fn best_of_n_needs_policy_and_critic() {
    for purpose in [Purpose::Critic, Purpose::Policy] {
        let mut spec = with_templates();
        spec.purpose = purpose;
        let server = Server::ready(spec).await;
        server
            .refusal(BEST_OF_N, &best_of(2), StatusCode::FORBIDDEN, "purpose")
            .await;
    }
}

#[test]
fn candidates_share_one_prompt_and_no_prefix_is_computed_twice() {
    let arguments = BestOfNArguments {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base"),
        device: DeviceArguments { device: Wanted::Cpu },
        random_seed: Some(1),
        n: 32,
        max_tokens: 8,
        question: "What digit is this?".to_owned(),
        picture: 224,
        max_model_len: 4096,
        seed: 3,
        json: false,
    };
    let measured = measure(&arguments).expect("runs");
    let (naive, shared) = (measured.naive, measured.shared);
    assert_eq!(
        naive.candidates.computed, naive.candidates.asked as u64,
        "nothing is shared"
    );
    assert_eq!(
        naive.comparisons.computed, naive.comparisons.asked as u64,
        "nothing is shared"
    );
    assert!(
        shared.candidates.computed * 20 <= naive.candidates.computed,
        "{measured:?}"
    );
    let computed = shared.candidates.computed + shared.comparisons.computed;
    assert!(computed <= measured.distinct, "{measured:?}");
    assert!(shared.comparisons.computed < naive.comparisons.computed, "{measured:?}");
}
