//! Text formats that the API server checks. Unknown formats are not checked, as there.

use std::{net::IpAddr, sync::LazyLock};

use base64::Engine as _;
use regex::Regex;

static UUID: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new("(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}$").ok());
static LABEL: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$").ok());
static HOSTNAME: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,62})(\.[a-zA-Z0-9_][a-zA-Z0-9_-]{0,62})*\.?)$").ok());
static GO_DURATION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^[+-]?(0|(([0-9]+(\.[0-9]*)?|\.[0-9]+)\s*(ns|us|µs|ms|s|m|h|d|w)\s*)+)$").ok());

/// True when `text` is of `format` or the format is not one that is checked.
#[must_use]
pub fn matches(format: &str, text: &str) -> bool {
    match format {
        "date-time" | "datetime" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok() && text.len() == 10,
        "duration" => full(&GO_DURATION, text),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "uuid" => full(&UUID, text),
        "ipv4" => matches!(text.parse(), Ok(IpAddr::V4(_))),
        "ipv6" => matches!(text.parse(), Ok(IpAddr::V6(_))),
        "cidr" => cidr(text),
        "uri" => text.starts_with('/') || text.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some()),
        "hostname" => text.len() <= 255 && full(&HOSTNAME, text),
        "email" => text
            .split_once('@')
            .is_some_and(|(user, host)| !user.is_empty() && !host.is_empty()),
        "k8s-short-name" => full(&LABEL, text),
        "k8s-long-name" => text.len() <= 253 && text.split('.').all(|part| full(&LABEL, part)),
        _ => true,
    }
}

fn full(pattern: &LazyLock<Option<Regex>>, text: &str) -> bool {
    pattern.as_ref().is_some_and(|p| p.is_match(text))
}

fn cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else {
        return false;
    };
    match (address.parse(), bits.parse::<u8>()) {
        (Ok(IpAddr::V4(_)), Ok(bits)) => bits <= 32,
        (Ok(IpAddr::V6(_)), Ok(bits)) => bits <= 128,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_accept_their_texts_and_refuse_others() {
        for (format, good, bad) in [
            ("date-time", "2026-11-23T19:00:00Z", "yesterday"),
            ("date", "2026-11-23", "2026-13-01"),
            ("duration", "1h30m", "soon"),
            ("byte", "aGk=", "a"),
            ("uuid", "00000000-0000-4000-8000-000000000000", "x"),
            ("ipv4", "127.0.0.1", "::1"),
            ("cidr", "10.0.0.0/8", "10.0.0.0/33"),
            ("uri", "pvc://claim/path", "no scheme"),
            ("k8s-short-name", "a-b", "A"),
        ] {
            assert!(matches(format, good), "{format} {good}");
            assert!(!matches(format, bad), "{format} {bad}");
        }
        assert!(matches("int64", "anything"));
    }
}
