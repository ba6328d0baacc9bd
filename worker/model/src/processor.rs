//! Messages, pictures and videos to token ids, positions and what the vision tower reads.

use std::path::Path;

use candle_core::Tensor;

use crate::{
    ModelError, Result,
    batch::Row,
    chat::{ChatTemplate, Message, Part},
    config::{Config, Vision},
    llava_onevision,
    media::{Medium, MediumSize, Resampler, Sampling},
    qwen2_5_vl::{
        self, FrameBudget, TimeStep,
        positions::{VisualSpan, positions},
    },
    rope::Position,
    tokenizer::Tokenizer,
    visual::{Layout, Visual, VisualProcessor},
};

/// Index of the first placeholder of a visual, and how many there are.
pub type Span = (usize, usize);

/// What a conversation will cost, known before any picture is resized.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Token ids, placeholders expanded.
    pub ids: Vec<u32>,
    /// What each medium becomes, in the order of the messages' parts.
    pub layouts: Vec<Layout>,
    /// Where each medium's placeholders stand, in the same order.
    pub spans: Vec<Span>,
}

/// A conversation ready for the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, placeholders expanded.
    pub ids: Vec<u32>,
    /// Position of each token.
    pub positions: Vec<Position>,
    /// Largest position plus one, minus the number of tokens.
    pub rope_delta: i64,
    /// Pictures and videos in the order of the messages' parts.
    pub visuals: Vec<Visual>,
    /// Where the placeholders of each visual stand, in the same order.
    pub spans: Vec<Span>,
}

impl Prompt {
    /// The prompt as a row, with the features of its visuals in order.
    pub fn row(&self, features: &[Tensor]) -> Result<Row> {
        if features.len() != self.spans.len() {
            return Err(ModelError::Input(format!(
                "features of {} visuals for a prompt of {}",
                features.len(),
                self.spans.len()
            )));
        }
        let starts = self.spans.iter().map(|(start, _)| *start);
        Ok(Row {
            ids: self.ids.clone(),
            positions: self.positions.clone(),
            features: starts.zip(features.iter().cloned()).collect(),
        })
    }
}

/// What checkpoints leave open.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessorOptions {
    /// How seconds of a video become positions (Qwen2.5-VL).
    pub time_step: TimeStep,
    /// How large frames of a video become (Qwen2.5-VL).
    pub frame_budget: FrameBudget,
    /// How pictures are resized (Qwen2.5-VL).
    pub resampler: Resampler,
}

/// How the positions of a family's tokens run.
#[derive(Clone, Copy, Debug)]
enum Positions {
    /// One after another, visual or not.
    Plain,
    /// Visual tokens spread over time, height and width; so many patches a side become one token.
    Multimodal { merge: usize },
}

/// Tokenizer, chat template and visual processor of one checkpoint.
#[derive(Debug)]
pub struct Processor {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    visuals: Box<dyn VisualProcessor>,
    image_token_id: u32,
    video_token_id: u32,
    positions: Positions,
}

