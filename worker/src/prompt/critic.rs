//! How a critic is asked: its template, its labels, and the box they stand in.
//!
//! A file is the template itself, with an optional head between two lines `---`, or a YAML file that describes a
//! template beside it. So published prompts are loaded as they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use flotilla_api::conversion::Template;
use serde::Deserialize;

use super::{LABELS, PromptError, PromptTemplate, Syntax, read, source};
use crate::{critic::scale::Scale, uri::Volumes};

/// The line that begins the head of a template.
const HEAD: &str = "---\n";

/// The longest label.
const MAX_LABEL_BYTES: usize = 200;

/// What templates of critics may show, in our names.
const PAIR: [&str; 3] = ["question", "response_1", "response_2"];
const ONE: [&str; 5] = ["question", "response", "min", "max", "step"];

/// The head of a template, or a YAML file that describes one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Description {
    /// The file of the template, beside this one.
    template: Option<String>,
    /// The template itself.
    text: Option<String>,
    /// How the template is written.
    syntax: Syntax,
    /// Our names to those that the template uses.
    names: BTreeMap<String, String>,
    /// A file beside this one: Jinja over `content`, the filled template.
    wrap: Option<String>,
    /// What the critic writes if response 1 is better, if response 2 is, and, where it may, if neither is.
    labels: Option<Vec<String>>,
    /// What opens and what closes the box of the verdict.
    #[serde(rename = "box")]
    brackets: Option<[String; 2]>,
    /// The scores of a template for one response.
    scale: Option<ScaleDescription>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScaleDescription {
    min: f64,
    max: f64,
    #[serde(default = "one")]
    step: f64,
}

fn one() -> f64 {
    1.0
}

/// What a verdict looks like.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Form {
    /// For response 1, for response 2, and for neither, where that is a verdict.
    pub labels: Vec<String>,
    /// Opens the box.
    pub open: String,
    /// Closes it.
    pub close: String,
}

impl Default for Form {
    fn default() -> Self {
        Self {
            labels: LABELS.map(str::to_owned).to_vec(),
            open: "\\boxed{".to_owned(),
            close: "}".to_owned(),
        }
    }
}

/// What a template shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shows {
    /// Two responses, to be compared.
    Pair,
    /// One response, to be scored.
    One,
}

/// A critic's template with the form of its verdicts.
#[derive(Clone, Debug)]
pub struct CriticTemplate {
    prompt: PromptTemplate,
    shows: Shows,
    /// What its verdicts look like.
    pub form: Form,
    /// The scores, where a request names none.
    pub scale: Scale,
}

impl CriticTemplate {
    /// The template that a spec names, with its head or description.
    pub fn load(template: &Template, volumes: &Volumes) -> Result<Self, PromptError> {
        let (name, path, text) = source(template, volumes)?;
        let described = |text: &str| {
            serde_yaml::from_str::<Description>(text).map_err(|source| PromptError::Description {
                name: name.clone(),
                source,
            })
        };
        let beside = |file: &str| read(&beside(&name, path.as_deref(), file)?);
        if !is_yaml(path.as_deref()) {
            let (head, body) = split_head(&name, &text)?;
            let description = head.map(described).transpose()?.unwrap_or_default();
            if description.template.is_some() || description.text.is_some() {
                let fault = "the head of a template names no other: template and text belong into a YAML file";
                return Err(invalid(&name, fault));
            }
            return Self::describe(&name, body.to_owned(), description, beside);
        }
        let mut description = described(&text)?;
        let body = match (description.template.take(), description.text.take()) {
            (Some(file), None) => beside(&file)?,
            (None, Some(text)) => text,
            _ => return Err(invalid(&name, "it takes exactly one of template and text")),
        };
        Self::describe(&name, body, description, beside)
    }

    /// A template that comes with the worker.
    pub fn builtin(name: &str) -> Result<Self, PromptError> {
        let template = Template {
            builtin: Some(name.to_owned()),
            ..Template::default()
        };
        Self::load(&template, &Volumes::default())
    }

    fn describe(
        name: &str,
        body: String,
        description: Description,
        beside: impl Fn(&str) -> Result<String, PromptError>,
    ) -> Result<Self, PromptError> {
        let known: BTreeSet<&str> = PAIR.into_iter().chain(ONE).collect();
        if let Some(unknown) = description.names.keys().find(|name| !known.contains(name.as_str())) {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(invalid(
                name,
                format!("names has {unknown:?}, which is none of {known}"),
            ));
        }
        let mut prompt = PromptTemplate::compile(name, body, description.syntax)?;
        prompt.names = description.names;
        if let Some(file) = &description.wrap {
            let wrap = PromptTemplate::compile(file, beside(file)?, Syntax::Jinja)?;
            prompt.wrap = Some(Box::new(wrap));
        }
        let scale = match description.scale {
            Some(ScaleDescription { min, max, step }) => {
                Scale::new(min, max, step).map_err(|error| invalid(name, error.to_string()))?
            }
            None => Scale::default(),
        };
        let template = Self {
            shows: shows(&prompt)?,
            form: form(name, description.labels, description.brackets)?,
            prompt,
            scale,
        };
        // What cannot be rendered is found before the first request.
        match template.shows {
            Shows::Pair => template.pair("question", ["first", "second"])?,
            Shows::One => template.one("question", "response", &scale)?,
        };
        Ok(template)
    }

