//! The hypervisor's side: the vhost-user handshake, and what a guest has that outlives a connection.

use super::{
    event::Event,
    layout::{QUEUE_SIZE, Shape},
    memory::Memory,
    queue::Queue,
};
use anyhow::{Context, Result, ensure};
use std::{
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, atomic::Ordering},
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

/// A guest, as far as a backend sees it. The request queues are taken out, to be driven, each by a thread.
#[derive(Debug)]
pub struct Guest {
    memory: Arc<Memory>,
    shape: Shape,
    rings: Vec<Ring>,
}

/// What the hypervisor knows of a queue.
#[derive(Debug)]
struct Ring {
    kick: Arc<Event>,
    call: Arc<Event>,
}

/// Where a hypervisor says that queues begin. In a guest that has just booted both are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// The used index: the first request without an answer.
    Used,
    /// The available index, as Cloud Hypervisor 53 does when it connects again: requests without an answer would be lost.
    Available,
}

/// A connection to a backend, which serves until it is dropped.
pub struct Connection {
    frontend: Frontend,
}

impl Guest {
    /// A guest that has just booted, and its request queues.
    pub fn new(shape: Shape) -> Result<(Self, Vec<Queue>)> {
        let memory = Arc::new(Memory::new(shape.memory())?);
        let mut rings = Vec::new();
        let mut queues = Vec::new();
        for number in 0..=shape.queues {
            let ring = Ring { kick: Arc::new(Event::new()?), call: Arc::new(Event::new()?) };
            if number > 0 {
                let layout = shape.layout(number);
                queues.push(Queue::new(memory.clone(), layout, ring.kick.clone(), ring.call.clone()));
            }
            rings.push(ring);
        }
        Ok((Self { memory, shape, rings }, queues))
    }

    pub(super) fn memory(&self) -> Arc<Memory> {
        self.memory.clone()
    }

    pub(super) fn call(&self, queue: usize) -> Result<Arc<Event>> {
        Ok(self.rings.get(queue).context("No such queue")?.call.clone())
    }

    /// Connects to the backend that listens at `socket`, and enables all queues.
    pub fn connect(&self, socket: &Path, base: Base) -> Result<Connection> {
        let mut connection = self.attach(socket, base)?;
        (0..self.rings.len()).try_for_each(|number| connection.enable(number))?;
        Ok(connection)
    }

    /// Connects and sets all queues up, saying for each that it begins at `base`. None is enabled yet.
    pub fn attach(&self, socket: &Path, base: Base) -> Result<Connection> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("Cannot connect to the backend at {}", socket.display()))?;
        self.handshake(stream, base).context("The vhost-user handshake failed")
    }

    fn handshake(&self, stream: UnixStream, base: Base) -> Result<Connection> {
        let wanted = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let mut frontend = Frontend::from_stream(stream, self.rings.len() as u64);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        ensure!(offered & wanted == wanted, "It offers the features {offered:#x}, not {wanted:#x}");
        let protocol = frontend.get_protocol_features()?;
        let protocol = protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK);
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(wanted)?;
        let region = self.memory.region();
        frontend.set_mem_table(&[region])?;
        for (number, ring) in self.rings.iter().enumerate() {
            self.set_up(&frontend, number, ring, &region, base)?;
        }
        Ok(Connection { frontend })
    }

    fn set_up(
        &self,
        frontend: &Frontend,
        number: usize,
        ring: &Ring,
        region: &VhostUserMemoryRegionInfo,
        base: Base,
    ) -> Result<()> {
        let layout = self.shape.layout(number);
        let address = |offset: usize| region.userspace_addr + offset as u64;
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: address(layout.table()),
            used_ring_addr: address(layout.used()),
            avail_ring_addr: address(layout.available()),
            log_addr: None,
        };
        let base = match base {
            Base::Used => layout.used_index(),
            Base::Available => layout.available_index(),
        };
        let base = self.memory.atomic(base).load(Ordering::Acquire);
        frontend.set_vring_num(number, QUEUE_SIZE)?;
        frontend.set_vring_base(number, base)?;
        frontend.set_vring_addr(number, &addresses)?;
        frontend.set_vring_call(number, ring.call.vhost())?;
        frontend.set_vring_kick(number, ring.kick.vhost())?;
        Ok(())
    }
}

impl Connection {
    /// Enables a queue, the high-priority queue being number 0.
    pub fn enable(&mut self, number: usize) -> Result<()> {
        self.frontend.set_vring_enable(number, true).with_context(|| format!("Cannot enable queue {number}"))
    }
}
