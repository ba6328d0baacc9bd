//! No process outlives the node: a watchdog that kills every registered group when this process ends, even by SIGKILL.
//!
//! It is a `/bin/sh` that reads group numbers from a pipe whose other end only this process holds; end of file means
//! that this process is gone. (`PR_SET_PDEATHSIG` would be tied to the thread that started the container, which a
//! thread pool may end at any time.) A group is taken off the list before its leader is reaped, so no reused number
//! is ever killed.

use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use super::record::ProcessId;

const SCRIPT: &str = r#"
groups=" "
while read -r action group; do
  case $action in
    add) groups="$groups$group " ;;
    remove) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
"#;

/// The watchdog. Dropping it kills every group that is still registered.
#[derive(Debug)]
pub struct Guard {
    pipe: Mutex<Option<ChildStdin>>,
    shell: Mutex<Child>,
}

impl Guard {
    /// Starts the watchdog.
    pub fn start() -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .env_clear()
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Self {
            pipe: Mutex::new(pipe),
            shell: Mutex::new(shell),
        })
    }

    /// Registers a group.
    pub fn add(&self, id: ProcessId) {
        self.send(&format!("add {}\n", id.pid));
    }

    /// Takes a group off the list. Call it before the leader is reaped.
    pub fn remove(&self, id: ProcessId) {
        self.send(&format!("remove {}\n", id.pid));
    }

    fn send(&self, line: &str) {
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = pipe.as_mut()
            && let Err(error) = pipe.write_all(line.as_bytes())
        {
            tracing::warn!(%error, "the watchdog of container processes is gone");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Err(error) = self.shell.lock().unwrap_or_else(PoisonError::into_inner).wait() {
            tracing::warn!(%error, "the watchdog of container processes was not reaped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf};

    use super::*;
    use crate::node::process::{Launch, start};

    fn sleeper() -> Launch {
        Launch {
            program: PathBuf::from("/bin/sleep"),
            args: vec!["600".to_owned()],
            env: BTreeMap::new(),
            dir: PathBuf::from("/"),
        }
    }

    #[tokio::test]
    async fn registered_groups_die_with_the_guard_and_removed_ones_live_on() {
        let guard = Guard::start().unwrap();
        let started: Vec<_> = (0..4).map(|_| start(&sleeper()).unwrap()).collect();
        for one in &started {
            guard.add(one.process.id());
        }
        guard.remove(started[1].process.id());
        guard.remove(started[3].process.id());
        drop(guard);
        assert_eq!(started[0].process.wait(|_| ()).await.unwrap().signal, Some(9));
        assert_eq!(started[2].process.wait(|_| ()).await.unwrap().signal, Some(9));
        for survivor in [&started[1], &started[3]] {
            survivor.process.terminate();
            assert_eq!(survivor.process.wait(|_| ()).await.unwrap().signal, Some(15));
        }
    }
}
