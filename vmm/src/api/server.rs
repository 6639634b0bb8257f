//! The server: `laird`'s end of the API.

use super::{
    audit::{Attempt, AuditLog},
    log,
    types::{
        ApiError, ApplyReply, ApplyRequest, ErrorKind, HostStatus, SessionReply, SessionRequest, VmStatus,
    },
};
use crate::{
    error::chain,
    fleet,
    shim::{
        client,
        protocol::{Grant, Session},
    },
    supervisor::{Supervisor, SupervisorError},
    vm::machine::{Request, State},
};
use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, DefaultBodyLimit, Path, Query, State as Shared, connect_info::Connected},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use http_body_util::channel::Channel;
use hyper::body::Bytes;
use serde::Deserialize;
use std::{sync::Arc, time::Duration};
use tokio::{
    net::{UnixListener, unix::UCred},
    sync::mpsc,
};

/// The largest request body in bytes: a fleet file of thousands of VMs.
const BODY_MAX: usize = 4 << 20;

/// How long a ticket is good for.
const TICKET_MS: i64 = 10_000;

/// How often a log that is followed is looked at.
const LOG_POLL: Duration = Duration::from_millis(200);

/// What every handler may use.
#[derive(Debug)]
pub struct Api {
    supervisor: Arc<Supervisor>,
    audit: AuditLog,
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: u32,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        // A peer whose credentials the kernel does not tell is nobody.
        Self { uid: stream.io().peer_cred().as_ref().map_or(u32::MAX, UCred::uid) }
    }
}

/// Serves the API on `listener` until the future is dropped.
pub async fn serve(listener: UnixListener, supervisor: Arc<Supervisor>) -> std::io::Result<()> {
    let audit = AuditLog::new(&supervisor.dirs().audit_log());
    let api = Arc::new(Api { supervisor, audit });
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/apply", post(apply))
        .route("/v1/vms/{vm}", get(vm_status))
        .route("/v1/vms/{vm}/start", post(start))
        .route("/v1/vms/{vm}/stop", post(stop))
        .route("/v1/vms/{vm}/restart", post(restart))
        .route("/v1/vms/{vm}/kill", post(kill))
        .route("/v1/vms/{vm}/log", get(console_log))
        .route("/v1/vms/{vm}/sessions", post(session))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(api);
    axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::Failed => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotPermitted => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
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
        Self { kind, message: error.to_string() }
    }
}

fn failed(message: String) -> ApiError {
    ApiError { kind: ErrorKind::Failed, message }
}

fn lost() -> ApiError {
    failed("Internal error: a task ended without a result".into())
}

/// Does what was begun to its end and its record, also where the client does not wait for it.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work).await.unwrap_or_else(|_| Err(lost()))
}

impl Api {
    /// Records an attempt with what came of it.
    fn audited<T>(
        &self,
        peer: Peer,
        verb: &str,
        vm: Option<&str>,
        detail: Option<String>,
        outcome: Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        self.audit.record(&Attempt {
            time: jiff::Timestamp::now(),
            uid: peer.uid,
            verb,
            vm,
            detail,
            verdict: if outcome.is_ok() { "allowed" } else { "refused" },
            reason: outcome.as_ref().err().map(ToString::to_string),
        });
        outcome
    }
}

async fn status(Shared(api): Shared<Arc<Api>>) -> Json<HostStatus> {
    Json(api.supervisor.status().await)
}

async fn vm_status(
    Shared(api): Shared<Arc<Api>>,
    Path(vm): Path<String>,
) -> Result<Json<VmStatus>, ApiError> {
    Ok(Json(api.supervisor.vm_status(&vm).await?))
}

async fn change(
    api: Arc<Api>,
    peer: Peer,
    vm: String,
    verb: &'static str,
    request: Request,
) -> Result<(), ApiError> {
    whole(async move {
        let outcome = api.supervisor.request(&vm, request).await.map_err(ApiError::from);
        api.audited(peer, verb, Some(&vm), None, outcome)
    })
    .await
}

