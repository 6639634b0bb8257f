//! Taking a device away from a guest that runs.

use super::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often it is looked whether a device is gone.
const LOOK: Duration = Duration::from_millis(100);

/// Where QEMU keeps the devices that have a name.
const NAMED: &str = "/machine/peripheral";

impl Qmp {
    /// Takes the device with the name `id` away, within `patience`. The answer to the command only says that the guest was asked to let go of
    /// it, and a guest need not: so it is looked whether the device is gone (faults.md, HV11). One that is not there is gone.
    pub async fn unplug(&self, id: &str, patience: Duration) -> Result<(), QmpError> {
        let end = Instant::now() + patience;
        if !self.has_device(id).await? {
            return Ok(());
        }
        self.execute_with("device_del", json!({ "id": id })).await?;
        while self.has_device(id).await? {
            if Instant::now() >= end {
                return Err(QmpError::Stays { id: id.into(), patience });
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn has_device(&self, id: &str) -> Result<bool, QmpError> {
        let answer = self.execute_with("qom-list", json!({ "path": NAMED })).await?;
        let devices = answer.as_array().ok_or(QmpError::Malformed)?;
        Ok(devices.iter().any(|device| device.get("name").and_then(Value::as_str) == Some(id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Heard;
    use std::process::{Child, Command, Stdio};
    use tokio::sync::watch;

    /// A QEMU that runs no guest.
    struct Qemu(Child);

    impl Drop for Qemu {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Nobody in the guest lets go of anything, as nobody is there: a device in a slot stays, whatever QEMU answers.
    #[tokio::test]
    async fn hv11_a_device_that_the_guest_keeps_is_told_and_one_that_is_gone_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args("-S -machine q35,accel=tcg -m 64 -nodefaults -no-user-config -display none".split(' '))
            .args(["-device", "pcie-root-port,id=below", "-device", "virtio-rng-pci,bus=below,id=kept"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null());
        let qemu = match command.spawn() {
            Ok(child) => Qemu(child),
            Err(error) => return println!("SKIPPED: qemu-system-x86_64 cannot be run: {error}"),
        };
        let (sender, _heard) = watch::channel(Heard::default());
        let pid = qemu.0.id().cast_signed();
        let qmp = Qmp::connect(&socket, pid, Duration::from_secs(60), sender).await.unwrap();
        let short = Duration::from_millis(300);
        qmp.unplug("nothing", short).await.unwrap();
        let error = qmp.unplug("kept", short).await.unwrap_err();
        assert_eq!(error.to_string(), "The guest has not let go of the device kept within 300ms");
        // It answers on, and the device is there.
        assert!(qmp.has_device("kept").await.unwrap());
    }
}
