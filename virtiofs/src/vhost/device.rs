//! The device of one connection, as the library's worker and request handler see it.

use super::{
    Config, QUEUE_SIZE_MAX, Service,
    queue::{Memory, Queue, State},
    vring::Vring,
};
use crate::{fuse::Session, sandbox::restrict_worker, stats::Requests};
use std::{
    cell::RefCell,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VringEpollHandler};
use virtio_bindings::bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// A connection's device. Each queue has a worker thread of its own.
pub(super) struct Device {
    config: Config,
    queues: Vec<Arc<Queue>>,
    stopping: Arc<AtomicBool>,
    moves: Arc<AtomicU64>,
    /// Those of all queues, once the last worker has told.
    vrings: Arc<OnceLock<Vec<Vring>>>,
    /// Ends the connection.
    shutdown: OnceLock<ShutdownHandle>,
    /// The reading ends of the exit events. The library forgets them without closing them.
    exits: Mutex<Vec<RawFd>>,
}

/// The most memory regions. The library tells the frontend that number, but takes any; each is a mapping and a descriptor.
const REGIONS_MAX: usize = 509;

thread_local! {
    static WORKER: RefCell<Option<WorkerGuard>> = const { RefCell::new(None) };
}

/// Ends the connection when the worker ends: it never comes back, and the guest would wait for ever.
struct WorkerGuard(ShutdownHandle);

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

impl Device {
    pub(super) fn new(service: Arc<Service>, config: Config, memory: Memory) -> Self {
        let session = Arc::new(Session::new());
        let stopping = Arc::new(AtomicBool::new(false));
        let (vrings, moves) = (Arc::new(OnceLock::new()), Arc::new(AtomicU64::new(0)));
        let queue = |(number, stats): (usize, &Arc<Requests>)| {
            Arc::new(Queue {
                service: service.clone(),
                session: session.clone(),
                memory: memory.clone(),
                moves: moves.clone(),
                stopping: stopping.clone(),
                vrings: vrings.clone(),
                number,
                stats: stats.clone(),
                state: Mutex::new(State::one_of(service.requests.len())),
            })
        };
        Self {
            queues: service.requests.iter().enumerate().map(queue).collect(),
            config,
            stopping,
            moves,
            vrings,
            shutdown: OnceLock::new(),
            exits: Mutex::default(),
        }
    }

    /// Has the last worker tell which vrings there are: to the others the library shows their own only.
    pub(super) fn meet(&self, workers: &[Arc<VringEpollHandler<Arc<Self>>>]) -> io::Result<()> {
        let Some(last) = workers.last() else { return Ok(()) };
        let event = EventFd::new(EFD_NONBLOCK)?;
        event.write(1)?;
        let number = u64::from(self.meeting());
        last.register_listener(event.as_raw_fd(), EventSet::IN, number)?;
        self.vrings.wait();
        last.unregister_listener(event.as_raw_fd(), EventSet::IN, number)
    }

    /// The number of the event for that: the first that the library leaves to its users.
    fn meeting(&self) -> u16 {
        u16::try_from(self.config.queues()).unwrap_or(u16::MAX).saturating_add(1)
    }

    /// Says how to end the connection.
    pub(super) fn set_shutdown(&self, handle: ShutdownHandle) {
        let _ = self.shutdown.set(handle);
    }

    /// Takes no more requests, whatever the guest does.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The descriptors to close once the worker has ended.
    pub(super) fn take_exits(&self) -> Vec<RawFd> {
        std::mem::take(&mut self.exits.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn watch_worker(&self) {
        restrict_worker();
        WORKER.with_borrow_mut(|guard| {
            if guard.is_none() {
                *guard = self.shutdown.get().cloned().map(WorkerGuard);
            }
        });
    }
}

fn has_whole_file(region: &GuestRegionMmap) -> bool {
    let Some(at) = region.file_offset() else { return true };
    match at.file().metadata() {
        // Devices have no length.
        Ok(meta) => {
            !meta.is_file() || at.start().checked_add(region.len()).is_some_and(|end| end <= meta.len())
        }
        Err(_) => false,
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.config.queues()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE_MAX)
    }

    /// A queue belongs to the first thread whose mask has it: to the thread of its number. The last one sees all the others, too.
    fn queues_per_thread(&self) -> Vec<u64> {
        let bit = |number| u32::try_from(number).ok().and_then(|number| 1u64.checked_shl(number));
        let mut masks: Vec<u64> = (0..self.config.queues()).filter_map(bit).collect();
        let all = masks.iter().fold(0, |all, mask| all | mask);
        if let Some(last) = masks.last_mut() {
            *last = all;
        }
        masks
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.queues.iter().for_each(|queue| queue.stop());
    }

    /// The library's queues know it.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size)
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// The device shares the library's memory, so all there is to do is to check it: nobody else looks how many regions there
    /// are, and whether the files are as long as the regions. Beyond a file's end, an access would be the end of this process.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let error = {
            let new = memory.memory();
            if new.num_regions() > REGIONS_MAX {
                format!("There are more than {REGIONS_MAX} memory regions")
            } else if !new.iter().all(has_whole_file) {
                "A file is shorter than the memory region in it".into()
            } else {
                self.moves.fetch_add(1, Ordering::Release);
                return Ok(());
            }
        };
        let exclusive = memory.lock().unwrap_or_else(PoisonError::into_inner);
        exclusive.replace(GuestMemoryMmap::new());
        self.moves.fetch_add(1, Ordering::Release);
        Err(io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = usize::try_from(queue_index).ok().and_then(|index| self.queues.get(index)) {
            queue.stop();
        }
        Ok(())
    }

    /// Never an error: that would end the worker for good.
    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        self.watch_worker();
        if device_event == self.meeting() {
            let _ = self.vrings.set(vrings.to_vec());
            return Ok(());
        }
        // A worker's own vring is its last one. Other events than that queue's are the library's.
        if let (Some(queue), Some((vring, others))) = (self.queues.get(thread_id), vrings.split_last())
            && usize::from(device_event) == others.len()
        {
            queue.run(vring);
        }
        Ok(())
    }
}
