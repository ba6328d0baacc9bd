//! The loops of role `train`.
