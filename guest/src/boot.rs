//! What the host puts into the initramfs for one VM, read by `lair-guest init`.
//!
//! It holds no secrets: those come by the control channel ([`crate::wire::message::Hello`]).

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where the initramfs holds the [`BootConfig`], as JSON.
pub const CONFIG: &str = "/lair/boot.json";

/// Where the initramfs holds the view's registration, in the format of `nix-store --load-db`.
pub const REGISTRATION: &str = "/lair/registration";

/// Where the initramfs holds the kernel modules to load, one path a line, in order of dependency.
pub const MODULES: &str = "/lair/modules";

/// The tag of the virtiofs device that shows the store.
pub const STORE_TAG: &str = "store";

/// One VM's boot configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The VM's name.
    pub hostname: String,
    /// The system's own init, an absolute path in the store. `None`: the agent runs [`Self::services`].
    #[serde(default)]
    pub init: Option<String>,
    /// A store path whose `bin` is the guest's PATH and whose `etc` is copied to `/etc`.
    #[serde(default)]
    pub profile: Option<String>,
    /// What makes `/nix/store` writable. `None`: it is the read-only view itself.
    #[serde(default)]
    pub overlay: Option<Overlay>,
    /// Block devices to mount, in this order.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Programs that the agent keeps running; unused where [`Self::init`] is set.
    #[serde(default)]
    pub services: Vec<Service>,
    /// Names of the credentials to wait for before the system or any service starts.
    #[serde(default)]
    pub credentials: Vec<String>,
    /// Deny AF_VSOCK (and io_uring, which could open it unseen) to all services and what they start.
    #[serde(default)]
    pub deny_vsock: bool,
}

/// Where writes to `/nix/store` go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Overlay {
    /// Memory; gone with the guest.
    Tmpfs {
        /// The most that it may hold, in bytes.
        bytes: u64,
    },
    /// A volume, by its name: `store-upper`, `store-work` and `nix-var` in it.
    Volume {
        /// One of [`BootConfig::volumes`].
        name: String,
    },
}

/// A virtio-blk device with a file system on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The device's serial, by which the guest finds it (at most 20 bytes).
    pub name: String,
    /// Where it is mounted, an absolute path.
    pub mount: String,
}

/// A program that the agent keeps running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The name in logs and events.
    pub name: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Added to the environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// What accepts connections once the service is up: a unix socket's path or `ADDRESS:PORT`.
    /// Without it the service counts as up as soon as it runs.
    #[serde(default)]
    pub ready: Option<String>,
}
