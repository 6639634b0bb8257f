//! Whether a guest has room for the windows (BARs) of the devices that it gets (faults.md, VF13). Pure.
//!
//! QEMU's q35 has two places for them: what is 64-bit and prefetchable goes above all of the guest's memory, the rest below 4 GiB, since the port
//! that each card is behind can pass on no more. A port's range begins and ends at multiples of the card's largest window: one of 128 GiB with
//! a small one beside it takes 256 GiB. SeaBIOS lays them out so, and Linux leaves it at that.

use crate::{
    fleet::units::Size,
    host::{
        facts::Engine,
        pci::{Address, Bar, Space},
    },
};
use std::{collections::BTreeMap, fmt};

const MIB: u128 = 1 << 20;
const GIB: u128 = 1 << 30;

/// Where memory ends and the room below 4 GiB begins: the registers of PCI Express are before it, the interrupt controllers behind. Of guests
/// with so much memory as reaches it, all but 2 GiB is above 4 GiB.
const LOW: std::ops::Range<u128> = 0xc000_0000..0xfec0_0000;
const MEMORY_BELOW: u128 = 0xb000_0000;

/// What the machine's own devices and the cards' ROMs may take there.
const OWN: u128 = 64 * MIB;

/// The smallest range of a port.
const PORT: u128 = 2 * MIB;

/// As much room above a guest's memory as QEMU tells the guest of by itself.
const HOLE: u128 = 32 * GIB;

/// Where AMD's processors have addresses that are no memory's. QEMU has a guest's memory begin above it where its devices would reach there (7.1),
/// with AMD's processors only; with others some GiB just below are not used.
const HYPERTRANSPORT: std::ops::Range<u128> = 0xfd_0000_0000..0x100_0000_0000;

/// The bits of an emulated address: QEMU has it so.
const EMULATED: u32 = 40;

/// The most bits that are made use of: what page tables of four levels reach, by which KVM may have to translate.
const BITS_MAX: u32 = 48;

/// What decides how much room a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// Its memory.
    pub memory: Size,
    /// What executes it.
    pub engine: Engine,
    /// How many bits an address of the host's memory has, if that is known.
    pub host_bits: Option<u32>,
}

/// A window of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The function.
    pub function: Address,
    /// The window.
    pub bar: Bar,
}

/// Why a guest cannot have its devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "There is no room for window {} (BAR) of {device}, which has {size}: with it, the VM's devices need {need} {place}; {hint}", .index
)]
pub struct NoRoom {
    /// The device with the largest window.
    pub device: Address,
    /// The window's number.
    pub index: u8,
    /// Its size.
    pub size: Size,
    /// What all windows need there.
    pub need: Size,
    /// Where they would be.
    pub place: Place,
    /// What can be done.
    pub hint: Hint,
}

/// Where windows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Below 4 GiB.
    Low,
    /// Above the guest's memory.
    High {
        /// That memory.
        memory: Size,
        /// How many bits an address of it has.
        bits: u32,
    },
    /// Above the memory of a guest that runs.
    Told {
        /// As much as it was told of when it started.
        room: Size,
    },
}

/// What can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// The window can be made smaller.
    Resize {
        /// The device.
        device: Address,
        /// The window's number.
        index: u8,
        /// With this size all have room.
        size: u64,
    },
    /// An emulated processor has no more.
    Emulated,
    /// The host's processor has no more.
    Processor,
    /// Nothing has more.
    Fewer,
    /// A guest that starts is told of more.
    Restart,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told { room } => write!(f, "above its memory, and it was started with room for {room}"),
            Self::Low => write!(f, "below 4GiB, where there are {}", size(room_below())),
            Self::High { memory, bits } => write!(
                f,
                "above its memory of {memory}, and its processor, with addresses of {bits} bits, reaches no further than {}",
                size(1 << bits)
            ),
        }
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resize { device, index, size } => write!(
                f,
                "while no driver has the device, `echo {} >/sys/bus/pci/devices/{device}/resource{index}_resize` makes the window {} (Resizable BAR)",
                size.trailing_zeros().saturating_sub(20),
                Size(*size)
            ),
            Self::Emulated => f.write_str("emulated processors have no more bits: use KVM"),
            Self::Processor => f.write_str(
                "the host's processor has no more bits (phys-bits): give the VM fewer devices, or have the firmware make the window smaller \
                 (Resizable BAR)",
            ),
            Self::Fewer => f.write_str("give the VM fewer devices"),
            Self::Restart => f.write_str("it gets them with `vmctl restart`"),
        }
    }
}

