//! What answers each route. Whoever gets here may.

use super::{
    audit::read::{Reader, Wanted},
    gpus::{GpuStatus, GpusQuery, GpusReply, ReleaseReply},
    limits::{AUDIT_ANSWER, LOOK, POLL},
    log,
    metrics::{self, Own, Seen},
    openapi,
    progress::{Change, Wish},
    server::{Api, Call, Done, Lines, bytes, document, failed, patience},
    types::{
        API_VERSION, ApiError, ApplyReply, ApplyRequest, AuditQuery, ErrorKind, EventsQuery, LogQuery,
        SessionReply, SessionRequest, VersionReply, WaitQuery,
    },
    usage::Usage,
};
use crate::{
    error::chain,
    fleet,
    host::{
        pci::{Address, Inventory, NotAnAddress},
        thread,
    },
    shim::{
        client,
        protocol::{Grant, Session},
    },
    supervisor::Supervisor,
    vm::machine::State,
};
use axum::response::{IntoResponse, Response};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use std::sync::{Arc, atomic::Ordering::Relaxed};
use tokio::time::sleep;

/// How long a ticket is good for.
const TICKET_MS: i64 = 10_000;

pub(super) async fn version(_: Call) -> Done {
    let laird = env!("CARGO_PKG_VERSION").into();
    Ok(document(VersionReply { laird, api: API_VERSION })).into()
}

pub(super) async fn openapi(_: Call) -> Done {
    Ok(document(openapi::document())).into()
}

pub(super) async fn status(call: Call) -> Done {
    Ok(document(call.api.supervisor.status().await)).into()
}

pub(super) async fn vm_status(call: Call) -> Done {
    let status = call.api.supervisor.vm_status(&call.vm).await;
    status.map(document).map_err(ApiError::from).into()
}

pub(super) async fn start(call: Call) -> Done {
    change(call, Wish::Start).await.into()
}

pub(super) async fn stop(call: Call) -> Done {
    change(call, Wish::Stop).await.into()
}

pub(super) async fn restart(call: Call) -> Done {
    change(call, Wish::Restart).await.into()
}

pub(super) async fn kill(call: Call) -> Done {
    change(call, Wish::Kill).await.into()
}

async fn change(call: Call, wish: Wish) -> Result<Response, ApiError> {
    let WaitQuery { wait, timeout } = call.query()?;
    let change = Change::ask(&call.api.supervisor, &call.vm, wish).await?;
    let (lines, response) = Lines::new();
    tokio::spawn(async move {
        if wait { change.follow(lines, patience(timeout)).await } else { change.accepted(lines).await }
    });
    Ok(response)
}

pub(super) async fn apply(call: Call) -> Done {
    let request: ApplyRequest = match call.body() {
        Ok(request) => request,
        Err(error) => return Err(error).into(),
    };
    let supervisor = &call.api.supervisor;
    let file = match &request.file {
        Some(file) => file.name.clone(),
        None => supervisor.fleet_file().display().to_string(),
    };
    let detail = if request.dry_run { format!("{file} (dry run)") } else { file };
    let outcome = check_and_apply(supervisor, request).await.map(document);
    Done { outcome, verb: None, detail: Some(detail) }
}

async fn check_and_apply(
    supervisor: &Arc<Supervisor>,
    request: ApplyRequest,
) -> Result<ApplyReply, ApiError> {
    let name = request.file.as_ref().map(|file| file.name.clone());
    let (path, host) = (supervisor.fleet_file().to_owned(), supervisor.host().facts);
    let checked = thread::run(move || match request.file {
        Some(file) => fleet::check(&file.name, file.text.as_bytes(), &host),
        None => fleet::check_file(&path, &host),
    });
    let invalid = |problems: fleet::Problems| ApiError::new(ErrorKind::Invalid, problems.to_string());
    let loaded = checked.await.map_err(|error| failed(chain(&error)))?.map_err(invalid)?;
    Ok(if request.dry_run { supervisor.preview(loaded, name) } else { supervisor.apply(loaded, name).await })
}

pub(super) async fn session(call: Call) -> Done {
    let request: SessionRequest = match call.body() {
        Ok(request) => request,
        Err(error) => return Err(error).into(),
    };
    let (verb, detail) = match &request.session {
        Session::Exec(exec) if exec.is_shell() => ("shell", None),
        Session::Exec(exec) => ("exec", serde_json::to_string(&exec.command).ok()),
        Session::Console(console) => ("console", console.read_only.then(|| "read only".into())),
        Session::Connect { port } => ("connect", Some(port.to_string())),
    };
    let outcome = grant(&call, request.session).await.map(document);
    Done { outcome, verb: Some(verb), detail }
}

async fn grant(call: &Call, session: Session) -> Result<SessionReply, ApiError> {
    let vm = &call.vm;
    let snapshot = call.api.supervisor.vm(vm)?.snapshot();
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
        uid: call.peer.uid,
        session,
    };
    client::grant(&plan.shim.sockets.control, grant).await.map_err(|error| failed(chain(&error)))?;
    Ok(SessionReply { ticket, socket: plan.shim.sockets.session.clone() })
}

pub(super) async fn console_log(call: Call) -> Done {
    let open = || {
        let query: LogQuery = call.query()?;
        call.api.supervisor.vm(&call.vm)?;
        let dirs = call.api.supervisor.dirs().vm(&call.vm).map_err(|error| failed(error.to_string()))?;
        let (sender, response) = bytes("application/octet-stream");
        let dropped = Arc::clone(&call.api.log_dropped);
        tokio::spawn(async move {
            // A log that cannot be read ends here.
            let _ = log::send(dirs.log("console"), query.follow, POLL, sender, &dropped).await;
        });
        Ok(response)
    };
    open().into()
}

