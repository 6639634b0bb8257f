//! `tests/host-vm` as a command.

use anyhow::{Context, Result, ensure};
use lair_harness::testbed::Testbed;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// The variable by which what a run has started is found again.
const MARK: &str = "LAIR_TEST_MARK";

/// `tests/host-vm` with these options and a shell script; `None`, with the reason, where there is no kernel for it.
fn host_vm(options: &[&str], script: &str) -> Result<Option<(Command, String)>> {
    if Testbed::find()?.is_none() {
        return Ok(None);
    }
    let mark = format!("{MARK}={}-{:?}", std::process::id(), std::thread::current().id());
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../host-vm"));
    command.args(options).args(["--", "bash", "-c", script]);
    let (name, value) = mark.split_once('=').context("a mark")?;
    command.env(name, value).stdin(Stdio::null());
    Ok(Some((command, mark)))
}

/// Processes that carry a mark, but for zombies.
fn marked(mark: &str) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let with_mark = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(with_mark).collect()
}

/// Waits until nothing is left of a run.
fn nothing_left(mark: &str) -> Result<()> {
    let began = Instant::now();
    while !marked(mark).is_empty() {
        ensure!(began.elapsed() < PATIENCE, "left: {:?}", marked(mark));
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

fn described(output: &Output) -> String {
    format!("{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

#[test]
fn exit_status_streams_and_results_come_back_and_nothing_else() -> Result<()> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (out, stray) = (directory.path().join("out"), directory.path().join("stray"));
    let script = format!(
        "pwd; echo \"$GIVEN\"; echo result >{out}/result; echo stray | tee {stray} >/stray; cat {stray} >/dev/stderr\n\
         head -c 3000000 /dev/zero | tr '\\0' x; sleep 600 & exit 7",
        out = out.display(),
        stray = stray.display()
    );
    let log = directory.path().join("kernel.log");
    let options = [
        "--out",
        out.to_str().context("UTF-8")?,
        "--env",
        "GIVEN=a  b$'\"",
        "--log",
        log.to_str().context("UTF-8")?,
        "--timeout",
        "300",
    ];
    let Some((mut command, mark)) = host_vm(&options, &script)? else { return Ok(()) };
    let output = command.output()?;
    ensure!(output.status.code() == Some(7), "{}", described(&output));
    let expected = format!("{}\na  b$'\"\n{}", std::env::current_dir()?.display(), "x".repeat(3_000_000));
    ensure!(text(&output.stdout) == expected, "{} bytes", output.stdout.len());
    ensure!(text(&output.stderr) == "stray\n", "{}", text(&output.stderr));
    ensure!(fs::read_to_string(out.join("result"))? == "result\n");
    ensure!(!stray.exists() && !Path::new("/stray").exists(), "it wrote to the machine");
    ensure!(fs::read_to_string(&log)?.contains("Power down"), "the kernel's log is kept");
    nothing_left(&mark)
}

#[test]
fn a_kernel_that_panics_is_told_with_its_last_words() -> Result<()> {
    // Words go out by a process that needs the one processor as well.
    let script = "echo before; sleep 2; echo c >/proc/sysrq-trigger; sleep 600";
    let Some((mut command, mark)) = host_vm(&["--timeout", "300"], script)? else { return Ok(()) };
    let output = command.output()?;
    ensure!(output.status.code() == Some(125), "{}", described(&output));
    ensure!(text(&output.stdout) == "before\n", "{}", described(&output));
    let said = text(&output.stderr);
    ensure!(said.contains("Kernel panic - not syncing: sysrq triggered crash"), "{said}");
    ensure!(said.contains("host-vm: the VM ended before the command did"), "{said}");
    nothing_left(&mark)
}

#[test]
fn the_time_out_ends_it() -> Result<()> {
    let Some((mut command, mark)) = host_vm(&["--timeout", "3"], "sleep 600")? else { return Ok(()) };
    let output = command.output()?;
    ensure!(output.status.code() == Some(124), "{}", described(&output));
    ensure!(
        text(&output.stderr).contains("host-vm: ended after the time-out of 3 s"),
        "{}",
        described(&output)
    );
    nothing_left(&mark)
}

#[test]
fn what_runs_is_told_before_the_time_out_and_what_the_kernel_said_after_it() -> Result<()> {
    let script =
        "mkdir /tmp/lair-it; echo its words >/tmp/lair-it/laird.log; echo kernel words >/dev/kmsg; sleep 600";
    let Some((mut command, mark)) = host_vm(&["--timeout", "90"], script)? else { return Ok(()) };
    let output = command.output()?;
    ensure!(output.status.code() == Some(124), "{}", described(&output));
    for expected in [
        "sleep 600",
        "--- the end of /tmp/lair-it/laird.log\nits words",
        "kernel words",
        "sysrq: Show Blocked State",
    ] {
        ensure!(text(&output.stderr).contains(expected), "{expected}: {}", described(&output));
    }
    nothing_left(&mark)
}

#[test]
fn one_that_is_stuck_is_ended_and_told_from_a_command_that_takes_long() -> Result<()> {
    let options = ["--timeout", "300", "--stuck", "40"];
    let Some((mut command, mark)) = host_vm(&options, "echo up; sleep 60; echo still; sleep 600")? else {
        return Ok(());
    };
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(run.stdout.take().context("no standard output")?).lines();
    let said: Vec<_> = lines.by_ref().take(2).collect::<Result<_, _>>()?;
    if said == ["up", "still"] {
        let qemu = marked(&mark).into_iter().find(is_qemu).context("no QEMU")?;
        kill(Pid::from_raw(qemu), Signal::SIGSTOP)?;
    }
    let output = run.wait_with_output()?;
    ensure!(said == ["up", "still"], "a command that takes long was ended: {}", described(&output));
    ensure!(output.status.code() == Some(123), "{}", described(&output));
    ensure!(text(&output.stderr).contains("host-vm: the VM was stuck"), "{}", described(&output));
    nothing_left(&mark)
}

fn is_qemu(pid: &i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
}

/// Waits until a run's QEMU is there.
fn started(mark: &str, run: &mut Child) -> Result<()> {
    let began = Instant::now();
    while !marked(mark).iter().any(is_qemu) {
        ensure!(began.elapsed() < PATIENCE && run.try_wait()?.is_none(), "it does not start");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn ended_from_outside_it_leaves_nothing_not_even_by_sigkill() -> Result<()> {
    for (signal, code) in [(Signal::SIGTERM, Some(143)), (Signal::SIGINT, Some(130)), (Signal::SIGKILL, None)]
    {
        let Some((mut command, mark)) = host_vm(&["--timeout", "300"], "sleep 600")? else { return Ok(()) };
        let mut run = command.stdout(Stdio::null()).spawn()?;
        started(&mark, &mut run)?;
        kill(Pid::from_raw(run.id().cast_signed()), signal)?;
        ensure!(run.wait()?.code() == code, "{signal}");
        nothing_left(&mark)?;
    }
    Ok(())
}
