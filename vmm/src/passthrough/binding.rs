//! What is written for a device to go to `vfio-pci`, and back to the driver that it had: one write at a time, from what is seen of it.
//! Pure, so it does not matter where an earlier `laird` was killed.
//!
//! `driver_override` is what keeps other drivers away, so it stands, as it was read back, before the device is taken from its driver. New
//! ids are never given to `vfio-pci`: it would take devices that nobody meant.

use crate::host::pci::{Address, Bar, Device, Id};
use serde::{Deserialize, Serialize};

/// VFIO's driver.
pub const VFIO: &str = "vfio-pci";

/// One function as it was before it was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Where it is.
    pub address: Address,
    /// Who made it.
    pub vendor: Id,
    /// What it is.
    pub device: Id,
    /// Its driver.
    pub driver: Option<String>,
    /// The only driver that might take it.
    pub driver_override: Option<String>,
    /// Whether the kernel might cut its power while it was idle.
    pub d3cold: Option<bool>,
    /// The lanes of its link, which are as many after each use.
    pub width: Option<u8>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its windows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bars: Vec<Bar>,
}

impl Function {
    /// A function as it is now.
    pub fn of(device: &Device) -> Self {
        Self {
            address: device.address,
            vendor: device.vendor,
            device: device.device,
            driver: device.driver.clone(),
            driver_override: device.driver_override.clone(),
            d3cold: device.d3cold_allowed,
            width: device.link.width,
            group: device.group,
            bars: device.bars.clone(),
        }
    }
}

/// As much of a device as decides the next write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its driver.
    pub driver: Option<String>,
    /// The only driver that may take it.
    pub driver_override: Option<String>,
    /// Whether the kernel may cut its power.
    pub d3cold: Option<bool>,
}

impl Seen {
    /// What is seen of a device.
    pub fn of(device: &Device) -> Self {
        Self {
            driver: device.driver.clone(),
            driver_override: device.driver_override.clone(),
            d3cold: device.d3cold_allowed,
        }
    }
}

/// Whose it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// VFIO's.
    Vfio,
    /// Its first driver's.
    Host,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Names the only driver that may take it, or none.
    Override(Option<String>),
    /// Says whether its power may be cut.
    D3cold(bool),
    /// Takes it from its driver.
    Unbind(String),
    /// Has the kernel look for a driver.
    Probe,
    /// Has this driver take it.
    Bind(String),
}

impl Write {
    /// The file, and what is written to it.
    pub fn target(&self, address: Address) -> (String, String) {
        let attribute = |name: &str| format!("/sys/bus/pci/devices/{address}/{name}");
        match self {
            Self::Override(driver) => {
                (attribute("driver_override"), format!("{}\n", driver.as_deref().unwrap_or_default()))
            }
            Self::D3cold(allowed) => (attribute("d3cold_allowed"), u8::from(*allowed).to_string()),
            // Not through the device's own link: whoever took it meanwhile keeps it.
            Self::Unbind(driver) => (format!("/sys/bus/pci/drivers/{driver}/unbind"), address.to_string()),
            Self::Probe => ("/sys/bus/pci/drivers_probe".into(), address.to_string()),
            Self::Bind(driver) => (format!("/sys/bus/pci/drivers/{driver}/bind"), address.to_string()),
        }
    }

    /// What it is for.
    pub fn wanted(&self) -> String {
        match self {
            Self::Override(Some(driver)) => format!("its driver_override does not become {driver}"),
            Self::Override(None) => "its driver_override does not go away".into(),
            Self::D3cold(allowed) => format!("its d3cold_allowed does not become {}", u8::from(*allowed)),
            Self::Unbind(driver) => format!("{driver} does not let go of it"),
            Self::Probe => format!("{VFIO} does not take it"),
            Self::Bind(driver) => format!("{driver} does not take it back"),
        }
    }
}

/// The next write that brings `function` to its goal; none if it is there.
pub fn next(function: &Function, goal: Goal, seen: &Seen) -> Option<Write> {
    match goal {
        Goal::Vfio => to_vfio(seen),
        Goal::Host => to_host(function, seen),
    }
}

fn to_vfio(seen: &Seen) -> Option<Write> {
    if seen.driver_override.as_deref() != Some(VFIO) {
        return Some(Write::Override(Some(VFIO.into())));
    }
    if seen.d3cold == Some(true) {
        return Some(Write::D3cold(false));
    }
    match seen.driver.as_deref() {
        Some(VFIO) => None,
        Some(driver) => Some(Write::Unbind(driver.into())),
        None => Some(Write::Probe),
    }
}