pub(super) async fn events(call: Call) -> Done {
    let query: EventsQuery = match call.query() {
        Ok(query) => query,
        Err(error) => return Err(error).into(),
    };
    let mut reader = call.api.supervisor.observed().events.reader(query.after);
    let (mut lines, response) = Lines::new();
    tokio::spawn(async move {
        while let Some(event) = reader.try_next() {
            if !lines.send(&event).await {
                return;
            }
        }
        if !query.follow {
            return;
        }
        loop {
            tokio::select! {
                event = reader.next() => if !lines.send(&event).await { return },
                () = lines.closed() => return,
            }
        }
    });
    Ok(response).into()
}

pub(super) async fn audit(call: Call) -> Done {
    let query: AuditQuery = match call.query() {
        Ok(query) => query,
        Err(error) => return Err(error).into(),
    };
    let wanted = Wanted { since: query.since, vm: query.vm };
    let mut reader = Reader::new(call.api.supervisor.dirs().clone(), wanted);
    let mut most = query.limit.unwrap_or(1000).min(AUDIT_ANSWER);
    let (mut lines, response) = Lines::new();
    tokio::spawn(async move {
        loop {
            // Files are read where that may block.
            let read = thread::run(move || {
                let (records, _) = reader.next(most);
                (reader, records)
            });
            let Ok((returned, records)) = read.await else { return };
            reader = returned;
            for record in records {
                if !lines.send(&record).await {
                    return;
                }
            }
            if !query.follow {
                return;
            }
            // The limit is for what was there before.
            most = AUDIT_ANSWER;
            tokio::select! {
                () = sleep(POLL) => {}
                () = lines.closed() => return,
            }
        }
    });
    Ok(response).into()
}

pub(super) async fn gpus(call: Call) -> Done {
    let answer = async || {
        let query: GpusQuery = call.query()?;
        let inventory = inventory(&call.api).await?;
        let held = call.api.supervisor.host().devices.held();
        Ok(document(GpusReply::new(&inventory, &held, &query)))
    };
    answer().await.into()
}

pub(super) async fn gpu(call: Call) -> Done {
    let answer = async || {
        let address = address(&call)?;
        let inventory = inventory(&call.api).await?;
        // Why it could not be read says more than that it is not there.
        let unreadable = inventory.unreadable.iter().find(|error| error.address() == address);
        let held = call.api.supervisor.host().devices.held();
        GpuStatus::of(&inventory, &held, address).map(document).map_err(|missing| match unreadable {
            Some(error) => failed(chain(error)),
            None => ApiError::new(ErrorKind::NotFound, missing.to_string())
                .hint("`vmctl gpu list --all` shows all that there are"),
        })
    };
    answer().await.into()
}

pub(super) async fn release(call: Call) -> Done {
    let answer = async || {
        let address = address(&call)?;
        let devices = &call.api.supervisor.host().devices;
        devices.give_back(address).await.map_err(|error| failed(chain(&error)))?;
        Ok(document(ReleaseReply { address }))
    };
    answer().await.into()
}

fn address(call: &Call) -> Result<Address, ApiError> {
    let invalid = |error: NotAnAddress| ApiError::new(ErrorKind::Invalid, error.to_string());
    call.address.parse().map_err(invalid)
}

/// The devices as they are now.
async fn inventory(api: &Api) -> Result<Inventory, ApiError> {
    let sysfs = api.supervisor.host().sysfs.clone();
    let read = api.look.at(LOOK, move || Inventory::read(&sysfs)).await?;
    read.map_err(|error| failed(chain(&error)))
}

pub(super) async fn metrics(call: Call) -> Done {
    let mut response = metrics_text(&call.api).await.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::MEDIA_TYPE));
    Ok(response).into()
}

/// The metrics as text.
pub(super) async fn metrics_text(api: &Api) -> String {
    let host = api.supervisor.status().await;
    let mut processes = vec![(None, "laird".to_owned(), std::process::id())];
    for vm in &host.vms {
        for (part, pid) in &vm.processes {
            let part = serde_json::to_value(part).ok().and_then(|part| Some(part.as_str()?.to_owned()));
            let entry =
                part.zip(u32::try_from(*pid).ok()).map(|(part, pid)| (Some(vm.name.clone()), part, pid));
            processes.extend(entry);
        }
    }
    let running = host.vms.iter().filter(|vm| !vm.processes.is_empty()).map(|vm| vm.name.as_str());
    let store = metrics::store_requests(api.supervisor.dirs(), running).await;
    let usage = thread::run(move || {
        let usage = |(vm, part, pid)| Some((vm, part, Usage::of(pid).ok()?));
        processes.into_iter().filter_map(usage).collect()
    });
    let devices = &api.supervisor.host().devices;
    let gpus = host.vms.iter().flat_map(|vm| metrics::gpus_of(vm, &devices.functions_of(&vm.name)));
    let leases = devices.held().into_iter().filter_map(|(key, holding)| Some((key, holding.lease?)));
    let seen = Seen {
        usage: usage.await.unwrap_or_default(),
        store,
        gpus: gpus.collect(),
        leases: leases.filter(|(_, lease)| lease.is_open()).collect(),
    };
    let connections = api.connections.counts();
    let [allowed, refused] = api.attempts.each_ref().map(|count| count.load(Relaxed));
    let own = Own {
        allowed,
        refused,
        unwritten: api.unwritten.load(Relaxed),
        log_dropped: api.log_dropped.load(Relaxed),
        connections: connections.open,
        connections_dropped: connections.dropped,
        connections_refused: connections.refused,
        surplus_descriptors: connections.surplus_descriptors,
    };
    metrics::text(&host, &api.supervisor.observed().stats, &own, &seen)
}
