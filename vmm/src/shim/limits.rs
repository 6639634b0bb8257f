//! Every bound of the shim in one place: what a guest, a client or another shim can make it hold or wait for.

use std::time::Duration;

/// Link connections that are open at once. Twice as many descriptors, and 128 KiB of buffers each at most.
pub(super) const CONNECTIONS: usize = 1024;

/// Sessions that are open at once. Apart from [`CONNECTIONS`], so that a guest cannot lock operators out.
pub(super) const SESSIONS: usize = 64;

/// Connections on one listening socket that have not said yet what they want.
pub(super) const HANDSHAKES: usize = 64;

/// Control connections at once.
pub(super) const CONTROLS: usize = 32;

/// Dials into the guest that wait for its answer, those that nobody waits for any more included.
pub(super) const DIALS: usize = 64;

/// The longest time that a grant may be unused. `laird` gives 10 s.
pub(super) const GRANT: Duration = Duration::from_secs(60);

/// Grants that were given and not used.
pub(super) const GRANTS: usize = 256;

/// Requests to the agent that wait for their answers.
pub(super) const ASKS: usize = 64;

/// Console bytes that wait for one session that shows the console. One that reads more slowly misses the oldest.
pub(super) const CONSOLE_VIEW: usize = 256 << 10;

/// How much of what the console has shown is shown to a new session first, in bytes.
pub(super) const CONSOLE_RECENT: usize = 8 << 10;

/// How long the guest may take for what is typed on its console. Then it is dropped, as by a terminal whose buffer is full.
pub(super) const CONSOLE_TYPED: Duration = Duration::from_secs(5);

/// Recordings of a VM's sessions that are kept; the oldest go first.
pub(super) const RECORDINGS: usize = 500;

/// One recording, in bytes.
pub(super) const RECORDING_BYTES: u64 = 8 << 20;

/// All recordings of a VM, in bytes: at least as much as all sessions together may need.
pub(super) const RECORDINGS_BYTES: u64 = 512 << 20;

const _: () = assert!(RECORDINGS >= SESSIONS && RECORDINGS_BYTES >= SESSIONS as u64 * RECORDING_BYTES);

/// What waits to be recorded, in bytes, for all sessions together.
pub(super) const RECORDING_QUEUE: usize = 1 << 20;

/// What waits to be recorded for one session, in bytes: one that floods loses of its own recording, not of the others'.
pub(super) const RECORDING_SHARE: usize = RECORDING_QUEUE / 4;

/// The longest first message on a link, session or dial connection, and the longest answer to it, in bytes.
pub(super) const HANDSHAKE_BYTES: usize = 4 << 10;

/// The longest message of the agent on the control channel, in bytes.
pub(super) const EVENT_BYTES: usize = 64 << 10;

/// All credentials of a VM together, in bytes: with base64's third on top they must fit into one frame.
pub(super) const CREDENTIAL_BYTES: usize = 512 << 10;

/// The shortest and the longest pause before credentials that the guest did not take are sent again.
pub(super) const CREDENTIAL_RETRY: (Duration, Duration) = (PING_EVERY, Duration::from_secs(300));

/// The configuration file, in bytes.
pub(super) const CONFIG_BYTES: usize = 1 << 20;

/// How long a peer may take for its first message, and for taking the answer.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long to wait for a connection into the guest. A guest under emulation is slow.
pub(super) const DIAL: Duration = Duration::from_secs(5);

/// How long a dial that nobody waits for is kept open, see [`super::vsock`].
pub(super) const DIAL_ABANDONED: Duration = Duration::from_secs(60);

/// How long another VM's shim may take for its answer: its own [`DIAL`] is within.
pub(super) const DIAL_OTHER: Duration = Duration::from_secs(8);

/// Devices of a guest that it may tell of, or functions of them.
pub(super) const DEVICES: usize = 64;

/// Kinds of messages of a guest's kernel about its devices.
pub(super) const DEVICE_FAULTS: usize = 32;

/// GPUs of which a guest may tell figures.
pub(super) const GPUS: usize = 16;

/// Characters of a device's address in the guest, of its port's address there, of its driver's name and of the driver's version.
pub(super) const DEVICE_NAME: usize = 64;

/// How often in a second watchers are told at once what a guest says of its devices.
pub(super) const DEVICE_NEWS: u32 = 2;

/// How long the agent may take for an answer to a request.
pub(super) const ASK: Duration = Duration::from_secs(10);

/// Between signs of life on the control channel.
pub(super) const PING_EVERY: Duration = Duration::from_secs(5);

/// A sign of life that takes longer ends the control channel.
pub(super) const PING: Duration = Duration::from_secs(15);

/// The shortest and the longest pause between attempts to connect to the agent or the console.
pub(super) const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A channel that lasted this long starts the next back-off from its shortest pause.
pub(super) const LASTING: Duration = Duration::from_secs(5);

/// The pause after an accept that failed, for want of descriptors most likely.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Between two replies to one watcher.
pub(super) const WATCH_PAUSE: Duration = Duration::from_millis(50);

/// Each of the two files in which the end of another program's output is kept, in bytes.
pub(super) const OUTPUT_FILE: u64 = 1 << 20;

/// How much of another program's output waits for the disk, in bytes.
pub(super) const OUTPUT_BACKLOG: usize = 256 << 10;

/// How long a stop waits for connections to end and logs to be written.
pub(super) const STOP: Duration = Duration::from_secs(2);

/// How long a session that is cut off may take to hear why, and the last input of a client that has left to reach the guest.
pub(super) const PARTING: Duration = Duration::from_secs(1);

/// Refusals a second with an audit record each; the others share one that counts them.
pub(super) const REFUSALS: u32 = 10;

/// Lines a second on standard error.
pub(super) const NOTES: u32 = 1;

/// Entries a second of a guest's journal; the others share one that counts them. More than an agent of ours sends for long.
pub(super) const JOURNAL: u32 = 1000;
