//! `$(VAR)` in commands, arguments and environment values, as core/v1 `Container` describes it.

/// Replaces `$(NAME)` by what `lookup` answers; an unknown name stays as it is and `$$` stands for one `$`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(tail) = rest.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = rest.strip_prefix('(').and_then(|tail| tail.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_a(text: &str) -> String {
        expand(text, |name| (name == "A").then(|| "1".to_owned()))
    }

    #[test]
    fn a_known_name_is_replaced_and_an_unknown_one_stays() {
        assert_eq!(with_a("x$(A)y$(B)"), "x1y$(B)");
    }

    #[test]
    fn two_dollars_escape_a_reference() {
        assert_eq!(with_a("$$(A) $$"), "$(A) $");
    }

    #[test]
    fn a_lone_dollar_or_an_open_bracket_stays() {
        assert_eq!(with_a("$ $A $(A"), "$ $A $(A");
    }
}
