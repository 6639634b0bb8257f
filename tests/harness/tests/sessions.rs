//! Operators' sessions with a real guest: `vmctl` on a terminal.

use anyhow::{Context, Result, bail, ensure};
use lair_harness::{
    fleet::{empty, mib, vm},
    host::Host,
    testbed::Testbed,
};
use lair_vmm::fleet::schema::Vm;
use nix::pty::{Winsize, openpty};
use std::{
    fs::{self, File},
    io::{Read, Write},
    process::{Child, ExitStatus},
    sync::{Arc, Mutex},
    thread::sleep,
    time::{Duration, Instant},
};

/// Under emulation on a slow machine.
const BOOT: Duration = Duration::from_secs(300);

/// For everything else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Status 0 while the process lives that the shell has left behind, 1 when it does not.
const RUNNING: &str = "set +e; for file in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $file; echo; done 2>/dev/null | \
    grep -q '^sleep 1234'";

/// `vmctl` on a terminal.
struct Operator {
    vmctl: Child,
    terminal: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Operator {
    fn run(host: &Host, arguments: &[&str]) -> Result<Self> {
        let size = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None)?;
        let vmctl = host
            .vmctl(arguments)
            .env("TERM", "xterm")
            .stdin(pty.slave.try_clone()?)
            .stdout(pty.slave.try_clone()?)
            .stderr(pty.slave)
            .spawn()?;
        let terminal = File::from(pty.master);
        let (mut reader, seen) = (terminal.try_clone()?, Arc::new(Mutex::new(Vec::new())));
        let operator = Self { vmctl, terminal, seen: seen.clone() };
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut chunk) {
                if let Ok(mut seen) = seen.lock() {
                    seen.extend_from_slice(&chunk[..read]);
                }
            }
        });
        Ok(operator)
    }

    fn types(&mut self, text: &str) -> Result<()> {
        Ok(self.terminal.write_all(text.as_bytes())?)
    }

    fn seen(&self) -> String {
        self.seen.lock().map(|seen| String::from_utf8_lossy(&seen).into_owned()).unwrap_or_default()
    }

    fn sees(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen().contains(text) {
            ensure!(Instant::now() < deadline, "no {text:?} in {:?}", self.seen());
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ends(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.vmctl.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "vmctl does not end: {:?}", self.seen());
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.vmctl.kill();
        let _ = self.vmctl.wait();
    }
}

/// Boots one VM alone; `None` where there is no test bed.
fn boot(
    name: &str,
    root: &str,
    change: impl FnOnce(&Testbed, &mut Vm) -> Result<()>,
) -> Result<Option<Host>> {
    let Some(testbed) = Testbed::find()? else { return Ok(None) };
    let mut host = Host::temporary(name)?;
    let mut fleet = empty(&testbed);
    let mut guest = vm(&testbed, &[root])?;
    change(&testbed, &mut guest)?;
    fleet.vms.insert("guest".into(), guest);
    host.write_fleet(&fleet)?;
    host.start()?;
    host.wait_ready("guest", BOOT)?;
    Ok(Some(host))
}

#[test]
fn a_shell_has_a_terminal_outlives_laird_and_takes_its_processes_with_it() -> Result<()> {
    let Some(mut host) = boot("shell", "profile-plain", |_, _| Ok(()))? else { return Ok(()) };
    let mut operator = Operator::run(&host, &["shell", "guest"])?;
    operator.types("stty size; tty; echo $TERM $((6 * 7)) $PWD\r")?;
    operator.sees("40 120\r\n/dev/pts/0\r\nxterm 42 /root\r\n")?;
    // The terminal echoes what is typed, unless it is a password.
    operator.types("stty -echo; echo now\r")?;
    operator.sees("\nnow\r\n")?;
    operator.types("read -r word\r")?;
    operator.types("secret-word\r")?;
    operator.types("stty echo; echo ${#word}\r")?;
    operator.sees("11\r\n")?;

    host.kill_laird()?;
    operator.types("echo alone $((1 + 1))\r")?;
    operator.sees("alone 2\r\n")?;
    host.start()?;
    host.wait_ready("guest", PATIENCE)?;
    operator.types("(trap '' HUP; sleep 1234) & echo begun\r")?;
    operator.sees("\nbegun\r\n")?;
    until_status(&host, 0).context("the shell's child does not run")?;
    operator.types("\r~.")?;
    assert_eq!(operator.ends()?.code(), Some(125), "{}", operator.seen());
    // Those that ignore SIGHUP get two seconds.
    until_status(&host, 1).context("the shell's child lives on")?;

    let mut operator =
        Operator::run(&host, &["exec", "-t", "guest", "--", "sh", "-c", "[ -t 0 ] && exit 7"])?;
    assert_eq!(operator.ends()?.code(), Some(7), "{}", operator.seen());
    recordings(&host)
}

/// Waits until [`RUNNING`] ends with `wanted`. Any other status than its two would be Lair's, and tells nothing.
fn until_status(host: &Host, wanted: i32) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = host.try_shell("guest", RUNNING)?;
        match output.status.code() {
            Some(status) if status == wanted => return Ok(()),
            Some(0 | 1) => ensure!(Instant::now() < deadline, "not within {} s", PATIENCE.as_secs()),
            _ => bail!("{output:?}"),
        }
        sleep(Duration::from_millis(200));
    }
}

fn recordings(host: &Host) -> Result<()> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(host.state_file("guest", "sessions"))? {
        let path = entry?.path();
        let name = path.file_name().context("no name")?.to_string_lossy().into_owned();
        let kind = if name.ends_with("-shell.cast") { "shell" } else { "exec" };
        texts.push((kind, fs::read_to_string(path)?));
    }
    texts.sort();
    let kinds: Vec<_> = texts.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, ["exec", "shell"]);
    let shell = &texts[1].1;
    assert!(shell.contains("/dev/pts/0") && shell.contains("alone 2") && shell.contains("\"m\""), "{shell}");
    assert!(!shell.contains("secret-word"), "{shell}");
    Ok(())
}

#[test]
fn the_console_is_shown_and_left() -> Result<()> {
    let Some(host) = boot("console", "profile-plain", |_, _| Ok(()))? else { return Ok(()) };
    host.shell("guest", "echo before > /dev/hvc0")?;
    let mut operator = Operator::run(&host, &["console", "guest"])?;
    operator.sees("[console of VM guest;")?;
    operator.sees("before\r\n")?;
    // What is typed reaches the guest's terminal, which echoes it.
    host.shell("guest", "stty -F /dev/hvc0 echo; echo after > /dev/hvc0")?;
    operator.sees("after\r\n")?;
    operator.types("typed\r~.")?;
    assert_eq!(operator.ends()?.code(), Some(0), "{}", operator.seen());
    Ok(())
}

#[test]
fn a_system_with_an_init_of_its_own_has_shells_too() -> Result<()> {
    let booted = boot("systemd-shell", "debian-system", |testbed, guest| {
        guest.profile = None;
        guest.init = Some(format!("{}/init", testbed.path("debian-system")?).into());
        guest.memory = mib(768);
        Ok(())
    });
    let Some(host) = booted? else { return Ok(()) };
    let mut operator = Operator::run(&host, &["shell", "guest"])?;
    operator.types("tty; stty size; jobs; ps -o tty= -p $$; exit 4\r")?;
    assert_eq!(operator.ends()?.code(), Some(4), "{}", operator.seen());
    let seen = operator.seen();
    assert!(seen.contains("/dev/pts/") && seen.contains("40 120\r\n"), "{seen}");
    assert!(!seen.contains("no job control"), "{seen}");
    Ok(())
}
