//! The client: `vmctl`'s end of the API.

use super::{
    gpus::{GpuStatus, GpusQuery, GpusReply, ReleaseReply},
    types::{
        API_HEADER, API_VERSION, ApiError, ApplyReply, ApplyRequest, AuditQuery, AuditRecord, ErrorKind,
        Event, EventsQuery, HostStatus, Progress, SessionReply, SessionRequest, VersionReply, VmStatus,
    },
};
use crate::host::pci::Address;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONTENT_TYPE, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    marker::PhantomData,
    path::{Path, PathBuf},
};
use tokio::net::UnixStream;

/// The largest answer that is read, in bytes; logs are streamed and have no limit.
const ANSWER_MAX: usize = 16 << 20;

/// Why an answer was not had.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens.
    #[error("laird is not running: nothing listens on {0}")]
    Down(PathBuf),
    /// The socket is closed to this user.
    #[error("No access to {0}; be root, or join the group that it belongs to")]
    Denied(PathBuf),
    /// The socket cannot be used.
    #[error("Cannot connect to {0}")]
    Connect(PathBuf, #[source] io::Error),
    /// The connection failed.
    #[error("The connection to laird failed")]
    Http(#[from] hyper::Error),
    /// The connection ended before the answer did.
    #[error("laird ended, or closed the connection, before the answer was whole")]
    Ended,
    /// The other end is of another release.
    #[error("laird speaks version {0} of the API, this client speaks version {API_VERSION}")]
    Version(String),
    /// The answer is not one of this API.
    #[error("laird answered {0} with what is not this version's API; is it another release?")]
    Malformed(StatusCode),
    /// `laird` said no.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// A client of the `laird` behind one socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client; nothing is connected yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// The versions of the other end.
    pub async fn version(&self) -> Result<VersionReply, ClientError> {
        self.call(Method::GET, "/v1/version", &()).await
    }

    /// The host and its VMs.
    pub async fn status(&self) -> Result<HostStatus, ClientError> {
        self.call(Method::GET, "/v1/status", &()).await
    }

    /// One VM.
    pub async fn vm(&self, vm: &str) -> Result<VmStatus, ClientError> {
        self.call(Method::GET, &vm_path(vm, ""), &()).await
    }

    /// Starts a VM; returns when the request is taken.
    pub async fn start(&self, vm: &str) -> Result<(), ClientError> {
        self.change(vm, "start", None).await.map(drop)
    }

    /// Stops a VM; returns when the request is taken.
    pub async fn stop(&self, vm: &str) -> Result<(), ClientError> {
        self.change(vm, "stop", None).await.map(drop)
    }

    /// Stops a VM and starts it again; returns when the request is taken.
    pub async fn restart(&self, vm: &str) -> Result<(), ClientError> {
        self.change(vm, "restart", None).await.map(drop)
    }

    /// Ends a VM without asking its guest; returns when the request is taken.
    pub async fn kill(&self, vm: &str) -> Result<(), ClientError> {
        self.change(vm, "kill", None).await.map(drop)
    }

    /// Asks a VM to `start`, `stop`, `restart` or be `kill`ed. It returns when the request is taken; how far the VM is comes then, for as
    /// many seconds as `wait` says, or once.
    pub async fn change(
        &self,
        vm: &str,
        verb: &str,
        wait: Option<u64>,
    ) -> Result<Lines<Progress>, ClientError> {
        let query = wait.map(|seconds| format!("?wait=true&timeout={seconds}")).unwrap_or_default();
        let response = self.send(Method::POST, &vm_path(vm, &format!("/{verb}{query}")), &()).await?;
        Ok(Lines::of(response))
    }

    /// Makes a fleet the fleet, or says what that would change.
    pub async fn apply(&self, request: &ApplyRequest) -> Result<ApplyReply, ClientError> {
        self.call(Method::POST, "/v1/apply", request).await
    }

    /// A ticket for a session with a VM.
    pub async fn session(&self, vm: &str, request: &SessionRequest) -> Result<SessionReply, ClientError> {
        self.call(Method::POST, &vm_path(vm, "/sessions"), request).await
    }

    /// The console log of a VM, as a stream of chunks.
    pub async fn log(&self, vm: &str, follow: bool) -> Result<Incoming, ClientError> {
        let path = vm_path(vm, if follow { "/log?follow=true" } else { "/log" });
        Ok(self.send(Method::GET, &path, &()).await?.into_body())
    }

    /// What happens, after the event of an id.
    pub async fn events(&self, query: &EventsQuery) -> Result<Lines<Event>, ClientError> {
        self.events_as(query).await
    }

    /// The same as what an event is to be read: of one that a later `laird` tells, all is in a [`serde_json::Value`].
    pub async fn events_as<T: DeserializeOwned>(&self, query: &EventsQuery) -> Result<Lines<T>, ClientError> {
        let after = query.after.map(|id| format!("&after={id}")).unwrap_or_default();
        let path = format!("/v1/events?follow={}{after}", query.follow);
        Ok(Lines::of(self.send(Method::GET, &path, &()).await?))
    }

    /// Records of the audit logs.
    pub async fn audit(&self, query: &AuditQuery) -> Result<Lines<AuditRecord>, ClientError> {
        let mut path = format!("/v1/audit?follow={}", query.follow);
        for (key, value) in [
            ("since", query.since.map(|since| since.to_string())),
            ("vm", query.vm.clone()),
            ("limit", query.limit.map(|limit| limit.to_string())),
        ] {
            if let Some(value) = value {
                path.push_str(&format!("&{key}={}", encoded(&value)));
            }
        }
        Ok(Lines::of(self.send(Method::GET, &path, &()).await?))
    }

    /// The GPUs of the host, or all its devices.
    pub async fn gpus(&self, query: &GpusQuery) -> Result<GpusReply, ClientError> {
        self.call(Method::GET, &format!("/v1/gpus?all={}", query.all), &()).await
    }

    /// One device of the host.
    pub async fn gpu(&self, address: Address) -> Result<GpuStatus, ClientError> {
        self.call(Method::GET, &format!("/v1/gpus/{}", encoded(&address.to_string())), &()).await
    }

    /// Gives a device back to the host.
    pub async fn release_gpu(&self, address: Address) -> Result<ReleaseReply, ClientError> {
        self.call(Method::POST, &format!("/v1/gpus/{}/release", encoded(&address.to_string())), &()).await
    }

    /// Counters for Prometheus, as text.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let response = self.send(Method::GET, "/metrics", &()).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let text = body.ok().and_then(|body| String::from_utf8(body.to_bytes().into()).ok());
        text.ok_or(ClientError::Malformed(status))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        read(response).await.ok_or(ClientError::Malformed(status))
    }

    /// Sends a request; an answer that is an error becomes one.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::Down(self.socket.clone())
            }
            io::ErrorKind::PermissionDenied => ClientError::Denied(self.socket.clone()),
            _ => ClientError::Connect(self.socket.clone(), error),
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let body = if method == Method::GET { vec![] } else { serde_json::to_vec(body).unwrap_or_default() };
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = method;
        // Only characters that are legal in a VM's name are in it, so it parses; any other is the server's to refuse.
        *request.uri_mut() = path.parse().unwrap_or_default();
        let headers = request.headers_mut();
        headers.insert(HOST, HeaderValue::from_static("laird"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(API_HEADER, HeaderValue::from(API_VERSION));
        let response = sender.send_request(request).await?;
        let status = response.status();
        // What another version says is not looked at: it might mean something else.
        let theirs = response.headers().get(API_HEADER).map(HeaderValue::as_bytes);
        if theirs != Some(API_VERSION.to_string().as_bytes()) {
            let theirs = theirs.map(|theirs| String::from_utf8_lossy(theirs).into_owned());
            return Err(ClientError::Version(theirs.unwrap_or_else(|| "0".into())));
        }
        if status.is_success() {
            return Ok(response);
        }
        let error: Option<ApiError> = read(response).await;
        Err(error.map_or(ClientError::Malformed(status), ClientError::Api))
    }
}

