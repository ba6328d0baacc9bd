//! What an agent that died left behind.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::{
    log,
    process::{kill_exactly, kill_marked},
    record::{Exit, PodRecord, State},
};

/// Name of the record in a pod's directory.
const RECORD: &str = "record.json";

/// Directory of one pod.
pub fn pod_dir(root: &Path, uid: &str) -> PathBuf {
    root.join("pods").join(uid)
}

/// Writes the record so that a crash leaves the old or the new one.
pub fn save(root: &Path, record: &PodRecord) -> io::Result<()> {
    let dir = pod_dir(root, &record.uid);
    fs::create_dir_all(&dir)?;
    let partial = dir.join("record.json.new");
    fs::write(&partial, serde_json::to_vec_pretty(record)?)?;
    fs::rename(&partial, dir.join(RECORD))
}

/// Removes everything of a pod but its logs.
pub fn remove(root: &Path, uid: &str) -> io::Result<()> {
    match fs::remove_dir_all(pod_dir(root, uid)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Kills every process that an earlier agent recorded or marked, notes their ends and returns the records.
pub fn recover(root: &Path, now: Timestamp) -> io::Result<Vec<PodRecord>> {
    let pods = root.join("pods");
    fs::create_dir_all(&pods)?;
    let mut records = Vec::new();
    for entry in fs::read_dir(&pods)? {
        let dir = entry?.path();
        let Some(uid) = dir.file_name().and_then(|name| name.to_str()).map(str::to_owned) else {
            continue;
        };
        // The marks also find a process that was started a moment before it could be recorded.
        let killed = kill_marked(&format!("{uid}/"));
        if killed > 0 {
            tracing::warn!(pod = uid, killed, "processes of an earlier agent were killed");
        }
        match read(&dir) {
            Ok(mut record) => {
                note_ends(root, &mut record, now);
                save(root, &record)?;
                records.push(record);
            }
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "a pod's record cannot be read and is removed");
                fs::remove_dir_all(&dir)?;
            }
        }
    }
    Ok(records)
}

fn read(dir: &Path) -> io::Result<PodRecord> {
    Ok(serde_json::from_slice(&fs::read(dir.join(RECORD))?)?)
}

fn note_ends(root: &Path, record: &mut PodRecord, now: Timestamp) {
    let logs = log::pod_dir(root, &record.namespace, &record.name, &record.uid);
    for container in &mut record.containers {
        let State::Running { started_at } = container.state else {
            continue;
        };
        if let Some(id) = container.process {
            kill_exactly(id);
        }
        if let Err(error) = log::mark_ended(&logs.join(&container.name), container.restart_count) {
            tracing::debug!(container = container.name, %error, "the end of a log was not noted");
        }
        let exit = Exit {
            code: 137,
            signal: Some(9),
            reason: "Error".to_owned(),
            message: Some("the node agent ended while this container ran; its processes were killed".to_owned()),
            started_at,
            finished_at: now,
            container_id: container.process.map(super::record::ProcessId::container_id),
        };
        container.end(exit);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::core::v1::Pod;

    use super::*;
    use crate::node::process::{Launch, MARKER, marked as marked_processes, start};

    #[tokio::test]
    async fn recorded_and_marked_processes_are_killed_and_noted() {
        let root = tempfile::tempdir().unwrap();
        let uid = format!("leftover-{}", std::process::id());
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": uid}, "spec": {"containers": [{"name": "c"}]}
        }))
        .unwrap();
        let sleeper = |mark: &str| Launch {
            program: PathBuf::from("/bin/sleep"),
            args: vec!["600".to_owned()],
            env: BTreeMap::from([(MARKER.to_owned(), mark.to_owned())]),
            dir: PathBuf::from("/"),
        };
        let (recorded, marked) = (
            start(&sleeper("other")).unwrap(),
            start(&sleeper(&format!("{uid}/c"))).unwrap(),
        );
        // Between fork and the end of exec a process shows no environment.
        while marked_processes(&format!("{uid}/")).is_empty() {
            tokio::task::yield_now().await;
        }
        let mut record = PodRecord::new(&pod, Timestamp::UNIX_EPOCH);
        record.containers[0].state = State::Running {
            started_at: Timestamp::UNIX_EPOCH,
        };
        record.containers[0].process = Some(recorded.process.id());
        save(root.path(), &record).unwrap();

        let records = recover(root.path(), Timestamp::now()).unwrap();

        assert_eq!(recorded.process.wait(|_| ()).await.unwrap().code, 137);
        assert_eq!(marked.process.wait(|_| ()).await.unwrap().code, 137);
        let exit = records[0].containers[0].newest_exit().unwrap();
        assert_eq!((exit.code, exit.reason.as_str()), (137, "Error"));
        assert_eq!(recover(root.path(), Timestamp::now()).unwrap(), records);
    }

    #[test]
    fn a_torn_record_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = pod_dir(root.path(), "u");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(RECORD), "{").unwrap();
        assert_eq!(recover(root.path(), Timestamp::now()).unwrap(), []);
        assert!(!dir.exists());
    }
}
