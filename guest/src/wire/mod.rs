//! The protocol between a VM's host side and the agent in it.
//!
//! Everything of ours that crosses vsock, and everything between our processes on the host, is a
//! sequence of [frames](frame): half-close does not survive every hypervisor, so the end of a stream is
//! a frame as well. A conversation begins with one [message]; what follows depends on it.
//!
//! | who connects | to | first frame | then |
//! |---|---|---|---|
//! | host | guest port [`AGENT_PORT`] | [`message::HostOpen::Control`] | requests and events, JSON messages |
//! | host | guest port [`AGENT_PORT`] | [`message::HostOpen::Exec`] | stdin and, with a terminal, its changes of size one way; stdout, stderr and the exit status the other |
//! | host | guest port of a link | none | the agent says [`message::LinkReply`], then data both ways |
//! | guest | host port [`LINK_PORT`] | [`message::LinkOpen`] | the host says [`message::LinkReply`], then data both ways |
//!
//! The agent accepts connections from the host only (CID 2). A connection that the guest opens carries the
//! ticket of this boot, because AF_VSOCK is open to every process of a guest, sandboxed builds included.

pub mod frame;
pub mod message;
pub mod relay;

/// The vsock port on which the agent listens. Below 1024, so that only root in the guest can bind it.
pub const AGENT_PORT: u32 = 1;

/// The vsock port of the host to which the agent connects to open a link.
///
/// High, because vhost-device-vsock 0.3.0 counts its own ports for dials of the host up from 0, takes the host ports of
/// connections that the guest has opened as used, and fails every dial from the moment its count meets one of them.
pub const LINK_PORT: u32 = 4_000_000_000;

/// The version of the protocol. A peer of another version is refused with both numbers in the message.
pub const VERSION: u32 = 1;
