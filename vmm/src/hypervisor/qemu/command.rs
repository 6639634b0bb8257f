//! A [`Machine`] as QEMU's command line (pure).

use crate::{
    fleet::units::Size,
    host::{facts::Engine, pci::Address},
    hypervisor::{
        Card, Disk, Machine,
        ports::{Port, SPARE_PORTS},
    },
};
use serde_json::{Value, json};
use std::path::Path;

/// Entries of the store device's queues: the most that QEMU allows.
const STORE_QUEUE: u16 = 1024;

/// What every guest's kernel is told first; the fleet file's own words follow and cannot set these again.
///
/// The virtio console does not slow a boot as a serial port does. A panic reboots rather than hangs.
pub const CMDLINE: &str = "console=hvc0 reboot=t panic=-1 quiet";

/// The arguments that start `machine`, stopped before its first instruction so that nothing of its console is lost.
pub fn arguments(machine: &Machine) -> Vec<String> {
    let mut arguments = Arguments(Vec::new());
    arguments.flag("-nodefaults");
    arguments.flag("-no-user-config");
    arguments.pair("-display", "none");
    arguments.pair("-name", format!("guest={}", escape(&machine.name)));
    arguments.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    let (accel, cpu) = match machine.engine {
        Engine::Kvm => ("kvm", "host"),
        Engine::Tcg => ("tcg", "max"),
    };
    arguments.pair("-machine", format!("q35,accel={accel},memory-backend=memory,usb=off,vmport=off"));
    arguments.pair("-cpu", cpu);
    if let Some(Size(bytes)) = machine.hole {
        // SeaBIOS places what is there anyway; by this QEMU sees to it that the processor reaches it, and the guest may place it otherwise.
        arguments.pair("-global", format!("q35-pcihost.pci-hole64-size={bytes}"));
    }
    // A guest that is told of a new card by ACPI gives it no more room than its port had at the boot, 2 MiB; by the port's own registers it
    // gives it what it needs.
    arguments.pair("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    arguments.pair("-smp", machine.vcpus.to_string());
    arguments.pair("-m", format!("{}B", machine.memory.0));
    arguments.object(json!({
        "qom-type": "memory-backend-memfd", "id": "memory", "size": machine.memory.0, "share": true,
    }));
    arguments.pair("-kernel", text(&machine.kernel));
    arguments.pair("-initrd", text(&machine.initramfs));
    arguments.pair("-append", machine.cmdline.clone());
    arguments.connect("store", &machine.store_socket);
    arguments.device(json!({
        "driver": "vhost-user-fs-pci", "chardev": "store",
        "tag": lair_guest::boot::STORE_TAG, "queue-size": STORE_QUEUE,
        "num-request-queues": machine.store_queues,
    }));
    arguments.connect("vsock", &machine.vsock_socket);
    arguments.device(json!({ "driver": "vhost-user-vsock-pci", "chardev": "vsock" }));
    arguments.listen("console", &machine.console_socket);
    arguments.device(json!({ "driver": "virtio-serial-pci" }));
    arguments.device(json!({ "driver": "virtconsole", "chardev": "console" }));
    arguments.device(json!({ "driver": "virtio-rng-pci" }));
    // By it a kernel that panics says so, where it has the driver.
    arguments.device(json!({ "driver": "pvpanic-pci" }));
    for (index, disk) in machine.disks.iter().enumerate() {
        arguments.disk(index, disk);
    }
    let cards = machine.cards.iter().map(Some).chain([None; SPARE_PORTS]);
    for (port, card) in (1..).map(Port).zip(cards) {
        arguments.port(port, machine.ports(), card);
    }
    arguments.listen("qmp", &machine.control_socket);
    arguments.pair("-mon", "chardev=qmp,mode=control");
    arguments.flag("-S");
    arguments.0
}

/// The devices that a card in `port` is made of, the first function first.
pub(super) fn functions(port: Port, card: &Card) -> Vec<Value> {
    let function = |(number, address): (usize, &Address)| {
        json!({
            "driver": "vfio-pci", "id": function_id(port, *address), "host": address.to_string(),
            "bus": port.to_string(), "addr": format!("0.{number}"), "multifunction": card.functions.len() > 1,
        })
    };
    card.functions.iter().enumerate().map(function).collect()
}

/// The name of a function of a card in a port: by it QEMU tells what it has, and where. A name has no colons.
pub(super) fn function_id(port: Port, address: Address) -> String {
    format!("{port}-{}", address.to_string().replace(':', "."))
}

struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    /// JSON needs no escaping of QEMU's own.
    fn object(&mut self, value: Value) {
        self.pair("-object", value.to_string());
    }

    fn device(&mut self, value: Value) {
        self.pair("-device", value.to_string());
    }

    fn connect(&mut self, id: &str, socket: &Path) {
        self.pair("-chardev", format!("socket,id={id},path={}", escape(&text(socket))));
    }

    fn listen(&mut self, id: &str, socket: &Path) {
        self.pair("-chardev", format!("socket,id={id},server=on,wait=off,path={}", escape(&text(socket))));
    }

    /// A port with a card, or with none yet. A card has a port of its own, as on a mainboard: drivers look for a link.
    fn port(&mut self, port: Port, ports: usize, card: Option<&Card>) {
        let (id, number) = (port.to_string(), port.0);
        let mut device = json!({ "driver": "pcie-root-port", "id": id, "chassis": number, "slot": number });
        // Where there is no room QEMU says so.
        if let (Some(slot), Some(device)) = (port.slot(ports), device.as_object_mut()) {
            device.insert("addr".into(), format!("{slot:x}").into());
        }
        self.device(device);
        for function in card.into_iter().flat_map(|card| functions(port, card)) {
            self.device(function);
        }
    }

    fn disk(&mut self, index: usize, disk: &Disk) {
        let node = format!("disk{index}");
        self.pair(
            "-blockdev",
            json!({
                "driver": "raw", "node-name": node, "discard": "unmap",
                "file": { "driver": "file", "filename": text(&disk.image), "discard": "unmap" },
            })
            .to_string(),
        );
        self.device(json!({ "driver": "virtio-blk-pci", "drive": node, "serial": disk.serial }));
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// QEMU's option syntax ends a value at a comma; a doubled comma stands for one.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::hypervisor) fn machine() -> Machine {
        Machine {
            name: "builder".into(),
            engine: Engine::Tcg,
            vcpus: 2,
            memory: Size(1 << 30),
            kernel: "/nix/store/k/vmlinuz".into(),
            initramfs: "/run/lair/vms/builder/initramfs".into(),
            cmdline: format!("{CMDLINE} loglevel=4"),
            store_socket: "/run/lair/vms/builder/store.sock".into(),
            store_queues: 2,
            vsock_socket: "/run/lair/vms/builder/vsock.sock".into(),
            disks: vec![Disk { serial: "state".into(), image: "/var/lib/lair/vms/builder/state.img".into() }],
            cards: vec![],
            known_slots: true,
            hole: None,
            console_socket: "/run/lair/vms/builder/console.sock".into(),
            control_socket: "/run/lair/vms/builder/qmp.sock".into(),
        }
    }

    #[test]
    fn vf4_a_card_has_a_port_of_its_own_and_its_functions_are_one_there() {
        let card = |addresses: &[&str]| Card {
            functions: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        };
        let cards = vec![card(&["0000:01:00.0", "0000:01:00.1"]), card(&["0000:02:00.0"])];
        let arguments = arguments(&Machine { cards, ..machine() });
        let devices: Vec<_> =
            arguments.iter().filter(|a| a.contains("vfio-pci") || a.contains("pcie-root-port")).collect();
        insta::assert_debug_snapshot!(devices);
    }

    #[test]
    fn vf13_room_for_large_windows_is_asked_for_and_nothing_where_none_is_needed() {
        let arguments = arguments(&Machine { hole: Some(Size(318 << 30)), ..machine() });
        let plain = super::arguments(&machine());
        let more: Vec<_> = arguments.iter().filter(|argument| !plain.contains(argument)).collect();
        insta::assert_debug_snapshot!(more, @r#"
        [
            "q35-pcihost.pci-hole64-size=341449900032",
        ]
        "#);
    }

    /// What fits by our rules, QEMU starts with; what is one GiB more, it refuses.
    #[test]
    fn vf13_qemu_counts_as_we_do() {
        // An emulated processor; memory below 4 GiB, and what would reach AMD's addresses begins above them.
        let most = (0xfd_0000_0000_u64 >> 30) - 4;
        for (hole, starts) in [(most, true), (most + 1, false)] {
            let machine = Machine { hole: Some(Size(hole << 30)), memory: Size(64 << 20), ..machine() };
            let arguments = super::arguments(&machine);
            let at = |flag: &str| arguments.iter().position(|argument| argument == flag).unwrap();
            let taken = ["-machine", "-cpu", "-global"]
                .map(|flag| arguments[at(flag)..=at(flag) + 1].to_vec())
                .concat();
            let taken = taken.iter().map(|argument| argument.replace(",memory-backend=memory", ""));
            let mut qemu = std::process::Command::new("qemu-system-x86_64");
            qemu.args(taken).args(["-m", "64", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]);
            qemu.stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::piped());
            let mut qemu = match qemu.spawn() {
                Ok(qemu) => qemu,
                Err(error) => return println!("SKIPPED: qemu-system-x86_64 cannot be run: {error}"),
            };
            // One that has started ends so.
            let _ = std::io::Write::write_all(&mut qemu.stdin.take().unwrap(), b"quit\n");
            let output = qemu.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), starts, "{hole}: {said}");
            assert!(starts || said.contains("phys-bits too low"), "{said}");
        }
    }

    #[test]
    fn command_line() {
        insta::assert_snapshot!(arguments(&machine()).join("\n"));
    }

    #[test]
    fn kvm_uses_the_hosts_processor() {
        let arguments = arguments(&Machine { engine: Engine::Kvm, ..machine() }).join(" ");
        assert!(arguments.contains("accel=kvm") && arguments.contains("-cpu host"));
    }

    /// What QEMU, shells and files of lines would take for something else. A NUL cannot be in an argument at all.
    const METACHARACTERS: &str = ",=:;@#%&|<>()[]{}*?!~^$`'\"\\ \t\n\r/+._-";

    /// The options of an argument as QEMU reads them: a comma ends a value, two stand for one.
    fn options(argument: &str) -> Vec<(String, String)> {
        let mut parts = vec![String::new()];
        let mut left = argument.chars().peekable();
        while let Some(c) = left.next() {
            if c == ',' && left.next_if_eq(&',').is_none() {
                parts.push(String::new());
            } else {
                parts.last_mut().unwrap().push(c);
            }
        }
        let option = |part: String| match part.split_once('=') {
            Some((key, value)) => (key.into(), value.into()),
            None => (part, String::new()),
        };
        parts.into_iter().map(option).collect()
    }

    /// An argument as QEMU understands it: JSON, options, or one string.
    fn understood(flag: &str, argument: &str) -> Value {
        match flag {
            "-object" | "-device" | "-blockdev" => serde_json::from_str(argument).unwrap(),
            "-chardev" | "-name" => json!(options(argument)),
            _ => json!(argument),
        }
    }

    fn all_understood(machine: &Machine) -> Vec<Value> {
        let arguments = arguments(machine);
        let flags = std::iter::once("").chain(arguments.iter().map(String::as_str));
        flags.zip(&arguments).map(|(flag, argument)| understood(flag, argument)).collect()
    }

    #[test]
    fn cf12_every_string_arrives_whole_and_as_nothing_else() {
        let calm = "a-calm-string";
        let with = |text: &str| Machine {
            name: text.into(),
            kernel: text.into(),
            initramfs: text.into(),
            cmdline: text.into(),
            store_socket: text.into(),
            vsock_socket: text.into(),
            disks: vec![Disk { serial: text.into(), image: text.into() }],
            console_socket: text.into(),
            control_socket: text.into(),
            ..machine()
        };
        let expected = json!(all_understood(&with(calm))).to_string();
        assert_eq!(expected.matches(calm).count(), 10, "a string of the machine is not tried: {expected}");
        let wild =
            METACHARACTERS.chars().flat_map(|c| [format!("a{c}b"), format!("{c}"), format!("{c}{c}a{c}")]);
        let worse =
            [",server=off,path=/etc/passwd", "\"},{\"driver\":\"x\"", "-sandbox", "--", "json:{}", "${HOME}"];
        for text in wild.chain(worse.map(Into::into)) {
            let quoted = json!(text).to_string();
            let expected = expected.replace(calm, &quoted[1..quoted.len() - 1]);
            assert_eq!(json!(all_understood(&with(&text))).to_string(), expected, "{text:?}");
        }
    }
}