/// How much room the guest must be told of above its memory for `windows`, where that is more than it is told of anyway.
pub fn hole(windows: &[Window], guest: &Guest) -> Result<Option<Size>, NoRoom> {
    let misfit = match misfit(windows, guest) {
        Ok(hole) => return Ok((hole > HOLE).then(|| size(hole.next_multiple_of(GIB)))),
        Err(misfit) => misfit,
    };
    let general = match (misfit.place, guest.engine) {
        (Place::Low | Place::Told { .. }, _) => Hint::Fewer,
        (Place::High { .. }, Engine::Tcg) => Hint::Emulated,
        (Place::High { .. }, Engine::Kvm) => Hint::Processor,
    };
    let Window { function, bar } = misfit.largest;
    // The largest that has room.
    let smaller = bar.sizes.iter().rev().filter(|smaller| **smaller < bar.size).find(|smaller| {
        let resized = |window: &Window| match window {
            window if window == misfit.largest => {
                Window { function: *function, bar: Bar { size: **smaller, ..bar.clone() } }
            }
            window => window.clone(),
        };
        self::misfit(&windows.iter().map(resized).collect::<Vec<_>>(), guest).is_ok()
    });
    let resize = |size: &u64| Hint::Resize { device: *function, index: bar.index, size: *size };
    Err(NoRoom {
        device: *function,
        index: bar.index,
        size: Size(bar.size),
        need: size(misfit.need),
        place: misfit.place,
        hint: smaller.map_or(general, resize),
    })
}

/// Whether a guest that runs has room for `windows`: it was told of as much as `told` when it started.
pub fn suffices(windows: &[Window], guest: &Guest, told: Option<Size>) -> Result<(), NoRoom> {
    let room = told.unwrap_or(size(HOLE));
    let need = hole(windows, guest)?.filter(|need| *need > room);
    let memory = windows.iter().filter(|window| window.bar.space == Space::Memory);
    let (Some(need), Some(largest)) = (need, memory.max_by_key(|window| window.bar.size)) else {
        return Ok(());
    };
    Err(NoRoom {
        device: largest.function,
        index: largest.bar.index,
        size: Size(largest.bar.size),
        need,
        place: Place::Told { room },
        hint: Hint::Restart,
    })
}

/// Windows that have no room, with the largest of them.
struct Misfit<'a> {
    largest: &'a Window,
    need: u128,
    place: Place,
}

/// How much room above the guest's memory the windows take.
fn misfit<'a>(windows: &'a [Window], guest: &Guest) -> Result<u128, Misfit<'a>> {
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for card in cards(windows) {
        let (prefetchable, other): (Vec<&Window>, Vec<&Window>) =
            card.into_iter().partition(|window| window.bar.prefetchable);
        low.push(other);
        // A port has one range for all that is prefetchable.
        let wide = prefetchable.iter().all(|window| window.bar.is_64bit);
        if wide { high.push(prefetchable) } else { low.push(prefetchable) }
    }
    let all = Ranges::of(&low);
    if let Some(largest) = all.largest.filter(|_| all.below(LOW.end - OWN) < LOW.start) {
        return Err(Misfit { largest, need: all.sum, place: Place::Low });
    }
    let ranges = Ranges::of(&high);
    let Some(largest) = ranges.largest else { return Ok(0) };
    let above = |start: u128| {
        let memory = u128::from(guest.memory.0);
        let above = if memory < MEMORY_BELOW { 0 } else { memory - (2 * GIB) };
        let start = (start + above).next_multiple_of(GIB);
        (start, start.next_multiple_of(ranges.align) + ranges.sum)
    };
    let (mut start, mut end) = above(4 * GIB);
    if end.max(start + HOLE) > HYPERTRANSPORT.start {
        (start, end) = above(HYPERTRANSPORT.end);
    }
    let bits = match guest.engine {
        Engine::Tcg => EMULATED,
        Engine::Kvm => guest.host_bits.unwrap_or(BITS_MAX).min(BITS_MAX),
    };
    if end > 1 << bits {
        return Err(Misfit { largest, need: end - start, place: Place::High { memory: guest.memory, bits } });
    }
    Ok(end - start)
}

