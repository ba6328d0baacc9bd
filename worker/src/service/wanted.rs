//! What a client wants drawn after a prompt, and what its text must be.

use std::sync::{Arc, OnceLock};

use flotilla_engine::{Constraint, EngineError, GrammarSource, Grammars, Prompt, Recipe, Request, Sampling};

use super::{Service, ServiceError, generation::Generation};

/// Completions of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// How many.
    pub n: usize,
    /// How their tokens are drawn. `max_tokens` and the tokens that end a turn are set once the prompt is known; `stop_ids` are
    /// those that the client adds.
    pub sampling: Sampling,
    /// Longest completion; what the context leaves if absent.
    pub max_tokens: Option<usize>,
    /// Strings that end a completion.
    pub stops: Vec<String>,
    /// Go on after the tokens that end a turn.
    pub ignore_eos: bool,
    /// What a text must be.
    pub form: Option<Form>,
}

/// What a text must be, and the field of the request that says so.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// The field.
    pub field: &'static str,
    /// What a text must be.
    pub shape: Shape,
}

/// What a text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// A text of a grammar.
    Grammar(GrammarSource),
    /// One of these texts.
    Choice(Vec<String>),
}

/// Turns forms into constraints. What the tokenizer's vocabulary needs for that is made when the first one comes.
#[derive(Debug, Default)]
pub struct Compiler {
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Service {
    /// Begins to draw. `max_tokens` is the longest completion that [`Self::prepare`] found room for.
    pub async fn draw(
        self: &Arc<Self>,
        prompt: Arc<Prompt>,
        max_tokens: usize,
        wanted: &Wanted,
    ) -> Result<Generation, ServiceError> {
        let sampling = self.complete(wanted, max_tokens)?;
        let constraint = match wanted.form.clone() {
            Some(form) => Some(self.constraint(form).await?),
            None => None,
        };
        let field = wanted.form.as_ref().map_or("messages", |form| form.field);
        Recipe::new(&sampling, constraint.as_ref(), wanted.n, &[]).map_err(|error| refusal(field, &error))?;
        let mut request = Request::new(prompt, wanted.n, sampling);
        request.constraint = constraint;
        self.generate(request, &wanted.stops)
    }

    /// The sampling with what only the model knows.
    fn complete(&self, wanted: &Wanted, max_tokens: usize) -> Result<Sampling, ServiceError> {
        let tokenizer = self.processor().tokenizer();
        let mut sampling = wanted.sampling.clone();
        sampling.max_tokens = max_tokens;
        let limit = tokenizer.id_limit();
        let biased = sampling.logit_bias.iter().map(|(id, _)| ("logit_bias", *id));
        let stops = sampling.stop_ids.iter().map(|id| ("stop_token_ids", *id));
        if let Some((field, id)) = biased.chain(stops).find(|(_, id)| *id >= limit) {
            let message = format!(
                "{field} names token {id}, the last of this model is {}",
                limit.saturating_sub(1)
            );
            return Err(ServiceError::invalid(field, message));
        }
        if !wanted.ignore_eos {
            sampling.stop_ids.extend_from_slice(tokenizer.stop_ids());
        } else if let Some(form) = &wanted.form {
            let message = format!(
                "ignore_eos contradicts {}, which says where a completion ends",
                form.field
            );
            return Err(ServiceError::invalid("ignore_eos", message));
        }
        if let Some((field, message)) = sampling.fault() {
            return Err(ServiceError::invalid(field, message));
        }
        Ok(sampling)
    }

    /// Compiling blocks, so it runs off the async threads, as preparing a prompt does.
    async fn constraint(self: &Arc<Self>, form: Form) -> Result<Constraint, ServiceError> {
        let compile = move |service: &Self| service.constraint_blocking(&form);
        self.apart("compile a constraint", None, compile).await
    }

    fn constraint_blocking(&self, form: &Form) -> Result<Constraint, ServiceError> {
        let refused = |error: EngineError| refusal(form.field, &error);
        match &form.shape {
            Shape::Choice(texts) => Constraint::choice(&self.choices(form.field, texts)?).map_err(refused),
            Shape::Grammar(source) => {
                let tokenizer = self.processor().tokenizer();
                let made = || Grammars::new(tokenizer).map_err(|error| fault(&error));
                let grammars = self.compiler.grammars.get_or_init(made);
                let grammars = grammars
                    .as_ref()
                    .map_err(|reason| ServiceError::invalid(form.field, reason))?;
                Ok(Constraint::Grammar(grammars.compile(source).map_err(refused)?))
            }
        }
    }

    /// The tokens of each text.
    fn choices(&self, field: &'static str, texts: &[String]) -> Result<Vec<Vec<u32>>, ServiceError> {
        let tokenizer = self.processor().tokenizer();
        let of = |text: &String| {
            let ids = tokenizer
                .encode(text)
                .map_err(|error| ServiceError::invalid(field, error.to_string()))?;
            let special = |id: &u32| tokenizer.token_bytes(*id).is_some_and(|token| token.special);
            match ids.iter().any(special) {
                true => Err(ServiceError::invalid(
                    field,
                    format!("{field} has a special token in {text:?}"),
                )),
                false => Ok(ids),
            }
        };
        texts.iter().map(of).collect()
    }
}

/// What the engine says about a request, as an error of the field that caused it.
fn refusal(field: &'static str, error: &EngineError) -> ServiceError {
    ServiceError::invalid(field, fault(error))
}

fn fault(error: &EngineError) -> String {
    match error {
        EngineError::InvalidRequest(fault) => fault.clone(),
        other => other.to_string(),
    }
}
