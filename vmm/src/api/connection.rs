//! Clients' connections: how many there are, and how long each may take to ask. One request each: so one that has not asked is idle, and
//! one that has is not.

use super::{
    access::owns,
    limits::Limits,
    peer::Peer,
    slots::Slots,
    socket::{ClientStream, accept},
    types::{API_HEADER, API_VERSION, ApiError, ErrorKind},
};
use axum::Router;
use hyper::{Request, body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use tokio::net::{UnixListener, UnixStream};

/// What a client is told for which there is no slot.
fn busy() -> String {
    let error = ApiError::new(ErrorKind::Busy, "Too many connections to laird are open")
        .hint("close some, such as a vmctl with --follow");
    let body = serde_json::to_string(&error).unwrap_or_default();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n{API_HEADER}: {API_VERSION}\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Connections {
    limits: Limits,
    slots: Arc<Mutex<Slots>>,
    surplus: Arc<AtomicU64>,
}

/// What there was of connections, for metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) open: usize,
    pub(super) dropped: u64,
    pub(super) refused: u64,
    pub(super) surplus_descriptors: u64,
}

impl Connections {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, slots: Arc::default(), surplus: Arc::default() }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counts(&self) -> Counts {
        let slots = self.slots();
        Counts {
            open: slots.len(),
            dropped: slots.dropped,
            refused: slots.refused,
            surplus_descriptors: self.surplus.load(Relaxed),
        }
    }

    /// Takes connections for ever.
    pub(super) async fn serve(&self, listener: &UnixListener, router: &Router) {
        loop {
            let Some((stream, _)) = accept(listener.accept(), self.limits.accept_pause).await else {
                continue;
            };
            self.take(stream, router);
        }
    }

    fn take(&self, stream: UnixStream, router: &Router) {
        // A peer whose credentials the kernel does not tell is nobody, and is not served.
        let Ok(peer) = Peer::of(&stream) else { return };
        let Some((id, gives_way)) = self.slots().take(peer.uid, owns(peer.uid), &self.limits) else {
            let _ = stream.try_write(busy().as_bytes());
            return;
        };
        let slot = Slot { id, slots: Arc::clone(&self.slots) };
        let stream = ClientStream::new(stream, Arc::clone(&self.surplus));
        let asked = Asked { slot, peer: Arc::new(peer), router: TowerToHyperService::new(router.clone()) };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.request)
            .max_buf_size(self.limits.head)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), asked);
        tokio::spawn(async move {
            // What goes wrong on a connection is that client's alone.
            tokio::select! {
                _ = connection => {}
                _ = gives_way => {}
            }
        });
    }
}

/// A slot, given back when it is dropped.
struct Slot {
    id: u64,
    slots: Arc<Mutex<Slots>>,
}

impl Slot {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots().leave(self.id);
    }
}

/// Answers one connection's requests.
struct Asked {
    slot: Slot,
    peer: Arc<Peer>,
    router: TowerToHyperService<Router>,
}

impl Service<Request<Incoming>> for Asked {
    type Response = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        self.slot.slots().busy(self.slot.id);
        request.extensions_mut().insert(Arc::clone(&self.peer));
        self.router.call(request)
    }
}
