//! Who meets whom. A bracket gives the pairs of a round and takes their results; it asks nobody itself.

use super::{draw::Draw, pair::Pair};

/// How pairs become a winner.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    /// The winner of each pair goes on: n - 1 comparisons in ⌈log₂ n⌉ rounds.
    Knockout,
    /// The champion meets the next one: n - 1 comparisons, one after another.
    Sequential,
    /// Everybody meets everybody: n (n - 1) / 2 comparisons in one round.
    RoundRobin,
}

impl Kind {
    /// Comparisons of a contest of `n` entrants.
    pub fn comparisons(self, n: usize) -> usize {
        match self {
            Self::Knockout | Self::Sequential => n.saturating_sub(1),
            Self::RoundRobin => n.saturating_mul(n.saturating_sub(1)) / 2,
        }
    }

    /// A bracket of this kind.
    pub fn bracket(self, entrants: &[usize], draw: &Draw) -> Box<dyn Bracket> {
        match self {
            Self::Knockout => Box::new(Knockout {
                remaining: draw.places(entrants),
            }),
            Self::Sequential => {
                let mut waiting = draw.places(entrants);
                waiting.reverse();
                Box::new(Sequential {
                    champion: waiting.pop(),
                    waiting,
                })
            }
            Self::RoundRobin => Box::new(RoundRobin::new(entrants, draw)),
        }
    }
}

/// The result of one pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Meeting {
    /// The pair.
    pub pair: Pair,
    /// Who goes on.
    pub winner: usize,
    /// Whether the critic could not tell, and the lot decided.
    pub by_lot: bool,
    /// Log-odds of the first against the second.
    pub margin: Option<f64>,
}

/// What an entrant reached where everybody meets everybody.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// The candidate.
    pub candidate: usize,
    /// Comparisons won, a half for each that the critic could not tell (Copeland).
    pub wins: f64,
    /// Sum of its margins, which parts equal wins (Borda).
    pub margin: f64,
}

/// A contest between two rounds.
pub trait Bracket: std::fmt::Debug + Send {
    /// The pairs of the next round, none of which depends on another; empty once the winner is known.
    fn pairs(&self) -> Vec<Pair>;

    /// Who has no opponent in the next round and goes on.
    fn bye(&self) -> Option<usize> {
        None
    }

    /// Takes the results of the round, one for each of its pairs.
    fn record(&mut self, meetings: &[Meeting]);

    /// The winner, once known; None of no entrants.
    fn winner(&self) -> Option<usize>;

    /// The best first, where everybody meets everybody; else nothing.
    fn standings(&self) -> Vec<Standing> {
        Vec::new()
    }
}

/// The winner of each pair goes on. The odd one has a bye and stands first in the next round, so that nobody has two in
/// a row.
#[derive(Debug)]
struct Knockout {
    remaining: Vec<usize>,
}

impl Bracket for Knockout {
    fn pairs(&self) -> Vec<Pair> {
        let pairs = self.remaining.chunks_exact(2);
        pairs
            .map(|pair| Pair {
                first: pair[0],
                second: pair[1],
            })
            .collect()
    }

    fn bye(&self) -> Option<usize> {
        match self.remaining.chunks_exact(2).remainder() {
            [odd] if self.remaining.len() > 1 => Some(*odd),
            _ => None,
        }
    }

    fn record(&mut self, meetings: &[Meeting]) {
        let winners = meetings.iter().map(|meeting| meeting.winner);
        self.remaining = self.bye().into_iter().chain(winners).collect();
    }

    fn winner(&self) -> Option<usize> {
        self.remaining.first().copied()
    }
}

/// The champion meets the next one.
#[derive(Debug)]
struct Sequential {
    champion: Option<usize>,
    /// The next one last.
    waiting: Vec<usize>,
}

impl Bracket for Sequential {
    fn pairs(&self) -> Vec<Pair> {
        let next = self.champion.zip(self.waiting.last());
        next.map(|(first, second)| Pair { first, second: *second })
            .into_iter()
            .collect()
    }

    fn record(&mut self, meetings: &[Meeting]) {
        for meeting in meetings {
            self.champion = Some(meeting.winner);
            self.waiting.pop();
        }
    }

    fn winner(&self) -> Option<usize> {
        self.champion
    }
}

/// Everybody meets everybody once; most wins, then the largest sum of margins, then the lowest lot.
#[derive(Debug)]
struct RoundRobin {
    /// The best first once `decided`.
    standings: Vec<Standing>,
    lots: Vec<usize>,
    decided: bool,
}

impl RoundRobin {
    fn new(entrants: &[usize], draw: &Draw) -> Self {
        let standing = |candidate: &usize| Standing {
            candidate: *candidate,
            wins: 0.0,
            margin: 0.0,
        };
        Self {
            standings: entrants.iter().map(standing).collect(),
            lots: entrants.iter().map(|candidate| draw.lot(*candidate)).collect(),
            decided: entrants.len() < 2,
        }
    }

    fn of(&mut self, candidate: usize) -> Option<&mut Standing> {
        self.standings
            .iter_mut()
            .find(|standing| standing.candidate == candidate)
    }
}

impl Bracket for RoundRobin {
    fn pairs(&self) -> Vec<Pair> {
        if self.decided {
            return Vec::new();
        }
        let entrants: Vec<usize> = self.standings.iter().map(|standing| standing.candidate).collect();
        let against = |(index, first): (usize, &usize)| {
            let first = *first;
            let others: Vec<usize> = entrants[index + 1..].to_vec();
            others.into_iter().map(move |second| Pair { first, second })
        };
        entrants.iter().enumerate().flat_map(against).collect()
    }

    fn record(&mut self, meetings: &[Meeting]) {
        for meeting in meetings {
            let Pair { first, second } = meeting.pair;
            let share = |candidate| match meeting.by_lot {
                true => 0.5,
                false => f64::from(u8::from(meeting.winner == candidate)),
            };
            let margin = meeting.margin.unwrap_or(0.0);
            for (candidate, margin) in [(first, margin), (second, -margin)] {
                if let Some(standing) = self.of(candidate) {
                    standing.wins += share(candidate);
                    standing.margin += margin;
                }
            }
        }
        let lots: std::collections::HashMap<usize, usize> = self
            .standings
            .iter()
            .map(|standing| standing.candidate)
            .zip(self.lots.iter().copied())
            .collect();
        self.standings.sort_by(|a, b| {
            let by_lot = || lots.get(&a.candidate).cmp(&lots.get(&b.candidate));
            (b.wins.total_cmp(&a.wins))
                .then_with(|| b.margin.total_cmp(&a.margin))
                .then_with(by_lot)
        });
        self.decided = true;
    }

    fn winner(&self) -> Option<usize> {
        self.standings.first().map(|standing| standing.candidate)
    }

    fn standings(&self) -> Vec<Standing> {
        self.standings.clone()
    }
}
