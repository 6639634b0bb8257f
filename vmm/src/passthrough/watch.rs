//! Watches devices while VMs have them (faults.md, VF11): one that fails is blamed, which makes its VM degraded, and nobody gets it afterwards.
//!
//! The kernel tells when it takes a device away or finds an error of it. It does not tell of all: a device that no longer answers, a link that lost
//! lanes, a device that is pulled out while its hypervisor has it, which the kernel only takes away once that lets go. So each is looked at
//! now and then as well. As long as no VM has a device, nothing is listened to and nothing looked at.

use super::{
    binding::{Function, VFIO},
    devices::{Devices, Told},
    machine::{Reason, State},
    record::Holding,
    reset,
};
use crate::{
    error::chain,
    host::{
        pci::{
            Address, AerCounts, Device, DeviceError, Sysfs,
            uevent::{Event, Happened, Heard, Uevents},
        },
        thread,
    },
};
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

/// How fast it is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often devices are looked at of which nothing is told.
    pub interval: Duration,
    /// The time between two looks where much is told at once.
    pub pause: Duration,
    /// How long what may pass must be so: a guest may reset its device, which does not answer then.
    pub lasts: Duration,
    /// How long a look may take.
    pub patience: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { interval: seconds(10), pause: seconds(1), lasts: seconds(5), patience: seconds(10) }
    }
}

/// What is wrong with a function.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    function: Address,
    what: String,
    /// Whether it may be right again in a moment.
    may_pass: bool,
}

/// What is seen of a function at a look.
struct Seen {
    device: Result<Device, DeviceError>,
    numbers: io::Result<Option<u32>>,
    errors: Option<AerCounts>,
}

/// Watches the devices that VMs have, as long as there is somebody who knows them.
pub async fn follow(devices: Weak<Devices>, pace: Pace) {
    let Some(mut told) = devices.upgrade().map(|devices| devices.subscribe()) else { return };
    loop {
        let Some(any) = devices.upgrade().map(|devices| !leased(&devices).is_empty()) else { return };
        if any {
            attend(&devices, &mut told, pace).await;
        } else if let Err(RecvError::Closed) = told.recv().await {
            return;
        }
    }
}

/// Those that VMs have and that nothing is known against, each with its VM.
fn leased(devices: &Devices) -> Vec<(Address, String, Holding)> {
    let fine = devices.held().into_iter().filter(|(_, holding)| holding.life.blame.is_none());
    let leased = fine.filter_map(|(key, holding)| match &holding.life.state {
        State::Leased { vm } => Some((key, vm.clone(), holding)),
        _ => None,
    });
    leased.collect()
}

/// Listens and looks until no VM has a device.
async fn attend(devices: &Weak<Devices>, told: &mut broadcast::Receiver<Told>, pace: Pace) {
    let mut uevents = Uevents::listen()
        .inspect_err(
            |error| tracing::warn!(%error, "the kernel tells nothing of devices; they are looked at only"),
        )
        .ok();
    let (mut suspects, mut looking) = (Suspects::new(), None);
    // At once, for what happened before it listened.
    let (mut last, mut next, mut is_news) = (Instant::now(), Instant::now(), false);
    loop {
        let heard = tokio::select! {
            heard = hear(&uevents) => Some(heard),
            message = told.recv() => match message {
                Err(RecvError::Closed) => return,
                _ => None,
            },
            // A device that hangs must not hold up what is heard: it would be taken for what happens to a later VM.
            () = sleep_until(next), if looking.is_none() => {
                let Some(devices) = devices.upgrade() else { return };
                (last, is_news) = (Instant::now(), false);
                looking = Some(tokio::spawn(look(devices, std::mem::take(&mut suspects), pace)));
                None
            }
            found = looked(&mut looking) => {
                suspects = found;
                let pause = if suspects.is_empty() { pace.interval } else { pace.lasts };
                next = if is_news { last + pace.pause } else { Instant::now() + pause };
                None
            }
        };
        let Some(devices) = devices.upgrade() else { return };
        let leased = leased(&devices);
        if leased.is_empty() {
            return;
        }
        match heard {
            None => {}
            Some(Ok(heard)) => {
                if let Heard::Event(Event { device, what: Happened::Error(word) }) = heard
                    && let Some((_, vm, _)) = leased.iter().find(|(_, _, holding)| holding.has(device))
                {
                    let (devices, vm) = (Arc::clone(&devices), vm.clone());
                    let what = format!("the kernel found an error of it (AER, {word})");
                    // It waits for what is being done about the device.
                    tokio::spawn(async move { blame(&devices, &vm, device, what).await });
                }
                // Whatever happened can be seen.
                (next, is_news) = (next.min(last + pace.pause), true);
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "the kernel tells nothing of devices any more; they are looked at only");
                uevents = None;
            }
        }
    }
}

