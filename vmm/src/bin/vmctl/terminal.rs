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
    use super::{on_a_terminal::restored_after, *};
    use rustix::termios::LocalModes;

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
        restored_after("terminal::tests::panics_while_raw", "in the raw");
    }
}

#[cfg(test)]
pub(crate) mod on_a_terminal {
    use super::*;
    use rustix::{
        pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
        termios::{Winsize, tcsetwinsize},
    };
    use std::{
        io::Read,
        process::{Command, Stdio},
    };

    /// Runs an ignored test on a terminal of 24 lines of 80 characters. It panics, saying `reason`; the terminal is as before. Given back is
    /// what the terminal was sent.
    pub(crate) fn restored_after(test: &str, reason: &str) -> String {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let own = openpt(flags).unwrap();
        grantpt(&own).unwrap();
        unlockpt(&own).unwrap();
        let end = ioctl_tiocgptpeer(&own, flags).unwrap();
        tcsetwinsize(&own, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let before = tcgetattr(&own).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", test])
            .stdin(end.try_clone().unwrap())
            .stdout(end)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut terminal = std::fs::File::from(own.try_clone().unwrap());
        let shown = std::thread::spawn(move || {
            let (mut shown, mut chunk) = (Vec::new(), [0; 4096]);
            // An error when nobody has it open any more.
            while let Ok(read @ 1..) = terminal.read(&mut chunk) {
                shown.extend_from_slice(&chunk[..read]);
            }
            String::from_utf8_lossy(&shown).into_owned()
        });
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        assert!(said.contains(reason) && status.code() == Some(101), "{said}");
        let now = tcgetattr(&own).unwrap();
        assert_eq!(
            (now.input_modes, now.output_modes, now.local_modes),
            (before.input_modes, before.output_modes, before.local_modes)
        );
        shown.join().unwrap()
    }
}
