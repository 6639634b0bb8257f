//! `vmctl man`: a man page for each program and each verb, made of the definitions of their command lines.

use crate::error::CommandError;
use clap::{Command, CommandFactory};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The directory, which is made if it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, CommandError> {
    let directory = &arguments.directory;
    write(directory).map_err(|error| {
        CommandError::failed(format!("Cannot write man pages to {}: {error}", directory.display()))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for program in programs() {
        clap_mangen::generate_to(program, directory)?;
    }
    Ok(())
}

/// All programs whose command lines can be known here.
fn programs() -> Vec<Command> {
    use lair_vmm::arguments::{Laird, Shim};
    vec![
        crate::Arguments::command(),
        Laird::command(),
        Shim::command(),
        lair_virtiofs::arguments::Cli::command(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verb_and_each_program_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        let pages = directory.path().join("made/man1");
        write(&pages).unwrap();
        let page = |name: &str| fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();
        let command = crate::Arguments::command();
        for verb in command.get_subcommands() {
            let name = verb.get_name();
            let page = page(&format!("vmctl-{name}"));
            assert!(
                page.contains(&format!("vmctl\\-{name}")) || page.contains(&format!("vmctl-{name}")),
                "{page}"
            );
            let about = verb.get_about().unwrap().to_string();
            let first = about.split_whitespace().next().unwrap();
            assert!(page.contains(first), "{name}: {page}");
        }
        assert!(page("vmctl").contains("SUBCOMMANDS"));
        assert!(page("laird").contains("state\\-dir"));
        assert!(page("lair-shim").contains("config"));
        assert!(page("lair-virtiofs").contains("view"));
        assert!(page("lair-virtiofs-index").contains("jobs"));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(write(&file.path().join("man1")).is_err());
    }
}
