//! Which devices a VM gets, of those that it asks for. Pure.

use super::{binding::Function, record::Holding, window::Window};
use crate::{
    fleet::gpus::Gpu,
    host::pci::{Address, Device, Inventory},
};
use std::collections::{BTreeMap, BTreeSet};

/// The most candidates that are told with what is against them.
const TOLD_MAX: usize = 16;

/// Devices that go together, of which a VM gets some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The lowest address among them.
    pub key: Address,
    /// All of them, as they are before they are taken.
    pub functions: Vec<Function>,
    /// Those that the VM sees: what it asked for, with all functions of the card.
    pub given: BTreeSet<Address>,
}

impl Chosen {
    /// The windows of what the VM sees.
    pub fn windows(&self) -> Vec<Window> {
        let seen = self.functions.iter().filter(|function| self.given.contains(&function.address));
        let windows =
            seen.flat_map(|f| f.bars.iter().map(|bar| Window { function: f.address, bar: bar.clone() }));
        windows.collect()
    }
}

/// Why a VM cannot have what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Cannot have {want}: {}", .why.join("; "))]
pub struct Unmet {
    /// What it asks for.
    pub want: String,
    /// Each candidate with what is against it.
    pub why: Vec<String>,
}

/// Chooses a device for each of `wants`, from those that `vm` has, those that are free, and the host's.
pub fn choose(
    vm: &str,
    wants: &[Gpu],
    inventory: &Inventory,
    held: &BTreeMap<Address, Holding>,
) -> Result<Vec<Chosen>, Unmet> {
    let asked: BTreeSet<Address> = wants
        .iter()
        .filter_map(|want| match want {
            Gpu::At(at) => Some(at.address),
            Gpu::Any(_) => None,
        })
        .collect();
    let mut choice = Choice { vm, inventory, held, asked, chosen: BTreeMap::new() };
    // What is named is not for those to whom any would do.
    let (named, any): (Vec<_>, Vec<_>) = wants.iter().partition(|want| matches!(want, Gpu::At(_)));
    for want in named.into_iter().chain(any) {
        choice.meet(want)?;
    }
    Ok(choice.chosen.into_values().collect())
}

struct Choice<'a> {
    vm: &'a str,
    inventory: &'a Inventory,
    held: &'a BTreeMap<Address, Holding>,
    asked: BTreeSet<Address>,
    chosen: BTreeMap<Address, Chosen>,
}

