//! `GET /`: the chat page, a client of this API for the browser. Its files are part of the program; it loads nothing else.
//!
//! | file | what |
//! |---|---|
//! | `index.html`, `page.css`, `icon.svg` | what is seen |
//! | `main.js` | starts the page: which model, which modes, which key |
//! | `chat.js`, `compare.js`, `best_of_n.js`, `score.js` | one mode each |
//! | `api.js` | requests, streams of events, failures |
//! | `pictures.js` | pictures that are dropped, pasted and chosen |
//! | `bracket.js` | a tournament as a drawing and as a table |
//! | `prose.js` | what a model wrote, as elements and never as markup |
//! | `notice.js`, `announcer.js`, `field.js`, `element.js` | failures, screen readers, forms, elements |

use std::sync::LazyLock;

use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::get,
};
use sha2::{Digest, Sha256};

use super::error::ApiError;

/// Only this server's own scripts, styles and pictures, and pictures that the user chose; text of a model never becomes
/// markup, not even by mistake.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// Name, media type, content.
const FILES: [(&str, &str, &str); 16] = [
    ("index.html", HTML, include_str!("index.html")),
    ("page.css", CSS, include_str!("page.css")),
    ("icon.svg", "image/svg+xml", include_str!("icon.svg")),
    ("announcer.js", JAVASCRIPT, include_str!("announcer.js")),
    ("api.js", JAVASCRIPT, include_str!("api.js")),
    ("best_of_n.js", JAVASCRIPT, include_str!("best_of_n.js")),
    ("bracket.js", JAVASCRIPT, include_str!("bracket.js")),
    ("chat.js", JAVASCRIPT, include_str!("chat.js")),
    ("compare.js", JAVASCRIPT, include_str!("compare.js")),
    ("element.js", JAVASCRIPT, include_str!("element.js")),
    ("field.js", JAVASCRIPT, include_str!("field.js")),
    ("main.js", JAVASCRIPT, include_str!("main.js")),
    ("notice.js", JAVASCRIPT, include_str!("notice.js")),
    ("pictures.js", JAVASCRIPT, include_str!("pictures.js")),
    ("prose.js", JAVASCRIPT, include_str!("prose.js")),
    ("score.js", JAVASCRIPT, include_str!("score.js")),
];

/// `"sha256 of the content"` of each of [`FILES`].
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |content: &str| format!("\"{}\"", hex::encode(Sha256::digest(content)));
    FILES.iter().map(|(_, _, content)| tag(content)).collect()
});

/// The page and its files, open to everybody: they hold nothing that the program's source does not.
pub fn router() -> Router {
    Router::new()
        .route("/", get(|headers: HeaderMap| async move { answer(0, &headers) }))
        .route("/page/{name}", get(file))
}

async fn file(Path(name): Path<String>, uri: Uri, headers: HeaderMap) -> Response {
    match FILES.iter().position(|(known, _, _)| *known == name) {
        Some(index) => answer(index, &headers),
        None => {
            let message = format!("there is no {}; the page is at /", uri.path());
            ApiError::new(StatusCode::NOT_FOUND, "not_found", message).into_response()
        }
    }
}

/// The file, or that the client's copy is still good. Clients ask each time, so that a new version is seen at once.
fn answer(index: usize, headers: &HeaderMap) -> Response {
    let (_, media_type, content) = FILES[index];
    let tag = &TAGS[index];
    let known = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|tags| {
            tags.split(',')
                .any(|known| known.trim().trim_start_matches("W/") == tag)
        });
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        content.into_response()
    };
    let fixed: [(HeaderName, &'static str); 6] = [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    let answered = response.headers_mut();
    for (name, value) in fixed {
        answered.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::from_str(tag) {
        answered.insert(header::ETAG, tag);
    }
    response
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use axum::{body::Body, http::Request};
    use tower::ServiceExt;

    use super::*;

    async fn get(path: &str, tag: Option<&str>) -> Response {
        let mut request = Request::get(path);
        if let Some(tag) = tag {
            request = request.header(header::IF_NONE_MATCH, tag);
        }
        let request = request.body(Body::empty()).expect("a request");
        router().oneshot(request).await.expect("an answer")
    }

    fn value(response: &Response, name: HeaderName) -> &str {
        response.headers()[name].to_str().expect("text")
    }

    #[tokio::test]
    async fn the_page_may_load_nothing_from_elsewhere() {
        let page = get("/", None).await;
        assert_eq!(page.status(), StatusCode::OK);
        assert_eq!(value(&page, header::CONTENT_TYPE), HTML);
        let policy = value(&page, header::CONTENT_SECURITY_POLICY);
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(value(&page, header::X_CONTENT_TYPE_OPTIONS), "nosniff");
        assert_eq!(value(&page, header::REFERRER_POLICY), "no-referrer");
    }

    #[tokio::test]
    async fn a_copy_that_is_still_good_is_not_sent_again() {
        let script = get("/page/main.js", None).await;
        let tag = value(&script, header::ETAG).to_owned();
        let again = get("/page/main.js", Some(&format!("\"other\", W/{tag}"))).await;
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(value(&again, header::ETAG), tag);
        let other = get("/page/chat.js", Some(&tag)).await;
        assert_eq!(other.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn only_listed_files_are_served() {
        for path in ["/page/mod.rs", "/page/..%2Fmod.rs", "/page/"] {
            assert_eq!(get(path, None).await.status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn every_file_that_a_file_names_is_served() {
        let served: HashSet<&str> = FILES.iter().map(|(name, _, _)| *name).collect();
        for (name, media_type, content) in FILES {
            let (before, after) = if media_type == JAVASCRIPT {
                ("from \"./", '"')
            } else {
                ("\"page/", '"')
            };
            for rest in content.split(before).skip(1) {
                let named = rest.split(after).next().unwrap_or_default();
                assert!(served.contains(named), "{name} names {named}");
            }
        }
    }

    #[test]
    fn no_file_turns_text_into_markup_or_names_another_host() {
        for (name, _, content) in FILES {
            for forbidden in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
            ] {
                assert!(!content.contains(forbidden), "{name} has {forbidden}");
            }
            let elsewhere = content.replace("http://www.w3.org/", "");
            assert!(!elsewhere.contains("://"), "{name} names another host");
        }
    }
}
