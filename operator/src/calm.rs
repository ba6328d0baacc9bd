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
                        return Some(self.pass(name, LONGEST.min(pause.length * 2)));
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

#[cfg(test)]
mod tests {
    use futures::channel::mpsc::unbounded;
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    fn name(text: &str) -> ObjectRef<Pod> {
        ObjectRef::new(text).within("lab")
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_mention_goes_through_at_once_and_a_burst_once_after_it() {
        let (sender, queue) = unbounded();
        let mut calm = std::pin::pin!(calm(queue));
        let begun = Instant::now();
        for text in ["a", "b", "a", "a"] {
            sender.unbounded_send(name(text)).expect("open");
        }
        assert_eq!(calm.next().await, Some(name("a")));
        assert_eq!(calm.next().await, Some(name("b")));
        assert!(begun.elapsed() < SHORTEST);
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(begun.elapsed() >= SHORTEST);
        drop(sender);
        assert_eq!(calm.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mention_after_the_pause_does_not_wait() {
        let (sender, queue) = unbounded();
        let mut calm = std::pin::pin!(calm(queue));
        sender.unbounded_send(name("a")).expect("open");
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(
            tokio::time::timeout(3 * LONGEST, calm.next()).await.is_err(),
            "nothing is said twice"
        );
        let later = Instant::now();
        sender.unbounded_send(name("a")).expect("open");
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(later.elapsed() < SHORTEST);
    }

    #[tokio::test(start_paused = true)]
    async fn who_keeps_being_mentioned_is_let_through_ever_less_often() {
        let (sender, queue) = unbounded();
        let talk = async {
            for _ in 0..1000 {
                sender.unbounded_send(name("a")).expect("open");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            drop(sender);
        };
        let (passes, ()) = tokio::join!(calm(queue).count(), talk);
        // In ten seconds: at 0, .1, .3, .7, 1.5, and then every two seconds.
        assert_eq!(passes, 9);
    }
}
