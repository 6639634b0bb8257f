//! What `laird` writes for one VM's shim. The shim reads it at its start and when told to reload.
//!
//! `laird` may be of a later release than a shim that runs: fields that are not known here are let pass, and those that say nothing are
//! not written.

use super::{files, limits};
use crate::fleet::schema::{Credential, RotatedCredential};
use lair_guest::wire::message::{IncomingLink, OutgoingLink};
use serde::{Deserialize, Deserializer, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The configuration of one VM's shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShimConfig {
    /// The VM's name.
    pub vm: String,
    /// The hybrid vsock socket: `CONNECT PORT` reaches the guest; what the guest connects to appears at this path
    /// with `_PORT` appended, where the shim listens.
    pub vsock: PathBuf,
    /// The hypervisor's console socket, to which the shim connects.
    pub console: PathBuf,
    /// The console log. It is at most [`Self::console_limit`] bytes; the file before it has `.1` appended.
    pub console_log: PathBuf,
    /// The size at which the console log is rotated, in bytes.
    pub console_limit: u64,
    /// Where the guest's journal goes. Without it the guest is not asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalTarget>,
    /// The audit log of the VM's links and sessions: JSON lines, appended.
    pub audit_log: PathBuf,
    /// The directory of recordings of operators' terminals, made with the first one. `None` in a configuration of the previous
    /// release: nothing is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recordings: Option<PathBuf>,
    /// Where the shim listens.
    pub sockets: ShimSockets,
    /// Links that the guest may open.
    pub outgoing: Vec<Outgoing>,
    /// Links that end in the guest.
    pub incoming: Vec<Incoming>,
    /// Credentials, by name: the files that hold them, and what to restart in the guest when they change.
    #[serde(deserialize_with = "credentials")]
    pub credentials: BTreeMap<String, Credential>,
}

/// Credentials as in the fleet file, which takes no field that it does not know.
fn credentials<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Credential>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Any {
        File(PathBuf),
        Rotated {
            file: PathBuf,
            #[serde(default)]
            restart: Vec<String>,
        },
    }
    let known = |any| match any {
        Any::File(file) => Credential::File(file),
        Any::Rotated { file, restart } => Credential::Rotated(RotatedCredential { file, restart }),
    };
    let all = BTreeMap::<String, Any>::deserialize(from)?;
    Ok(all.into_iter().map(|(name, any)| (name, known(any))).collect())
}

/// Where a guest's journal goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalTarget {
    /// The socket of the host's journal.
    pub socket: PathBuf,
    /// The file for a host without one; the file before it has `.1` appended.
    pub log: PathBuf,
    /// The size at which that file is rotated, in bytes.
    pub limit: u64,
}

/// The shim's listening sockets: one for each kind of client, so that directory rights keep them apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimSockets {
    /// For `laird`: [`super::protocol::Control`].
    pub control: PathBuf,
    /// For operators with a ticket: [`super::protocol::SessionOpen`].
    pub session: PathBuf,
    /// For the other VMs' shims: [`super::protocol::Dial`].
    pub dial: PathBuf,
}

/// A link that the guest may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// What the guest is told about it.
    pub link: OutgoingLink,
    /// What it reaches.
    pub to: OutgoingTarget,
}

/// What an outgoing link reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutgoingTarget {
    /// Another VM, by way of its shim's dial socket.
    Vm {
        /// The VM's name, for the audit log.
        vm: String,
        /// [`ShimSockets::dial`] of that VM.
        dial: PathBuf,
    },
    /// A unix socket of the host.
    Host {
        /// The socket's path.
        socket: PathBuf,
    },
}

/// A link that ends in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The link's name.
    pub name: String,
    /// The vsock port in the guest.
    pub port: u32,
    /// What the agent dials behind the port. `None`: a program in the guest listens on the port, and speaks no frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<String>,
    /// The VMs that may connect; `host` for the host.
    pub from: Vec<String>,
    /// Where the shim listens on the host, for links from `host`: a loopback `ADDRESS:PORT` or a unix socket's path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_listen: Option<String>,
}

