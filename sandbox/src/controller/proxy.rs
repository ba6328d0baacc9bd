//! Takes connections to a service's address on to its pods, one after the other in turn.
//!
//! A service without a ready pod does not listen at all, so that a connection is refused at once.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// How long a backend has to accept.
const CONNECT: Duration = Duration::from_secs(2);
/// Pause after a connection could not be accepted (too many open files, say).
const PAUSE: Duration = Duration::from_millis(100);

/// Listeners by address. Dropping it ends them; open connections end with it.
#[derive(Debug, Default)]
pub struct Proxy {
    listeners: HashMap<SocketAddr, Listener>,
}

#[derive(Debug)]
struct Listener {
    targets: watch::Sender<Vec<SocketAddr>>,
    _task: JoinSet<()>,
}

impl Proxy {
    /// Listens exactly where `routes` has backends. Answers the addresses where that failed.
    pub async fn serve(&mut self, routes: BTreeMap<SocketAddr, Vec<SocketAddr>>) -> Vec<(SocketAddr, io::Error)> {
        self.listeners
            .retain(|address, _| routes.get(address).is_some_and(|targets| !targets.is_empty()));
        let mut failed = Vec::new();
        for (address, targets) in routes.into_iter().filter(|(_, targets)| !targets.is_empty()) {
            if let Some(listener) = self.listeners.get(&address) {
                listener.targets.send_replace(targets);
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(socket) => {
                    let (sender, receiver) = watch::channel(targets);
                    let mut task = JoinSet::new();
                    task.spawn(accept(socket, receiver));
                    self.listeners.insert(
                        address,
                        Listener {
                            targets: sender,
                            _task: task,
                        },
                    );
                }
                Err(error) => failed.push((address, error)),
            }
        }
        failed
    }
}

async fn accept(socket: TcpListener, targets: watch::Receiver<Vec<SocketAddr>>) {
    let turn = Arc::new(AtomicUsize::new(0));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((client, _)) => {
                    let (targets, turn) = (targets.clone(), Arc::clone(&turn));
                    connections.spawn(async move {
                        if let Err(error) = forward(client, &targets, &turn).await {
                            tracing::debug!(%error, "a connection to a service ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection to a service");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Connects to the next backend, or to one of the others if it does not answer.
async fn forward(
    mut client: TcpStream,
    targets: &watch::Receiver<Vec<SocketAddr>>,
    turn: &AtomicUsize,
) -> io::Result<()> {
    let backends = targets.borrow().clone();
    let first = turn.fetch_add(1, Ordering::Relaxed);
    let mut last = io::Error::from(io::ErrorKind::ConnectionRefused);
    for step in 0..backends.len() {
        let address = backends[first.wrapping_add(step) % backends.len()];
        match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(mut backend)) => {
                client.set_nodelay(true)?;
                backend.set_nodelay(true)?;
                tokio::io::copy_bidirectional(&mut client, &mut backend).await?;
                return Ok(());
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A backend that answers every connection with `word`.
    async fn backend(word: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(word.as_bytes()).await.unwrap();
            }
        });
        address
    }

    async fn ask(address: SocketAddr) -> io::Result<String> {
        let mut text = String::new();
        TcpStream::connect(address).await?.read_to_string(&mut text).await?;
        Ok(text)
    }

    async fn free_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn backends_take_turns_and_a_dead_one_is_passed_over() {
        let (a, b, dead, front) = (
            backend("a").await,
            backend("b").await,
            free_address().await,
            free_address().await,
        );
        let mut proxy = Proxy::default();
        assert!(proxy.serve(BTreeMap::from([(front, vec![a, b])])).await.is_empty());
        let mut answers = vec![ask(front).await.unwrap(), ask(front).await.unwrap()];
        answers.sort();
        assert_eq!(answers, ["a", "b"]);
        proxy.serve(BTreeMap::from([(front, vec![dead, a])])).await;
        for _ in 0..3 {
            assert_eq!(ask(front).await.unwrap(), "a");
        }
    }

    #[tokio::test]
    async fn a_service_without_backends_refuses_at_once() {
        let (a, front) = (backend("a").await, free_address().await);
        let mut proxy = Proxy::default();
        proxy.serve(BTreeMap::from([(front, vec![a])])).await;
        assert_eq!(ask(front).await.unwrap(), "a");
        proxy.serve(BTreeMap::from([(front, Vec::new())])).await;
        let refused = async {
            // A connection that was accepted just before the end is reset instead.
            while !ask(front)
                .await
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
            {
                tokio::task::yield_now().await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(30), refused).await.is_ok());
    }
}