async fn hear(uevents: &Option<Uevents>) -> io::Result<Heard> {
    match uevents {
        Some(uevents) => uevents.next().await,
        None => std::future::pending().await,
    }
}

async fn looked(looking: &mut Option<JoinHandle<Suspects>>) -> Suspects {
    let Some(task) = looking else { return std::future::pending().await };
    let suspects = task.await.unwrap_or_default();
    *looking = None;
    suspects
}

async fn blame(devices: &Arc<Devices>, vm: &str, function: Address, what: String) {
    if let Err(error) = devices.blame(vm, function, what).await {
        tracing::error!(device = %function, vm, error = chain(&error), "cannot write down that it failed");
    }
}

/// Devices with a fault that may pass, and since when it is seen.
type Suspects = BTreeMap<Address, Instant>;

/// Looks at all that VMs have.
async fn look(devices: Arc<Devices>, suspects: Suspects, pace: Pace) -> Suspects {
    let mut still = Suspects::new();
    for (key, vm, holding) in leased(&devices) {
        let (sysfs, since) = (devices.sysfs().clone(), holding.since);
        let looked = thread::run(move || {
            let fault = |function: &Function| fault(function, &holding, Seen::of(&sysfs, function.address));
            holding.functions.iter().filter_map(fault).min_by_key(|fault| fault.may_pass)
        });
        let fault = match timeout(pace.patience, looked).await {
            Ok(Ok(fault)) => fault,
            // There is no thread for it, this time.
            Ok(Err(error)) => {
                tracing::warn!(device = %key, error = chain(&error), "it cannot be looked at");
                None
            }
            Err(_) => {
                let what = format!("a look at it does not end within {:?}", pace.patience);
                Some(Fault { function: key, what, may_pass: true })
            }
        };
        // It may have gone to another VM meanwhile, by way of its driver and a reset.
        let is_same = devices.held().get(&key).is_some_and(|now| now.since == since);
        let Some(fault) = fault.filter(|_| is_same) else { continue };
        let seen = suspects.get(&key).copied().unwrap_or_else(Instant::now);
        if fault.may_pass && seen.elapsed() < pace.lasts {
            still.insert(key, seen);
        } else {
            blame(&devices, &vm, fault.function, fault.what).await;
        }
    }
    still
}

impl Seen {
    fn of(sysfs: &Sysfs, function: Address) -> Self {
        Self {
            device: Device::read(sysfs, function),
            numbers: sysfs.numbers(function),
            errors: AerCounts::read(sysfs, function),
        }
    }
}

