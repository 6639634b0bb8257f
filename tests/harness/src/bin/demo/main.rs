//! The main job: three microVMs build, sign, serve and substitute a real derivation, over vsock links.
//!
//! Started by `tests/demo`, which installs and builds what this needs.

mod disturb;
mod fleet;
mod job;
mod steps;

use anyhow::{Context, Result, bail};
use clap::Parser;
use disturb::Disturbance;
use lair_harness::{host::Host, testbed::Testbed};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};
use steps::Steps;

/// Boots hydra, cache and builder from one fleet file; builds, signs, serves and substitutes a derivation.
#[derive(Debug, Parser)]
#[command(name = "tests/demo", max_term_width = 100)]
struct Arguments {
    /// Leave the fleet up, and print the LAIR_SOCKET for vmctl
    #[arg(long, conflicts_with = "stop")]
    keep: bool,
    /// End a fleet that was left up
    #[arg(long)]
    stop: bool,
    /// Kill laird while the build runs, and leave it dead until the build has ended
    #[arg(long, hide = true)]
    kill_laird: bool,
    /// Kill laird, and start it again at once, so many times at random during a build of so many seconds
    #[arg(long, hide = true, num_args = 2, value_names = ["TIMES", "SECONDS"], conflicts_with = "kill_laird")]
    restarts: Vec<u32>,
}

/// Set by Ctrl-C; looked at between steps, whose children the terminal has ended as well.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupted(_: nix::libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// An error if the user has pressed Ctrl-C.
fn check_interrupt() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) { bail!("Interrupted") } else { Ok(()) }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tests/demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One place for each user, so that `--stop` finds what `--keep` left; short for the sake of the sockets in it.
fn directory() -> PathBuf {
    std::env::temp_dir().join(format!("lair-demo-{}", nix::unistd::geteuid()))
}

fn run(arguments: &Arguments) -> Result<()> {
    handle_interrupt();
    let directory = directory();
    if directory.exists() {
        // Left by --keep, or by a run that was killed: a new laird finds its VMs and ends them.
        end(&directory)?;
    }
    if arguments.stop {
        return Ok(());
    }
    let testbed = Testbed::find()?.context("LAIR_TESTBED is not set; start this as tests/demo")?;
    let mut host = Host::new(&directory)?;
    // Also after a failure: that is when one wants to look.
    host.keep = arguments.keep;
    if arguments.keep {
        println!("To look at the fleet with vmctl: export LAIR_SOCKET={}\n", host.socket().display());
    }
    let mut steps = Steps::new();
    let keys = fleet::Keys::make(&testbed, &directory.join("keys"))?;
    let fleet = fleet::fleet(&testbed, &keys)?;
    host.write_fleet(&fleet)?;

    println!("Fleet: hydra, cache and builder, from {}\n", host.fleet_file().display());
    steps.step("laird checks the fleet file and starts", |_| {
        println!("{}", indent(&host.run_vmctl(&["check", &host.fleet_file().to_string_lossy()])?));
        host.start()
    })?;
    job::boot(&mut steps, &host)?;
    let disturbance = match arguments.restarts[..] {
        [times, seconds] => Disturbance::Restarts { times, seconds },
        _ if arguments.kill_laird => Disturbance::Kill,
        _ => Disturbance::None,
    };
    job::build(&mut steps, &mut host, &testbed, &keys, disturbance)?;
    job::serve_and_substitute(&mut steps, &host, &testbed, &keys)?;
    job::refusals(&mut steps, &host, &testbed)?;
    println!("\n$ vmctl status\n{}", host.run_vmctl(&["status"])?);
    println!("Links:\n{}", job::link_table(&host)?);
    println!("All steps done in {:.1} s", steps.total().as_secs_f64());
    if arguments.keep {
        println!("\nThe fleet stays up. To look at it:\n  export LAIR_SOCKET={}", host.socket().display());
        println!("  {} status\nand tests/demo --stop ends it.", host.program("vmctl").display());
        return Ok(());
    }
    steps.step("all VMs are stopped", |_| host.stop())
}

fn end(directory: &Path) -> Result<()> {
    let mut host = Host::new(directory)?;
    if host.fleet_file().exists() {
        if host.status().is_ok() {
            host.replace_laird()?;
        } else {
            host.start()?;
        }
        host.stop()
    } else {
        Ok(std::fs::remove_dir_all(directory)?)
    }
}

fn handle_interrupt() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(interrupted), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        #[expect(unsafe_code, reason = "the one call that sets a signal's handler")]
        // SAFETY: the handler does nothing but store into an atomic.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("      {line}")).collect::<Vec<_>>().join("\n")
}
