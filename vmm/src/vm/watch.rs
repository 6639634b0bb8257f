//! Watching what runs of a VM: its processes, its shim, its reboots.

use super::{handle::Mail, machine::Part, running::Running};
use crate::{
    host::process::{Process, ProcessId},
    shim::client,
};
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

/// How long the last words of a hypervisor may be on their way.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The pause before a shim is asked again that did not answer.
const AGAIN: Duration = Duration::from_millis(200);

/// Reports the end of a process. That of a hypervisor is reported once its last words are there: whether the guest powered off tells
/// a stop from a failure.
pub(super) async fn process(part: Part, process: Arc<Process>, running: Running, queue: mpsc::Sender<Mail>) {
    let how = process.ended().await;
    // It may have been connected only lately.
    if part == Part::Hypervisor
        && let Some(mut heard) = running.heard()
    {
        let _ = timeout(LAST_WORDS, heard.wait_for(|heard| heard.lost)).await;
    }
    let _ = queue.send(Mail::Ended(part, process.id(), how)).await;
}

/// Reports what the shim `id` says, for as long as anybody listens.
pub(super) async fn shim(id: ProcessId, control: PathBuf, queue: mpsc::Sender<Mail>) {
    while !queue.is_closed() {
        if let Ok(mut changes) = client::watch(&control).await {
            while let Ok(Some(status)) = changes.next().await {
                if queue.send(Mail::Shim(id, Box::new(status))).await.is_err() {
                    return;
                }
            }
        }
        sleep(AGAIN).await;
    }
}

/// Says when a reboot is worth a line in the log: at most once a second, with the number of those since the last line.
#[derive(Debug, Default)]
pub(super) struct Reboots {
    total: u64,
    told: u64,
    last: Option<Instant>,
}

impl Reboots {
    /// Takes how many more there are. Pure: the caller brings the time.
    pub(super) fn more(&mut self, count: u64, now: Instant) -> Option<u64> {
        self.total = self.total.saturating_add(count);
        let quiet =
            self.last.is_some_and(|last| now.saturating_duration_since(last) < Duration::from_secs(1));
        if count == 0 || quiet {
            return None;
        }
        self.last = Some(now);
        let untold = self.total.saturating_sub(self.told);
        self.told = self.total;
        Some(untold)
    }

    /// How many there were.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hv7_a_reboot_loop_is_a_line_a_second() {
        let (mut reboots, start) = (Reboots::default(), Instant::now());
        assert_eq!(reboots.more(1, start), Some(1));
        let told: Vec<_> =
            (0..100).filter_map(|at| reboots.more(1, start + Duration::from_millis(at * 30))).collect();
        // In 3 seconds; each line tells of those before it.
        assert_eq!(told, [35, 34]);
        assert_eq!(reboots.total(), 101);
        assert_eq!(reboots.more(0, start + Duration::from_secs(60)), None);
    }
}
