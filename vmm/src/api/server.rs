//! The server: `laird`'s end of the API. Each call is the same: who is it, may it, what does it say, do it, record it.

use super::{
    access::{CurrentAccess, Role},
    audit::{Attempt, AuditLog, DeviceRecord, Verdict, now},
    connection::Connections,
    json,
    limits::{self, Limits},
    look::Look,
    peer::Peer,
    routes::{Method, ROUTES, Recorded, Route},
    scrape,
    stream::Pieces,
    types::{API_HEADER, API_VERSION, ApiError, ErrorKind},
};
use crate::{
    passthrough::{Told, What},
    supervisor::{Supervisor, SupervisorError},
};
use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, FromRequestParts, Query, RawPathParams, Request},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    body::{Body as _, Bytes},
    header::CONTENT_TYPE,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::UnixListener,
    sync::{broadcast::error::RecvError, mpsc},
    time::timeout,
};

/// What every handler may use.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) supervisor: Arc<Supervisor>,
    pub(super) connections: Connections,
    /// Records that no disk has.
    pub(super) unwritten: Arc<AtomicU64>,
    /// Bytes of console logs that readers were too slow for.
    pub(super) log_dropped: Arc<AtomicU64>,
    /// Looks at the host's devices.
    pub(super) look: Look,
    /// Attempts, allowed and refused.
    pub(super) attempts: [AtomicU64; 2],
    audit: AuditLog,
    access: Arc<CurrentAccess>,
    request: Duration,
}

/// One call of an API route by somebody who may.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) api: Arc<Api>,
    pub(super) peer: Arc<Peer>,
    /// The VM in the path, where the route has one.
    pub(super) vm: String,
    /// The device in the path, where the route has one.
    pub(super) address: String,
    uri: Uri,
    body: Bytes,
}

impl Call {
    /// The query.
    pub(super) fn query<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let query = Query::try_from_uri(&self.uri);
        let invalid = |error: axum::extract::rejection::QueryRejection| {
            ApiError::new(ErrorKind::Invalid, format!("The query: {}", error.body_text()))
        };
        query.map(|Query(query)| query).map_err(invalid)
    }

    /// The body.
    pub(super) fn body<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let invalid = |error| ApiError::new(ErrorKind::Invalid, format!("The request's body: {error}"));
        json::parse(&self.body).map_err(invalid)
    }
}

/// What came of a call.
pub(super) struct Done {
    pub(super) outcome: Result<Response, ApiError>,
    /// What the audit log calls it, if not by its route.
    pub(super) verb: Option<&'static str>,
    /// More about what was asked, for the audit log.
    pub(super) detail: Option<String>,
}

impl From<Result<Response, ApiError>> for Done {
    fn from(outcome: Result<Response, ApiError>) -> Self {
        Self { outcome, verb: None, detail: None }
    }
}

/// Serves the API on `listener` until the future is dropped.
pub async fn serve(listener: UnixListener, supervisor: Arc<Supervisor>) -> std::io::Result<()> {
    serve_within(Limits::default(), listener, supervisor).await
}

/// [`serve`] with other limits.
pub async fn serve_within(
    limits: Limits,
    listener: UnixListener,
    supervisor: Arc<Supervisor>,
) -> std::io::Result<()> {
    let unwritten = Arc::new(AtomicU64::new(0));
    let audit = AuditLog::start(&supervisor.dirs().audit_log(), Arc::clone(&unwritten))?;
    let request = limits.request;
    let connections = Connections::new(limits);
    let api = Arc::new(Api {
        supervisor,
        connections,
        unwritten,
        log_dropped: Arc::default(),
        look: Look::default(),
        attempts: Default::default(),
        audit,
        access: Arc::default(),
        request,
    });
    let router = router(&api);
    let devices = record_devices(&api);
    tokio::select! {
        () = devices => Ok(()),
        () = api.connections.serve(&listener, &router) => Ok(()),
        () = scrape::serve(&api) => Ok(()),
    }
}

