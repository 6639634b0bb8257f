//! An operator: `vmctl` on a terminal of its own.

#![allow(unsafe_code)] // A controlling terminal is given between fork and exec.
#![allow(dead_code)] // Each suite uses a part of it.

use nix::poll::{PollFd, PollFlags, poll};
use rustix::{
    process::{ioctl_tiocsctty, setsid},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    path::Path,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    process::{Child, Command},
    time,
};

/// No wait is longer: far above what anything takes, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    time::timeout(LIMIT, future).await.expect("vmctl does not end")
}

pub(crate) struct Operator {
    pub(crate) child: Child,
    /// The terminal's other end.
    terminal: Option<File>,
    /// How the terminal was before.
    before: Termios,
    seen: Arc<Mutex<Vec<u8>>>,
    done: Arc<AtomicBool>,
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.hang_up();
    }
}

impl Operator {
    /// Runs `vmctl` with these arguments on a terminal of 24 lines of 80 characters.
    pub(crate) fn run(laird: &Path, arguments: &[&str]) -> Self {
        Self::run_with(laird, arguments, |_| {})
    }

    pub(crate) fn run_with(laird: &Path, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let own = openpt(flags).unwrap();
        grantpt(&own).unwrap();
        unlockpt(&own).unwrap();
        let end = ioctl_tiocgptpeer(&own, flags).unwrap();
        let before = tcgetattr(&end).unwrap();
        set_size(&own, 24, 80);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command
            .arg("--socket")
            .arg(laird)
            .args(arguments)
            .env("TERM", "xterm")
            .stdin(end.try_clone().unwrap())
            .stdout(end.try_clone().unwrap())
            .stderr(end)
            .kill_on_drop(true);
        change(&mut command);
        // SAFETY: the closure makes two system calls.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                Ok(ioctl_tiocsctty(rustix::stdio::stdin())?)
            });
        }
        let mut reader = File::from(own);
        let terminal = Some(reader.try_clone().unwrap());
        let operator = Self {
            child: command.spawn().unwrap(),
            terminal,
            before,
            seen: Arc::default(),
            done: Arc::default(),
        };
        let (seen, done) = (operator.seen.clone(), operator.done.clone());
        // Ends when nobody has the terminal open, or with the operator.
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while !done.load(Relaxed) {
                let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
                match poll(&mut fds, 20_u8) {
                    Ok(0) => continue,
                    Ok(_) => {}
                    Err(_) => return,
                }
                let Ok(read @ 1..) = reader.read(&mut chunk) else { return };
                seen.lock().unwrap().extend_from_slice(&chunk[..read]);
            }
        });
        operator
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        set_size(self.terminal.as_ref().unwrap(), rows, columns);
    }

    pub(crate) fn types(&mut self, text: &str) {
        self.terminal.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Closes the terminal.
    pub(crate) fn hang_up(&mut self) {
        self.terminal = None;
        self.done.store(true, Relaxed);
    }

    /// All that the terminal has shown.
    pub(crate) fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    pub(crate) async fn sees(&self, text: &str) {
        self.until(text, || self.seen().contains(text)).await;
    }

    /// Waits until a text was shown more often than that.
    pub(crate) async fn sees_more(&self, text: &str, than: usize) {
        self.until(text, || self.seen().matches(text).count() > than).await;
    }

    pub(crate) fn is_raw(&self) -> bool {
        let modes = tcgetattr(self.terminal.as_ref().unwrap()).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    pub(crate) async fn becomes_raw(&self) {
        self.until("a raw terminal", || self.is_raw()).await;
    }

    async fn until(&self, what: &str, done: impl Fn() -> bool) {
        let waited = async {
            while !done() {
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        time::timeout(LIMIT, waited).await.unwrap_or_else(|_| panic!("no {what}: {}", self.seen()));
    }

    /// Waits for `vmctl`; its exit status. The terminal is as it was.
    pub(crate) async fn status(&mut self) -> Option<i32> {
        let status = within(self.child.wait()).await.unwrap();
        let now = tcgetattr(self.terminal.as_ref().unwrap()).unwrap();
        assert_eq!(
            (now.input_modes, now.output_modes, now.control_modes, now.local_modes),
            (
                self.before.input_modes,
                self.before.output_modes,
                self.before.control_modes,
                self.before.local_modes
            ),
            "{}",
            self.seen()
        );
        status.code()
    }
}

fn set_size(terminal: impl AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

/// `vmctl` without a terminal; the exit status and both outputs.
pub(crate) async fn without_terminal(laird: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmctl"))
        .arg("--socket")
        .arg(laird)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    let output = within(output).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}
