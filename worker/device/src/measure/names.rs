//! Names of lines: what was asked for. A peer's answers are found by them.

/// Samples of prompts, decoded step by step: how many share a prompt of how many tokens, and how it is read.
pub fn groups((groups, n): (usize, usize), prompt: usize, picture: bool, how: &str) -> String {
    format!("decode {groups} groups of {n} over {prompt}{}, {how}", shown(picture))
}

/// The same where every sample has a prompt of its own.
pub fn alone(rows: usize, prompt: usize, picture: bool) -> String {
    format!("decode {rows} over {prompt} each{}, nothing shared", shown(picture))
}

/// Whole requests of `n` samples, each of `new` tokens after a prompt of `prompt` tokens.
pub fn requests((count, n): (usize, usize), (prompt, new): (usize, usize), picture: bool) -> String {
    let asked = match (count, n) {
        (_, 1) => format!("requests {count}"),
        (1, _) => format!("request of {n}"),
        _ => format!("requests {count} of {n}"),
    };
    format!("{asked} x {prompt}+{new}{}", shown(picture))
}

/// The samples of one request as requests of their own.
pub fn requests_alone(count: usize, lengths: (usize, usize), picture: bool) -> String {
    format!("{}, nothing shared", requests((count, 1), lengths, picture))
}

fn shown(picture: bool) -> &'static str {
    if picture { ", picture" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_shares_a_prompt_and_whether_it_has_a_picture() {
        assert_eq!(
            groups((1, 8), 1536, true, "as served"),
            "decode 1 groups of 8 over 1536, picture, as served"
        );
        assert_eq!(alone(8, 1536, false), "decode 8 over 1536 each, nothing shared");
        assert_eq!(requests((1, 8), (1536, 256), true), "request of 8 x 1536+256, picture");
        assert_eq!(requests((32, 1), (1024, 128), false), "requests 32 x 1024+128");
        assert_eq!(
            requests_alone(128, (1536, 256), true),
            "requests 128 x 1536+256, picture, nothing shared"
        );
    }
}
