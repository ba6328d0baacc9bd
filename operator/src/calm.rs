//! A queue that gathers bursts: ten pods that become ready one after the other are a few passes over their job, not ten.
//!
//! The first mention of a name goes through at once, so nothing waits that happens alone. Mentions that follow go through
//! together at the end of a pause, which doubles as long as they keep coming. kube's own debounce delays the first one too,
//! and all of them for as long as others follow.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use futures::{Stream, StreamExt as _, channel::mpsc::UnboundedReceiver, stream};
use kube::{Resource, runtime::reflector::ObjectRef};
use tokio::time::{Instant, sleep_until};

/// Pause after the first mention.
const SHORTEST: Duration = Duration::from_millis(100);
/// Longest pause: how late the operator may notice what happens amid a burst.
const LONGEST: Duration = Duration::from_secs(2);

/// What `queue` says, without its bursts; ends with the queue.
pub fn calm<K>(queue: UnboundedReceiver<ObjectRef<K>>) -> impl Stream<Item = ObjectRef<K>> + Send
where
    K: Resource<DynamicType = ()> + Send + Sync + 'static,
{
    let calm = Calm {
        queue,
        ends: BTreeMap::new(),
        pauses: HashMap::new(),
        passed: 0,
    };
    stream::unfold(calm, |mut calm| async {
        let name = calm.next().await?;
        Some((name, calm))
    })
}

struct Calm<K: Resource<DynamicType = ()>> {
    queue: UnboundedReceiver<ObjectRef<K>>,
    /// Names that pause, by the end of their pause and a number that tells equal ends apart.
    ends: BTreeMap<(Instant, u64), ObjectRef<K>>,
    pauses: HashMap<ObjectRef<K>, Pause>,
    /// Names that went through so far.
    passed: u64,
}

/// The pause of one name.
struct Pause {
    length: Duration,
    /// The name was mentioned again meanwhile.
    again: bool,
}

impl<K: Resource<DynamicType = ()>> Calm<K> {
    async fn next(&mut self) -> Option<ObjectRef<K>> {
        loop {
            let end = self.ends.keys().next().map(|(end, _)| *end);
            tokio::select! {
                // First whatever is there already: it may be a burst.
                biased;
                name = self.queue.next() => {
                    let name = name?;
                    match self.pauses.get_mut(&name) {
                        Some(pause) => pause.again = true,
                        None => return Some(self.pass(name, SHORTEST)),
                    }
                }
                () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => {
                    let Some((_, name)) = self.ends.pop_first() else { continue };
                    if let Some(pause) = self.pauses.remove(&name)
                        && pause.again
                    {
                        return Some(self.pass(name, longer(pause.length)));
                    }
                }
            }
        }
    }

    fn pass(&mut self, name: ObjectRef<K>, length: Duration) -> ObjectRef<K> {
        self.passed += 1;
        self.ends.insert((Instant::now() + length, self.passed), name.clone());
        self.pauses.insert(name.clone(), Pause { length, again: false });
        name
    }
}

/// The pause after a pause in which a name was mentioned again.
fn longer(pause: Duration) -> Duration {
    LONGEST.min(pause * 2)
}

#[cfg(test)]
mod tests {
    use futures::channel::mpsc::unbounded;
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    fn name(text: &str) -> ObjectRef<Pod> {
        ObjectRef::new(text).within("lab")
    }

    #[tokio::test]
    async fn the_first_mention_goes_through_and_a_burst_once_after_it() {
        let (sender, queue) = unbounded();
        let mut names = std::pin::pin!(calm(queue));
        for text in ["a", "a", "b", "a", "a"] {
            sender.unbounded_send(name(text)).expect("open");
        }
        assert_eq!(names.next().await, Some(name("a")));
        assert_eq!(names.next().await, Some(name("b")));
        assert_eq!(names.next().await, Some(name("a")));
        drop(sender);
        assert_eq!(names.next().await, None);
    }

    #[tokio::test]
    async fn a_name_goes_through_again_after_its_pause() {
        let (sender, queue) = unbounded();
        let mut names = std::pin::pin!(calm(queue));
        for _ in 0..3 {
            sender.unbounded_send(name("a")).expect("open");
            assert_eq!(names.next().await, Some(name("a")));
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let pauses = std::iter::successors(Some(SHORTEST), |pause| Some(longer(*pause)));
        let milliseconds: Vec<u128> = pauses.take(7).map(|pause| pause.as_millis()).collect();
        assert_eq!(milliseconds, [100, 200, 400, 800, 1600, 2000, 2000]);
    }
}
