use super::VisionConfig;
use crate::{
    ModelError, Result,
    media::{Medium, MediumSize},
    visual::{Layout, Visual, VisualProcessor},
};
use std::path::Path;
#[derive(Debug)]
pub struct SquareProcessor;
impl SquareProcessor {
    pub fn load(_: &Path, _: &VisionConfig) -> Result<Self> {
        Ok(Self)
    }
}
impl VisualProcessor for SquareProcessor {
    fn plan(&self, _: &[MediumSize]) -> Result<Vec<Layout>> {
        Err(ModelError::Image("interim".into()))
    }
    fn process(&self, _: &[Medium]) -> Result<Vec<Visual>> {
        Err(ModelError::Image("interim".into()))
    }
    fn tokens(&self, _: &Layout) -> usize {
        0
    }
}
