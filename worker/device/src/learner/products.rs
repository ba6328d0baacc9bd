//! Linear layers over the rows of a batch, and their gradients.

use flotilla_kernels::{Buffer, Finish, Float, Gemm, Gpu, GpuError};

use super::gradients::Sum;

/// Products of matrices of so many rows. Their widths are those of the buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Products<'a> {
    pub gpu: &'a Gpu,
    pub rows: usize,
}

impl Products<'_> {
    /// `out = x · weightᵀ`.
    pub fn linear<T: Float>(&self, x: &Buffer<T>, weight: &Buffer<T>, out: &Buffer<T>) -> Result<(), GpuError> {
        let product = Gemm::linear(self.rows, out.len() / self.rows, x.len() / self.rows);
        self.gpu.gemm(product, x, weight, out)
    }

    /// `out = stream + x · weightᵀ`, summed in f32 and rounded once.
    pub fn linear_onto<T: Float>(
        &self,
        stream: &Buffer<T>,
        x: &Buffer<T>,
        weight: &Buffer<T>,
        out: &Buffer<T>,
    ) -> Result<(), GpuError> {
        self.gpu.copy(stream, out)?;
        let product = Gemm::linear(self.rows, out.len() / self.rows, x.len() / self.rows);
        self.gpu.gemm(product.accumulate(), x, weight, out)
    }

    /// `out = x · weightᵀ + bias` in one pass.
    pub fn biased<T: Float>(
        &self,
        x: &Buffer<T>,
        (weight, bias): (&Buffer<T>, &Buffer<T>),
        out: &Buffer<T>,
    ) -> Result<(), GpuError> {
        let product = Gemm::linear(self.rows, out.len() / self.rows, x.len() / self.rows);
        self.gpu.gemm_finished(product, x, weight, out, Finish::Bias(bias))
    }

    /// `out = stream + x · weightᵀ + bias` in one pass after a copy.
    pub fn biased_onto<T: Float>(
        &self,
        stream: &Buffer<T>,
        x: &Buffer<T>,
        (weight, bias): (&Buffer<T>, &Buffer<T>),
        out: &Buffer<T>,
    ) -> Result<(), GpuError> {
        self.gpu.copy(stream, out)?;
        let product = Gemm::linear(self.rows, out.len() / self.rows, x.len() / self.rows);
        self.gpu
            .gemm_finished(product.accumulate(), x, weight, out, Finish::Bias(bias))
    }

    /// Gradients of a linear layer: of its input, overwriting `dx`, and of its weight.
    pub fn linear_backward<T: Float, G: Float>(
        &self,
        dy: &Buffer<T>,
        (x, weight): (&Buffer<T>, &Buffer<T>),
        dx: &Buffer<T>,
        sum: &Sum<G>,
    ) -> Result<(), GpuError> {
        self.input_gradient(dy, weight, dx)?;
        self.weight_gradient(dy, x, sum)
    }

    /// `dx = dy · weight`.
    pub fn input_gradient<T: Float>(&self, dy: &Buffer<T>, weight: &Buffer<T>, dx: &Buffer<T>) -> Result<(), GpuError> {
        let product = Gemm::input_gradient(self.rows, dy.len() / self.rows, dx.len() / self.rows);
        self.gpu.gemm(product, dy, weight, dx)
    }

    /// `dyᵀ · x`, to a sum or over what is there.
    pub fn weight_gradient<T: Float, G: Float>(
        &self,
        dy: &Buffer<T>,
        x: &Buffer<T>,
        sum: &Sum<G>,
    ) -> Result<(), GpuError> {
        let product = Gemm::weight_gradient(self.rows, dy.len() / self.rows, x.len() / self.rows);
        let product = if sum.adds { product.accumulate() } else { product };
        self.gpu.gemm(product, dy, x, sum.buffer)
    }
}
