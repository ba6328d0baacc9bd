//! `metav1` conditions: the time of a transition moves only when the status does.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// Writes conditions of one object in one pass.
#[derive(Debug)]
pub struct Conditions<'a> {
    list: &'a mut Vec<Condition>,
    generation: Option<i64>,
    now: Timestamp,
}

impl<'a> Conditions<'a> {
    /// Conditions about `generation` of a spec, as of `now`.
    pub fn new(list: &'a mut Vec<Condition>, generation: Option<i64>, now: Timestamp) -> Self {
        Self { list, generation, now }
    }

    /// Sets one condition; `reason` is CamelCase, `message` is for people and empty where there is nothing to add.
    pub fn set(&mut self, type_: &str, holds: bool, reason: &str, message: &str) {
        let status = if holds { "True" } else { "False" };
        let mut next = Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            observed_generation: self.generation,
            last_transition_time: Time(self.now),
        };
        match self.list.iter_mut().find(|known| known.type_ == type_) {
            Some(known) => {
                if known.status == next.status {
                    next.last_transition_time = known.last_transition_time.clone();
                }
                *known = next;
            }
            None => self.list.push(next),
        }
    }
}

/// Whether a condition is True.
pub fn holds(list: &[Condition], type_: &str) -> bool {
    find(list, type_).is_some_and(|condition| condition.status == "True")
}

/// A condition by its type.
pub fn find<'a>(list: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    list.iter().find(|condition| condition.type_ == type_)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transition_time_moves_only_when_the_status_does() {
        let mut list = Vec::new();
        let at = |seconds| Timestamp::from_second(seconds).expect("in range");
        Conditions::new(&mut list, Some(1), at(10)).set("Ready", false, "Waiting", "for a");
        Conditions::new(&mut list, Some(2), at(20)).set("Ready", false, "Waiting", "for b");
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].last_transition_time, Time(at(10)));
        assert_eq!(
            (list[0].observed_generation, list[0].message.as_str()),
            (Some(2), "for b")
        );
        Conditions::new(&mut list, Some(2), at(30)).set("Ready", true, "Resolved", "");
        assert_eq!(list[0].last_transition_time, Time(at(30)));
        assert!(holds(&list, "Ready") && !holds(&list, "Failed"));
    }
}
