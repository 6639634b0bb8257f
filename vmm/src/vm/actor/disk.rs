//! Writing down what a later `laird` has to know.

use super::Actor;
use crate::{
    error::chain,
    host::thread,
    state::{
        dirs::{self, VmDirs},
        file::WriteError,
    },
    vm::{
        checkpoint, lasting,
        machine::{Life, State, Step},
        record::Record,
        trace::Start,
    },
};
use std::{io, path::PathBuf};

impl Actor {
    pub(super) fn dirs(&self) -> Result<VmDirs, dirs::DirsError> {
        self.context.dirs.vm(&self.context.name)
    }

    /// Writes down what is wanted and what outlives the VM, if that has changed.
    pub(super) async fn keep(&mut self, life: &Life) -> Result<(), WriteError> {
        let lasting = life.lasting();
        if self.kept.as_ref() == Some(&lasting) {
            return Ok(());
        }
        let Ok(dirs) = self.dirs() else { return Ok(()) };
        let boot_id = self.context.host.boot_id.clone();
        checkpoint::reach("the lasting state: before it is written");
        let kept = lasting.clone();
        write(dirs.lasting(), move || {
            if let Err(error) = dirs::create(&dirs.state, 0o750) {
                let source = io::Error::other(chain(&error));
                return Err(WriteError { path: dirs.lasting(), step: "making its directory", source });
            }
            lasting::write(&dirs.lasting(), &boot_id, &kept)
        })
        .await?;
        checkpoint::reach("the lasting state: written");
        self.kept = Some(lasting);
        Ok(())
    }

    pub(super) async fn keep_or_warn(&mut self, life: &Life) {
        if let Err(error) = self.keep(life).await {
            self.not_kept(&error);
        }
    }

    pub(super) fn not_kept(&self, error: &WriteError) {
        tracing::error!(
            vm = self.context.name,
            error = chain(error),
            "cannot write down what is wanted of it"
        );
    }

    /// Writes down what a later `laird` needs to find the VM again.
    pub(super) async fn record(&self) -> Result<(), WriteError> {
        let Some(plan) = self.running.plan() else { return Ok(()) };
        // The first steps leave nothing that has to be found.
        if matches!(self.life.state, State::Starting(Step::View | Step::Directories))
            || !plan.dirs.run.exists()
        {
            return Ok(());
        }
        let boot_id = &self.context.host.boot_id;
        let mut record = Record::new(boot_id, &self.life, self.since, &plan);
        record.processes =
            self.running.processes().iter().map(|(part, process)| (*part, process.id())).collect();
        record.start = Start::clone(&self.running.start());
        checkpoint::reach(&format!("{}: before it is recorded", self.life.state.word()));
        write(plan.dirs.record(), move || record.write(&plan.dirs.record())).await?;
        checkpoint::reach(&format!("{}: recorded", self.life.state.word()));
        Ok(())
    }

    pub(super) async fn record_or_warn(&self) {
        if let Err(error) = self.record().await {
            tracing::error!(vm = self.context.name, error = chain(&error), "cannot record the runtime state");
        }
    }
}

/// Writes on a thread: a disk that hangs stops this VM's task only.
async fn write(
    path: PathBuf,
    work: impl FnOnce() -> Result<(), WriteError> + Send + 'static,
) -> Result<(), WriteError> {
    let written = thread::run(work).await;
    written
        .unwrap_or_else(|error| Err(WriteError { path, step: "writing it", source: io::Error::other(error) }))
}
