//! Hands what guests say of their devices to those who look after devices.

use crate::{passthrough::Devices, vm::handle::Snapshot};
use lair_guest::wire::message::DeviceReport;
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::sleep};

/// The pause after a report with nothing new in it: only a guest that lies has many of those.
const PAUSE: Duration = Duration::from_secs(1);

/// Follows a VM until its task has ended. A report is all that a guest knows, so it does not matter which are not seen.
pub(super) async fn follow(devices: Arc<Devices>, vm: String, mut changes: watch::Receiver<Snapshot>) {
    let mut last = None;
    loop {
        let said = changes.borrow_and_update().shim.as_ref().and_then(|shim| shim.devices.clone());
        if let Some(said) = said {
            let DeviceReport { devices: seen, faults, gpus, .. } = &said.report;
            // Other figures move all the time, and nothing follows from them here.
            let errors: Vec<_> = gpus.iter().map(|gpu| gpu.ecc_volatile).collect();
            let now = Some((said.boot_id.clone(), seen.clone(), faults.clone(), errors));
            if now != last {
                last = now;
                // Each VM has such a task; only those that have something to say need the room for this.
                let news = Box::pin(devices.reported(&vm, &said)).await;
                if !news && !faults.is_empty() {
                    sleep(PAUSE).await;
                }
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
