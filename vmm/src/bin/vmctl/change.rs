//! `vmctl start`, `stop`, `restart` and `kill`.

use crate::{Context, error::CommandError, status, wait};
use lair_vmm::api::{
    client::{Client, ClientError, Lines},
    types::{Outcome, Progress},
};
use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{interval, sleep},
};

/// How often a VM is asked for its state where `laird` does not tell it.
const AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The VMs
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    #[command(flatten)]
    wait: wait::WaitArguments,
}

/// What is asked of the VMs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    Start,
    Stop,
    Restart,
    Kill,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Kill => "kill",
        }
    }

    /// Whether a state is the end of it, for who does not know what came before.
    fn reached(self, state: &str) -> Option<Outcome> {
        match state {
            "failed" | "quarantined" => Some(Outcome::Failed),
            state if state == self.wanted() => Some(Outcome::Done),
            _ => None,
        }
    }

    /// Where the VMs are in the end.
    fn wanted(self) -> &'static str {
        match self {
            Self::Start | Self::Restart => "ready",
            Self::Stop | Self::Kill => "stopped",
        }
    }
}

pub(crate) async fn run(
    verb: Verb,
    arguments: Arguments,
    context: &Context,
) -> Result<ExitCode, CommandError> {
    let (tell, told) = mpsc::channel(16);
    let mut waiting = JoinSet::new();
    // One VM's refusal is not another's; the first tells the exit status.
    let mut errors = Vec::new();
    for vm in &arguments.vms {
        match context.client.change(vm, verb.word(), arguments.wait.seconds()).await {
            Ok(lines) => {
                let asked = Asked {
                    vm: vm.clone(),
                    verb,
                    client: context.client.clone(),
                    seconds: arguments.wait.seconds(),
                };
                waiting.spawn(asked.follow(lines, tell.clone()));
            }
            Err(error) => errors.push(error.into()),
        }
    }
    drop(tell);
    let shown = tokio::spawn(show(told));
    let mut ends = Vec::new();
    for end in waiting.join_all().await {
        match end {
            Ok(end) => {
                errors.extend(failure(verb, &end));
                ends.push(end);
            }
            Err(error) => errors.push(error.into()),
        }
    }
    let _ = shown.await;
    if context.json && !ends.is_empty() {
        ends.sort_by(|a, b| a.vm.cmp(&b.vm));
        status::print_json(&ends)?;
    }
    let statuses: Vec<_> = errors.iter().map(|error: &CommandError| error.report(context.json)).collect();
    Ok(statuses.first().copied().unwrap_or(ExitCode::SUCCESS))
}

/// A VM that has agreed to a change.
struct Asked {
    vm: String,
    verb: Verb,
    client: Client,
    seconds: Option<u64>,
}

impl Asked {
    /// Reads how far the VM is, up to the end; also across a restart of `laird`, which ends its answer, and not the change.
    async fn follow(
        self,
        mut lines: Lines<Progress>,
        tell: mpsc::Sender<Progress>,
    ) -> Result<Progress, ClientError> {
        let (began, asked) = (Instant::now(), jiff::Timestamp::now());
        loop {
            match lines.next().await {
                Ok(Some(progress)) if progress.outcome.is_some() => return Ok(progress),
                Ok(Some(progress)) => drop(tell.send(progress).await),
                Ok(None) | Err(ClientError::Ended | ClientError::Http(_)) => break,
                Err(error) => return Err(error),
            }
        }
        let Some(seconds) = self.seconds else { return Err(ClientError::Ended) };
        let patience = Duration::from_secs(seconds);
        loop {
            let elapsed = began.elapsed();
            match self.client.vm(&self.vm).await {
                Ok(vm) => {
                    let reached = self.verb.reached(&vm.state);
                    // One that is ready since before has not been restarted.
                    let before = matches!(self.verb, Verb::Restart) && vm.since < asked;
                    let mut progress = Progress {
                        outcome: reached.filter(|outcome| *outcome != Outcome::Done || !before),
                        vm: vm.name,
                        state: vm.state,
                        detail: vm.detail,
                        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                    };
                    if progress.outcome.is_none() && elapsed >= patience {
                        progress.outcome = Some(Outcome::TimedOut);
                    }
                    if progress.outcome.is_some() {
                        return Ok(progress);
                    }
                    let _ = tell.send(progress).await;
                }
                Err(error) if elapsed >= patience => return Err(error),
                // It is being started again.
                Err(ClientError::Down(_) | ClientError::Ended | ClientError::Http(_)) => {}
                Err(error) => return Err(error),
            }
            sleep(AGAIN).await;
        }
    }
}

/// What is to be said of a VM that is not where it should be.
fn failure(verb: Verb, end: &Progress) -> Option<CommandError> {
    let Progress { vm, state, detail, elapsed_ms, outcome } = end;
    match outcome {
        Some(Outcome::Failed) => {
            let why = detail.as_deref().unwrap_or("somebody else stopped it, or its guest powered off");
            Some(CommandError::failed(format!("VM {vm} {state}: {why}")))
        }
        Some(Outcome::TimedOut) => Some(CommandError::timed_out(format!(
            "VM {vm} is {state}, not {}, after {} s; it goes on",
            verb.wanted(),
            elapsed_ms / 1000
        ))),
        Some(Outcome::Accepted | Outcome::Done) | None => None,
    }
}

/// Shows what is waited for on a line of the terminal, from a second on.
async fn show(mut told: mpsc::Receiver<Progress>) {
    let began = Instant::now();
    let mut line = wait::Line::default();
    let mut seconds = interval(Duration::from_secs(1));
    let mut vms = BTreeMap::new();
    loop {
        tokio::select! {
            progress = told.recv() => match progress {
                Some(progress) => drop(vms.insert(progress.vm.clone(), progress)),
                None => return,
            },
            _ = seconds.tick() => {}
        }
        if began.elapsed() >= Duration::from_secs(1) {
            line.show(&wait::summary(&vms, began.elapsed()));
        }
    }
}
