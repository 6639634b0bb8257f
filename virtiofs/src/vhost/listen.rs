//! Connections: one after the other, for as long as the process lives.
//!
//! The listening socket stays, so that a hypervisor that starts the guest anew finds it. What is learned from the host (index, open
//! files) is kept; what belongs to a guest ends with its connection.

use super::device::{Device, Shared};
use crate::quiet::Quiet;
use std::{os::unix::net::UnixListener, sync::Arc, time::Duration};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// How long to wait after a failure that the next connection would meet as well.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves one connection after the other; it never returns.
pub fn serve(listener: UnixListener, shared: &Arc<Shared>) -> ! {
    let mut listener = Listener::from(listener);
    let quiet = Quiet::default();
    loop {
        if let Err(error) = serve_one(&mut listener, shared) {
            quiet.say(|unsaid| tracing::warn!(error = %error, unsaid, "a connection ended with an error"));
            std::thread::sleep(PAUSE);
        }
    }
}

fn serve_one(listener: &mut Listener, shared: &Arc<Shared>) -> Result<(), Box<dyn std::error::Error>> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let device = Arc::new(Device::new(Arc::clone(shared), memory.clone())?);
    let mut daemon = VhostUserDaemon::new("vhost-user".into(), device, memory).map_err(|e| e.to_string())?;
    daemon.start(listener).map_err(|e| e.to_string())?;
    tracing::info!("connected");
    let outcome = daemon.wait();
    for handler in daemon.get_epoll_handlers() {
        handler.send_exit_event();
    }
    tracing::info!("disconnected");
    use vhost::vhost_user::Error as Vhost;
    use vhost_user_backend::Error as Backend;
    match outcome {
        // The ways in which a hypervisor ends.
        Ok(())
        | Err(Backend::HandleRequest(Vhost::Disconnected | Vhost::PartialMessage | Vhost::SocketBroken(_))) => {
            Ok(())
        }
        Err(error) => Err(error.to_string().into()),
    }
}
