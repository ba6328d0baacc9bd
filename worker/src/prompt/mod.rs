//! How a question and two responses become the user's text.
//!
//! Templates are data: Jinja over `question`, `response_1` and `response_2`, shipped in `worker/templates` or named by
//! the resource. Preparing data and serving a critic render with the same code, so that a critic is asked as it was
//! trained.

use std::path::PathBuf;

use flotilla_api::conversion::Template;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};

use crate::{
    error::WorkerError,
    uri::{UriError, Volumes},
};

/// The templates that come with the worker, by name.
const BUILTIN: [(&str, &str); 4] = [
    ("critic-short", include_str!("../../templates/critic-short.jinja")),
    ("critic-criteria", include_str!("../../templates/critic-criteria.jinja")),
    ("policy-think", include_str!("../../templates/policy-think.jinja")),
    ("plain", include_str!("../../templates/plain.jinja")),
];

/// The verdicts of a critic whose prompts number the responses.
pub const LABELS: [&str; 3] = ["1", "2", "tie"];

/// The largest template file that is read.
const MAX_TEMPLATE_BYTES: u64 = 64 << 10;

/// Why a prompt cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// No such template is shipped.
    #[error("there is no built-in template {name:?} (built in: {known})")]
    UnknownBuiltin {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// Not exactly one member of the template is set.
    #[error("a template takes exactly one of builtin, uri and inline")]
    Ambiguous,
    /// The file of the template is named wrongly.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The file of the template cannot be read.
    #[error("failed to read template {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file of the template is not a template.
    #[error("template {} has {bytes} bytes, more than {MAX_TEMPLATE_BYTES}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The template is not Jinja.
    #[error("template {name:?} is invalid")]
    Syntax {
        /// Name of the template.
        name: String,
        /// Why.
        source: minijinja::Error,
    },
    /// The template asks for something that the row does not have.
    #[error("failed to render template {name:?}")]
    Render {
        /// Name of the template.
        name: String,
        /// Why.
        source: minijinja::Error,
    },
}

impl From<PromptError> for WorkerError {
    fn from(error: PromptError) -> Self {
        Self::permanent("failed to load the prompt template", error)
    }
}

/// A compiled template.
#[derive(Clone, Debug)]
pub struct PromptTemplate {
    name: String,
    environment: Environment<'static>,
}

impl PromptTemplate {
    /// The template that a spec names.
    pub fn load(template: &Template, volumes: &Volumes) -> Result<Self, PromptError> {
        match (&template.builtin, &template.uri, &template.inline) {
            (Some(name), None, None) => Self::builtin(name),
            (None, Some(uri), None) => {
                let path = volumes.resolve(uri)?;
                let read = |source| PromptError::Read {
                    path: path.clone(),
                    source,
                };
                let bytes = std::fs::metadata(&path).map_err(read)?.len();
                if bytes > MAX_TEMPLATE_BYTES {
                    return Err(PromptError::TooLong { path, bytes });
                }
                Self::compile(uri, std::fs::read_to_string(&path).map_err(read)?)
            }
            (None, None, Some(text)) => Self::compile("inline", text.clone()),
            _ => Err(PromptError::Ambiguous),
        }
    }

    /// A template that comes with the worker.
    pub fn builtin(name: &str) -> Result<Self, PromptError> {
        match BUILTIN.iter().find(|(known, _)| *known == name) {
            Some((name, text)) => Self::compile(name, (*text).to_owned()),
            None => Err(PromptError::UnknownBuiltin {
                name: name.to_owned(),
                known: BUILTIN.map(|(name, _)| name).join(", "),
            }),
        }
    }

    fn compile(name: &str, text: String) -> Result<Self, PromptError> {
        let mut environment = Environment::new();
        // A missing response must not silently become an empty one.
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .add_template_owned(TEMPLATE, text)
            .map_err(|source| PromptError::Syntax {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            name: name.to_owned(),
            environment,
        })
    }

    /// The user's text for a question and, where a critic is asked, the two responses.
    pub fn render(&self, question: &str, responses: Option<[&str; 2]>) -> Result<String, PromptError> {
        let values = match responses {
            Some([response_1, response_2]) => context! { question, response_1, response_2 },
            None => context! { question },
        };
        self.environment
            .get_template(TEMPLATE)
            .and_then(|template| template.render(values))
            .map_err(|source| PromptError::Render {
                name: self.name.clone(),
                source,
            })
    }
}

/// Name of the only template in each environment.
const TEMPLATE: &str = "prompt";

/// The template that a command line names: a builtin or a file.
pub fn template_argument(argument: &str) -> Result<Template, WorkerError> {
    if BUILTIN.iter().any(|(name, _)| *name == argument) {
        return Ok(Template {
            builtin: Some(argument.to_owned()),
            ..Template::default()
        });
    }
    let path = std::path::Path::new(argument)
        .canonicalize()
        .map_err(|source| WorkerError::ReadFile {
            what: "template (neither a builtin nor a file)",
            path: argument.into(),
            source,
        })?;
    Ok(Template {
        uri: Some(format!("file://{}", path.display())),
        ..Template::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_critic_prompt_is_the_question_the_responses_and_nothing_more() {
        let template = PromptTemplate::builtin("critic-short").expect("built in");
        assert_eq!(
            template
                .render("What digit is this?", Some(["7", "3"]))
                .expect("renders"),
            "What digit is this?\nResponse 1: 7\nResponse 2: 3\nWhich response is better?"
        );
    }

    #[test]
    fn every_builtin_compiles_and_renders() {
        for (name, _) in BUILTIN {
            let template = PromptTemplate::builtin(name).expect("compiles");
            let text = template.render("Q?", Some(["A", "B"])).expect("renders");
            assert!(text.contains("Q?"), "{name}");
        }
    }

    #[test]
    fn a_missing_response_is_an_error_and_not_an_empty_one() {
        let template = PromptTemplate::builtin("critic-short").expect("built in");
        assert!(matches!(template.render("Q?", None), Err(PromptError::Render { .. })));
    }

    #[test]
    fn text_is_neither_escaped_nor_read_as_a_template() {
        let template = PromptTemplate::builtin("plain").expect("built in");
        assert_eq!(
            template.render("a < b & {{ question }}", None).expect("renders"),
            "a < b & {{ question }}"
        );
    }

    #[test]
    fn a_template_is_read_from_a_file_of_a_claim() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(
            directory.path().join("mine.jinja"),
            "{{ response_2 }} or {{ response_1 }}?",
        )
        .expect("writes");
        let volumes = Volumes::parse(&[format!("data={}", directory.path().display())]).expect("a volume");
        let template = Template {
            uri: Some("pvc://data/mine.jinja".to_owned()),
            ..Template::default()
        };
        let template = PromptTemplate::load(&template, &volumes).expect("loads");
        assert_eq!(template.render("Q?", Some(["a", "b"])).expect("renders"), "b or a?");
    }

    #[test]
    fn an_unknown_builtin_names_the_known_ones() {
        let error = PromptTemplate::builtin("critic-long").expect_err("unknown");
        assert!(error.to_string().contains("critic-short, critic-criteria"), "{error}");
    }
}
