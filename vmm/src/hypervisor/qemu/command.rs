//! A [`Machine`] as QEMU's command line (pure).

use crate::{
    host::facts::Engine,
    hypervisor::{Disk, Machine},
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
    }));
    arguments.connect("vsock", &machine.vsock_socket);
    arguments.device(json!({ "driver": "vhost-user-vsock-pci", "chardev": "vsock" }));
    arguments.listen("console", &machine.console_socket);
    arguments.device(json!({ "driver": "virtio-serial-pci" }));
    arguments.device(json!({ "driver": "virtconsole", "chardev": "console" }));
    arguments.device(json!({ "driver": "virtio-rng-pci" }));
    for (index, disk) in machine.disks.iter().enumerate() {
        arguments.disk(index, disk);
    }
    arguments.listen("qmp", &machine.control_socket);
    arguments.pair("-mon", "chardev=qmp,mode=control");
    arguments.flag("-S");
    arguments.0
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
mod tests {
    use super::*;
    use crate::fleet::units::Size;

    fn machine() -> Machine {
        Machine {
            name: "builder".into(),
            engine: Engine::Tcg,
            vcpus: 2,
            memory: Size(1 << 30),
            kernel: "/nix/store/k/vmlinuz".into(),
            initramfs: "/run/lair/vms/builder/initramfs".into(),
            cmdline: format!("{CMDLINE} loglevel=4"),
            store_socket: "/run/lair/vms/builder/store.sock".into(),
            vsock_socket: "/run/lair/vms/builder/vsock.sock".into(),
            disks: vec![Disk { serial: "state".into(), image: "/var/lib/lair/vms/builder/state.img".into() }],
            console_socket: "/run/lair/vms/builder/console.sock".into(),
            control_socket: "/run/lair/vms/builder/qmp.sock".into(),
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

    #[test]
    fn cf12_no_string_reaches_another_option() {
        let hostile = r#"x,server=off,path=/etc/passwd"},-sandbox=off"#;
        let calm = arguments(&machine());
        let machine = Machine {
            name: hostile.into(),
            store_socket: format!("/run/{hostile}").into(),
            console_socket: format!("/run/{hostile}").into(),
            disks: vec![Disk { serial: hostile.into(), image: format!("/{hostile}").into() }],
            ..machine()
        };
        let wild = arguments(&machine);
        assert_eq!(wild.len(), calm.len());
        for (wild, calm) in wild.iter().zip(&calm) {
            if let (Ok(Value::Object(wild)), Ok(Value::Object(calm))) =
                (serde_json::from_str(wild), serde_json::from_str(calm))
            {
                assert_eq!(wild.keys().collect::<Vec<_>>(), calm.keys().collect::<Vec<_>>());
            } else if wild != calm {
                // Options that QEMU would see: separated by commas that are not doubled.
                let options = wild.replace(",,", "").matches(',').count();
                assert_eq!(options, calm.matches(',').count(), "{wild}");
            }
        }
    }
}
