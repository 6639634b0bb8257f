//! Waiting for VMs, with a line that says so on a terminal.

use crate::output::harmless;
use lair_vmm::api::types::Progress;
use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::Duration,
};

/// The most characters of the line: terminals have 80 columns.
const WIDTH: usize = 79;

/// One line on the terminal that is written over, and gone in the end.
#[derive(Debug, Default)]
pub(crate) struct Line {
    shown: bool,
}

impl Line {
    pub(crate) fn show(&mut self, text: &str) {
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

/// How far the VMs are, on one line.
pub(crate) fn summary(vms: &BTreeMap<String, Progress>, elapsed: Duration) -> String {
    let vm = |progress: &Progress| {
        let detail = progress.detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
        format!("{}: {}{detail}", progress.vm, progress.state)
    };
    let mut text: String = vms.values().map(vm).collect::<Vec<_>>().join(", ");
    let seconds = format!("  {}s", elapsed.as_secs());
    let room = WIDTH.saturating_sub(seconds.len());
    if text.chars().count() > room {
        text = text.chars().take(room.saturating_sub(3)).collect();
        text.push_str("...");
    }
    text + &seconds
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
    /// How long to wait, in seconds, if at all.
    pub(crate) fn seconds(&self) -> Option<u64> {
        (self.wait || self.timeout.is_some()).then(|| self.timeout.unwrap_or(600))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_fits_on_a_line() {
        let progress = |vm: &str, detail: Option<&str>| Progress {
            vm: vm.into(),
            state: "starting".into(),
            detail: detail.map(Into::into),
            elapsed_ms: 0,
            outcome: None,
        };
        let mut vms = BTreeMap::new();
        for (vm, detail) in [("builder", Some("index")), ("cache", None)] {
            vms.insert(vm.to_owned(), progress(vm, detail));
        }
        let text = summary(&vms, Duration::from_secs(12));
        assert_eq!(text, "builder: starting (index), cache: starting  12s");
        for number in 0..20 {
            vms.insert(number.to_string(), progress(&number.to_string(), None));
        }
        let text = summary(&vms, Duration::from_secs(600));
        assert_eq!(text.len(), WIDTH);
        assert!(text.ends_with("...  600s"), "{text}");
    }
}
