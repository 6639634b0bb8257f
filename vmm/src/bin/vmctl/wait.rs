//! Waiting for VMs, with a line that says so on a terminal.

use crate::{Context, error::CommandError, output::harmless};
use lair_vmm::api::types::VmStatus;
use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

/// How often a VM is asked for its state.
const POLL: Duration = Duration::from_millis(200);

/// Waits until `done` says yes to the VM's state. A VM that fails meanwhile is an error.
pub(crate) async fn until(
    context: &Context,
    vm: &str,
    wanted: &str,
    deadline: Instant,
    done: impl Fn(&VmStatus) -> bool,
) -> Result<(), CommandError> {
    let began = Instant::now();
    let mut line = Line { shown: false };
    loop {
        let status = context.client.vm(vm).await?;
        if done(&status) {
            return Ok(());
        }
        let detail = status.detail.as_deref().unwrap_or("no reason recorded");
        if matches!(status.state.as_str(), "failed" | "quarantined") {
            return Err(CommandError::failed(format!("VM {vm} {}: {detail}", status.state)));
        }
        if Instant::now() >= deadline {
            let state = &status.state;
            return Err(CommandError::timed_out(format!(
                "VM {vm} is {state}, not {wanted}, after {:?}",
                began.elapsed()
            )));
        }
        if began.elapsed() > Duration::from_secs(1) {
            let detail = status.detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
            line.show(&format!("{vm}: {}{detail}, {}s", status.state, began.elapsed().as_secs()));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// One line on the terminal that is written over, and gone in the end.
struct Line {
    shown: bool,
}

impl Line {
    fn show(&mut self, text: &str) {
        let mut terminal = std::io::stderr();
        if terminal.is_terminal() {
            let _ = write!(terminal, "\r\x1b[K{}", harmless(text));
            let _ = terminal.flush();
            self.shown = true;
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Options of verbs that wait.
#[derive(Debug, clap::Args)]
pub(crate) struct WaitArguments {
    /// Return only when it is done, or has failed
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait, in seconds [default: 600]; then the exit status is 5. Implies --wait
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

impl WaitArguments {
    /// Until when to wait, if at all.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        (self.wait || self.timeout.is_some())
            .then(|| Instant::now() + Duration::from_secs(self.timeout.unwrap_or(600).min(1 << 20)))
    }
}