impl Processor {
    /// Reads the processor files of a checkpoint directory.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_with(dir, &ProcessorOptions::default())
    }

    /// As [`Self::load`], with what checkpoints leave open.
    pub fn load_with(dir: &Path, options: &ProcessorOptions) -> Result<Self> {
        let config = Config::load(dir)?;
        let (visuals, positions, built_in): (Box<dyn VisualProcessor>, _, _) = match &config.vision {
            Vision::Qwen25Vl(vision) => {
                let mut visuals = qwen2_5_vl::QwenVisualProcessor::load(dir, vision)?;
                visuals.time_step = options.time_step;
                visuals.frame_budget = options.frame_budget;
                visuals.resample_pictures(dir, options.resampler)?;
                let merge = vision.spatial_merge_size;
                let positions = Positions::Multimodal { merge };
                (Box::new(visuals), positions, qwen2_5_vl::CHAT_TEMPLATE)
            }
            Vision::LlavaOneVision(_) => (
                Box::new(llava_onevision::OneVisionVisualProcessor::load(dir)?),
                Positions::Plain,
                llava_onevision::CHAT_TEMPLATE,
            ),
        };
        Ok(Self {
            tokenizer: Tokenizer::load(dir)?,
            template: ChatTemplate::load(dir, built_in)?,
            visuals,
            image_token_id: config.image_token_id,
            video_token_id: config.video_token_id,
            positions,
        })
    }

    /// Which frames of a video file the family's models are shown.
    pub fn sampling(&self) -> Sampling {
        match self.positions {
            Positions::Plain => Sampling::ONE_VISION,
            Positions::Multimodal { .. } => Sampling::QWEN,
        }
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Messages to text.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Pictures and videos to what the vision tower reads.
    pub fn visuals(&self) -> &dyn VisualProcessor {
        &*self.visuals
    }

    /// Renders the conversation, opens the assistant's turn, and expands each placeholder to the tokens of its medium.
    /// `sizes` are those of the messages' image and video parts, in their order.
    pub fn plan(&self, messages: &[Message], sizes: &[MediumSize]) -> Result<Plan> {
        check_media(messages, sizes)?;
        self.plan_text(&self.template.render(messages, true)?, sizes)
    }

    fn plan_text(&self, text: &str, sizes: &[MediumSize]) -> Result<Plan> {
        let ids = self.tokenizer.encode(text)?;
        let layouts = self.visuals.plan(sizes)?;
        let (ids, spans) = self.expand(&ids, &layouts)?;
        Ok(Plan { ids, layouts, spans })
    }

    /// The text of a conversation, unless its length alone says that it has too many tokens: encoding takes hundreds of bytes
    /// for each.
    fn rendered(&self, messages: &[Message], max_tokens: usize) -> Result<String> {
        let text = self.template.render(messages, true)?;
        refuse_longer(self.tokenizer.least_tokens(&text), max_tokens)?;
        Ok(text)
    }

    /// As [`Self::plan`], then resizes and cuts the pictures. A prompt of more than `max_tokens` is refused before that.
    pub fn prepare(&self, messages: &[Message], media: &[Medium], max_tokens: usize) -> Result<Prompt> {
        let sizes = media.iter().map(Medium::size).collect::<Vec<_>>();
        check_media(messages, &sizes)?;
        let text = self.rendered(messages, max_tokens)?;
        let plan = self.plan_text(&text, &sizes)?;
        refuse_longer(plan.ids.len(), max_tokens)?;
        let visuals = self.visuals.process(media)?;
        self.lay_out(plan.ids, plan.spans, visuals)
    }

    /// As [`Self::prepare`], with visuals that were made for another conversation about the same media in the same order:
    /// they are not resized and cut again.
    pub fn prepare_again(&self, messages: &[Message], visuals: Vec<Visual>, max_tokens: usize) -> Result<Prompt> {
        let ids = self.tokenizer.encode(&self.rendered(messages, max_tokens)?)?;
        let layouts = visuals.iter().map(|visual| visual.layout).collect::<Vec<_>>();
        let (ids, spans) = self.expand(&ids, &layouts)?;
        refuse_longer(ids.len(), max_tokens)?;
        self.lay_out(ids, spans, visuals)
    }

    /// A prompt whose placeholders are expanded already, as [`Self::prepare`] left them: the same ids and visuals give the
    /// same prompt. Visuals of one kind must be in the order of their placeholders.
    pub fn arrange(&self, ids: Vec<u32>, visuals: Vec<Visual>) -> Result<Prompt> {
        let mut spans = Vec::with_capacity(visuals.len());
        let mut next = [0, 0];
        for (number, visual) in visuals.iter().enumerate() {
            let placeholder = self.placeholder(&visual.layout);
            let from = &mut next[usize::from(visual.layout.is_video())];
            let size = self.visuals.tokens(&visual.layout);
            let rest = ids.get(*from..).unwrap_or_default();
            let start = *from + rest.iter().position(|id| *id == placeholder).unwrap_or(rest.len());
            let span = ids.get(start..start + size);
            if !span.is_some_and(|span| span.iter().all(|id| *id == placeholder)) {
                let problem = format!("visual {number} takes {size} placeholders, which the token ids do not have");
                return Err(ModelError::Template(problem));
            }
            spans.push((start, size));
            *from = start + size;
        }
        for (from, placeholder) in next.into_iter().zip([self.image_token_id, self.video_token_id]) {
            if ids.get(from..).unwrap_or_default().contains(&placeholder) {
                let problem = format!(
                    "the token ids have more placeholders than {} visuals take",
                    visuals.len()
                );
                return Err(ModelError::Template(problem));
            }
        }
        self.lay_out(ids, spans, visuals)
    }

    fn placeholder(&self, layout: &Layout) -> u32 {
        if layout.is_video() {
            self.video_token_id
        } else {
            self.image_token_id
        }
    }

    fn lay_out(&self, ids: Vec<u32>, spans: Vec<Span>, visuals: Vec<Visual>) -> Result<Prompt> {
        let positions = match self.positions {
            Positions::Plain => (0..ids.len() as u32).map(|position| [position; 3]).collect(),
            Positions::Multimodal { merge } => {
                let visual_span = |((start, _), visual): (&Span, &Visual)| match visual.layout {
                    Layout::Patches { grid, time_step, .. } => Some(VisualSpan {
                        start: *start,
                        grid,
                        time_step,
                    }),
                    _ => None,
                };
                let mut spans = spans.iter().zip(&visuals).filter_map(visual_span).collect::<Vec<_>>();
                spans.sort_by_key(|span| span.start);
                positions(ids.len(), &spans, merge)?
            }
        };
        let end = positions.iter().flatten().max().map_or(0, |p| i64::from(*p) + 1);
        Ok(Prompt {
            rope_delta: end - ids.len() as i64,
            ids,
            positions,
            visuals,
            spans,
        })
    }

    /// Repeats each placeholder as often as its medium has tokens; also where each medium's begin. The k-th image
    /// placeholder is that of the k-th image, wherever the template put it, and so are those of videos. More or fewer
    /// placeholders than media (for example one written in a message's text) are refused.
    fn expand(&self, ids: &[u32], layouts: &[Layout]) -> Result<(Vec<u32>, Vec<Span>)> {
        let kinds = [
            (self.image_token_id, false, "image"),
            (self.video_token_id, true, "video"),
        ];
        let mut waiting = Vec::with_capacity(kinds.len());
        for (placeholder, video, kind) in kinds {
            let own = (0..layouts.len()).filter(|i| layouts[*i].is_video() == video);
            let own = own.collect::<std::collections::VecDeque<_>>();
            let given = ids.iter().filter(|id| **id == placeholder).count();
            if given != own.len() {
                let problem = format!("{given} {kind} placeholders for {} {kind}s", own.len());
                return Err(ModelError::Template(problem));
            }
            waiting.push((placeholder, own));
        }
        let sizes = layouts
            .iter()
            .map(|layout| self.visuals.tokens(layout))
            .collect::<Vec<_>>();
        let mut expanded = Vec::with_capacity(ids.len() + sizes.iter().sum::<usize>());
        let mut spans = vec![(0, 0); layouts.len()];
        for id in ids {
            let own = waiting.iter_mut().find(|(placeholder, _)| placeholder == id);
            match own.and_then(|(_, own)| own.pop_front()) {
                Some(medium) => {
                    spans[medium] = (expanded.len(), sizes[medium]);
                    expanded.extend(std::iter::repeat_n(*id, sizes[medium]));
                }
                None => expanded.push(*id),
            }
        }
        Ok((expanded, spans))
    }
}

/// Refuses a prompt of more tokens than allowed.
fn refuse_longer(tokens: usize, limit: usize) -> Result<()> {
    if tokens > limit {
        return Err(ModelError::TooLong { tokens, limit });
    }
    Ok(())
}

/// Refuses media of which kind or number is not that of the messages' parts.
fn check_media(messages: &[Message], sizes: &[MediumSize]) -> Result<()> {
    let parts = messages.iter().flat_map(|message| message.content.media());
    let named = parts.map(|part| *part == Part::Video).collect::<Vec<_>>();
    let given = sizes
        .iter()
        .map(|size| matches!(size, MediumSize::Video { .. }))
        .collect::<Vec<_>>();
    if named == given {
        return Ok(());
    }
    let count = |list: &[bool]| {
        (
            list.iter().filter(|video| !**video).count(),
            list.iter().filter(|v| **v).count(),
        )
    };
    let ((images, videos), (given_images, given_videos)) = (count(&named), count(&given));
    Err(ModelError::Input(format!(
        "the messages have {images} image and {videos} video parts, but {given_images} images and {given_videos} videos \
         were given (in another order, if the numbers are equal)"
    )))
}
