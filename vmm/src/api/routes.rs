//! The table of what can be asked. The router and the OpenAPI document are both made from it, so they cannot differ.

use super::{
    access::Role,
    gpus::{GpuStatus, GpusQuery, GpusReply, ReleaseReply},
    handlers,
    limits::{BODY, FLEET_BODY},
    server::{Call, Done},
    types::{
        ApplyReply, ApplyRequest, AuditQuery, AuditRecord, Event, EventsQuery, HostStatus, LogQuery,
        Progress, SessionReply, SessionRequest, VersionReply, VmStatus, WaitQuery,
    },
};
use schemars::{Schema, SchemaGenerator};
use std::pin::Pin;

/// The schema of one type.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What answers a call.
pub(super) type Handler = fn(Call) -> Pin<Box<dyn Future<Output = Done> + Send>>;

/// How a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
}

/// What an answer is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    /// One JSON document.
    Json(SchemaOf),
    /// JSON objects, one a line.
    Lines(SchemaOf),
    /// Text of this media type.
    Text(&'static str),
}

/// Which calls leave a record in the audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// All.
    All,
    /// Those by somebody who may not: what is asked every second would drown what matters.
    Refusals,
}

/// One thing that can be asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) method: Method,
    /// The path; `{vm}` stands for a VM's name, `{address}` for where a device is.
    pub(super) path: &'static str,
    /// Its name in the audit log and in the document.
    pub(super) verb: &'static str,
    /// What it does.
    pub(super) about: &'static str,
    /// The least role that may; `None`: whoever may connect.
    pub(super) role: Option<Role>,
    pub(super) recorded: Recorded,
    pub(super) query: Option<SchemaOf>,
    /// What the body is, and the most bytes that it may have.
    pub(super) body: Option<(SchemaOf, usize)>,
    pub(super) answer: Answer,
    pub(super) handler: Handler,
}

impl Route {
    /// The longest body that is read. Clients may say `null` where there is nothing to say.
    pub(super) fn body_limit(&self) -> usize {
        self.body.map_or(BODY, |(_, limit)| limit)
    }
}

macro_rules! schema {
    ($type:ty) => {
        |generator| generator.subschema_for::<$type>()
    };
}

macro_rules! handler {
    ($handler:path) => {
        |call| Box::pin($handler(call))
    };
}

const READ: Route = Route {
    method: Method::Get,
    path: "",
    verb: "",
    about: "",
    role: Some(Role::View),
    recorded: Recorded::Refusals,
    query: None,
    body: None,
    answer: Answer::Text("text/plain"),
    handler: handler!(handlers::version),
};

/// A change of one VM that may be waited for.
const CHANGE: Route = Route {
    method: Method::Post,
    role: Some(Role::Operate),
    recorded: Recorded::All,
    query: Some(schema!(WaitQuery)),
    answer: Answer::Lines(schema!(Progress)),
    ..READ
};

/// All that can be asked.
pub(super) const ROUTES: &[Route] = &[
    Route {
        path: "/v1/version",
        verb: "version",
        about: "The versions of laird and of its API",
        role: None,
        answer: Answer::Json(schema!(VersionReply)),
        ..READ
    },
    Route {
        path: "/v1/openapi.json",
        verb: "openapi",
        about: "This document",
        answer: Answer::Text("application/json"),
        handler: handler!(handlers::openapi),
        ..READ
    },
    Route {
        path: "/v1/status",
        verb: "status",
        about: "The host and its VMs",
        answer: Answer::Json(schema!(HostStatus)),
        handler: handler!(handlers::status),
        ..READ
    },
    Route {
        path: "/v1/vms/{vm}",
        verb: "status",
        about: "One VM",
        answer: Answer::Json(schema!(VmStatus)),
        handler: handler!(handlers::vm_status),
        ..READ
    },
    Route {
        path: "/v1/vms/{vm}/start",
        verb: "start",
        about: "Starts a VM",
        handler: handler!(handlers::start),
        ..CHANGE
    },
    Route {
        path: "/v1/vms/{vm}/stop",
        verb: "stop",
        about: "Stops a VM: asks the guest, then presses its power button, then ends its hypervisor",
        handler: handler!(handlers::stop),
        ..CHANGE
    },
    Route {
        path: "/v1/vms/{vm}/restart",
        verb: "restart",
        about: "Stops a VM and starts it again, with what the fleet file says now",
        handler: handler!(handlers::restart),
        ..CHANGE
    },
    Route {
        path: "/v1/vms/{vm}/kill",
        verb: "kill",
        about: "Ends a VM's processes at once, without asking the guest",
        handler: handler!(handlers::kill),
        ..CHANGE
    },
    Route {
        path: "/v1/vms/{vm}/log",
        verb: "logs",
        about: "The console log of a VM, as the guest wrote it",
        recorded: Recorded::All,
        query: Some(schema!(LogQuery)),
        answer: Answer::Text("application/octet-stream"),
        handler: handler!(handlers::console_log),
        ..READ
    },
    Route {
        method: Method::Post,
        path: "/v1/vms/{vm}/sessions",
        verb: "session",
        about: "A ticket, good for one session with a VM at the socket of its shim",
        role: Some(Role::Operate),
        recorded: Recorded::All,
        body: Some((schema!(SessionRequest), BODY)),
        answer: Answer::Json(schema!(SessionReply)),
        handler: handler!(handlers::session),
        ..READ
    },
    Route {
        path: "/v1/gpus",
        verb: "gpu",
        about: "The GPUs of the host, or all its devices, and whether they could be given to VMs",
        query: Some(schema!(GpusQuery)),
        answer: Answer::Json(schema!(GpusReply)),
        handler: handler!(handlers::gpus),
        ..READ
    },
    Route {
        path: "/v1/gpus/{address}",
        verb: "gpu",
        about: "One device of the host",
        answer: Answer::Json(schema!(GpuStatus)),
        handler: handler!(handlers::gpu),
        ..READ
    },
    Route {
        method: Method::Post,
        path: "/v1/gpus/{address}/release",
        verb: "release",
        about: "Gives a device that no VM has back to the host's drivers, also one that is quarantined",
        role: Some(Role::Operate),
        recorded: Recorded::All,
        answer: Answer::Json(schema!(ReleaseReply)),
        handler: handler!(handlers::release),
        ..READ
    },
    Route {
        method: Method::Post,
        path: "/v1/apply",
        verb: "apply",
        about: "Makes a fleet file the fleet, or says what that would change",
        role: Some(Role::Administer),
        recorded: Recorded::All,
        body: Some((schema!(ApplyRequest), FLEET_BODY)),
        answer: Answer::Json(schema!(ApplyReply)),
        handler: handler!(handlers::apply),
        ..READ
    },
    Route {
        path: "/v1/events",
        verb: "events",
        about: "What happens to VMs, in the order in which it does",
        query: Some(schema!(EventsQuery)),
        answer: Answer::Lines(schema!(Event)),
        handler: handler!(handlers::events),
        ..READ
    },
    Route {
        path: "/v1/audit",
        verb: "audit",
        about: "Who asked for what, and what went over links and sessions: laird's records and those of all shims, by time",
        role: Some(Role::Administer),
        recorded: Recorded::All,
        query: Some(schema!(AuditQuery)),
        answer: Answer::Lines(schema!(AuditRecord)),
        handler: handler!(handlers::audit),
        ..READ
    },
    Route {
        path: "/metrics",
        verb: "metrics",
        about: "Counters for Prometheus",
        answer: Answer::Text(super::metrics::MEDIA_TYPE),
        handler: handler!(handlers::metrics),
        ..READ
    },
];
