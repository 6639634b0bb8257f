//! The terminal while it is `top`'s: another screen, raw. However `top` ends, it is as before.

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event},
};
use std::{io, ops::DerefMut};
use tokio::sync::mpsc;

/// The terminal. A panic restores it as well: ratatui's hook does.
#[derive(Debug)]
pub(super) struct Screen(DefaultTerminal);

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        ratatui::try_init().map(Self).inspect_err(|_| {
            // It may have got half-way.
            let _ = ratatui::try_restore();
        })
    }
}

impl std::ops::Deref for Screen {
    type Target = DefaultTerminal;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Screen {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// Keys and changes of the size. They are read on a thread of their own, which nothing can stop but the end of the program.
pub(super) fn events() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || while event::read().is_ok_and(|event| sender.blocking_send(event).is_ok()) {});
    receiver
}
