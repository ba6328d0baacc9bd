//! What a rollout pod and a learner say to each other, and what the pod does.
//!
//! A learner sends its weights under a version, then pieces of a batch; the pod answers each piece with the tokens that the
//! learner itself would have drawn: the same engine, the same rows together, a seed for every prompt. So on the CPU it does
//! not matter which pod answers, or how many there are.
//!
//! | file | what |
//! |---|---|
//! | [`wire`] | the bodies of `POST /v1/rollouts` and `PUT /v1/weights` |
//! | [`sampler`] | a model whose weights change between two pieces |

pub mod sampler;
pub mod wire;

/// Rows that one engine decodes together. A constant, so that no result depends on the number of threads or pods.
pub const ROWS_PER_PIECE: usize = 128;
/// Images that go through the vision tower together.
pub const IMAGES_PER_PASS: usize = 32;
