//! Whole fetches from servers of this process that speak the protocols.

mod buckets;
mod hub_server;
mod hubs;

use std::{collections::BTreeMap, path::Path, sync::Mutex, time::Duration};

use super::*;

/// Settings that keep models in `cache` and do not wait.
fn settings(cache: &Path, hub: HubSettings) -> Settings {
    Settings {
        cache: Some(cache.to_owned()),
        hub,
        pause: Duration::from_millis(1),
    }
}

/// Every file below a directory.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = crate::manifest::list_files(dir).expect("a directory");
    let read = |name: String| {
        let bytes = std::fs::read(dir.join(&name)).expect("reads");
        (name, bytes)
    };
    names.into_iter().map(read).collect()
}

fn silent(_: &Transfer) {}

#[test]
fn the_rest_is_timed_by_the_speed_so_far() {
    let transfer = Transfer {
        total: 16_000_000,
        done: 4_000_000,
        per_second: 2e6,
    };
    assert_eq!(transfer.to_string(), "4.0 of 16.0 MB, 2.0 MB/s, 6 s left");
    let begun = Transfer {
        per_second: 0.0,
        ..transfer
    };
    assert_eq!(begun.seconds_left(), None);
}

#[tokio::test]
async fn the_progress_reaches_the_total() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = hub_server::HubServer::start(hub_server::Behaviour::default()).await;
    let told = Mutex::new(Vec::new());
    let report = |transfer: &Transfer| told.lock().expect("not poisoned").push((transfer.done, transfer.total));
    let address = Address::parse("hf://org/model").expect("an address");
    fetch(&address, &settings(dir.path(), server.settings()), &report)
        .await
        .expect("fetches");
    let (done, total) = *told.lock().expect("not poisoned").last().expect("told");
    let expected = server.needed().values().map(Vec::len).sum::<usize>() as u64;
    assert_eq!((done, total), (expected, expected));
}