impl Choice<'_> {
    fn meet(&mut self, want: &Gpu) -> Result<(), Unmet> {
        let unmet = |why: Vec<String>| Unmet { want: want.to_string(), why };
        if !self.inventory.vfio.driver {
            return Err(unmet(vec!["the driver vfio-pci is not loaded (modprobe vfio-pci)".into()]));
        }
        let count = match want {
            Gpu::At(_) => 1,
            Gpu::Any(any) => any.count,
        };
        let mut candidates: Vec<&Device> =
            self.inventory.devices.values().filter(|device| want.means(device)).collect();
        // What it has it keeps, and one that is reset already is ready sooner. The sort keeps the order of addresses.
        candidates.sort_by_key(|device| match self.holding(device.address) {
            Some((_, holding)) if self.is_own(holding) => 0,
            Some(_) => 1,
            None => 2,
        });
        let (mut met, mut why) = (0_u32, Vec::new());
        for device in candidates {
            if met == count {
                break;
            }
            match self.against(want, device) {
                Some(reason) => why.push(format!("{}: {reason}", device.told())),
                None => {
                    self.take(device);
                    met = met.saturating_add(1);
                }
            }
        }
        if met == count {
            return Ok(());
        }
        let more = why.len().saturating_sub(TOLD_MAX);
        why.truncate(TOLD_MAX);
        if more > 0 {
            why.push(format!("and {more} more"));
        }
        if met > 0 {
            why.insert(0, format!("only {met} of {count} can be had"));
        }
        if why.is_empty() {
            why.push(match want {
                Gpu::At(at) => format!("there is no PCI device {}", at.address),
                Gpu::Any(_) => "this host has none".into(),
            });
        }
        Err(unmet(why))
    }

    fn holding(&self, address: Address) -> Option<(&Address, &Holding)> {
        self.held.iter().find(|(_, holding)| holding.has(address))
    }

    /// Whether the VM has it already.
    fn is_own(&self, holding: &Holding) -> bool {
        holding.life.state.vm() == Some(self.vm)
    }

    /// What is against giving a device.
    fn against(&self, want: &Gpu, device: &Device) -> Option<String> {
        let taken = |chosen: &Chosen| chosen.functions.iter().any(|f| f.address == device.address);
        // Who names two functions of a card gets the card once; who wants any two wants two.
        if matches!(want, Gpu::Any(_)) && self.chosen.values().any(taken) {
            return Some("this VM gets it already".into());
        }
        let holding = self.holding(device.address).map(|(_, holding)| holding);
        if holding.is_some_and(|holding| self.is_own(holding)) {
            return None;
        }
        if let Some(refusal) = holding.and_then(|holding| holding.life.obstacle()) {
            return Some(refusal.to_string());
        }
        let obstacles = self.inventory.obstacles(device, &self.asked);
        if !obstacles.is_empty() {
            return Some(obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join(", and "));
        }
        // What goes with it may be another's, or be left in quarantine.
        self.inventory.together(device).into_iter().find_map(|address| {
            let (_, holding) = self.holding(address)?;
            Some(format!("{address}, which goes with it: {}", holding.life.obstacle()?))
        })
    }

    fn take(&mut self, device: &Device) {
        let (key, functions) = match self.holding(device.address) {
            Some((key, holding)) => (*key, holding.functions.clone()),
            None => {
                let mut whole = self.inventory.together(device);
                whole.sort_unstable();
                let functions = whole
                    .iter()
                    .filter_map(|address| self.inventory.devices.get(address))
                    .map(Function::of)
                    .collect();
                (whole.first().copied().unwrap_or(device.address), functions)
            }
        };
        let chosen =
            self.chosen.entry(key).or_insert_with(|| Chosen { key, functions, given: BTreeSet::new() });
        let card = chosen.functions.iter().map(|f| f.address).filter(|other| other.same_card(device.address));
        let card: Vec<_> = card.collect();
        chosen.given.extend(card);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::pci::machine::Machine,
        passthrough::machine::{Life, Reason, State},
    };

    fn wants(text: &str) -> Vec<Gpu> {
        serde_json::from_str(text).unwrap()
    }

    const LOADED: &str = "/proc/self/mountinfo =\n/sys/bus/pci/drivers/vfio-pci/bind =\n";

    fn device(address: &str, class: &str, more: &str) -> String {
        format!("[{address}]\nvendor = 0x10de\ndevice = 0x2684\nclass = {class}\n{more}\n")
    }

    /// Two cards with sound, and a disk with a network card in one group.
    fn host() -> Inventory {
        Inventory::of(&Machine::of(
            &[
                LOADED.to_owned(),
                device("0000:01:00.0", "0x030000", "iommu_group = 1\ndriver = nouveau"),
                device("0000:01:00.1", "0x040300", "iommu_group = 1\ndriver = snd_hda_intel"),
                device("0000:02:00.0", "0x030000", "iommu_group = 2"),
                device("0000:02:00.1", "0x040300", "iommu_group = 2"),
                device("0000:03:00.0", "0x010802", "iommu_group = 3\ndriver = nvme"),
                device("0000:04:00.0", "0x020000", "iommu_group = 3\ndriver = e1000e"),
            ]
            .concat(),
        ))
    }

    fn held(key: &str, state: State) -> BTreeMap<Address, Holding> {
        let inventory = host();
        let address: Address = key.parse().unwrap();
        let functions = inventory
            .together(&inventory.devices[&address])
            .iter()
            .map(|a| Function::of(&inventory.devices[a]))
            .collect();
        let life = Life { clean: state == State::Free, state, last: Some("a".into()), blame: None };
        BTreeMap::from([(address, Holding { life, ..Holding::of(functions, "boot") })])
    }

    fn chosen(text: &str, held: &BTreeMap<Address, Holding>) -> Result<Vec<String>, String> {
        let chosen = choose("b", &wants(text), &host(), held).map_err(|error| error.to_string())?;
        let told =
            |set: &BTreeSet<Address>| set.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        Ok(chosen
            .iter()
            .map(|chosen| format!("{} of {}", told(&chosen.given), chosen.functions.len()))
            .collect())
    }

    #[test]
    fn vf4_a_card_is_taken_whole_whichever_function_is_named() {
        let whole = ["0000:01:00.0 0000:01:00.1 of 2"];
        let none = BTreeMap::new();
        assert_eq!(chosen(r#"[{"address":"0000:01:00.0"}]"#, &none).unwrap(), whole);
        assert_eq!(chosen(r#"[{"address":"0000:01:00.1"}]"#, &none).unwrap(), whole);
        assert_eq!(
            chosen(r#"[{"address":"0000:01:00.1"},{"address":"0000:01:00.0"}]"#, &none).unwrap(),
            whole
        );
    }

    #[test]
    fn by_need_what_is_free_comes_first_and_what_is_named_is_left_out() {
        let none = BTreeMap::new();
        assert_eq!(
            chosen(r#"[{"vendor":"nvidia","arch":"ada"}]"#, &none).unwrap(),
            ["0000:01:00.0 0000:01:00.1 of 2"]
        );
        let free = held("0000:02:00.0", State::Free);
        assert_eq!(chosen(r#"[{"vendor":"nvidia"}]"#, &free).unwrap(), ["0000:02:00.0 0000:02:00.1 of 2"]);
        let both = ["0000:01:00.0 0000:01:00.1 of 2", "0000:02:00.0 0000:02:00.1 of 2"];
        assert_eq!(chosen(r#"[{"vendor":"nvidia","count":2}]"#, &none).unwrap(), both);
        assert_eq!(chosen(r#"[{"vendor":"nvidia"},{"address":"0000:01:00.0"}]"#, &none).unwrap(), both);
    }

    #[test]
    fn vf2_a_shared_group_is_refused_with_its_members_or_taken_whole() {
        let none = BTreeMap::new();
        insta::assert_snapshot!(chosen(r#"[{"address":"0000:03:00.0"}]"#, &none).unwrap_err(), @"Cannot have the device 0000:03:00.0: 0000:03:00.0 (NVMe controller, driver nvme): its IOMMU group 3 has other devices of the host's; all in it: 0000:03:00.0 (NVMe controller, driver nvme), 0000:04:00.0 (Ethernet controller, driver e1000e)");
        let both = chosen(r#"[{"address":"0000:03:00.0"},{"address":"0000:04:00.0"}]"#, &none).unwrap();
        assert_eq!(both, ["0000:03:00.0 0000:04:00.0 of 2"]);
    }

    #[test]
    fn vf10_what_another_vm_has_is_refused_with_who_and_with_all_candidates() {
        let leased = held("0000:01:00.0", State::Leased { vm: "a".into() });
        insta::assert_snapshot!(chosen(r#"[{"address":"0000:01:00.1"}]"#, &leased).unwrap_err(), @"Cannot have the device 0000:01:00.1: 0000:01:00.1 (audio device, driver snd_hda_intel): VM a has it; stop the VM first");
        insta::assert_snapshot!(chosen(r#"[{"vendor":"nvidia","count":2}]"#, &leased).unwrap_err(), @"Cannot have 2 of vendor nvidia: only 1 of 2 can be had; 0000:01:00.0 (VGA controller, driver nouveau): VM a has it; stop the VM first");
        let reason = Reason::Dead { address: "0000:01:00.0".into() };
        let quarantined = held("0000:01:00.0", State::Quarantined { reason });
        insta::assert_snapshot!(chosen(r#"[{"address":"0000:01:00.0"}]"#, &quarantined).unwrap_err(), @"Cannot have the device 0000:01:00.0: 0000:01:00.0 (VGA controller, driver nouveau): it is quarantined: 0000:01:00.0 does not answer: its configuration reads 0xffffffff; `vmctl gpu release` gives it back to the host");
    }

    #[test]
    fn vf1_what_is_not_there_is_told() {
        let none = BTreeMap::new();
        insta::assert_snapshot!(chosen(r#"[{"address":"0000:09:00.0"}]"#, &none).unwrap_err(), @"Cannot have the device 0000:09:00.0: there is no PCI device 0000:09:00.0");
        insta::assert_snapshot!(chosen(r#"[{"vendor":"nvidia","arch":"hopper"}]"#, &none).unwrap_err(), @"Cannot have 1 of vendor nvidia, Hopper: this host has none");
        let bare = Inventory::of(&Machine::of(&device("0000:01:00.0", "0x030000", "iommu_group = 1")));
        let error = choose("b", &wants(r#"[{"vendor":"nvidia"}]"#), &bare, &none).unwrap_err().to_string();
        assert!(error.ends_with("the driver vfio-pci is not loaded (modprobe vfio-pci)"), "{error}");
    }
}
