//! What is shown of recorded machines.

use super::{Named, list, show};
use crate::machine::Machine;
use lair_vmm::{
    api::gpus::{GpuStatus, GpusQuery, GpusReply},
    host::pci::{Address, AerCounts, Inventory, Sysfs},
    passthrough::{
        binding::Function,
        certificate::{Certificate, Measure, Said},
        fault::Fault,
        machine::{Life, Reason, State},
        record::Holding,
    },
};
use std::collections::BTreeMap;

const MACHINES: [&str; 4] = ["gtx-1080", "turing", "rtx-4000-sff-ada", "h100-sxm"];

fn inventory(name: &str) -> Inventory {
    Inventory::read(&Sysfs::at(Machine::recorded(name).root())).unwrap()
}

fn reply(name: &str, all: bool) -> GpusReply {
    GpusReply::new(&inventory(name), &BTreeMap::new(), &GpusQuery { all })
}

fn status(name: &str, address: &str) -> GpuStatus {
    GpuStatus::of(&inventory(name), &BTreeMap::new(), address.parse().unwrap()).unwrap()
}

/// As it is on a terminal of 80 columns.
fn trimmed(text: &str) -> String {
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn listed(reply: &GpusReply) -> String {
    let reasons: Vec<_> = list::reasons(reply).collect();
    format!("{}\n\n{}", trimmed(&list::shown(reply, Some(80)).to_string()), reasons.join("\n\n"))
}

fn shown(status: &GpuStatus) -> String {
    let mut parts = vec![trimmed(&show::facts(status, Some(80)).to_string())];
    parts.extend(show::members(status, Some(80)).map(|members| trimmed(&members.to_string())));
    parts.extend(show::reasons(status));
    parts.join("\n\n")
}

#[test]
fn lists() {
    for name in MACHINES {
        insta::assert_snapshot!(format!("list_{name}"), listed(&reply(name, false)));
    }
    insta::assert_snapshot!("list_all", trimmed(&list::shown(&reply("turing", true), Some(80)).to_string()));
}

#[test]
fn each_card_in_full() {
    for (name, address) in
        MACHINES.into_iter().zip(["0000:65:00.0", "0000:26:00.0", "0000:01:00.0", "0000:11:00.0"])
    {
        insta::assert_snapshot!(format!("show_{name}"), shown(&status(name, address)));
    }
    insta::assert_snapshot!("show_shared_group", shown(&status("turing", "0000:22:00.0")));
}

/// The GPU of a recorded machine, in a lease of a minute and after it.
fn leased(returned: bool) -> GpuStatus {
    let inventory = inventory("gtx-1080");
    let gpu: Address = "0000:65:00.0".parse().unwrap();
    let at = |second: i64| jiff::Timestamp::from_second(1_764_400_000 + second).unwrap();
    let aer = |corrected| Some(AerCounts { corrected, ..AerCounts::default() });
    let look = |aer| vec![(gpu, Measure::of(&inventory.devices[&gpu], aer))];
    let mut lease = Certificate::begin("cuda-builder", &look(aer(2)), Some(120), None, at(0));
    let said = |number, count, text| Said {
        boot: "boot",
        place: "0000:05:00.0",
        address: gpu,
        fault: Fault::Xid { number },
        count,
        text,
    };
    lease.note(said(31, 3, "NVRM: Xid (PCI:0000:01:00): 31, pid=7, name=\x1b[2J, MMU Fault"));
    let mut state = State::Leased { vm: "cuda-builder".into() };
    if returned {
        lease.note(said(79, 1, "NVRM: Xid (PCI:0000:01:00): 79, pid=7, GPU has fallen off the bus."));
        let mut after = look(aer(5));
        after[0].1.speed = None;
        after[0].1.windows[1].size /= 2;
        let what = "Xid 79 (the GPU has fallen off the bus), as VM cuda-builder says".into();
        let reason = Reason::Faulty { address: gpu.to_string(), what };
        lease.more_faults = true;
        lease.end(&after, Some(140), Some(&reason), at(60));
        state = State::Quarantined { reason };
    }
    let functions = vec![Function::of(&inventory.devices[&gpu])];
    let holding = Holding {
        life: Life { state, clean: false, last: Some("cuda-builder".into()), blame: None },
        since: at(60),
        reset_ms: Some(140),
        lease: Some(lease),
        ..Holding::of(functions, "boot")
    };
    GpuStatus::of(&inventory, &BTreeMap::from([(gpu, holding)]), gpu).unwrap()
}

#[test]
fn vf11_the_certificate_of_a_lease_is_shown_while_it_lasts_and_after_it() {
    insta::assert_snapshot!("show_leased", shown(&leased(false)));
    insta::assert_snapshot!("show_returned", shown(&leased(true)));
    insta::assert_json_snapshot!("json_lease", leased(true).held);
}

#[test]
fn json_has_names_and_all_that_laird_says() {
    insta::assert_json_snapshot!("json_list", list::Listed::new(&reply("rtx-4000-sff-ada", false)));
    let status = status("rtx-4000-sff-ada", "0000:01:00.0");
    insta::assert_json_snapshot!("json_show", Named::new(&status));
}

/// Elsewhere than on a terminal each row is one line, for `awk`.
#[test]
fn a_list_without_a_terminal_has_a_line_for_each_device() {
    assert_eq!(list::shown(&reply("h100-sxm", true), None).lines().count(), 1 + 12);
}

#[test]
fn cl14_names_that_a_module_gives_itself_steer_no_terminal() {
    let machine = Machine::of(
        "/proc/self/mountinfo =\n[0000:01:00.0]\nvendor = 0x10de\ndevice = 0x1b80\nclass = 0x030000\n\
         driver_override = \x1b[2J\nreset_method = \x1b[2J\n",
    );
    let inventory = Inventory::read(&Sysfs::at(machine.root())).unwrap();
    let status = GpuStatus::of(&inventory, &BTreeMap::new(), "0000:01:00.0".parse().unwrap()).unwrap();
    let text = shown(&status);
    assert!(!text.contains('\x1b') && text.contains("\\x1b[2J"), "{text}");
}

#[test]
fn links_and_resets_in_words() {
    let machine = Machine::of(
        "/proc/self/mountinfo =\n[0000:01:00.0]\nvendor = 0x1002\ndevice = 0x73bf\nclass = 0x030000\nreset_method = flr bus\n\
         current_link_speed = 16.0 GT/s PCIe\nmax_link_speed = 16.0 GT/s PCIe\ncurrent_link_width = 8\nmax_link_width = 16\n\
         iommu_group = 7\nsriov_totalvfs = 16\nsriov_numvfs = 2\ndriver = amdgpu\ndriver_override = vfio-pci\n\
         subsystem_vendor = 0x1002\nsubsystem_device = 0x0e3a\nnuma_node = 1\nd3cold_allowed = 1\n\
         bar0 = mem64pref 0x0 0x3ffffffff\nresource0_resize = 0000000000007f00\n\
         [0000:01:02.0]\nvendor = 0x1002\ndevice = 0x73ae\nclass = 0x038000\nphysfn = 0000:01:00.0\nreset_method =\n",
    );
    let inventory = Inventory::read(&Sysfs::at(machine.root())).unwrap();
    let status =
        |address: &str| GpuStatus::of(&inventory, &BTreeMap::new(), address.parse().unwrap()).unwrap();
    insta::assert_snapshot!("show_amd", shown(&status("0000:01:00.0")));
    insta::assert_snapshot!("show_virtual_function", shown(&status("0000:01:02.0")));
}
