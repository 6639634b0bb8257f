//! The operator's terminal: its size, and raw while it is a guest's.

use lair_guest::wire::message::{Terminal, TerminalSize};
use rustix::{
    stdio::stdin,
    termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr},
};
use std::{
    io::{self, IsTerminal},
    sync::{Mutex, Once, PoisonError},
};

/// How the terminal was before it became raw. Here, so that a panic anywhere finds it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether standard input is a terminal.
pub(crate) fn present() -> bool {
    io::stdin().is_terminal()
}

/// What a program on the other side needs to know of the terminal.
pub(crate) fn describe() -> Terminal {
    Terminal { term: std::env::var("TERM").unwrap_or_else(|_| "dumb".into()), size: size() }
}

/// Its size; zero where it has none.
pub(crate) fn size() -> TerminalSize {
    let known = tcgetwinsize(stdin()).ok();
    TerminalSize { rows: known.map_or(0, |size| size.ws_row), columns: known.map_or(0, |size| size.ws_col) }
}

/// The terminal is raw as long as this lives: every key is a byte for the other side. A panic makes it as before, too.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    pub(crate) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                report(panic);
            }));
        });
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let entered = Self(());
        // Dropped again if this fails half-way.
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(entered)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // At once: output that the terminal does not take must not hold this up. One that is gone needs nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::{
        pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
        termios::LocalModes,
    };
    use std::process::{Command, Stdio};

    /// Run by the test below, on a terminal.
    #[test]
    #[ignore = "needs the terminal that the test below gives it"]
    fn panics_while_raw() {
        std::mem::forget(Raw::enter().unwrap());
        assert!(!tcgetattr(stdin()).unwrap().local_modes.contains(LocalModes::ICANON));
        panic!("in the raw");
    }

    #[test]
    fn a_panic_leaves_the_terminal_as_it_was() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let own = openpt(flags).unwrap();
        grantpt(&own).unwrap();
        unlockpt(&own).unwrap();
        let end = ioctl_tiocgptpeer(&own, flags).unwrap();
        let before = tcgetattr(&own).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "terminal::tests::panics_while_raw"])
            .stdin(end)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("in the raw") && output.status.code() == Some(101), "{said}");
        let now = tcgetattr(&own).unwrap();
        assert_eq!(
            (now.input_modes, now.output_modes, now.local_modes),
            (before.input_modes, before.output_modes, before.local_modes)
        );
    }
}
