//! A queue that gathers bursts: ten pods that become ready within a moment are one pass over their job, not ten.
//!
//! The first mention of a name goes through at once, so nothing waits that happens alone; further mentions within the pause
//! go through together at its end. kube's own debounce delays the first one too, and for as long as others follow.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use futures::{Stream, StreamExt as _, channel::mpsc::UnboundedReceiver, stream};
use kube::{Resource, runtime::reflector::ObjectRef};
use tokio::time::{Instant, sleep_until};

/// What `queue` says, each name at most once in `pause`; ends with the queue.
pub fn calm<K>(queue: UnboundedReceiver<ObjectRef<K>>, pause: Duration) -> impl Stream<Item = ObjectRef<K>> + Send
where
    K: Resource<DynamicType = ()> + Send + Sync + 'static,
{
    let calm = Calm {
        queue,
        pause,
        ends: VecDeque::new(),
        again: HashMap::new(),
    };
    stream::unfold(calm, |mut calm| async {
        let name = calm.next().await?;
        Some((name, calm))
    })
}

struct Calm<K: Resource<DynamicType = ()>> {
    queue: UnboundedReceiver<ObjectRef<K>>,
    pause: Duration,
    /// Ends of the pauses, in order: all are equally long.
    ends: VecDeque<(Instant, ObjectRef<K>)>,
    /// Names that pause, and whether they were mentioned again.
    again: HashMap<ObjectRef<K>, bool>,
}

impl<K: Resource<DynamicType = ()>> Calm<K> {
    async fn next(&mut self) -> Option<ObjectRef<K>> {
        loop {
            let end = self.ends.front().map(|(end, _)| *end);
            tokio::select! {
                name = self.queue.next() => {
                    let name = name?;
                    match self.again.get_mut(&name) {
                        Some(again) => *again = true,
                        None => return Some(self.pass(name)),
                    }
                }
                () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => {
                    let Some((_, name)) = self.ends.pop_front() else { continue };
                    if self.again.remove(&name) == Some(true) {
                        return Some(self.pass(name));
                    }
                }
            }
        }
    }

    fn pass(&mut self, name: ObjectRef<K>) -> ObjectRef<K> {
        self.ends.push_back((Instant::now() + self.pause, name.clone()));
        self.again.insert(name.clone(), false);
        name
    }
}

#[cfg(test)]
mod tests {
    use futures::channel::mpsc::unbounded;
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    fn name(text: &str) -> ObjectRef<Pod> {
        ObjectRef::new(text).within("lab")
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_mention_goes_through_at_once_and_a_burst_once_after_it() {
        let (sender, queue) = unbounded();
        let mut calm = std::pin::pin!(calm(queue, PAUSE));
        let begun = Instant::now();
        for text in ["a", "b", "a", "a"] {
            sender.unbounded_send(name(text)).expect("open");
        }
        assert_eq!(calm.next().await, Some(name("a")));
        assert_eq!(calm.next().await, Some(name("b")));
        assert!(begun.elapsed() < PAUSE);
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(begun.elapsed() >= PAUSE);
        drop(sender);
        assert_eq!(calm.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mention_after_the_pause_does_not_wait() {
        let (sender, queue) = unbounded();
        let mut calm = std::pin::pin!(calm(queue, PAUSE));
        sender.unbounded_send(name("a")).expect("open");
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(
            tokio::time::timeout(3 * PAUSE, calm.next()).await.is_err(),
            "nothing is said twice"
        );
        let later = Instant::now();
        sender.unbounded_send(name("a")).expect("open");
        assert_eq!(calm.next().await, Some(name("a")));
        assert!(later.elapsed() < PAUSE);
    }
}