    /// The template alone.
    pub(super) fn into_prompt(self) -> PromptTemplate {
        self.prompt
    }

    /// Whether it compares or scores.
    pub fn shows(&self) -> Shows {
        self.shows
    }

    /// Name or file, for messages.
    pub fn name(&self) -> &str {
        &self.prompt.name
    }

    /// The user's text for two responses.
    pub fn pair(&self, question: &str, responses: [&str; 2]) -> Result<String, PromptError> {
        self.prompt.render(question, Some(responses))
    }

    /// The user's text for one response and its scale.
    pub fn one(&self, question: &str, response: &str, scale: &Scale) -> Result<String, PromptError> {
        let values = [question, response].map(str::to_owned);
        let numbers = [scale.min(), scale.max(), scale.step()].map(Scale::label);
        let values = ONE.into_iter().zip(values.into_iter().chain(numbers));
        self.prompt.fill(values.collect())
    }
}

/// Whether there is more to a file than the template.
pub(super) fn is_described(path: Option<&Path>, text: &str) -> bool {
    is_yaml(path) || text.starts_with(HEAD)
}

fn is_yaml(path: Option<&Path>) -> bool {
    let kind = path.and_then(Path::extension);
    kind.is_some_and(|kind| kind == "yaml" || kind == "yml")
}

fn invalid(name: &str, fault: impl Into<String>) -> PromptError {
    PromptError::Invalid {
        name: name.to_owned(),
        fault: fault.into(),
    }
}

/// The head between two lines `---`, and the template after it.
fn split_head<'a>(name: &str, text: &'a str) -> Result<(Option<&'a str>, &'a str), PromptError> {
    let Some(rest) = text.strip_prefix(HEAD) else {
        return Ok((None, text));
    };
    match rest.split_once("\n---\n") {
        Some((head, body)) => Ok((Some(head), body)),
        None => Err(invalid(
            name,
            "its head begins with a line --- and does not end with one",
        )),
    }
}

/// A file in the folder of the file that names it.
fn beside(name: &str, path: Option<&Path>, file: &str) -> Result<PathBuf, PromptError> {
    let Some(folder) = path.and_then(Path::parent) else {
        return Err(invalid(
            name,
            format!("it names the file {file:?}, but is no file itself"),
        ));
    };
    let inside = Path::new(file)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !inside {
        return Err(invalid(name, format!("the file {file:?} does not lie beside it")));
    }
    Ok(folder.join(file))
}

/// What the template shows, by the names it uses.
fn shows(prompt: &PromptTemplate) -> Result<Shows, PromptError> {
    let used = prompt.used_names();
    let uses = |ours: &str| used.contains(ours) || prompt.names.get(ours).is_some_and(|theirs| used.contains(theirs));
    match (uses("response_1") && uses("response_2"), uses("response")) {
        (true, false) => Ok(Shows::Pair),
        (false, true) => Ok(Shows::One),
        _ => {
            let used = used.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            let fault = format!(
                "it must show response_1 and response_2, or response, and uses {}; if they have other names there, set names",
                if used.is_empty() { "no names" } else { &used }
            );
            Err(invalid(&prompt.name, fault))
        }
    }
}

