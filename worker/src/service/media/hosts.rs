//! Which URLs a client may have fetched: an allow-list of hosts.

use std::{fmt, str::FromStr};

use reqwest::Url;

use super::address;

/// One entry of the allow-list: `example.com`, `*.example.com`, `example.com:8443`, `http://example.com`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostPattern {
    scheme: &'static str,
    /// Lower case, without the `*.` of a wildcard.
    host: String,
    /// Whether hosts below `host` are meant, and not itself.
    below: bool,
    port: u16,
}

/// Why an entry is no host pattern.
#[derive(Clone, Debug, thiserror::Error)]
#[error("image host {text:?} {fault}: write example.com, *.example.com, example.com:8443 or http://example.com")]
pub struct BadPattern {
    text: String,
    fault: &'static str,
}

impl FromStr for HostPattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Self, BadPattern> {
        let bad = |fault| BadPattern {
            text: text.to_owned(),
            fault,
        };
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => ("http", rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => ("https", rest),
            Some(_) => return Err(bad("is neither http nor https")),
            None => ("https", text),
        };
        let (below, name) = match rest.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, rest),
        };
        if name.is_empty() || name.contains(['/', '?', '#', '@', '*', '\\']) || name.contains(char::is_whitespace) {
            return Err(bad("is not a host"));
        }
        let url = Url::parse(&format!("{scheme}://{name}/")).map_err(|_| bad("is not a host"))?;
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err(bad("is not a host"));
        };
        if let Some(address) = literal(&url) {
            if below {
                return Err(bad("is an address, which has no hosts below it"));
            }
            if address::refusal(address).is_some() {
                return Err(bad("is not a public address"));
            }
        }
        Ok(Self {
            scheme,
            host: host.to_owned(),
            below,
            port,
        })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = if self.below { "*." } else { "" };
        write!(f, "{}://{below}{}:{}", self.scheme, self.host, self.port)
    }
}

impl HostPattern {
    fn admits(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        let named = if self.below {
            host.strip_suffix(&self.host)
                .is_some_and(|left| left.len() > 1 && left.ends_with('.'))
        } else {
            host == self.host
        };
        named && url.scheme() == self.scheme && url.port_or_known_default() == Some(self.port)
    }
}

