//! How a question and two responses become the user's text.
//!
//! Templates are data: Jinja over `question`, `response_1` and `response_2`, shipped in `worker/templates` or named by
//! the resource. Preparing data and serving a critic render with the same code, so that a critic is asked as it was
//! trained.
//!
//! | file | what |
//! |---|---|
//! | [`critic`] | a critic's template with its labels and its box |
//! | [`placeholders`] | texts with `{name}` placeholders |

pub mod critic;
pub mod placeholders;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use flotilla_api::conversion::Template;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Deserialize;

use self::{
    critic::CriticTemplate,
    placeholders::{PlaceholderError, Placeholders},
};
use crate::{
    error::WorkerError,
    uri::{UriError, Volumes},
};

/// The templates that come with the worker, by name.
const BUILTIN: [(&str, &str); 5] = [
    ("critic-short", include_str!("../../templates/critic-short.jinja")),
    ("critic-criteria", include_str!("../../templates/critic-criteria.jinja")),
    ("critic-score", include_str!("../../templates/critic-score.jinja")),
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
    /// The placeholders of the template cannot be read.
    #[error("template {name:?} is invalid")]
    Placeholder {
        /// Name of the template.
        name: String,
        /// Why.
        source: PlaceholderError,
    },
    /// The head or description of the template cannot be read.
    #[error("the description of template {name:?} is invalid")]
    Description {
        /// Name of the template.
        name: String,
        /// Why.
        source: serde_yaml::Error,
    },
    /// The template is not one for what it is to do.
    #[error("template {name:?}: {fault}")]
    Invalid {
        /// Name of the template.
        name: String,
        /// What is wrong.
        fault: String,
    },
    /// The template has a placeholder for something that there is not.
    #[error("template {name:?} has a placeholder {{{placeholder}}}, for which there is no value")]
    NoValue {
        /// Name of the template.
        name: String,
        /// The placeholder.
        placeholder: String,
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

/// How a template is written.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Syntax {
    /// `{{ question }}`, with filters and conditions.
    #[default]
    Jinja,
    /// `{question}`, as Python's `str.format` reads it.
    Format,
}

/// A compiled template.
#[derive(Clone, Debug)]
pub struct PromptTemplate {
    name: String,
    body: Body,
    /// Our names to those that the template uses.
    names: BTreeMap<String, String>,
    /// A template over `content`, the filled template.
    wrap: Option<Box<Self>>,
}

#[derive(Clone, Debug)]
enum Body {
    Jinja(Box<Environment<'static>>),
    Format(Placeholders),
}

impl PromptTemplate {
    /// The template that a spec names; of a critic's template with a head or description what it renders.
    pub fn load(template: &Template, volumes: &Volumes) -> Result<Self, PromptError> {
        let (name, path, text) = source(template, volumes)?;
        if critic::is_described(path.as_deref(), &text) {
            return Ok(CriticTemplate::load(template, volumes)?.into_prompt());
        }
        Self::compile(&name, text, Syntax::Jinja)
    }

    /// A template that comes with the worker.
    pub fn builtin(name: &str) -> Result<Self, PromptError> {
        Self::compile(name, builtin_text(name)?.to_owned(), Syntax::Jinja)
    }

    fn compile(name: &str, text: String, syntax: Syntax) -> Result<Self, PromptError> {
        let body = match syntax {
            Syntax::Jinja => Body::Jinja(Box::new(environment(name, text)?)),
            Syntax::Format => {
                // Jinja drops the last line end of a file too.
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let placeholders = Placeholders::parse(text).map_err(|source| PromptError::Placeholder {
                    name: name.to_owned(),
                    source,
                })?;
                Body::Format(placeholders)
            }
        };
        Ok(Self {
            name: name.to_owned(),
            body,
            names: BTreeMap::new(),
            wrap: None,
        })
    }

    /// The user's text for a question and, where a critic is asked, the two responses.
    pub fn render(&self, question: &str, responses: Option<[&str; 2]>) -> Result<String, PromptError> {
        let mut values = BTreeMap::from([("question", question.to_owned())]);
        if let Some([response_1, response_2]) = responses {
            values.insert("response_1", response_1.to_owned());
            values.insert("response_2", response_2.to_owned());
        }
        self.fill(values)
    }

    /// The text with values under our names and under those that the template has for them.
    fn fill(&self, values: BTreeMap<&str, String>) -> Result<String, PromptError> {
        let theirs = self.names.iter().filter_map(|(ours, theirs)| {
            let value = values.get(ours.as_str())?;
            Some((theirs.clone(), value.clone()))
        });
        let mut named: BTreeMap<String, String> = theirs.collect();
        for (ours, value) in values {
            named.entry(ours.to_owned()).or_insert(value);
        }
        let content = match &self.body {
            Body::Jinja(environment) => environment
                .get_template(TEMPLATE)
                .and_then(|template| template.render(&named))
                .map_err(|source| PromptError::Render {
                    name: self.name.clone(),
                    source,
                })?,
            Body::Format(placeholders) => {
                let filled = placeholders.fill(|name| named.get(name).cloned());
                filled.map_err(|placeholder| PromptError::NoValue {
                    name: self.name.clone(),
                    placeholder: placeholder.to_owned(),
                })?
            }
        };
        match &self.wrap {
            Some(wrap) => wrap.fill(BTreeMap::from([("content", content)])),
            None => Ok(content),
        }
    }

    /// The names that the template asks for.
    fn used_names(&self) -> BTreeSet<String> {
        match &self.body {
            Body::Jinja(environment) => {
                let template = environment.get_template(TEMPLATE);
                let used = template.map(|template| template.undeclared_variables(false));
                used.unwrap_or_default().into_iter().collect()
            }
            Body::Format(placeholders) => placeholders.names().map(str::to_owned).collect(),
        }
    }
}

fn environment(name: &str, text: String) -> Result<Environment<'static>, PromptError> {
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
    Ok(environment)
}

/// Name, file and text of the template that a spec names.
fn source(template: &Template, volumes: &Volumes) -> Result<(String, Option<PathBuf>, String), PromptError> {
    match (&template.builtin, &template.uri, &template.inline) {
        (Some(name), None, None) => Ok((name.clone(), None, builtin_text(name)?.to_owned())),
        (None, Some(uri), None) => {
            let path = volumes.resolve(uri)?;
            let text = read(&path)?;
            Ok((uri.clone(), Some(path), text))
        }
        (None, None, Some(text)) => Ok(("inline".to_owned(), None, text.clone())),
        _ => Err(PromptError::Ambiguous),
    }
}

fn builtin_text(name: &str) -> Result<&'static str, PromptError> {
    let found = BUILTIN.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| PromptError::UnknownBuiltin {
        name: name.to_owned(),
        known: BUILTIN.map(|(name, _)| name).join(", "),
    })
}

fn read(path: &Path) -> Result<String, PromptError> {
    let failed = |source| PromptError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_TEMPLATE_BYTES {
        let path = path.to_owned();
        return Err(PromptError::TooLong { path, bytes });
    }
    std::fs::read_to_string(path).map_err(failed)
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

/// Templates that a command line names, as NAME=FILE.
pub fn named_templates(arguments: &[String]) -> Result<BTreeMap<String, Template>, WorkerError> {
    let mut named = BTreeMap::new();
    for argument in arguments {
        let Some((name, file)) = argument.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            let what = format!("--critic-template takes NAME=FILE, not {argument:?}");
            return Err(WorkerError::invalid(what));
        };
        if named.insert(name.to_owned(), template_argument(file)?).is_some() {
            let what = format!("--critic-template {name:?} is given twice");
            return Err(WorkerError::invalid(what));
        }
    }
    Ok(named)
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
            let values = template.used_names().into_iter().map(|name| (name, "Q?".to_owned()));
            let values: BTreeMap<String, String> = values.collect();
            let values = values.iter().map(|(name, value)| (name.as_str(), value.clone()));
            let text = template.fill(values.collect()).expect("renders");
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
