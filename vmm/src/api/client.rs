//! The client: `vmctl`'s end of the API.

use super::types::{
    ApiError, ApplyReply, ApplyRequest, ErrorKind, HostStatus, SessionReply, SessionRequest, VmStatus,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
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
        self.send(Method::POST, &vm_path(vm, "/start"), &()).await.map(drop)
    }

    /// Stops a VM; returns when the request is taken.
    pub async fn stop(&self, vm: &str) -> Result<(), ClientError> {
        self.send(Method::POST, &vm_path(vm, "/stop"), &()).await.map(drop)
    }

    /// Stops a VM and starts it again; returns when the request is taken.
    pub async fn restart(&self, vm: &str) -> Result<(), ClientError> {
        self.send(Method::POST, &vm_path(vm, "/restart"), &()).await.map(drop)
    }

    /// Ends a VM without asking its guest; returns when the request is taken.
    pub async fn kill(&self, vm: &str) -> Result<(), ClientError> {
        self.send(Method::POST, &vm_path(vm, "/kill"), &()).await.map(drop)
    }

    /// Makes a fleet the fleet.
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
        headers.insert(hyper::header::HOST, hyper::header::HeaderValue::from_static("laird"));
        headers
            .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let error: Option<ApiError> = read(response).await;
        Err(error.map_or(ClientError::Malformed(status), ClientError::Api))
    }
}

impl ClientError {
    /// What kind of error it is, for the exit status.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Denied(_) => ErrorKind::NotPermitted,
            Self::Api(error) => error.kind,
            _ => ErrorKind::Failed,
        }
    }
}

/// A VM's name comes from a command line: what cannot stand in a path is encoded, so that it names nothing else.
fn vm_path(vm: &str, rest: &str) -> String {
    let name: String = vm
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("/v1/vms/{name}{rest}")
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