/// Records what becomes of devices. Those of the time before wait in their channel.
async fn record_devices(api: &Api) {
    let mut told = api.supervisor.host().devices.told_since_the_start();
    loop {
        match told.recv().await {
            Ok(Told { device, vm, what }) => {
                let (kind, detail) = match what {
                    What::State { state, detail } => {
                        let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
                        ("device", format!("{device} {state}{detail}"))
                    }
                    What::Fault(of, fault) => ("fault", format!("{of} {fault}, as the guest says")),
                    What::LeaseEnded(lease) => ("lease", format!("{device} {}", lease.summary())),
                };
                api.audit.record_device(&DeviceRecord {
                    time: now(),
                    kind,
                    device: device.to_string(),
                    vm,
                    detail,
                });
            }
            Err(RecvError::Lagged(count)) => {
                tracing::error!(count, "records of devices are missing in the audit log")
            }
            // Not while the API is served, which holds the sender.
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
}

fn router(api: &Arc<Api>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let api = Arc::clone(api);
        let handler = move |request: Request| answer(Arc::clone(&api), route, request);
        router = router.route(
            route.path,
            match route.method {
                Method::Get => get(handler),
                Method::Post => post(handler),
            },
        );
    }
    let unknown = async |uri: Uri| {
        let error = format!("There is no {} in this version of the API", uri.path());
        versioned(ApiError::new(ErrorKind::NotFound, error).into_response())
    };
    let wrong_method = async |uri: Uri| {
        let error = format!("{} is not asked with this method", uri.path());
        versioned(ApiError::new(ErrorKind::Invalid, error).into_response())
    };
    // Bodies are read, and bounded, by `answer`.
    router.fallback(unknown).method_not_allowed_fallback(wrong_method).layer(DefaultBodyLimit::disable())
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::Failed => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotPermitted => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::TimedOut => StatusCode::REQUEST_TIMEOUT,
            ErrorKind::Version => StatusCode::NOT_ACCEPTABLE,
            ErrorKind::Busy => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(self)).into_response()
    }
}