fn to_host(function: &Function, seen: &Seen) -> Option<Write> {
    if seen.driver_override != function.driver_override {
        return Some(Write::Override(function.driver_override.clone()));
    }
    // Where it was set aside for VFIO before, it may stay there.
    let aside = function.driver_override.as_deref() == Some(VFIO);
    match (seen.driver.as_deref(), function.driver.as_deref()) {
        (Some(VFIO), first) if first != Some(VFIO) && !aside => return Some(Write::Unbind(VFIO.into())),
        (None, Some(first)) => return Some(Write::Bind(first.into())),
        // Its first driver, or another one of the host's that somebody has chosen meanwhile.
        (Some(_), _) | (None, None) => {}
    }
    let differs = seen.d3cold.is_some() && function.d3cold.is_some() && seen.d3cold != function.d3cold;
    function.d3cold.filter(|_| differs).map(Write::D3cold)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A kernel with one device, as far as it matters.
    #[derive(Debug, Clone)]
    struct Kernel {
        seen: Seen,
        /// The driver that takes the device where nothing else is said.
        natural: Option<String>,
        /// Somebody who probes whatever is free, as udev and modprobe do.
        prober: bool,
    }

    impl Kernel {
        fn probe(&mut self) {
            if self.seen.driver.is_none() {
                self.seen.driver = self.seen.driver_override.clone().or_else(|| self.natural.clone());
            }
        }

        fn write(&mut self, write: &Write) {
            match write {
                Write::Override(driver) => self.seen.driver_override = driver.clone(),
                Write::D3cold(allowed) => self.seen.d3cold = Some(*allowed),
                Write::Unbind(driver) if self.seen.driver.as_ref() == Some(driver) => self.seen.driver = None,
                Write::Bind(driver)
                    if self.seen.driver_override.as_ref().is_none_or(|only| only == driver)
                        && self.seen.driver.is_none() =>
                {
                    self.seen.driver = Some(driver.clone());
                }
                Write::Probe => self.probe(),
                Write::Unbind(_) | Write::Bind(_) => {}
            }
            if self.prober {
                self.probe();
            }
        }

        fn reach(&mut self, function: &Function, goal: Goal) -> Vec<Write> {
            let mut writes = Vec::new();
            while let Some(write) = next(function, goal, &self.seen) {
                // VF6: no driver but VFIO's can take it from then on.
                if goal == Goal::Vfio && matches!(write, Write::Unbind(_) | Write::Probe) {
                    assert_eq!(self.seen.driver_override.as_deref(), Some(VFIO));
                }
                assert!(writes.len() < 8, "{writes:?}");
                self.write(&write);
                writes.push(write);
            }
            writes
        }
    }

    fn name() -> impl Strategy<Value = Option<String>> {
        prop::sample::select(vec![None, Some("nvme".to_owned()), Some("vfio-pci".to_owned())])
    }

    fn seen() -> impl Strategy<Value = Seen> {
        (name(), name(), prop::sample::select(vec![None, Some(true), Some(false)]))
            .prop_map(|(driver, driver_override, d3cold)| Seen { driver, driver_override, d3cold })
    }

    fn function(seen: &Seen) -> Function {
        Function {
            address: "0000:01:00.0".parse().unwrap(),
            vendor: Id(1),
            device: Id(2),
            driver: seen.driver.clone(),
            driver_override: seen.driver_override.clone(),
            d3cold: seen.d3cold,
            width: None,
            group: Some(1),
            bars: vec![],
        }
    }

    proptest! {
        /// VF7: from wherever an earlier `laird` was killed, with whoever probes besides.
        #[test]
        fn vf7_from_any_point_between_two_writes_it_comes_to_vfio_and_back(
            first in seen(), prober: bool, killed_at in 0_usize..8, killed_back_at in 0_usize..8,
        ) {
            // A driver that has it would be one that may.
            prop_assume!(first.driver_override.is_none() || first.driver.is_none() || first.driver == first.driver_override);
            let function = function(&first);
            let mut kernel = Kernel { seen: first.clone(), natural: first.driver.clone(), prober };
            for _ in 0..killed_at {
                let Some(write) = next(&function, Goal::Vfio, &kernel.seen) else { break };
                kernel.write(&write);
            }
            let writes = kernel.reach(&function, Goal::Vfio);
            prop_assert!(writes.len() <= 4, "{writes:?}");
            prop_assert_eq!(kernel.seen.driver.as_deref(), Some(VFIO));
            prop_assert!(kernel.seen.d3cold != Some(true));
            for _ in 0..killed_back_at {
                let Some(write) = next(&function, Goal::Host, &kernel.seen) else { break };
                kernel.write(&write);
            }
            kernel.reach(&function, Goal::Host);
            // Where somebody probes, or it was set aside, also what had no driver may have one.
            let aside = first.driver_override.as_deref() == Some(VFIO);
            if first.driver.is_some() || !(prober || aside) {
                prop_assert_eq!(&kernel.seen, &first);
            }
        }
    }

    #[test]
    fn vf6_the_override_comes_first_and_is_never_a_new_id() {
        let first = Seen { driver: Some("nvme".into()), driver_override: None, d3cold: Some(true) };
        let function = function(&first);
        let mut kernel = Kernel { seen: first, natural: Some("nvme".into()), prober: false };
        let mut writes = kernel.reach(&function, Goal::Vfio);
        writes.extend(kernel.reach(&function, Goal::Host));
        let told: Vec<_> = writes
            .iter()
            .map(|write| write.target(function.address))
            .map(|(path, text)| format!("{} {path}", text.trim()))
            .collect();
        insta::assert_snapshot!(told.join("\n"), @r"
        vfio-pci /sys/bus/pci/devices/0000:01:00.0/driver_override
        0 /sys/bus/pci/devices/0000:01:00.0/d3cold_allowed
        0000:01:00.0 /sys/bus/pci/drivers/nvme/unbind
        0000:01:00.0 /sys/bus/pci/drivers_probe
         /sys/bus/pci/devices/0000:01:00.0/driver_override
        0000:01:00.0 /sys/bus/pci/drivers/vfio-pci/unbind
        0000:01:00.0 /sys/bus/pci/drivers/nvme/bind
        1 /sys/bus/pci/devices/0000:01:00.0/d3cold_allowed
        ");
    }
}
