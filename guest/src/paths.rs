//! Where `lair-guest` keeps things in a running guest. All of it is in `/run`, made anew at each boot.

/// The folder of all the rest. Root only may write, anyone may pass.
pub(crate) const RUN: &str = "/run/lair";

/// This program, copied out of the initramfs.
pub(crate) const PROGRAM: &str = "/run/lair/lair-guest";

/// The [`lair_guest::boot::BootConfig`] that init hands to the agent; 0600.
pub(crate) const CONFIG: &str = "/run/lair/boot.json";

/// One unix socket for each link that this VM may open, by its name.
pub(crate) const LINKS: &str = "/run/lair/links";

/// The agent's own socket, for `lair-guest ready`; 0600.
pub(crate) const AGENT: &str = "/run/lair/agent.sock";

/// When the system said that it is up, in milliseconds after the kernel's start: an agent that is started again
/// under a system's own init would not be told a second time.
pub(crate) const READY: &str = "/run/lair/ready";

/// What happened when in this boot; 0600.
pub(crate) const TRACE: &str = "/run/lair/trace";

/// How far the journal has been told to the host; 0600.
pub(crate) const JOURNAL_CURSOR: &str = "/run/lair/journal-cursor";

/// Credentials, one file each; a file system of its own, 0700.
pub(crate) const CREDENTIALS: &str = "/run/credentials/lair";

/// From here a systemd that starts takes credentials as its own, and deletes them here.
pub(crate) const SYSTEMD_CREDENTIALS: &str = "/run/credentials/@initrd";

/// Here a systemd that runs looks for credentials that it was not started with (systemd.exec(5), `LoadCredential=`).
pub(crate) const CREDSTORE: &str = "/run/credstore";

/// The read-only view, where an overlay covers it.
pub(crate) const STORE_LOWER: &str = "/run/lair/store";

/// What holds the writable half of an overlay: `store-upper` and `store-work`, `nix-var` where it persists.
pub(crate) const STORE_WRITES: &str = "/run/lair/store-writes";
