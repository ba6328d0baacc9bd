//! GPUs that pods ask for and what the machine has for them.

use std::{collections::BTreeMap, path::Path};

use k8s_openapi::api::core::v1::Container;

use super::quantity;

/// Resource name of GPUs.
pub const RESOURCE: &str = "nvidia.com/gpu";

/// Advertised and real devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accelerators {
    /// What the node says it has.
    pub advertised: u32,
    /// What it has.
    pub real: u32,
}

impl Accelerators {
    /// Counts the machine's devices (`/dev/nvidia0` and so on).
    pub fn detect(advertised: u32) -> Self {
        let real = (0_u32..)
            .take_while(|n| Path::new(&format!("/dev/nvidia{n}")).exists())
            .count();
        Self {
            advertised,
            real: u32::try_from(real).unwrap_or(u32::MAX),
        }
    }

    /// In words, for a node's condition and a pod's event.
    pub fn describe(self) -> String {
        let Self { advertised, real } = self;
        match real {
            0 => format!("{advertised} {RESOURCE} are advertised; this machine has none: processes run on the CPU"),
            _ if real < advertised => {
                format!("{advertised} {RESOURCE} are advertised; this machine has {real}, which processes share")
            }
            _ => format!("{advertised} {RESOURCE} are advertised; this machine has {real}"),
        }
    }

    /// Devices are shared or missing.
    pub fn is_emulated(self) -> bool {
        self.real < self.advertised
    }

    /// Value of `CUDA_VISIBLE_DEVICES` for a process that asked for `count` devices, `taken` being held by others.
    pub fn visible_devices(self, count: u32, taken: u32) -> String {
        if self.real == 0 {
            return String::new();
        }
        let devices: Vec<String> = (0..count.min(self.real))
            .map(|n| ((taken + n) % self.real).to_string())
            .collect();
        devices.join(",")
    }
}

/// Devices that a container asks for; extended resources stand in the limits.
pub fn requested(container: &Container) -> u32 {
    let count =
        |values: Option<&BTreeMap<String, _>>| values.and_then(|values| values.get(RESOURCE)).and_then(quantity::milli);
    let resources = container.resources.as_ref();
    let milli = count(resources.and_then(|r| r.limits.as_ref()))
        .or_else(|| count(resources.and_then(|r| r.requests.as_ref())))
        .unwrap_or(0);
    u32::try_from(milli / 1000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_devices_shows_none() {
        let none = Accelerators { advertised: 8, real: 0 };
        assert_eq!(none.visible_devices(2, 0), "");
        assert!(none.is_emulated());
        assert!(none.describe().ends_with("run on the CPU"));
    }

    #[test]
    fn devices_are_handed_out_in_turn() {
        let two = Accelerators { advertised: 8, real: 2 };
        assert_eq!(two.visible_devices(1, 1), "1");
        assert_eq!(two.visible_devices(1, 2), "0");
        assert_eq!(two.visible_devices(4, 0), "0,1");
    }

    #[test]
    fn a_request_is_read_from_limits() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "c", "resources": {"limits": {"nvidia.com/gpu": "2"}}
        }))
        .unwrap();
        assert_eq!(requested(&container), 2);
        assert_eq!(requested(&Container::default()), 0);
    }
}