impl From<SupervisorError> for ApiError {
    fn from(error: SupervisorError) -> Self {
        let kind = match error {
            SupervisorError::NoSuchVm(..) => ErrorKind::NotFound,
            SupervisorError::Refused { .. } => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

/// An error of the kind that has no other.
pub(super) fn failed(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Failed, message)
}

/// A task of ours was lost.
pub(super) fn lost() -> ApiError {
    failed("Internal error: a task ended without a result")
}

/// One JSON document.
pub(super) fn document(value: impl Serialize) -> Response {
    Json(value).into_response()
}

/// An answer that goes on, and where its pieces go: as soon as the client has room for them.
pub(super) fn bytes(media_type: &'static str) -> (mpsc::Sender<Bytes>, Response) {
    let (sender, receiver) = mpsc::channel(1);
    let mut response = Body::new(Pieces(receiver)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    (sender, response)
}

/// An answer in JSON lines that goes on.
#[derive(Debug)]
pub(super) struct Lines(mpsc::Sender<Bytes>);

impl Lines {
    /// The answer, and where its lines go.
    pub(super) fn new() -> (Self, Response) {
        let (sender, response) = bytes("application/jsonl");
        (Self(sender), response)
    }

    /// Sends a line as soon as the client has room for it; `false` if the client is gone.
    pub(super) async fn send(&mut self, value: &impl Serialize) -> bool {
        let mut line = serde_json::to_vec(value).unwrap_or_default();
        line.push(b'\n');
        self.0.send(line.into()).await.is_ok()
    }

    /// Returns when the client is gone.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}

fn versioned(mut response: Response) -> Response {
    response.headers_mut().insert(API_HEADER, HeaderValue::from(API_VERSION));
    response
}

/// Answers a call. What was begun is done to its end and its record, also where the client does not wait for it.
async fn answer(api: Arc<Api>, route: &'static Route, request: Request) -> Response {
    let done = tokio::spawn(attempt(api, route, request)).await;
    versioned(done.unwrap_or_else(|_| lost().into_response()))
}

async fn attempt(api: Arc<Api>, route: &'static Route, request: Request) -> Response {
    let began = Instant::now();
    let (mut parts, body) = request.into_parts();
    // It is there: every connection has a peer.
    let Some(peer) = parts.extensions.get::<Arc<Peer>>().map(Arc::clone) else {
        return lost().into_response();
    };
    let fleet = api.supervisor.fleet();
    let role = match route.role {
        Some(_) => api.access.role(&fleet, &peer, api.request).await,
        None => Ok(None),
    };
    let (role, role_known) = match role {
        Ok(role) => (role, Ok(())),
        Err(error) => (None, Err(failed(error.to_string()))),
    };
    let named = named(&mut parts).await;
    let admitted = role_known.and_then(|()| admit(route, role, &peer, &parts.headers));
    let done = match admitted.and(named.clone()) {
        Ok(Named { vm, address }) => match read(body, route.body_limit(), api.request).await {
            Ok(body) => {
                let (api, peer) = (Arc::clone(&api), Arc::clone(&peer));
                let call = Call { api, peer, vm, address, uri: parts.uri, body };
                (route.handler)(call).await
            }
            Err(error) => Err(error).into(),
        },
        Err(error) => Err(error).into(),
    };
    let verdict = if done.outcome.is_ok() { Verdict::Allowed } else { Verdict::Refused };
    let denied = matches!(&done.outcome, Err(error) if error.kind == ErrorKind::NotPermitted);
    if denied || route.recorded == Recorded::All {
        if let Some(count) = api.attempts.get(usize::from(verdict == Verdict::Refused)) {
            count.fetch_add(1, Relaxed);
        }
        let Named { vm, address } = named.unwrap_or_default();
        let some = |text: String| (!text.is_empty()).then_some(text);
        let attempt = Attempt {
            time: now(),
            uid: peer.uid,
            gid: peer.gid,
            role,
            verb: done.verb.unwrap_or(route.verb),
            vm: some(vm),
            detail: done.detail.or(some(address)),
            verdict,
            reason: done.outcome.as_ref().err().map(ToString::to_string),
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        api.audit.record(attempt).await;
    }
    done.outcome.unwrap_or_else(IntoResponse::into_response)
}

/// What the path names; empty where the route has nothing of that kind.
#[derive(Debug, Clone, Default)]
struct Named {
    vm: String,
    address: String,
}

async fn named(parts: &mut Parts) -> Result<Named, ApiError> {
    let params = RawPathParams::from_request_parts(parts, &()).await;
    let invalid = |_| ApiError::new(ErrorKind::Invalid, "The path is not UTF-8");
    let params = params.map_err(invalid)?;
    let of = |name| params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned());
    Ok(Named { vm: of("vm").unwrap_or_default(), address: of("address").unwrap_or_default() })
}

/// Whether a call is answered at all.
fn admit(route: &Route, role: Option<Role>, peer: &Peer, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(needed) = route.role else { return Ok(()) };
    if let Some(theirs) = headers.get(API_HEADER)
        && theirs.as_bytes() != API_VERSION.to_string().as_bytes()
    {
        let theirs = String::from_utf8_lossy(theirs.as_bytes()).escape_debug().to_string();
        let message =
            format!("This client speaks version {theirs} of the API, laird speaks version {API_VERSION}");
        return Err(
            ApiError::new(ErrorKind::Version, message).hint("use the vmctl that came with this laird")
        );
    }
    if role >= Some(needed) {
        return Ok(());
    }
    let has = role.map_or("none".into(), |role| format!("`{}`", role.word()));
    let message = format!("{} takes the role `{}`; uid {} has {has}", route.verb, needed.word(), peer.uid);
    Err(ApiError::new(ErrorKind::NotPermitted, message)
        .hint("the roles are in the table `access` of the fleet file"))
}

/// The body of a request.
async fn read(body: Body, limit: usize, patience: Duration) -> Result<Bytes, ApiError> {
    let too_long =
        || ApiError::new(ErrorKind::Invalid, format!("The request's body has more than {limit} bytes"));
    // What says that it is too long is not read.
    if body.size_hint().lower() > u64::try_from(limit).unwrap_or(u64::MAX) {
        return Err(too_long());
    }
    match timeout(patience, Limited::new(body, limit).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_long()),
        Ok(Err(_)) => Err(ApiError::new(ErrorKind::Invalid, "The request's body ended early")),
        Err(_) => {
            let message = format!("The request's body did not come within {patience:?}");
            Err(ApiError::new(ErrorKind::TimedOut, message))
        }
    }
}

/// The longest wait for a VM.
pub(super) fn patience(seconds: Option<u64>) -> Option<Duration> {
    seconds.map(|seconds| Duration::from_secs(seconds.min(limits::WAIT_SECONDS)))
}
