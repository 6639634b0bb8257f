//! The log of a program: stderr, filtered by `LAIR_LOG`.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts logging. Under journald there are no times, for it adds its own.
pub fn start() {
    let filter = EnvFilter::try_from_env("LAIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() { builder.without_time().init() } else { builder.init() }
}
