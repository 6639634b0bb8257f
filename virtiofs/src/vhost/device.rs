//! The device of one connection, for rust-vmm's vhost-user framework.
//!
//! An error returned to the framework ends the queue's thread for good, so nothing that a guest does becomes one. A ring that cannot be
//! read is given up until it is set up anew; all else is answered with an errno, or with a length of zero.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    chain::{Buffers, ChainError},
    files::Files,
};
use crate::{
    fuse::{
        server::{Answer, OUT_HEADER, REQUEST_MAX, Reply, Server},
        wire::OutHeader,
    },
    quiet::Quiet,
    stats::Stats,
};
use nix::errno::Errno;
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};
use zerocopy::IntoBytes;

/// The most entries of a queue: what QEMU allows.
const QUEUE_SIZE: usize = 1024;

/// The queue for FORGET and INTERRUPT, which stands before those for requests.
const PRIORITY_QUEUES: usize = 1;

/// Bytes of the tag in the configuration space.
const TAG_LENGTH: usize = 36;

/// What all connections of one process share.
#[derive(Debug)]
pub struct Shared {
    /// Answers requests.
    pub server: Server,
    /// Contents of files.
    pub files: Files,
    /// Counters.
    pub stats: Arc<Stats>,
    /// The tag by which the guest mounts.
    pub tag: String,
    /// How many queues for requests there are.
    pub request_queues: usize,
    /// Trouble with the guest.
    pub trouble: Quiet,
    /// Trouble with the host's files.
    pub failures: Quiet,
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Snapshot = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// The device of one connection.
#[derive(Debug)]
pub struct Device {
    shared: Arc<Shared>,
    memory: Memory,
    event_idx: AtomicBool,
    /// For each queue the ring that was given up: the address of its table. Another one is tried again.
    broken: Vec<AtomicU64>,
    exit: Mutex<Option<(EventConsumer, EventNotifier)>>,
}

impl Device {
    /// A device over `memory`, which the framework fills.
    pub fn new(shared: Arc<Shared>, memory: Memory) -> io::Result<Self> {
        let queues = PRIORITY_QUEUES.saturating_add(shared.request_queues);
        Ok(Self {
            shared,
            memory,
            event_idx: AtomicBool::new(false),
            broken: (0..queues).map(|_| AtomicU64::new(u64::MAX)).collect(),
            exit: Mutex::new(Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK)?)),
        })
    }

    /// Answers all that is in a queue.
    fn serve(&self, place: usize, vring: &VringMutex<Memory>) {
        let Some(broken) = self.broken.get(place) else { return };
        let ring = vring.get_ref().get_queue().desc_table();
        if broken.load(Ordering::Relaxed) == ring {
            return;
        }
        loop {
            // A ring that cannot be written to shows below.
            let _ = vring.disable_notification();
            if !self.drain(vring) {
                broken.store(ring, Ordering::Relaxed);
                self.shared.stats.broken();
                self.shared.trouble.say(|unsaid| {
                    tracing::warn!(
                        queue = place,
                        unsaid,
                        "the guest's ring is broken; it must reset the queue"
                    );
                });
                return;
            }
            match vring.enable_notification() {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            }
        }
    }

    /// Answers what is in a queue now; false if the ring makes no sense.
    fn drain(&self, vring: &VringMutex<Memory>) -> bool {
        let memory = self.memory.memory();
        let mut served = 0_u32;
        loop {
            let chain = {
                let mut state = vring.get_mut();
                let Ok(mut chains) = state.get_queue_mut().iter(memory.clone()) else { return false };
                chains.next()
            };
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let used = self.request(&memory, chain);
            // A head beyond the queue's size cannot be given back.
            if vring.add_used(head, used).is_err() {
                return false;
            }
            served = served.saturating_add(1);
        }
        if served > 0 && vring.needs_notification().unwrap_or(true) {
            // A guest that does not take its interrupts has none to miss.
            let _ = vring.signal_used_queue();
        }
        true
    }

    /// Answers one request; the number of bytes that were written.
    fn request(&self, memory: &Snapshot, chain: DescriptorChain<Snapshot>) -> u32 {
        match self.try_request(memory, chain) {
            Ok(used) => used,
            Err(error) => {
                self.shared.trouble.say(|unsaid| {
                    tracing::warn!(error = %error, unsaid, "a request of the guest cannot be used");
                });
                0
            }
        }
    }

    fn try_request(&self, memory: &Snapshot, chain: DescriptorChain<Snapshot>) -> Result<u32, ChainError> {
        let buffers = Buffers::new(chain)?;
        let bytes = buffers.read(&**memory, REQUEST_MAX)?;
        let room = usize::try_from(buffers.room).unwrap_or(usize::MAX);
        let Some(mut answer) =
            self.shared.server.answer(&bytes, buffers.length, room.saturating_sub(OUT_HEADER))
        else {
            return Ok(0);
        };
        let contents = self.contents(&mut answer);
        self.shared.stats.request(answer.opcode, matches!(answer.reply, Reply::Error(_)));
        let data = match &answer.reply {
            Reply::None => return Ok(0),
            Reply::Error(_) => &[],
            Reply::Bytes(data) => data.as_slice(),
            Reply::Contents { .. } => contents.as_slice(),
        };
        if room < OUT_HEADER {
            return Ok(0);
        }
        let header: OutHeader = answer.header(u32::try_from(data.len()).map_err(|_| ChainError::TooLong)?);
        buffers.write(&**memory, OUT_HEADER, data)?;
        buffers.write(&**memory, 0, header.as_bytes())?;
        Ok(header.len)
    }

    /// Reads the contents that an answer names; the answer becomes an error where that fails.
    fn contents(&self, answer: &mut Answer) -> Vec<u8> {
        let Reply::Contents { node, offset, length } = answer.reply else { return vec![] };
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        match self.shared.files.read(self.shared.server.index(), node, offset, &mut data) {
            Ok(()) => self.shared.stats.contents(length.into()),
            Err(error) => {
                self.shared.failures.say(|unsaid| {
                    let place =
                        self.shared.server.index().location(node).map(|(_, place)| place).unwrap_or_default();
                    let file = String::from_utf8_lossy(&place).into_owned();
                    tracing::error!(file, %error, unsaid, "cannot read a file of the view");
                });
                answer.reply = Reply::Error(Errno::EIO);
            }
        }
        data
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        self.broken.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.shared.tag.as_bytes().to_vec();
        config.resize(TAG_LENGTH, 0);
        config.extend_from_slice(&u32::try_from(self.shared.request_queues).unwrap_or(1).to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(size).unwrap_or(usize::MAX));
        config.get(start..end).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // The framework has put it into the one that we share.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[VringMutex<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        let place = usize::from(event);
        if let Some(vring) = vrings.get(place) {
            self.serve(place, vring);
        }
        Ok(())
    }
}
