//! One CEL rule of `x-kubernetes-validations`: parsed once, evaluated per value.
//!
//! Source: KEP-2876 and `apiextensions-apiserver/pkg/apiserver/schema/cel/validation.go`.

use std::sync::Arc;

use kube_cel::{
    KubeCelExt,
    cel::{Context, ExecutionError, Value as Cel, objects::OptionalValue, parser::Expression, parser::Parser},
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    cause::Cause,
    path,
    rule_value::convert,
    structural::{Kind, Structural},
};

/// A rule as the schema states it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Source {
    rule: String,
    message: Option<String>,
    message_expression: Option<String>,
    reason: Option<String>,
    field_path: Option<String>,
    optional_old_self: Option<bool>,
}

/// A rule ready to be evaluated.
#[derive(Debug)]
pub struct Rule {
    source: Source,
    condition: Result<Expression, String>,
    message: Option<Result<Expression, String>>,
    transition: bool,
}

/// What one rule said about a value.
#[derive(Debug)]
enum Outcome {
    Holds,
    Broken(String),
    Failed(String),
}

impl Rule {
    /// Parses a rule; an expression that does not compile is reported by [`Rule::compile_errors`] and on evaluation.
    ///
    /// # Errors
    /// When `raw` is not shaped as a rule.
    pub fn parse(raw: &Value) -> Result<Self, serde_json::Error> {
        let source = Source::deserialize(raw)?;
        let condition = expression(&source.rule);
        let message = source.message_expression.as_deref().map(expression);
        let transition = condition.as_ref().is_ok_and(|c| c.references().has_variable("oldSelf"));
        Ok(Self {
            source,
            condition,
            message,
            transition,
        })
    }

    /// Why the rule or its message expression does not compile, with the property (`rule` or `messageExpression`).
    #[must_use]
    pub fn compile_errors(&self) -> Vec<(&'static str, &str, &str)> {
        let rule = self
            .condition
            .as_ref()
            .err()
            .map(|e| ("rule", self.source.rule.as_str(), e.as_str()));
        let text = self.source.message_expression.as_deref().unwrap_or_default();
        let message = self
            .message
            .as_ref()
            .and_then(|m| m.as_ref().err())
            .map(|e| ("messageExpression", text, e.as_str()));
        rule.into_iter().chain(message).collect()
    }

    fn evaluate(&self, plain: &Context<'_>, optional: &Context<'_>, has_old: bool) -> Outcome {
        let optional_old = self.source.optional_old_self == Some(true);
        if self.transition && !has_old && !optional_old {
            return Outcome::Holds;
        }
        let context = if optional_old { optional } else { plain };
        let condition = match &self.condition {
            Ok(condition) => condition,
            Err(error) => return Outcome::Failed(format!("rule compile error: {error}")),
        };
        match Cel::resolve(condition, context) {
            Ok(Cel::Bool(true)) => Outcome::Holds,
            Ok(Cel::Bool(false)) => Outcome::Broken(self.message(context)),
            Ok(other) => Outcome::Failed(format!(
                "rule compile error: must evaluate to a bool, not {}",
                other.type_of()
            )),
            Err(error) => Outcome::Failed(format!("{} evaluating rule: {}", wording(&error), self.name())),
        }
    }

    fn message(&self, context: &Context<'_>) -> String {
        if let Some(Ok(expression)) = &self.message
            && let Ok(Cel::String(text)) = Cel::resolve(expression, context)
            && !text.trim().is_empty()
            && !text.contains('\n')
        {
            return text.trim().to_owned();
        }
        match self.source.message.as_deref() {
            Some(text) if !text.is_empty() => text.trim().to_owned(),
            _ => format!("failed rule: {}", self.name()),
        }
    }

    fn name(&self) -> &str {
        match self.source.message.as_deref() {
            Some(text) if !text.is_empty() => text.trim(),
            _ => self.source.rule.trim(),
        }
    }

