//! Links that the guest opens. Input is the guest's: any process in it can connect here.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Subject},
    carry::{carry, end},
    config::OutgoingTarget,
    limits,
    links::{InUse, target_name},
    message,
    note::{chain, foreign},
    parting::leave,
    socket::accept,
    state::Shim,
    target::{self, TargetError},
};
use lair_guest::wire::{
    VERSION,
    message::{LinkOpen, LinkReply},
    relay::Form,
};
use std::sync::{Arc, atomic::Ordering::Relaxed};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Why a link that the guest asked for is not opened.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("Protocol version {theirs} is not spoken here, version {VERSION} is")]
    Version { theirs: u32 },
    #[error("The ticket is not one of this boot")]
    Ticket,
    #[error("Link {0} is not open to this VM")]
    Unknown(String),
    #[error("Limit of {} open connections is reached", limits::CONNECTIONS)]
    TooMany,
    #[error("Link {0} cannot be opened")]
    Target(String, #[source] TargetError),
}

/// Serves the guest's link port until the shim ends.
pub(super) async fn serve(shim: Arc<Shim>, listener: UnixListener) {
    let handshakes = Arc::new(Semaphore::new(limits::HANDSHAKES));
    loop {
        let stream = accept(&listener).await;
        match handshakes.clone().try_acquire_owned() {
            Ok(permit) => drop(tokio::spawn(serve_one(shim.clone(), stream, permit))),
            Err(_) => {
                let reason =
                    format!("Limit of {} connections without a first message is reached", limits::HANDSHAKES);
                shim.audit.refused(attempt(&shim, "", ""), reason);
            }
        }
    }
}

/// An attempt of the guest. `link` and `to` are empty as far as it did not say.
fn attempt(shim: &Shim, link: &str, to: &str) -> Attempt {
    let subject = Subject::Link { link: link.into() };
    Attempt { subject, from: shim.vm.clone(), to: to.into(), uid: None }
}

async fn serve_one(shim: Arc<Shim>, mut stream: UnixStream, handshake: OwnedSemaphorePermit) {
    let open = match message::receive::<LinkOpen, _>(&mut stream).await {
        Ok(open) => open,
        // No answer to what is not a request, but an end.
        Err(error) => {
            shim.audit.refused(attempt(&shim, "", ""), chain(&error));
            return leave(stream).await;
        }
    };
    drop(handshake);
    let known = shim.links.outgoing(&open.link);
    let to = known.as_ref().map(|(to, _)| target_name(to)).unwrap_or_default();
    let attempt = attempt(&shim, &foreign(&open.link), &to);
    let link = known.as_ref().map(|(_, link)| link.clone());
    match prepare(&shim, &open, known).await {
        Ok((target, form, link, _permit)) => {
            if let Err(error) = message::send(&mut stream, &LinkReply::Opened).await {
                shim.audit.refused(attempt, chain(&error));
                return leave(target).await;
            }
            carry(&shim, attempt, Some(&link), end(stream, Form::Framed), end(target, form)).await;
        }
        Err(refusal) => {
            if let Some(link) = link {
                link.counters.refused.fetch_add(1, Relaxed);
            }
            shim.audit.refused(attempt, chain(&refusal));
            let reply = LinkReply::Refused { reason: told(&refusal) };
            // Whether the guest takes it is its own affair.
            let _ = message::send(&mut stream, &reply).await;
        }
    }
}

async fn prepare(
    shim: &Shim,
    open: &LinkOpen,
    known: Option<(OutgoingTarget, InUse)>,
) -> Result<(UnixStream, Form, InUse, OwnedSemaphorePermit), Refusal> {
    if open.version != VERSION {
        return Err(Refusal::Version { theirs: open.version });
    }
    // Before the link: what links there are is nothing for a process without the ticket.
    if !shim.tickets().admit(&open.ticket) {
        return Err(Refusal::Ticket);
    }
    let name = || foreign(&open.link);
    let (to, link) = known.ok_or_else(|| Refusal::Unknown(name()))?;
    let permit = shim.connection().ok_or(Refusal::TooMany)?;
    let (target, form) =
        target::reach(&to, &open.link, &shim.vm).await.map_err(|error| Refusal::Target(name(), error))?;
    Ok((target, form, link, permit))
}

/// What the guest is told: no more of the causes than the first, since the others name paths of the host.
fn told(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Target(_, cause) => format!("{refusal}: {cause}"),
        other => other.to_string(),
    }
}
