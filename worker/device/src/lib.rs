//! The model on a GPU: packed weights, decode graphs, the runner of the engine, the learner.
