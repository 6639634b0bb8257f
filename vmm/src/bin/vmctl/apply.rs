//! `vmctl apply`.

use crate::{Context, error::CommandError, output::print_warnings, status};
use lair_vmm::{
    api::types::{ApplyRequest, FleetText},
    fleet::{
        self, Problems,
        diff::{Action, Change, What},
    },
};
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// A fleet file, which then holds until laird starts again; without it, laird reads its own again
    file: Option<PathBuf>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let file = match &arguments.file {
        Some(path) => {
            let text = fleet::read(path)?;
            let name = std::path::absolute(path)?.display().to_string();
            Some(FleetText { name, text })
        }
        None => None,
    };
    let reply = context.client.apply(&ApplyRequest { file, dry_run: arguments.dry_run }).await?;
    if context.json {
        status::print_json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    print_warnings(&Problems { problems: reply.warnings, omitted: reply.omitted_warnings });
    if reply.changes.is_empty() {
        println!("no changes");
    } else {
        print!("{}", lines(&reply.changes));
        if reply.dry_run {
            println!("\nNothing has been changed (--dry-run)");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The changes, one a line, and below each the keys that differ.
fn lines(changes: &[Change]) -> String {
    let name = |change: &Change| match change.what {
        What::Vm => change.name.clone(),
        What::Link => format!("link {}", change.name),
        What::Table => format!("[{}]", change.name),
    };
    let width = changes.iter().map(|change| name(change).len()).max().unwrap_or_default();
    let mut text = String::new();
    for change in changes {
        let (sign, words) = match (change.action, change.what) {
            (Action::Start, _) => ('+', "new: starts"),
            (Action::Add, What::Link) => ('+', "new"),
            (Action::Add, _) => ('+', "new: waits for vmctl start"),
            (Action::Stop, _) => ('-', "gone: stops"),
            (Action::Remove, _) => ('-', "gone"),
            (Action::PendingRestart, _) => ('~', "pending: runs on as it is, follows with vmctl restart"),
            (Action::Devices, _) => ('~', "its devices follow at once; it runs on"),
            (Action::PendingLaird, _) => ('~', "pending: is read when laird starts"),
            (Action::Change, What::Vm) => ('~', "follows with its next start; it does not run"),
            (Action::Change, What::Link | What::Table) => ('~', "follows at once"),
        };
        text.push_str(&format!("{sign} {:width$}  {words}\n", name(change)));
        let keys = change.keys.iter().map(|key| key.key.len()).max().unwrap_or_default();
        for key in &change.keys {
            let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "(none)".into());
            text.push_str(&format!(
                "    {:keys$}  {} -> {}\n",
                key.key,
                shown(&key.before),
                shown(&key.after)
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_vmm::fleet::diff::Difference;

    #[test]
    fn each_change_is_a_line_and_its_keys_are_below() {
        let key = |key: &str, before: Option<&str>, after: Option<&str>| Difference {
            key: key.into(),
            before: before.map(Into::into),
            after: after.map(Into::into),
        };
        let change = |what, name: &str, action, keys| Change { what, name: name.into(), action, keys };
        let changes = [
            change(
                What::Vm,
                "builder",
                Action::PendingRestart,
                vec![
                    key("memory", Some("8GiB"), Some("9GiB")),
                    key("volumes[0].size", Some("40GiB"), Some("50GiB")),
                ],
            ),
            change(What::Vm, "gpu", Action::Devices, vec![key("gpus", None, Some("[...]"))]),
            change(What::Vm, "cache", Action::Change, vec![key("init", None, Some("/nix/store/x/init"))]),
            change(What::Vm, "new", Action::Start, vec![]),
            change(What::Vm, "later", Action::Add, vec![]),
            change(What::Vm, "old", Action::Stop, vec![]),
            change(What::Vm, "older", Action::Remove, vec![]),
            change(What::Link, "build", Action::Remove, vec![]),
            change(What::Link, "rebuild", Action::Add, vec![]),
            change(What::Link, "web", Action::Change, vec![key("listen", Some("127.0.0.1:80"), None)]),
            change(What::Table, "host", Action::PendingLaird, vec![key("accel", Some("auto"), Some("tcg"))]),
        ];
        insta::assert_snapshot!(lines(&changes));
    }
}