fn form(name: &str, labels: Option<Vec<String>>, brackets: Option<[String; 2]>) -> Result<Form, PromptError> {
    let mut form = Form::default();
    if let Some([open, close]) = brackets {
        if open.trim().is_empty() || close.trim().is_empty() {
            return Err(invalid(
                name,
                "box takes what opens it and what closes it, neither of them empty",
            ));
        }
        (form.open, form.close) = (open, close);
    }
    if let Some(labels) = labels {
        let distinct: BTreeSet<String> = labels.iter().map(|label| label.trim().to_lowercase()).collect();
        let sound = |label: &String| !label.trim().is_empty() && label.len() <= MAX_LABEL_BYTES;
        if !(2..=3).contains(&labels.len()) || distinct.len() != labels.len() || !labels.iter().all(sound) {
            let fault = format!(
                "labels takes two or three different texts of at most {MAX_LABEL_BYTES} bytes (response 1 is better, \
                 response 2 is, neither is), not {labels:?}"
            );
            return Err(invalid(name, fault));
        }
        form.labels = labels;
    }
    Ok(form)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)], name: &str) -> Result<CriticTemplate, String> {
        let directory = tempfile::tempdir().expect("a directory");
        for (file, text) in files {
            std::fs::write(directory.path().join(file), text).expect("writes");
        }
        let template = Template {
            uri: Some(format!("file://{}", directory.path().join(name).display())),
            ..Template::default()
        };
        CriticTemplate::load(&template, &Volumes::default()).map_err(|error| crate::error::chain(&error))
    }

    #[test]
    fn presets_put_the_question_before_the_responses_and_the_responses_last() {
        let pair = CriticTemplate::builtin("critic-criteria").expect("compiles");
        let text = pair.pair("Q?", ["AAA", "BBB"]).expect("renders");
        assert!(
            text.ends_with("Question: Q?\n\nResponse 1: AAA\n\nResponse 2: BBB"),
            "{text}"
        );
        let one = CriticTemplate::builtin("critic-score").expect("compiles");
        let text = one.one("Q?", "AAA", &Scale::default()).expect("renders");
        assert!(
            text.ends_with("Question: Q?\n\nResponse: AAA") && text.contains("10 for one"),
            "{text}"
        );
        assert_eq!((pair.shows(), one.shows()), (Shows::Pair, Shows::One));
    }

    #[test]
    fn a_file_of_a_plain_template_has_the_usual_labels() {
        let template = load(
            &[("a.jinja", "{{ question }} {{ response_1 }} {{ response_2 }}")],
            "a.jinja",
        );
        assert_eq!(template.expect("loads").form, Form::default());
    }

    #[test]
    fn a_head_sets_labels_and_box() {
        let text = "---\nlabels: [A, B]\nbox: [\"[[\", \"]]\"]\n---\n{{ response_1 }} or {{ response_2 }}?\n";
        let template = load(&[("a.jinja", text)], "a.jinja").expect("loads");
        assert_eq!(template.form.labels, ["A", "B"]);
        assert_eq!(
            (template.form.open.as_str(), template.form.close.as_str()),
            ("[[", "]]")
        );
        assert_eq!(template.pair("Q", ["x", "y"]).expect("renders"), "x or y?");
    }

    #[test]
    fn a_description_loads_a_published_prompt_and_its_format_prompt_as_they_are() {
        let published = " Judge.\n\nQuestion: {question}\n\nAnswer 1: {a1}\n\nAnswer 2: {a2}\n\nSay {{X}}.\n";
        let wrap = "{{ content | trim }} Think first.";
        let yaml = "template: prompt.txt\nsyntax: format\nwrap: think.jinja\nnames: {response_1: a1, response_2: a2}\n\
                    labels: [Answer 1, Answer 2]\n";
        let files = [("prompt.txt", published), ("think.jinja", wrap), ("critic.yaml", yaml)];
        let template = load(&files, "critic.yaml").expect("loads");
        let text = template.pair("Q?", ["{a2}", "7"]).expect("renders");
        assert_eq!(
            text,
            "Judge.\n\nQuestion: Q?\n\nAnswer 1: {a2}\n\nAnswer 2: 7\n\nSay {X}. Think first."
        );
    }

    #[test]
    fn a_scale_of_a_hundred_is_configured() {
        let yaml = "text: '{{ q }}: {{ r }}'\nnames: {question: q, response: r}\nscale: {min: 0, max: 100}\n";
        let template = load(&[("s.yaml", yaml)], "s.yaml").expect("loads");
        assert_eq!((template.shows(), template.scale.labels().len()), (Shows::One, 101));
    }

    #[test]
    fn what_is_wrong_with_a_template_is_said_when_it_is_loaded() {
        let pair = "{{ response_1 }} {{ response_2 }}";
        for (file, text, reason) in [
            (
                "a.jinja",
                "{{ question }}",
                "it must show response_1 and response_2, or response, and uses question",
            ),
            ("a.jinja", "{{ response_1 ", "is invalid"),
            ("a.jinja", "---\nlabels: [a]\n", "does not end with one"),
            (
                "a.jinja",
                &format!("---\nlabels: [a]\n---\n{pair}"),
                "two or three different texts",
            ),
            (
                "a.jinja",
                &format!("---\nlabels: [a, A]\n---\n{pair}"),
                "two or three different texts",
            ),
            (
                "a.jinja",
                &format!("---\nlabel: [a, b]\n---\n{pair}"),
                "unknown field `label`",
            ),
            (
                "a.jinja",
                &format!("---\nnames: {{answer: a}}\n---\n{pair}"),
                "none of max, min",
            ),
            ("a.jinja", &format!("{pair} {{{{ evidence }}}}"), "failed to render"),
            ("a.yaml", "labels: [a, b]\n", "exactly one of template and text"),
            ("a.yaml", "template: ../etc/passwd\n", "does not lie beside it"),
            ("a.yaml", "template: missing.txt\n", "missing.txt"),
            (
                "a.yaml",
                "text: '{response_1} {response_2} {}'\nsyntax: format\n",
                "{} is no placeholder",
            ),
            (
                "a.yaml",
                "text: '{{ response }}'\nscale: {min: 5, max: 1}\n",
                "min < max",
            ),
        ] {
            let error = load(&[(file, text)], file).expect_err(reason);
            assert!(error.contains(reason), "{reason} is not in: {error}");
        }
    }
}
