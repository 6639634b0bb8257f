//! A `laird` that gives out tickets, and no more.

use crate::support::*;
use axum::{
    Json, Router,
    http::StatusCode,
    routing::{get, post},
};
use lair_vmm::{
    api::types::{ApiError, ErrorKind, SessionReply, SessionRequest},
    shim::{client, protocol::Grant},
};
use std::{
    path::PathBuf,
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};
use tokio::{net::UnixListener, task::JoinHandle};

/// What a guest may try to do to a terminal.
pub(crate) const HOSTILE: &str = "\x1b]0;owned\x07 \u{9b}2J \x1b[31m\u{7f}\r";

/// Runs until it is dropped, as if it was killed.
pub(crate) struct Laird {
    pub(crate) socket: PathBuf,
    /// How many sessions were asked for.
    pub(crate) asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Laird {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Laird {
    pub(crate) fn start(host: &Host, shim: &Shim) -> Self {
        let socket = host.path("laird.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let sockets = shim.config.sockets.clone();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let session = move |Json(request): Json<SessionRequest>| {
            let (sockets, number) = (sockets.clone(), count.fetch_add(1, Relaxed));
            async move {
                let ticket = format!("{number:064}");
                let grant = Grant {
                    ticket: ticket.clone(),
                    expires_unix_ms: in_ms(60_000),
                    uid: 1000,
                    session: request.session,
                };
                client::grant(&sockets.control, grant).await.unwrap();
                Json(SessionReply { ticket, socket: sockets.session })
            }
        };
        let hostile = || async {
            let error = ApiError { kind: ErrorKind::Failed, message: format!("VM failed: {HOSTILE}") };
            (StatusCode::CONFLICT, Json(error))
        };
        let router = Router::new()
            .route("/v1/vms/{vm}/sessions", post(session))
            .route("/v1/vms/{vm}/log", get(|| async { format!("{HOSTILE}\nnext\r\n") }))
            .route("/v1/vms/{vm}", get(hostile));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { socket, asked, task }
    }
}
