//! A `laird` that gives out tickets, and no more.

use crate::support::*;
use axum::{
    Json, Router,
    http::{HeaderValue, StatusCode},
    middleware::map_response,
    response::Response,
    routing::{get, post},
};
use lair_vmm::{
    api::types::{SessionReply, SessionRequest},
    shim::{client, protocol::Grant},
};
use serde_json::json;
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
            (
                StatusCode::CONFLICT,
                Json(json!({ "kind": "failed", "message": format!("VM failed: {HOSTILE}") })),
            )
        };
        let router = Router::new()
            .route("/v1/vms/{vm}/sessions", post(session))
            .route("/v1/vms/{vm}/log", get(|| async { format!("{HOSTILE}\nnext\r\n") }))
            .route("/v1/vms/{vm}", get(hostile))
            .layer(map_response(async |mut response: Response| {
                response.headers_mut().insert("lair-api-version", HeaderValue::from_static("1"));
                response
            }));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { socket, asked, task }
    }
}
