//! What travels between host and card: words of steps, drawn tokens. Two steps are on their way at a time.

use flotilla_engine::runner::Drawn;
use flotilla_kernels::{Buffer, Gpu, Inbox, Outbox, sampling::BROKEN};

use crate::{
    error::DeviceError,
    step::{Mail, Piece, Step},
};

/// Where words of steps and drawn tokens travel.
#[derive(Debug)]
pub(crate) struct Post {
    words: [Outbox<u32>; 2],
    drawn: [Inbox<u32>; 2],
    /// Which of them the last step has.
    last: usize,
}

/// A step on its way, of sequences that are given one token each and draw one on the card.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) step: Step,
    /// Where its tokens come in.
    pub(crate) place: usize,
}

impl Post {
    /// For steps that draw at most so many words.
    pub(crate) fn new(gpu: &Gpu, drawn: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            words: [gpu.outbox()?, gpu.outbox()?],
            drawn: [gpu.inbox(drawn)?, gpu.inbox(drawn)?],
            last: 0,
        })
    }

    /// The words of a step, ready to be sent.
    pub(crate) fn fill(
        &mut self,
        step: &Step,
        pieces: &[Piece<'_>],
        block_size: usize,
    ) -> Result<&mut Outbox<u32>, DeviceError> {
        self.last = 1 - self.last;
        let mail = Mail::new(step.size);
        let words = &mut self.words[self.last];
        step.write(pieces, block_size, &mail, words.fill(mail.words)?);
        Ok(words)
    }

    /// Has the tokens that this step, the last one, draws sent to the host. Gives where they come in.
    pub(crate) fn receive(&mut self, step: &Step, drawn: &Buffer<u32>) -> Result<usize, DeviceError> {
        let drawn = drawn.slice(0..3 * step.size.sequences())?;
        self.drawn[self.last].receive(&drawn)?;
        Ok(self.last)
    }

    /// Waits for the tokens that come in there.
    pub(crate) fn read(&mut self, place: usize) -> Result<Words<'_>, DeviceError> {
        Ok(Words::new(self.drawn[place].read()?))
    }
}

/// What the card has drawn: tokens `[sequences]`, the bits of their log-probabilities, and of those at temperature 1.
pub(crate) struct Words<'a> {
    words: &'a [u32],
    sequences: usize,
}

impl<'a> Words<'a> {
    fn new(words: &'a [u32]) -> Self {
        let sequences = words.len() / 3;
        Self { words, sequences }
    }

    /// The token at this place; None if its logits give no distribution.
    pub(crate) fn token(&self, place: usize) -> Option<Drawn> {
        let Self { words, sequences } = self;
        let id = words[place];
        (id != BROKEN).then(|| Drawn {
            id,
            log_probability: f32::from_bits(words[sequences + place]),
            model_log_probability: f32::from_bits(words[2 * sequences + place]),
            watched: Vec::new(),
        })
    }
}
