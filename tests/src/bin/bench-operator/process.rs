//! Memory and processor time of a process, from `/proc`.

use anyhow::Context as _;

/// Clock ticks a second in `/proc/PID/stat`: 100 on every Linux that this runs on.
const TICKS: f64 = 100.0;

/// Resident bytes, now and at most so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// `VmRSS`.
    pub resident: u64,
    /// `VmHWM`.
    pub peak: u64,
}

/// Memory of process `pid`.
pub fn memory(pid: i32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let field = |name: &str| -> anyhow::Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        let kibibytes: u64 = number.with_context(|| format!("{path} has no {name}"))?.parse()?;
        Ok(kibibytes * 1024)
    };
    Ok(Memory {
        resident: field("VmRSS:")?,
        peak: field("VmHWM:")?,
    })
}

/// Processor seconds that process `pid` has used.
pub fn processor_seconds(pid: i32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The second field is a name in parentheses that may hold anything.
    let (_, rest) = text.rsplit_once(')').with_context(|| format!("{path} is cut"))?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| -> anyhow::Result<f64> {
        let field = fields.get(index).with_context(|| format!("{path} is cut"))?;
        Ok(field.parse()?)
    };
    // utime and stime are fields 14 and 15 of the line.
    Ok((ticks(11)? + ticks(12)?) / TICKS)
}