async fn start(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<(), ApiError> {
    change(api, peer, vm, "start", Request::Start).await
}

async fn stop(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<(), ApiError> {
    change(api, peer, vm, "stop", Request::Stop).await
}

async fn restart(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<(), ApiError> {
    change(api, peer, vm, "restart", Request::Restart).await
}

async fn kill(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<(), ApiError> {
    change(api, peer, vm, "kill", Request::Kill).await
}

async fn apply(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(request): Json<ApplyRequest>,
) -> Result<Json<ApplyReply>, ApiError> {
    whole(async move {
        let detail = match &request.file {
            Some(file) => file.name.clone(),
            None => api.supervisor.fleet_file().display().to_string(),
        };
        let outcome = check_and_apply(&api.supervisor, request).await;
        api.audited(peer, "apply", None, Some(detail), outcome).map(Json)
    })
    .await
}

async fn check_and_apply(
    supervisor: &Arc<Supervisor>,
    request: ApplyRequest,
) -> Result<ApplyReply, ApiError> {
    let name = request.file.as_ref().map(|file| file.name.clone());
    let (path, host) = (supervisor.fleet_file().to_owned(), supervisor.host().facts);
    let checked = tokio::task::spawn_blocking(move || match request.file {
        Some(file) => fleet::check(&file.name, file.text.as_bytes(), &host),
        None => fleet::check_file(&path, &host),
    });
    let loaded = checked
        .await
        .map_err(|_| lost())?
        .map_err(|problems| ApiError { kind: ErrorKind::Invalid, message: problems.to_string() })?;
    Ok(supervisor.apply(loaded, name).await)
}

async fn session(
    Shared(api): Shared<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
    Json(request): Json<SessionRequest>,
) -> Result<Json<SessionReply>, ApiError> {
    let (verb, detail) = match &request.session {
        Session::Exec(exec) if exec.is_shell() => ("shell", None),
        Session::Exec(exec) => ("exec", serde_json::to_string(&exec.command).ok()),
        Session::Console(console) => ("console", console.read_only.then(|| "read only".into())),
        Session::Connect { port } => ("connect", Some(port.to_string())),
    };
    let outcome = grant(&api, peer, &vm, request.session).await;
    api.audited(peer, verb, Some(&vm), detail, outcome).map(Json)
}

async fn grant(api: &Api, peer: Peer, vm: &str, session: Session) -> Result<SessionReply, ApiError> {
    let snapshot = api.supervisor.vm(vm)?.snapshot();
    let (State::Booting | State::Ready, Some(plan)) = (&snapshot.state, &snapshot.plan) else {
        return Err(failed(format!("VM {vm} is {}", snapshot.state.word())));
    };
    let mut ticket = [0; 32];
    getrandom::fill(&mut ticket).map_err(|error| failed(format!("No random numbers: {error}")))?;
    let ticket: String = ticket.iter().map(|byte| format!("{byte:02x}")).collect();
    let expires = jiff::Timestamp::now().as_millisecond().saturating_add(TICKET_MS);
    let grant = Grant {
        ticket: ticket.clone(),
        expires_unix_ms: u64::try_from(expires).unwrap_or_default(),
        uid: peer.uid,
        session,
    };
    client::grant(&plan.shim.sockets.control, grant).await.map_err(|error| failed(chain(&error)))?;
    Ok(SessionReply { ticket, socket: plan.shim.sockets.session.clone() })
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogQuery {
    #[serde(default)]
    follow: bool,
}

async fn console_log(
    Shared(api): Shared<Arc<Api>>,
    Path(vm): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    api.supervisor.vm(&vm)?;
    let dirs = api.supervisor.dirs().vm(&vm).map_err(|error| failed(error.to_string()))?;
    let (sender, mut chunks) = mpsc::channel(1);
    tokio::spawn(log::send(dirs.log("console"), query.follow, LOG_POLL, sender));
    let (mut body, channel) = Channel::<Bytes>::new(1);
    tokio::spawn(async move {
        while let Some(chunk) = chunks.recv().await {
            if body.send_data(chunk.into()).await.is_err() {
                return;
            }
        }
    });
    Ok(Body::new(channel).into_response())
}
