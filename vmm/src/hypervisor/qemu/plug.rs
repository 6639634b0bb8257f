//! Giving cards to a guest that runs, and taking them away.

use super::{
    command::{function_id, functions},
    qmp::{Qmp, QmpError},
};
use crate::{
    host::pci::Address,
    hypervisor::{
        Card,
        ports::{Port, Ports},
    },
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::{Instant, sleep};

/// How often it is looked whether a device is gone.
const LOOK: Duration = Duration::from_millis(100);

/// After how long a guest is asked once more. For 5 s QEMU refuses to.
const ASK_AGAIN: Duration = Duration::from_secs(6);

/// Where QEMU keeps the devices that have a name.
const NAMED: &str = "/machine/peripheral";

impl Qmp {
    /// The ports of the machine, and what is in them. It is their names that tell.
    pub async fn ports(&self) -> Result<Ports, QmpError> {
        let mut ports = Ports::default();
        for name in self.devices().await? {
            if let Ok(port) = name.parse::<Port>() {
                ports.0.entry(port).or_default();
            } else if let Some((port, address)) = function_of(&name) {
                ports.0.entry(port).or_default().insert(address);
            }
        }
        Ok(ports)
    }

    /// Puts a card into a port that is empty, or has a part of it. QEMU may take `patience` for each function: the first device has all of the
    /// guest's memory pinned.
    pub async fn plug(&self, port: Port, card: &Card, patience: Duration) -> Result<(), QmpError> {
        let there = self.devices().await?;
        // The guest looks into the port once the first function is there, so that one comes last.
        for device in functions(port, card).into_iter().rev() {
            let id = device.get("id").and_then(Value::as_str).unwrap_or_default();
            if !there.contains(id) {
                self.execute_within("device_add", device, patience).await?;
            }
        }
        Ok(())
    }

    /// Takes all functions of a card out of a port, within `patience`. The answer to the command only says that the guest was asked to let go
    /// of it, and a guest need not: so it is looked whether it is gone (faults.md, HV11). What is not there is gone. A refusal is none as long as
    /// there is time: somebody may have asked a moment ago, and then QEMU takes no second request for some seconds.
    pub async fn unplug(
        &self,
        port: Port,
        card: &BTreeSet<Address>,
        patience: Duration,
    ) -> Result<(), QmpError> {
        let names: Vec<_> = card.iter().map(|address| function_id(port, *address)).collect();
        let end = Instant::now() + patience;
        let (mut asked, mut refusal): (Option<(&String, Instant)>, _) = (None, None);
        loop {
            let there = self.devices().await?;
            // The first one stands for all: a guest lets go of what is in a port as a whole. Where it is not there, others go one by one.
            let Some(id) = names.iter().find(|name| there.contains(*name)) else { return Ok(()) };
            if asked.is_none_or(|(last, when)| last != id || when.elapsed() >= ASK_AGAIN) {
                asked = Some((id, Instant::now()));
                refusal = match self.execute_with("device_del", json!({ "id": id })).await {
                    Ok(_) => None,
                    Err(error @ QmpError::Refused(..)) => Some(error),
                    Err(error) => return Err(error),
                };
            } else if Instant::now() >= end {
                return Err(refusal.unwrap_or(QmpError::Stays { id: id.clone(), patience }));
            } else {
                sleep(LOOK).await;
            }
        }
    }

    /// The names of all devices that have one.
    async fn devices(&self) -> Result<BTreeSet<String>, QmpError> {
        let answer = self.execute_with("qom-list", json!({ "path": NAMED })).await?;
        let devices = answer.as_array().ok_or(QmpError::Malformed)?;
        let names = devices.iter().filter_map(|device| device.get("name")?.as_str());
        Ok(names.map(str::to_owned).collect())
    }
}

/// Which function is in which port, by a name that [`function_id`] has made.
fn function_of(name: &str) -> Option<(Port, Address)> {
    let (port, address) = name.split_once('-')?;
    Some((port.parse().ok()?, address.replacen('.', ":", 2).parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{Heard, Machine, qemu::command};
    use std::{
        collections::BTreeMap,
        process::{Child, Command, Stdio},
        sync::Arc,
    };
    use tokio::sync::watch;

    /// A QEMU that runs no guest.
    struct Qemu {
        process: Child,
        qmp: Qmp,
        _directory: tempfile::TempDir,
    }

    impl Drop for Qemu {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    async fn qemu(devices: &[Value]) -> Option<Qemu> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args("-S -machine q35,accel=tcg -m 64 -nodefaults -no-user-config -display none".split(' '))
            .args(devices.iter().flat_map(|device| ["-device".to_owned(), device.to_string()]))
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null());
        let process = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: qemu-system-x86_64 cannot be run: {error}");
                return None;
            }
        };
        let (sender, _heard) = watch::channel(Heard::default());
        let pid = process.id().cast_signed();
        let qmp = Qmp::connect(&socket, pid, Duration::from_secs(60), sender).await.unwrap();
        Some(Qemu { process, qmp, _directory: directory })
    }

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_tells_what_is_where() {
        let (port, function) = (Port(3), address("0001:af:1f.7"));
        assert_eq!(function_id(port, function), "port3-0001.af.1f.7");
        assert_eq!(function_of("port3-0001.af.1f.7"), Some((port, function)));
        for other in ["port3", "port3-", "port3-0001.af.1f", "memory-x", "port3-0001:af:1f.7-", "disk0"] {
            assert_eq!(function_of(other), None, "{other}");
        }
    }

    /// Nobody in the guest lets go of anything, as nobody is there: a device in a port stays, whatever QEMU answers.
    #[tokio::test]
    async fn hv11_a_card_that_the_guest_keeps_is_told_and_one_that_is_gone_is_gone() {
        let (port, function) = (Port(1), address("0000:01:00.0"));
        // In the place of one of the host's.
        let device = json!({ "driver": "virtio-rng-pci", "bus": "port1", "id": function_id(port, function) });
        let devices = [
            json!({ "driver": "pcie-root-port", "id": "port1", "chassis": 1, "slot": 1 }),
            json!({ "driver": "pcie-root-port", "id": "port2", "chassis": 2, "slot": 2 }),
            device,
        ];
        let Some(qemu) = qemu(&devices).await else { return };
        let card = BTreeSet::from([function]);
        let expected = Ports([(port, card.clone()), (Port(2), BTreeSet::new())].into());
        assert_eq!(qemu.qmp.ports().await.unwrap(), expected);
        let short = Duration::from_millis(300);
        qemu.qmp.unplug(Port(2), &card, short).await.unwrap();
        let error = qemu.qmp.unplug(port, &card, short).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "The guest has not let go of the device port1-0000.01.00.0 within 300ms"
        );
        // As a laird that was started a moment later: QEMU refuses at first, and it may come about all the same.
        let began = Instant::now();
        let error = qemu.qmp.unplug(port, &card, short).await.unwrap_err();
        assert!(matches!(error, QmpError::Refused("device_del", _)), "{error}");
        assert!(began.elapsed() >= short, "it was given up at once");
        // It answers on, and the device is there.
        assert_eq!(qemu.qmp.ports().await.unwrap(), expected);
    }

    /// The guest sees each port where we say, whatever else there is.
    #[tokio::test]
    async fn vf11_ports_are_in_their_slots() {
        let card = |address| Card { functions: vec![self::address(address)] };
        let cards = vec![card("ffff:01:00.0"), card("ffff:02:00.0")];
        let machine = Machine { cards, ..command::tests::machine() };
        let is_in_place = |device: &Value| {
            let driver = device["driver"].as_str();
            driver.is_some_and(|driver| ["pcie-root-port", "virtio-rng-pci", "pvpanic-pci"].contains(&driver))
        };
        let devices =
            command::arguments(&machine).into_iter().filter_map(|text| serde_json::from_str(&text).ok());
        let devices: Vec<Value> = devices.filter(is_in_place).collect();
        let Some(qemu) = qemu(&devices).await else { return };
        let buses = qemu.qmp.execute("query-pci").await.unwrap();
        let seen = buses[0]["devices"].as_array().unwrap().iter().filter_map(|device| {
            let port: Port = device["qdev_id"].as_str()?.parse().ok()?;
            Some((port, (device["slot"].as_u64()?, device["function"].as_u64()?)))
        });
        let expected =
            (1..=6).map(|port| (Port(port), (Port(port).slot(machine.ports()).unwrap().into(), 0)));
        assert_eq!(seen.collect::<BTreeMap<_, _>>(), expected.collect());
    }

    /// What QEMU is told is what it understands, but for the device, which is not there.
    #[tokio::test]
    async fn a_card_that_is_not_there_is_refused_and_its_port_stays_empty() {
        let machine = Arc::new(command::tests::machine());
        let arguments = command::arguments(&machine);
        let ports = arguments.iter().filter(|argument| argument.contains("pcie-root-port"));
        let ports: Vec<Value> = ports.map(|text| serde_json::from_str(text).unwrap()).collect();
        let Some(qemu) = qemu(&ports).await else { return };
        let before = qemu.qmp.ports().await.unwrap();
        assert_eq!(before.0.len(), crate::hypervisor::ports::SPARE_PORTS);
        let card = Card { functions: vec![address("ffff:01:00.0")] };
        let error = qemu.qmp.plug(Port(1), &card, Duration::from_secs(30)).await.unwrap_err();
        assert!(error.to_string().starts_with("QEMU refused device_add: "), "{error}");
        assert!(error.to_string().contains("ffff:01:00.0: no such host device"), "{error}");
        assert_eq!(qemu.qmp.ports().await.unwrap(), before);
    }
}