/// The address that a URL names in place of a host. Every spelling of one (decimal, octal, hexadecimal) has been read by the
/// URL's parser.
pub fn literal(url: &Url) -> Option<std::net::IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Refuses a URL that the list does not name, before anything is looked up for it.
pub fn check(url: &Url, hosts: &[HostPattern]) -> Result<(), String> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("{}:// is not fetched", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a URL with a user name or password is not fetched".to_owned());
    }
    let Some(host) = url.host_str() else {
        return Err("the URL names no host".to_owned());
    };
    if let Some(reason) = literal(url).and_then(address::refusal) {
        return Err(format!("{host} is {reason}"));
    }
    if hosts.iter().any(|pattern| pattern.admits(url)) {
        return Ok(());
    }
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let origin = format!("{}://{host}{port}", url.scheme());
    Err(format!(
        "{origin} is not among the hosts from which this server fetches images (--image-host)"
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn admitted(patterns: &[&str], url: &str) -> bool {
        let hosts: Vec<HostPattern> = patterns.iter().map(|text| text.parse().expect("a pattern")).collect();
        check(&Url::parse(url).expect("a URL"), &hosts).is_ok()
    }

    #[test]
    fn a_host_admits_itself_and_nothing_else() {
        let host = ["Example.com"];
        assert!(admitted(&host, "https://example.com/a.png?b"));
        assert!(admitted(&host, "https://EXAMPLE.com:443/"));
        for url in [
            "https://example.com:8443/",
            "http://example.com/",
            "https://a.example.com/",
            "https://example.com.evil.test/",
            "https://notexample.com/",
            "https://user@example.com/",
            "https://:secret@example.com/",
        ] {
            assert!(!admitted(&host, url), "{url}");
        }
    }

    #[test]
    fn a_wildcard_admits_what_lies_below_it() {
        let hosts = ["*.example.com"];
        assert!(admitted(&hosts, "https://a.example.com/") && admitted(&hosts, "https://a.b.example.com/"));
        for url in ["https://example.com/", "https://.example.com/", "https://aexample.com/"] {
            assert!(!admitted(&hosts, url), "{url}");
        }
    }

    #[test]
    fn plain_http_and_other_ports_are_admitted_by_name_only() {
        assert!(admitted(&["http://example.com"], "http://example.com/"));
        assert!(!admitted(&["http://example.com"], "https://example.com/"));
        assert!(admitted(&["example.com:8443"], "https://example.com:8443/"));
        assert!(!admitted(&["example.com:8443"], "https://example.com/"));
    }

    #[test]
    fn an_entry_that_is_no_host_is_refused_with_what_to_write() {
        for text in [
            "",
            "*",
            "*.",
            "a/b",
            "ftp://a",
            "user@a",
            "a b",
            "10.0.0.1",
            "*.1.1.1.1",
            "[::1]",
            "2130706433",
            "a\\b",
        ] {
            let error = text.parse::<HostPattern>().expect_err(text);
            assert!(error.to_string().contains("write example.com"), "{error}");
        }
        assert!("1.1.1.1".parse::<HostPattern>().is_ok());
    }

    /// Spellings that browsers and URL parsers take for an IPv4 address.
    fn spellings(address: u32) -> Vec<String> {
        let [a, b, c, d] = address.to_be_bytes();
        let tail = address & 0xff_ffff;
        vec![
            format!("{a}.{b}.{c}.{d}"),
            format!("{address}"),
            format!("0x{address:x}"),
            format!("0{address:o}"),
            format!("0x{a:x}.0{b:o}.{c}.0x{d:X}"),
            format!("{a}.{tail}"),
            format!("{a}.{b}.{}", address & 0xffff),
            format!("{a}.{b}.{c}.{d}."),
            format!("%3{}.{b}.{c}.{d}", a % 10),
            format!("[::ffff:{a}.{b}.{c}.{d}]"),
            format!("[64:ff9b::{a}.{b}.{c}.{d}]"),
            format!("[2002:{:x}:{:x}::1]", address >> 16, address & 0xffff),
            format!("[0:0:0:0:0:FFFF:{:X}:{:x}]", address >> 16, address & 0xffff),
        ]
    }

    /// An address of one of the ranges that nobody outside may reach.
    fn inner() -> impl Strategy<Value = u32> {
        (any::<u32>(), 0usize..7).prop_map(|(bits, range)| {
            let (base, length) = [
                (0x0a00_0000, 8),
                (0x7f00_0000, 8),
                (0xa9fe_0000, 16),
                (0xac10_0000, 12),
                (0xc0a8_0000, 16),
                (0x6440_0000, 10),
                (0x0000_0000, 8),
            ][range];
            base | (bits & (u32::MAX >> length))
        })
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_private_address_passes(address in inner()) {
            // A list that would admit it by name, were it not an address.
            for spelling in spellings(address) {
                if spelling.starts_with('%') {
                    continue;
                }
                for scheme in ["http", "https"] {
                    let Ok(url) = Url::parse(&format!("{scheme}://{spelling}/a.png")) else { continue };
                    let pattern = HostPattern {
                        scheme,
                        host: url.host_str().expect("a host").to_owned(),
                        below: false,
                        port: url.port_or_known_default().expect("a port"),
                    };
                    prop_assert!(pattern.admits(&url));
                    prop_assert!(check(&url, &[pattern]).is_err(), "{}", url);
                }
            }
        }

        #[test]
        fn no_pattern_and_no_url_panics(text in "\\PC{0,40}", url in "(https?|ftp|data|file)?:?/?/?\\PC{0,40}") {
            let pattern = text.parse::<HostPattern>();
            if let Ok(url) = Url::parse(&url) {
                let _ = check(&url, &pattern.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