    fn cause(&self, at: &str, schema: &Structural, value: &Value, detail: &str) -> Cause {
        let field = match self.source.field_path.as_deref() {
            Some(below) => path::child(at, below.trim_start_matches('.')),
            None => at.to_owned(),
        };
        let shown = !matches!(schema.kind, Some(Kind::Object | Kind::Array));
        match self.source.reason.as_deref() {
            Some("FieldValueForbidden") => Cause::forbidden(&field, detail),
            Some("FieldValueRequired") => Cause::required(&field, detail),
            Some("FieldValueDuplicate") => Cause::duplicate(&field, value),
            _ if shown => Cause::invalid(&field, value, detail),
            _ => Cause::invalid_unshown(&field, detail),
        }
    }
}

fn expression(text: &str) -> Result<Expression, String> {
    Parser::new()
        .enable_optional_syntax(true)
        .parse(text)
        .map_err(|e| e.to_string())
}

fn wording(error: &ExecutionError) -> String {
    match error {
        ExecutionError::NoSuchKey(key) => format!("no such key: {key}"),
        other => other.to_string(),
    }
}

/// Evaluates all CEL rules of `schema` on `value`; `old` is the value it replaces, where there is one.
pub(crate) fn check(value: &Value, old: Option<&Value>, schema: &Structural) -> Vec<Cause> {
    let mut causes = Vec::new();
    if schema.has_rules {
        let base = Context::default().with_all();
        Walk {
            base: &base,
            causes: &mut causes,
        }
        .node(value, old, schema, "");
    }
    causes
}

struct Walk<'a> {
    base: &'a Context<'static>,
    causes: &'a mut Vec<Cause>,
}

impl Walk<'_> {
    fn node(&mut self, value: &Value, old: Option<&Value>, schema: &Structural, at: &str) {
        if value.is_null() || !schema.has_rules {
            return;
        }
        let old = old.filter(|o| !o.is_null());
        self.rules(value, old, schema, at);
        for branch in &schema.junctors.all_of {
            self.node(value, old, branch, at);
        }
        match value {
            Value::Object(map) => {
                for (name, child) in map {
                    let before = old.and_then(|o| o.get(name));
                    if let Some(property) = schema.properties.get(name) {
                        self.node(child, before, property, &path::child(at, name));
                    } else if let Some(property) = schema.field(name) {
                        self.node(child, before, property, &path::key(at, name));
                    }
                }
            }
            Value::Array(items) => {
                let Some(below) = schema.items.as_deref() else { return };
                for (i, item) in items.iter().enumerate() {
                    self.node(
                        item,
                        super::list::counterpart(schema, item, old),
                        below,
                        &path::index(at, i),
                    );
                }
            }
            _ => {}
        }
    }

    fn rules(&mut self, value: &Value, old: Option<&Value>, schema: &Structural, at: &str) {
        if schema.rules.is_empty() {
            return;
        }
        let current = convert(value, Some(schema), self.base);
        let before = old.map(|o| convert(o, Some(schema), self.base));
        let mut plain = self.base.new_inner_scope();
        plain.add_variable_from_value("self", current.clone());
        if let Some(before) = &before {
            plain.add_variable_from_value("oldSelf", before.clone());
        }
        let mut optional = self.base.new_inner_scope();
        optional.add_variable_from_value("self", current);
        let boxed = before.map_or_else(OptionalValue::none, OptionalValue::of);
        optional.add_variable_from_value("oldSelf", Cel::Opaque(Arc::new(boxed)));
        let unchanged = old == Some(value);
        // Ratcheting: what is as it was is not held against an update.
        for rule in schema.rules.iter().filter(|rule| rule.transition || !unchanged) {
            match rule.evaluate(&plain, &optional, old.is_some()) {
                Outcome::Holds => {}
                Outcome::Broken(detail) => self.causes.push(rule.cause(at, schema, value, &detail)),
                Outcome::Failed(detail) => {
                    let kind = schema.kind.map_or("", Kind::as_str);
                    self.causes
                        .push(Cause::invalid(at, &Value::String(kind.to_owned()), &detail));
                }
            }
        }
    }
}
