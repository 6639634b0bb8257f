//! `laird`'s API: HTTP and JSON on a unix socket. See the README.md here.
//!
//! | module | what is in it |
//! |---|---|
//! | [`types`] | what is said |
//! | [`client`] | `vmctl`'s end |
//! | [`server`] | `laird`'s end: each call admitted, answered, recorded |
//! | `routes`, `handlers`, [`openapi`] | the table of what can be asked; what answers; the document made from the table |
//! | `connection`, `slots`, `socket`, [`peer`] | clients' connections: how many, how long, from whom |
//! | [`access`] | roles |
//! | [`gpus`], `look` | the host's devices; how long a look at them may take |
//! | [`audit`], [`events`], [`observe`], `progress`, [`log`] | who asked for what; what happens; how far a change is; console logs |
//! | `metrics`, `usage`, `scrape` | counters for Prometheus, on TCP as well |
//! | [`limits`], `json`, `stream` | every bound in one place; strict JSON; answers that go on |

pub mod access;
pub mod audit;
pub mod client;
mod connection;
pub mod events;
pub mod gpus;
mod handlers;
mod json;
pub mod limits;
pub mod log;
mod look;
mod metrics;
pub mod observe;
pub mod openapi;
pub mod peer;
mod progress;
mod routes;
mod scrape;
pub mod server;
mod slots;
mod socket;
mod stream;
pub mod types;
mod usage;
