//! The host's devices, through `laird`.

use crate::{machine::Machine, support::*};
use lair_vmm::api::types::ErrorKind;
use std::fs;

#[tokio::test]
async fn devices_are_listed_and_shown() {
    let machine = Machine::recorded("turing");
    let host = Host::new().with_devices(&machine);
    host.serve(&host.fleet(&[])).await;
    let list = host.vmctl(&["gpu", "list"]).await;
    assert!(list.status.success(), "{list:?}");
    insta::assert_snapshot!(String::from_utf8(list.stdout).unwrap());
    let json = async |arguments: &[&str]| {
        let output = host.vmctl(arguments).await;
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let list = json(&["--json", "gpu", "list"]).await;
    assert_eq!(list["devices"].as_array().unwrap().len(), 1);
    let all = json(&["--json", "gpu", "list", "--all"]).await;
    assert_eq!(all["devices"].as_array().unwrap().len(), 13);
    let one = json(&["--json", "gpu", "show", "0000:26:00.0"]).await;
    assert_eq!(one, list["devices"][0]);
    assert_eq!(one["device_name"], "TU104 [GeForce RTX 2070 SUPER]");
    let text = host.vmctl(&["gpu", "show", "0000:26:00.3"]).await;
    assert!(String::from_utf8(text.stdout).unwrap().contains("0000:26:00.0, 0000:26:00.1, 0000:26:00.2"));
    // Looking is not recorded, as with other reads.
    assert!(host.audit().is_empty());
}

#[tokio::test]
async fn vf1_an_address_that_is_none_or_of_nothing_is_told() {
    let machine = Machine::recorded("turing");
    let host = Host::new().with_devices(&machine);
    let client = host.serve(&host.fleet(&[])).await;
    let output = host.vmctl(&["gpu", "show", "26:00.0"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("did you mean 0000:26:00.0?"), "{output:?}");
    let output = host.vmctl(&["gpu", "show", "0000:99:00.0"]).await;
    assert_eq!(output.status.code(), Some(4));
    insta::assert_snapshot!(said(&output));
    // Whoever does not use vmctl.
    let raw = host.raw(b"GET /v1/gpus/..%2F..%2Fetc HTTP/1.1\r\nhost: laird\r\n\r\n").await;
    assert!(raw.starts_with("HTTP/1.1 400") && raw.contains("is not a PCI address"), "{raw}");
    // A device that was pulled out.
    let address = "0000:26:00.2".parse().unwrap();
    client.gpu(address).await.unwrap();
    fs::remove_file(machine.root().join("sys/bus/pci/devices/0000:26:00.2")).unwrap();
    let error = client.gpu(address).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::NotFound, "There is no PCI device 0000:26:00.2".into())
    );
    // Its group still has it, so nothing that is with it can be given.
    let gpu = client.gpu("0000:26:00.0".parse().unwrap()).await.unwrap();
    assert!(gpu.obstacles.iter().any(|obstacle| obstacle.kind == "unknown_member"), "{gpu:?}");
}

#[tokio::test]
async fn a_device_that_makes_no_sense_is_told_and_hides_no_other() {
    let machine = Machine::of(
        "/proc/self/mountinfo =\n[0000:01:00.0]\nvendor = 0xffff\ndevice = 0xffff\nclass = 0xffff\n\
         [0000:02:00.0]\nvendor = 0x10de\ndevice = 0x1b80\nclass = 0x030000\n",
    );
    let host = Host::new().with_devices(&machine);
    host.serve(&host.fleet(&[])).await;
    let output = host.vmctl(&["gpu", "list"]).await;
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("GeForce GTX 1080"));
    let warning = "warning: PCI device 0000:01:00.0: class is \"0xffff\", which is no number of its kind\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), warning);
    let output = host.vmctl(&["gpu", "show", "0000:01:00.0"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("class is \"0xffff\""), "{output:?}");
}

#[tokio::test]
async fn a_host_without_gpus_says_so() {
    let host = Host::new();
    host.serve(&host.fleet(&[])).await;
    let output = host.vmctl(&["gpu", "list"]).await;
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "This host has no GPU of NVIDIA's or AMD's; --all shows all devices\n"
    );
}