impl Incoming {
    /// What the agent needs to know: nothing if a program in the guest listens by itself.
    pub fn for_agent(&self) -> Option<IncomingLink> {
        let connect = self.connect.clone()?;
        Some(IncomingLink { name: self.name.clone(), port: self.port, connect })
    }
}

/// Why a configuration was not read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("No configuration")]
    File(#[from] files::FileError),
    /// It is not what [`ShimConfig`] describes.
    #[error("Malformed configuration {path}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// It is the configuration of another VM's shim.
    #[error("Configuration is of VM {other}, this is the shim of VM {mine}")]
    OtherVm {
        /// This shim's VM.
        mine: String,
        /// The one in the file.
        other: String,
    },
    /// The shim is about to end.
    #[error("Reading the configuration was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

impl ShimConfig {
    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bytes = files::read(path, limits::CONFIG_BYTES)?;
        serde_json::from_slice(&bytes).map_err(|source| ConfigError::Malformed { path: path.into(), source })
    }

    /// Where links appear that the guest opens.
    pub fn link_socket(&self) -> PathBuf {
        let mut path = self.vsock.clone().into_os_string();
        path.push(format!("_{}", lair_guest::wire::LINK_PORT));
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn config() -> ShimConfig {
        let socket = PathBuf::from("/run/s");
        let outgoing =
            |name: &str, to| Outgoing { link: OutgoingLink { name: name.into(), listen: None }, to };
        let rotated = RotatedCredential { file: "/b".into(), restart: vec!["x.service".into()] };
        ShimConfig {
            vm: "hydra".into(),
            vsock: socket.clone(),
            console: socket.clone(),
            console_log: socket.clone(),
            console_limit: 1,
            journal: Some(JournalTarget { socket: socket.clone(), log: socket.clone(), limit: 2 }),
            audit_log: socket.clone(),
            recordings: Some(socket.clone()),
            sockets: ShimSockets { control: socket.clone(), session: socket.clone(), dial: socket.clone() },
            outgoing: vec![
                outgoing("store", OutgoingTarget::Host { socket: socket.clone() }),
                outgoing("queue", OutgoingTarget::Vm { vm: "other".into(), dial: socket }),
            ],
            incoming: vec![Incoming {
                name: "web".into(),
                port: 3000,
                connect: Some("/c".into()),
                from: vec!["host".into()],
                host_listen: Some("127.0.0.1:3000".into()),
            }],
            credentials: [
                ("a".to_owned(), Credential::File("/a".into())),
                ("b".to_owned(), Credential::Rotated(rotated)),
            ]
            .into(),
        }
    }

    /// Adds a field to each object below `value`, apart from `value` itself where its keys are names.
    fn extend(value: &mut Value, are_names: bool) {
        match value {
            Value::Object(fields) => {
                for (key, field) in fields.iter_mut() {
                    // Of these, the key is what tells the kind.
                    extend(field, key == "credentials" || key == "to");
                }
                if !are_names {
                    fields.insert("of_a_later_release".into(), json!({ "x": [1] }));
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| extend(value, false)),
            _ => {}
        }
    }

    #[test]
    fn vs7_a_configuration_of_a_later_laird_is_taken() {
        let mut later = serde_json::to_value(config()).unwrap();
        extend(&mut later, false);
        assert_eq!(later.to_string().matches("of_a_later_release").count(), 11);
        assert_eq!(serde_json::from_value::<ShimConfig>(later).unwrap(), config());
    }

    /// A shim of the previous release denies fields that it does not know.
    #[test]
    fn vs7_what_is_not_used_is_not_written() {
        let mut plain = config();
        (plain.journal, plain.recordings) = (None, None);
        (plain.incoming[0].connect, plain.incoming[0].host_listen) = (None, None);
        let written = serde_json::to_string(&plain).unwrap();
        assert!(!written.contains("null"), "{written}");
        assert_eq!(serde_json::from_str::<ShimConfig>(&written).unwrap(), plain);
    }
}