/// What is wrong with a function, compared with how it was when it was given to the VM. What cannot be read tells nothing.
fn fault(function: &Function, holding: &Holding, seen: Seen) -> Option<Fault> {
    let (what, may_pass) = match (seen.device, seen.numbers) {
        (Err(DeviceError::Missing(_)), _) => ("it was unplugged, or its link is down".into(), false),
        (Err(_), _) | (_, Err(_)) => return None,
        // The kernel takes the driver's link away first, then waits for the hypervisor to let go of the device, then removes it.
        // An unbinding looks the same.
        (Ok(Device { driver: None, .. }), _) => {
            (format!("it is being unplugged, or was unbound from {VFIO}"), true)
        }
        (Ok(Device { driver: Some(driver), .. }), _) if driver != VFIO => {
            (format!("it was taken from {VFIO}; its driver is {driver}"), true)
        }
        (Ok(device), Ok(numbers)) => match reset::check(function, &device, numbers) {
            Err(Reason::Dead { .. }) => {
                ("it does not answer: its configuration reads 0xffffffff".into(), true)
            }
            Err(Reason::Width { found, wanted, .. }) => {
                (format!("its link has {found} lanes of the {wanted} that it had"), true)
            }
            Err(reason) => (reason.to_string(), false),
            Ok(()) => {
                let lease = holding.lease.as_ref().filter(|lease| lease.is_open());
                let health =
                    lease.and_then(|lease| lease.functions.iter().find(|f| f.address == function.address));
                let counted = health.and_then(|health| health.before.aer).zip(seen.errors);
                let more = counted.map_or(0, |(before, now)| {
                    let since = now.since(before);
                    since.nonfatal.saturating_add(since.fatal)
                });
                if more == 0 {
                    return None;
                }
                (format!("the kernel counted errors of it: {more} (AER)"), false)
            }
        },
    };
    Some(Fault { function: function.address, what, may_pass })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fleet::gpus::Gpu,
        passthrough::{kernel::Kernel, write::Writer},
        state::dirs::Dirs,
    };
    use std::{fs, path::Path};

    const DISK: &str = "0000:01:00.0";
    const CARD: &str = "0000:02:00.0";
    const SOUND: &str = "0000:02:00.1";

    const PACE: Pace = Pace {
        interval: Duration::from_millis(30),
        pause: Duration::from_millis(10),
        lasts: Duration::from_millis(150),
        patience: Duration::from_secs(30),
    };

    fn at(address: &str) -> Gpu {
        serde_json::from_value(serde_json::json!({ "address": address })).unwrap()
    }

    /// VM `a` has the disk, `b` the card, and they are watched.
    async fn watched(kernel: &Kernel, directory: &Path, pace: Pace) -> Arc<Devices> {
        let dirs = Dirs { state: directory.join("state"), run: directory.join("run") };
        dirs.create().unwrap();
        let writer = Writer { program: kernel.program(), patience: Duration::from_secs(30) };
        let devices = Devices::open(Sysfs::at(kernel.root()), &dirs, "boot", writer);
        for (vm, address) in [("a", DISK), ("b", CARD)] {
            devices.acquire(vm, &[at(address)]).await.unwrap();
        }
        tokio::spawn(follow(Arc::downgrade(&devices), pace));
        devices
    }

    /// What `a` and `b` are told in the end, after something has happened to the kernel's files.
    async fn told(happens: impl FnOnce(&Kernel), pace: Pace) -> [Vec<String>; 2] {
        let (kernel, directory) = (Kernel::new(), tempfile::tempdir().unwrap());
        let write = |address, file, text: &str| fs::write(kernel.file(address, file), text).unwrap();
        for address in [DISK, CARD] {
            write(address, "aer_dev_fatal", "TOTAL_ERR_FATAL 3\n");
            write(address, "aer_dev_nonfatal", "TOTAL_ERR_NONFATAL 0\n");
            write(address, "aer_dev_correctable", "TOTAL_ERR_COR 0\n");
        }
        let devices = watched(&kernel, directory.path(), pace).await;
        tokio::time::sleep(PACE.lasts * 2).await;
        assert!(devices.faults("a").is_empty() && devices.faults("b").is_empty());
        happens(&kernel);
        let began = Instant::now();
        while devices.faults("a").is_empty() && devices.faults("b").is_empty() {
            assert!(began.elapsed() < Duration::from_secs(30), "nothing is noticed");
            tokio::time::sleep(PACE.interval).await;
        }
        ["a", "b"].map(|vm| devices.faults(vm))
    }

    #[tokio::test]
    async fn vf11_what_fails_while_a_vm_has_it_is_told_of_that_vm_alone() {
        let write = |kernel: &Kernel, address, file, text: &[u8]| {
            fs::write(kernel.file(address, file), text).unwrap()
        };
        let all = [
            told(
                |kernel| fs::remove_file(kernel.root().join("sys/bus/pci/devices").join(DISK)).unwrap(),
                PACE,
            )
            .await,
            told(|kernel| write(kernel, DISK, "config", &[0xff; 64]), PACE).await,
            told(|kernel| write(kernel, DISK, "current_link_width", b"1\n"), PACE).await,
            told(|kernel| write(kernel, DISK, "aer_dev_fatal", b"DLP 1\nTOTAL_ERR_FATAL 4\n"), PACE).await,
            told(|kernel| fs::remove_file(kernel.file(DISK, "driver")).unwrap(), PACE).await,
            told(
                |kernel| {
                    fs::remove_file(kernel.file(DISK, "driver")).unwrap();
                    std::os::unix::fs::symlink("../../../bus/pci/drivers/nvme", kernel.file(DISK, "driver"))
                        .unwrap();
                },
                PACE,
            )
            .await,
        ];
        let told: Vec<String> = all
            .into_iter()
            .flat_map(|[a, b]| {
                assert!(b.is_empty());
                a
            })
            .collect();
        insta::assert_snapshot!(told.join("\n"), @r"
        0000:01:00.0 failed while a VM had it: it was unplugged, or its link is down
        0000:01:00.0 failed while a VM had it: it does not answer: its configuration reads 0xffffffff
        0000:01:00.0 failed while a VM had it: its link has 1 lanes of the 4 that it had
        0000:01:00.0 failed while a VM had it: the kernel counted errors of it: 1 (AER)
        0000:01:00.0 failed while a VM had it: it is being unplugged, or was unbound from vfio-pci
        0000:01:00.0 failed while a VM had it: it was taken from vfio-pci; its driver is nvme
        ");
    }

    #[tokio::test]
    async fn vf11_any_function_of_a_card_speaks_for_all() {
        let [a, b] = told(|kernel| fs::write(kernel.file(SOUND, "config"), [0xff; 64]).unwrap(), PACE).await;
        assert!(a.is_empty() && b[0].starts_with("0000:02:00.1 failed"), "{a:?} {b:?}");
    }

    #[tokio::test]
    async fn vf11_what_passes_is_nothing() {
        let (kernel, directory) = (Kernel::new(), tempfile::tempdir().unwrap());
        let pace = Pace { lasts: Duration::from_secs(3600), ..PACE };
        let devices = watched(&kernel, directory.path(), pace).await;
        // As while a guest resets it.
        fs::write(kernel.file(DISK, "config"), [0xff; 64]).unwrap();
        tokio::time::sleep(PACE.interval * 10).await;
        kernel.answers(DISK);
        tokio::time::sleep(PACE.interval * 10).await;
        assert_eq!(devices.faults("a"), Vec::<String>::new());
    }

    /// Nothing is looked at that no VM has.
    #[tokio::test]
    async fn vf11_it_ends_with_the_last_lease_and_begins_with_the_next() {
        let (kernel, directory) = (Kernel::new(), tempfile::tempdir().unwrap());
        let devices = watched(&kernel, directory.path(), PACE).await;
        for vm in ["a", "b"] {
            devices.release(vm).await;
        }
        assert!(leased(&devices).is_empty());
        devices.acquire("a", &[at(DISK)]).await.unwrap();
        fs::write(kernel.file(DISK, "current_link_width"), "1\n").unwrap();
        let began = Instant::now();
        while devices.faults("a").is_empty() {
            assert!(began.elapsed() < Duration::from_secs(30), "nothing is noticed");
            tokio::time::sleep(PACE.interval).await;
        }
        // It ends with those who know the devices.
        let gone = Arc::downgrade(&devices);
        drop(devices);
        while gone.upgrade().is_some() {
            assert!(began.elapsed() < Duration::from_secs(30), "it is held for ever");
            tokio::time::sleep(PACE.interval).await;
        }
    }
}
