//! The templates by which the critic is asked, by name.

use std::{collections::BTreeMap, sync::Arc};

use flotilla_api::conversion::Template;
use flotilla_model::Tokenizer;

use super::{ServiceError, verdict::VerdictTokens};
use crate::{
    prompt::{
        PromptError,
        critic::{CriticTemplate, Shows},
    },
    uri::Volumes,
};

/// The template of comparisons where the spec names none.
const DEFAULT: &str = "critic-short";

/// The templates that every server has.
const BUILTIN: [&str; 3] = ["critic-short", "critic-criteria", "critic-score"];

/// A template, and the tokens of its labels.
#[derive(Debug)]
pub struct Asking {
    /// How the critic is asked.
    pub template: CriticTemplate,
    /// Tokens from which a verdict's log-odds are read.
    pub tokens: VerdictTokens,
}

/// Templates by name. The first that compares, and the first that scores, are those of requests that name none.
#[derive(Debug)]
pub struct Critics(Vec<(String, Arc<Asking>)>);

/// The templates of a server: `configured`, or critic-short, first, which comparisons use where a request names none, then the
/// named ones, then those that come with the worker.
pub fn load(
    configured: Option<&Template>,
    named: &BTreeMap<String, Template>,
    volumes: &Volumes,
) -> Result<Vec<(String, CriticTemplate)>, PromptError> {
    let default = Template {
        builtin: Some(DEFAULT.to_owned()),
        ..Template::default()
    };
    let first = configured.unwrap_or(&default);
    let name = first.builtin.as_deref().unwrap_or("default");
    let mut templates = vec![(name.to_owned(), CriticTemplate::load(first, volumes)?)];
    for (name, template) in named {
        let template = CriticTemplate::load(template, volumes)?;
        match templates.iter_mut().find(|(known, _)| known == name) {
            Some(place) => place.1 = template,
            None => templates.push((name.clone(), template)),
        }
    }
    for name in BUILTIN {
        if !templates.iter().any(|(known, _)| known == name) {
            templates.push((name.to_owned(), CriticTemplate::builtin(name)?));
        }
    }
    Ok(templates)
}

impl Critics {
    /// Of these templates.
    pub fn new(templates: Vec<(String, CriticTemplate)>, tokenizer: &Tokenizer) -> Self {
        let asking = |(name, template): (String, CriticTemplate)| {
            let tokens = VerdictTokens::new(tokenizer, &template.form);
            (name, Arc::new(Asking { template, tokens }))
        };
        Self(templates.into_iter().map(asking).collect())
    }

    /// The named template, or the first that shows what is to be judged.
    pub fn find(&self, name: Option<&str>, shows: Shows) -> Result<Arc<Asking>, ServiceError> {
        let fits = |asking: &Arc<Asking>| asking.template.shows() == shows;
        let fitting = self.0.iter().filter(|(_, asking)| fits(asking));
        let found = match name {
            None => fitting.clone().next(),
            Some(name) => fitting.clone().find(|(known, _)| known == name),
        };
        if let Some((_, asking)) = found {
            return Ok(asking.clone());
        }
        let names: Vec<&str> = fitting.map(|(name, _)| name.as_str()).collect();
        let (what, names) = match shows {
            Shows::Pair => ("compares two responses", names.join(", ")),
            Shows::One => ("scores one response", names.join(", ")),
        };
        let name = name.unwrap_or_default();
        let message = format!("there is no template {name:?} that {what} (there are {names})");
        Err(ServiceError::invalid("template", message))
    }
}
