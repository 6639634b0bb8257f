//! A hypervisor and a guest of our own, as far as a virtiofs backend sees them: the vhost-user protocol, virtqueues in shared
//! memory, FUSE requests as Linux sends them. Its own cost is small beside what it measures.
//!
//! | module | what is in it |
//! |---|---|
//! | [`memory`] | a guest's memory |
//! | [`layout`] | what is where in it |
//! | [`queue`] | the driver's side of a virtqueue |
//! | [`request`] | FUSE requests |
//! | [`session`] | a mount, one request at a time |
//! | [`connection`] | the hypervisor's side |
//! | [`echo`] | devices that show what no backend can be faster than |
//! | [`known`] | what one of them knows |

pub mod connection;
pub mod echo;
mod event;
pub mod known;
pub mod layout;
pub mod memory;
pub mod queue;
pub mod request;
pub mod session;
