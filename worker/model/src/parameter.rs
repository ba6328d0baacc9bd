//! What a configuration asks for: names, shapes and first values, without allocating any of them.

/// How a parameter is drawn for training from scratch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones (scales of normalizations).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// A parameter that a configuration asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Name as on the hub, for example `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Shape as on the hub.
    pub shape: Vec<usize>,
    /// How to draw it.
    pub init: Init,
}

impl Parameter {
    /// Number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Parameters in the order in which they are declared.
#[derive(Default)]
pub(crate) struct ParameterList(pub(crate) Vec<Parameter>);

impl ParameterList {
    pub(crate) fn push(&mut self, name: &str, shape: &[usize], init: Init) {
        self.0.push(Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            init,
        });
    }

    /// A linear map `[output, input]` with deviation `1 / sqrt(input)`, and its bias.
    pub(crate) fn linear(&mut self, name: &str, input: usize, output: usize, bias: bool) {
        let std = (input as f64).sqrt().recip();
        self.push(&format!("{name}.weight"), &[output, input], Init::Normal(std));
        if bias {
            self.push(&format!("{name}.bias"), &[output], Init::Zeros);
        }
    }

    /// Scale and shift of a layer normalization.
    pub(crate) fn layer_norm(&mut self, name: &str, width: usize) {
        self.push(&format!("{name}.weight"), &[width], Init::Ones);
        self.push(&format!("{name}.bias"), &[width], Init::Zeros);
    }
}
