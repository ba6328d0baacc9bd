//! Path rewriting: a process has no mount namespace, so paths of volume mounts become local directories.
//!
//! Rewritten are the command, its arguments, the working directory and the values of environment variables; the
//! contents of files never are. An occurrence of a mount path counts when it is a whole path or a prefix of one: the
//! character before it is none that paths are made of (so `--volume=data=/data` matches, `pvc://data/data` does
//! not), and after it comes `/` or a character that ends a path. The longest mount path wins. Text that was put in
//! is not looked at again.

/// Mount paths and the local paths that stand for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathRewriter {
    rules: Vec<(String, String)>,
}

impl PathRewriter {
    /// Takes pairs of (absolute path in the container, absolute local path). A mount of `/` is ignored: it would
    /// match every path of the machine.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut rules: Vec<(String, String)> = pairs
            .into_iter()
            .map(|(mount, local)| (mount.trim_end_matches('/').to_owned(), local))
            .filter(|(mount, _)| mount.starts_with('/'))
            .collect();
        rules.sort_by(|left, right| right.0.len().cmp(&left.0.len()).then_with(|| left.0.cmp(&right.0)));
        Self { rules }
    }

    /// Replaces every mount path in `text`.
    pub fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        let mut before = None;
        while let Some(next) = rest.chars().next() {
            if next == '/'
                && !before.is_some_and(is_path_character)
                && let Some((mount, local)) = self.rule_for(rest)
            {
                out.push_str(local);
                before = mount.chars().next_back();
                rest = &rest[mount.len()..];
                continue;
            }
            out.push(next);
            before = Some(next);
            rest = &rest[next.len_utf8()..];
        }
        out
    }

    fn rule_for(&self, text: &str) -> Option<(&str, &str)> {
        self.rules
            .iter()
            .find(|(mount, _)| {
                text.strip_prefix(mount.as_str())
                    .is_some_and(|tail| tail.chars().next().is_none_or(|c| c == '/' || !is_path_character(c)))
            })
            .map(|(mount, local)| (mount.as_str(), local.as_str()))
    }
}

fn is_path_character(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '~' | '%' | '+' | '@')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rewriter() -> PathRewriter {
        PathRewriter::new([
            ("/data".to_owned(), "/local/volumes/data".to_owned()),
            ("/data/models/".to_owned(), "/local/volumes/models".to_owned()),
            ("/etc/flotilla/config".to_owned(), "/local/config".to_owned()),
        ])
    }

    #[test]
    fn a_mount_path_and_what_lies_below_it_become_local() {
        assert_eq!(rewriter().apply("/data"), "/local/volumes/data");
        assert_eq!(
            rewriter().apply("/etc/flotilla/config/role.json"),
            "/local/config/role.json"
        );
    }

    #[test]
    fn the_longest_mount_path_wins() {
        assert_eq!(rewriter().apply("/data/models/a"), "/local/volumes/models/a");
        assert_eq!(rewriter().apply("/data/modelsx"), "/local/volumes/data/modelsx");
    }

    #[test]
    fn a_path_that_only_begins_alike_stays() {
        assert_eq!(rewriter().apply("/database"), "/database");
        assert_eq!(rewriter().apply("/data.bak"), "/data.bak");
    }

    #[test]
    fn a_path_after_an_equals_sign_or_a_space_is_rewritten() {
        assert_eq!(
            rewriter().apply("--volume=claim=/data"),
            "--volume=claim=/local/volumes/data"
        );
        assert_eq!(
            rewriter().apply("cat /data/x > /data/y;"),
            "cat /local/volumes/data/x > /local/volumes/data/y;"
        );
    }

    #[test]
    fn a_uri_or_a_longer_path_that_contains_a_mount_path_stays() {
        for text in ["pvc://claim/data", "file:///data/x", "/mnt/data", "a/data", "./data"] {
            assert_eq!(rewriter().apply(text), text);
        }
    }

    proptest! {
        #[test]
        fn text_without_a_slash_is_never_changed(text in "[^/]*") {
            prop_assert_eq!(rewriter().apply(&text), text);
        }
    }
}
