//! How the agent ends the guest: it asks PID 1.

use crate::sys;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::io;

/// How the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    Off,
    Reboot,
}

/// Asks PID 1 to end the guest: systemd, which is what an own init is taken for, or our reaper.
pub(super) fn ask(power: Power, own_init: bool) -> io::Result<()> {
    // systemd(1): SIGRTMIN+4 starts poweroff.target, SIGRTMIN+5 reboot.target. The reaper's table is in its module.
    match (own_init, power) {
        (true, Power::Off) => sys::signal_systemd(4),
        (true, Power::Reboot) => sys::signal_systemd(5),
        (false, Power::Off) => Ok(kill(Pid::from_raw(1), Signal::SIGUSR2)?),
        (false, Power::Reboot) => Ok(kill(Pid::from_raw(1), Signal::SIGTERM)?),
    }
}