/// An answer in JSON lines, as they come.
#[derive(Debug)]
pub struct Lines<T> {
    body: Incoming,
    status: StatusCode,
    buffer: Vec<u8>,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    fn of(response: Response<Incoming>) -> Self {
        let status = response.status();
        Self { body: response.into_body(), status, buffer: Vec::new(), of: PhantomData }
    }

    /// The next line; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|_| ClientError::Malformed(self.status));
            }
            match self.body.frame().await {
                Some(frame) => {
                    let frame = frame.map_err(|error| {
                        if error.is_incomplete_message() { ClientError::Ended } else { error.into() }
                    })?;
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                    if self.buffer.len() > ANSWER_MAX {
                        return Err(ClientError::Malformed(self.status));
                    }
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ClientError::Ended),
            }
        }
    }
}

impl ClientError {
    /// What kind of error it is, for the exit status.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Denied(_) => ErrorKind::NotPermitted,
            Self::Version(_) => ErrorKind::Version,
            Self::Api(error) => error.kind,
            _ => ErrorKind::Failed,
        }
    }

    /// What may help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Down(_) => Some(
                "start it, such as by `systemctl start lair`; --socket or LAIR_SOCKET name another".into(),
            ),
            Self::Version(_) => Some("use the vmctl that came with this laird".into()),
            Self::Api(error) => error.hint.clone(),
            _ => None,
        }
    }
}

/// A VM's name comes from a command line: what cannot stand in a path is encoded, so that it names nothing else.
fn vm_path(vm: &str, rest: &str) -> String {
    format!("/v1/vms/{}{rest}", encoded(vm))
}

fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

async fn read<T: DeserializeOwned>(response: Response<Incoming>) -> Option<T> {
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.ok()?;
    serde_json::from_slice(&body.to_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn cl2_a_daemon_that_is_down_is_told_from_a_socket_that_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("laird.sock");
        assert!(matches!(Client::new(&missing).status().await, Err(ClientError::Down(_))));
        // Left behind by a laird that was killed.
        drop(std::os::unix::net::UnixListener::bind(&missing).unwrap());
        assert!(matches!(Client::new(&missing).status().await, Err(ClientError::Down(_))));
    }

    #[test]
    fn a_name_cannot_reach_another_path() {
        assert_eq!(vm_path("a/../b?x", "/stop"), "/v1/vms/a%2F%2E%2E%2Fb%3Fx/stop");
    }
}