/// The memory windows of each card.
fn cards(windows: &[Window]) -> Vec<Vec<&Window>> {
    let mut cards: BTreeMap<Address, Vec<&Window>> = BTreeMap::new();
    for window in windows.iter().filter(|window| window.bar.space == Space::Memory) {
        let first = cards.keys().copied().find(|first| first.same_card(window.function));
        cards.entry(first.unwrap_or(window.function)).or_default().push(window);
    }
    cards.into_values().collect()
}

/// The ranges of ports.
struct Ranges<'a> {
    /// What they take together, if the first begins at a multiple of `align`.
    sum: u128,
    /// At what the largest range begins.
    align: u128,
    /// The largest window.
    largest: Option<&'a Window>,
}

impl<'a> Ranges<'a> {
    fn of(ports: &[Vec<&'a Window>]) -> Self {
        let (mut sum, mut align) = (0, PORT);
        for windows in ports.iter().filter(|windows| !windows.is_empty()) {
            let sizes = || windows.iter().map(|window| u128::from(window.bar.size));
            // The kernel's windows are powers of two; a file may say anything.
            let largest = sizes().max().unwrap_or_default().next_power_of_two().max(PORT);
            sum += sizes().sum::<u128>().next_multiple_of(largest);
            align = align.max(largest);
        }
        let largest = ports.iter().flatten().copied().max_by_key(|window| window.bar.size);
        Self { sum, align, largest }
    }

    /// Where the first begins, if the last ends before `end`.
    fn below(&self, end: u128) -> u128 {
        end.saturating_sub(self.sum) / self.align * self.align
    }
}

fn room_below() -> u128 {
    LOW.end - LOW.start - OWN
}

fn size(bytes: u128) -> Size {
    Size(u64::try_from(bytes).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::{Inventory, machine::Machine};
    use proptest::prelude::*;

    fn guest(memory_gib: u64, engine: Engine, host_bits: Option<u32>) -> Guest {
        Guest { memory: Size(memory_gib << 30), engine, host_bits }
    }

    /// A host's processor of today.
    fn kvm(memory_gib: u64) -> Guest {
        guest(memory_gib, Engine::Kvm, Some(46))
    }

    fn windows_of(machine: &Machine, addresses: &[&str]) -> Vec<Window> {
        let inventory = Inventory::of(machine);
        let of = |address: &&str| {
            let device = inventory.devices[&address.parse().unwrap()].clone();
            device.bars.into_iter().map(move |bar| Window { function: device.address, bar })
        };
        addresses.iter().flat_map(of).collect()
    }

    fn windows(text: &str) -> Vec<Window> {
        let machine = Machine::of(text);
        let inventory = Inventory::of(&machine);
        let addresses: Vec<_> = inventory.devices.keys().map(ToString::to_string).collect();
        windows_of(&machine, &addresses.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// H100s, whose windows are those that `lspci` shows in github.com/fastfetch-cli/fastfetch, issue 1658.
    fn h100s(count: u8) -> Vec<Window> {
        let text: String = (0..count)
            .map(|bus| {
                format!(
                    "[0000:{bus:02x}:00.0]\nvendor = 0x10de\ndevice = 0x2330\nclass = 0x030200\n\
                     bar0 = mem64pref 0x88042000000 0x88042ffffff\nbar2 = mem64pref 0x84000000000 0x85fffffffff\n\
                     bar4 = mem64pref 0x88040000000 0x88041ffffff\n"
                )
            })
            .collect();
        windows(&text)
    }

    const CARD: &str = "[0000:01:00.0]\nvendor = 0x10de\ndevice = 0x2684\nclass = 0x030000\n";

    #[test]
    fn vf13_small_cards_have_room_in_every_guest_and_need_nothing_said() {
        let gtx = windows_of(&Machine::recorded("gtx-1080"), &["0000:65:00.0", "0000:65:00.1"]);
        let functions = ["0000:26:00.0", "0000:26:00.1", "0000:26:00.2", "0000:26:00.3"];
        let rtx = windows_of(&Machine::recorded("turing"), &functions);
        assert_eq!((gtx.len(), rtx.len()), (5, 8));
        for windows in [vec![], gtx.clone(), rtx.clone(), [gtx, rtx].concat()] {
            for guest in [
                kvm(1),
                kvm(512),
                guest(8, Engine::Tcg, None),
                guest(1, Engine::Kvm, Some(36)),
                guest(8, Engine::Kvm, None),
            ] {
                assert_eq!(hole(&windows, &guest), Ok(None), "{guest:?}");
            }
        }
    }

    #[test]
    fn vf13_an_h100_has_room_that_qemu_must_be_told_of() {
        let gib = |gib: u64| Ok(Some(Size(gib << 30)));
        // 256 GiB from a multiple of 128 GiB on.
        assert_eq!(hole(&h100s(1), &kvm(2)), gib(384 - 4));
        assert_eq!(hole(&h100s(1), &kvm(64)), gib(384 - 66));
        assert_eq!(hole(&h100s(1), &kvm(126)), gib(256));
        assert_eq!(hole(&h100s(1), &guest(64, Engine::Tcg, None)), gib(384 - 66));
        // Beyond what is AMD's.
        assert_eq!(hole(&h100s(8), &kvm(64)), gib(2048 + 128 - 62));
        // Not known is not refused.
        assert_eq!(hole(&h100s(8), &guest(64, Engine::Kvm, None)), gib(2048 + 128 - 62));
    }

    #[test]
    fn vf13_a_guest_that_runs_has_as_much_room_as_it_was_started_with() {
        let said = |told| suffices(&h100s(1), &kvm(2), told).map_err(|error| error.to_string());
        assert_eq!(said(Some(Size(380 << 30))), Ok(()));
        insta::assert_snapshot!(said(None).unwrap_err(), @"There is no room for window 2 (BAR) of 0000:00:00.0, which has 128GiB: with it, the VM's devices need 380GiB above its memory, and it was started with room for 32GiB; it gets them with `vmctl restart`");
        assert!(said(Some(Size(379 << 30))).is_err());
        assert_eq!(suffices(&[], &kvm(2), None), Ok(()));
    }

    #[test]
    fn vf13_what_a_processor_cannot_reach_is_refused_with_the_window_and_what_to_do() {
        let said = |windows: &[Window], guest: &Guest| hole(windows, guest).unwrap_err().to_string();
        insta::assert_snapshot!(said(&h100s(4), &guest(64, Engine::Tcg, Some(46))), @"There is no room for window 2 (BAR) of 0000:03:00.0, which has 128GiB: with it, the VM's devices need 1090GiB above its memory of 64GiB, and its processor, with addresses of 40 bits, reaches no further than 1TiB; emulated processors have no more bits: use KVM");
        insta::assert_snapshot!(said(&h100s(2), &guest(16, Engine::Kvm, Some(39))), @"There is no room for window 2 (BAR) of 0000:01:00.0, which has 128GiB: with it, the VM's devices need 622GiB above its memory of 16GiB, and its processor, with addresses of 39 bits, reaches no further than 512GiB; the host's processor has no more bits (phys-bits): give the VM fewer devices, or have the firmware make the window smaller (Resizable BAR)");
        // As some cards can be.
        let resizable = format!(
            "{CARD}bar0 = mem 0x0 0xffffff\nbar1 = mem64pref 0x0 0x7ffffffff\nbar3 = mem64pref 0x0 0x1ffffff\nresource1_resize = 000000000000ffc0\n"
        );
        let few = guest(2, Engine::Kvm, Some(36));
        insta::assert_snapshot!(said(&windows(&resizable), &few), @"There is no room for window 1 (BAR) of 0000:01:00.0, which has 32GiB: with it, the VM's devices need 92GiB above its memory of 2GiB, and its processor, with addresses of 36 bits, reaches no further than 64GiB; while no driver has the device, `echo 14 >/sys/bus/pci/devices/0000:01:00.0/resource1_resize` makes the window 16GiB (Resizable BAR)");
        // None of its sizes would do.
        let large = resizable.replace("000000000000ffc0", "0000000000018000");
        insta::assert_snapshot!(said(&windows(&large), &few), @"There is no room for window 1 (BAR) of 0000:01:00.0, which has 32GiB: with it, the VM's devices need 92GiB above its memory of 2GiB, and its processor, with addresses of 36 bits, reaches no further than 64GiB; the host's processor has no more bits (phys-bits): give the VM fewer devices, or have the firmware make the window smaller (Resizable BAR)");
    }

    #[test]
    fn vf13_what_must_be_below_4_gib_and_is_more_than_there_is_is_refused() {
        let card = |windows: &str| self::windows(&format!("{CARD}{windows}"));
        let guest = kvm(8);
        assert_eq!(hole(&card("bar0 = mem 0x0 0x1fffffff"), &guest), Ok(None));
        insta::assert_snapshot!(hole(&card("bar0 = mem 0x0 0x3fffffff"), &guest).unwrap_err(), @"There is no room for window 0 (BAR) of 0000:01:00.0, which has 1GiB: with it, the VM's devices need 1GiB below 4GiB, where there are 940MiB; give the VM fewer devices");
        // A port has one range for what is prefetchable, and one below 4 GiB for what is not, of however many bits.
        assert!(hole(&card("bar0 = mem64 0x0 0x3fffffff"), &guest).is_err());
        assert!(hole(&card("bar0 = mempref 0x0 0xfff\nbar1 = mem64pref 0x0 0x3fffffff"), &guest).is_err());
        assert_eq!(hole(&card("bar0 = mem 0x0 0xfff\nbar1 = mem64pref 0x0 0x3fffffff"), &guest), Ok(None));
        // So a small window can take its card's others away from where they have no room: above so much memory, emulated, are only addresses of
        // AMD's.
        let huge = Guest { memory: Size(1_050_119_503_873), engine: Engine::Tcg, host_bits: None };
        assert!(hole(&card("bar0 = mem64pref 0x0 0xfff"), &huge).is_err());
        assert_eq!(hole(&card("bar0 = mem64pref 0x0 0xfff\nbar2 = mempref 0x0 0xfff"), &huge), Ok(None));
        // Ports are no memory.
        assert_eq!(hole(&card("bar0 = io 0x0 0x3fffffff"), &guest), Ok(None));
    }

    fn some_window() -> impl Strategy<Value = Window> {
        let size = prop_oneof![any::<u64>(), (0_u32..50).prop_map(|bit| 1 << bit)];
        let address = (0_u8..4, 0_u8..4).prop_map(|(bus, function)| format!("0000:{bus:02x}:00.{function}"));
        let sizes = prop::collection::vec(any::<u64>(), 0..3);
        (address, any::<bool>(), any::<bool>(), size, sizes).prop_map(
            |(address, is_64bit, prefetchable, size, sizes)| Window {
                function: address.parse().unwrap(),
                bar: Bar { index: 0, space: Space::Memory, is_64bit, prefetchable, size, sizes },
            },
        )
    }

    proptest! {
        /// Nothing panics, whatever files say; what is refused stays so with a card more; room is as much as the windows at least.
        #[test]
        fn vf13_more_cards_never_need_less(windows in prop::collection::vec(some_window(), 0..8), memory in any::<u64>(), bits in prop::option::of(any::<u32>())) {
            for engine in [Engine::Kvm, Engine::Tcg] {
                let guest = Guest { memory: Size(memory), engine, host_bits: bits };
                let all = hole(&windows, &guest);
                let Some(last) = windows.last() else { continue };
                if let Ok(all) = all {
                    let other = |w: &&Window| !w.function.same_card(last.function);
                    let fewer: Vec<_> = windows.iter().filter(other).cloned().collect();
                    prop_assert!(hole(&fewer, &guest).is_ok());
                    let high = |w: &&Window| w.bar.is_64bit && w.bar.prefetchable;
                    let alone = windows.iter().all(|w| high(&w));
                    let sum: u128 = windows.iter().map(|w| u128::from(w.bar.size)).sum();
                    prop_assert!(!alone || u128::from(all.map_or(32 << 30, |all| all.0)) >= sum);
                }
            }
        }
    }
}
