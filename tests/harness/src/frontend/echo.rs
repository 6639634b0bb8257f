//! Devices of no use, in a thread of this process, which show what no backend can be faster than.
//!
//! [`Device::Empty`] answers each request at once: what a round trip to it takes is what the frontend itself costs. [`Device::Knowing`]
//! also looks up what was asked in tables that have each answer ready, and copies it: what is left without checking, counting or
//! sharing anything. [`Device::Reading`] knows of one file only, and has the kernel copy it. Both are confined by the filters of system calls
//! that a backend's workers have. [`Device::Late`] is an empty one that takes its time: so it is seen how long a frontend that goes to sleep is
//! still awake.

use super::{
    connection::Guest,
    event::Event,
    known::{KEY_MAX, Known, NODE},
    layout::{DESCRIPTOR, Layout, Shape},
    memory::Memory,
    queue::{Descriptor, Queue, Used},
};
use anyhow::{Context, Result, anyhow};
use lair_virtiofs::{
    fuse::wire::{InHeader, OutHeader, ReadIn},
    sandbox::restrict_like_worker,
};
use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};
use zerocopy::IntoBytes;

/// What the device does.
#[derive(Debug, Clone, Copy)]
pub enum Device<'a> {
    /// Replies with a header.
    Empty,
    /// Reads all of a request, and replies with what is known about that.
    Knowing(&'a Known),
    /// Replies to each READ with what is in this file.
    Reading(&'a File),
    /// Replies with a header, so much later.
    Late(Duration),
}

/// The device's own. On lines of its own: what the frontend writes for itself beside it would else go to and fro between processors.
#[repr(align(128))]
struct Echo<'a> {
    memory: Arc<Memory>,
    layout: Layout,
    call: Arc<Event>,
    /// The next entry of both rings.
    next: u16,
    device: Device<'a>,
    /// Where a request's node and arguments are put together.
    key: [u8; KEY_MAX],
}

impl Echo<'_> {
    /// Answers all that there is.
    fn run(&mut self) -> Result<()> {
        let available = self.memory.atomic(self.layout.available_index());
        let used = self.memory.atomic(self.layout.used_index());
        while available.load(Ordering::Acquire) != self.next {
            // All that is known beforehand, at once: otherwise each step of what follows would wait for the other processor.
            // This frontend puts requests and replies into the same places each time.
            self.layout.request_lines(0).iter().for_each(|&line| self.memory.fetch::<false>(line));
            self.layout.reply_lines(0).iter().for_each(|&line| self.memory.fetch::<true>(line));
            self.memory.fetch::<true>(self.layout.used_entry(self.next));
            let head: u16 = self.memory.get(self.layout.available_entry(self.next));
            let table: Descriptor = self.memory.get(self.layout.table() + DESCRIPTOR * usize::from(head));
            let request: Descriptor = self.memory.get(usize::try_from(table.address)?);
            let header: InHeader = self.memory.get(usize::try_from(request.address)?);
            let body = match self.device {
                Device::Empty => 0,
                Device::Knowing(known) => fill(&self.memory, known, &mut self.key, &table, &header)?,
                Device::Reading(file) => self.read(file, &table)?,
                Device::Late(late) => {
                    let begin = Instant::now();
                    while begin.elapsed() < late {}
                    0
                }
            };
            let length = size_of::<OutHeader>() as u32 + body;
            let reply = OutHeader { len: length, error: 0, unique: header.unique };
            self.memory.put(self.layout.reply(head), &reply);
            let entry = Used { head: head.into(), length };
            self.memory.put(self.layout.used_entry(self.next), &entry);
            self.next = self.next.wrapping_add(1);
            used.store(self.next, Ordering::Release);
            fence(Ordering::SeqCst);
            let event = self.memory.atomic(self.layout.used_event()).load(Ordering::Relaxed);
            if event == self.next.wrapping_sub(1) {
                self.call.signal()?;
            }
        }
        // It needs no kicks, being awake all the time.
        self.memory.atomic(self.layout.available_event()).store(self.next.wrapping_sub(1), Ordering::Relaxed);
        Ok(())
    }
}

impl Echo<'_> {
    /// Fills the reply to the READ whose indirect table this is behind the header. How many bytes.
    fn read(&self, file: &File, table: &Descriptor) -> Result<u32> {
        let mut arguments = None;
        let mut pieces = Vec::with_capacity(table.length as usize / DESCRIPTOR);
        for number in 1..table.length as usize / DESCRIPTOR {
            let part: Descriptor = self.memory.get(usize::try_from(table.address)? + DESCRIPTOR * number);
            let address = usize::try_from(part.address)?;
            if part.is_written() {
                pieces.push((address, part.length as usize));
            } else {
                arguments = Some(self.memory.get::<ReadIn>(address));
            }
        }
        let offset = arguments.context("No READ")?.offset;
        // The first one is the header's own.
        Ok(u32::try_from(self.memory.preadv(file, offset, pieces.get(1..).unwrap_or_default())?)?)
    }
}

/// Reads the arguments of the request whose indirect table this is to where `key` is, and fills its reply behind the header. How many bytes.
fn fill(
    memory: &Memory,
    known: &Known,
    key: &mut [u8; KEY_MAX],
    table: &Descriptor,
    header: &InHeader,
) -> Result<u32> {
    key[..NODE].copy_from_slice(header.nodeid.as_bytes());
    let mut end = NODE;
    // What is still to be copied, once all arguments are there.
    let mut left: Option<&[u8]> = None;
    let mut filled = 0;
    for number in 1..table.length as usize / DESCRIPTOR {
        let at = usize::try_from(table.address)? + DESCRIPTOR * number;
        let part: Descriptor = memory.get(at);
        let (address, length) = (usize::try_from(part.address)?, part.length as usize);
        match &mut left {
            _ if !part.is_written() => {
                let place = key.get_mut(end..end + length).context("Arguments that are too long")?;
                memory.read(address, place);
                end += length;
            }
            // This one is the header's own.
            None => left = Some(known.answer(header, &key[..end]).context("Nothing is known about that")?),
            Some(left) => {
                let now;
                (now, *left) = left.split_at(length.min(left.len()));
                memory.write_many(address, now);
                filled += now.len();
            }
        }
    }
    Ok(u32::try_from(filled)?)
}

/// What the device looks at all the time, on lines of its own.
#[repr(align(128))]
struct Alone(AtomicBool);

/// A queue, and a device behind it.
pub struct Loopback<'a> {
    // Owns the events and the memory.
    _guest: Guest,
    queue: Queue,
    echo: Echo<'a>,
}

impl<'a> Loopback<'a> {
    /// For a guest with one request at a time, of up to 1 MiB of data.
    pub fn new(device: Device<'a>) -> Result<Self> {
        let shape = Shape { queues: 1, depth: 1, pages: 256 };
        let (guest, mut queues) = Guest::new(shape)?;
        let queue = queues.pop().context("no queue")?;
        let layout = shape.layout(1);
        let echo =
            Echo { memory: guest.memory(), layout, call: guest.call(1)?, next: 0, device, key: [0; KEY_MAX] };
        Ok(Self { _guest: guest, queue, echo })
    }

    /// Runs `work` on the queue. The device is awake meanwhile, and only then.
    pub fn run<T>(&mut self, work: impl FnOnce(&mut Queue) -> Result<T>) -> Result<T> {
        let Self { queue, echo, .. } = self;
        let done = Alone(AtomicBool::new(false));
        thread::scope(|scope| {
            let device = scope.spawn(|| -> Result<()> {
                if matches!(echo.device, Device::Knowing(_) | Device::Reading(_)) {
                    restrict_like_worker()?;
                }
                while !done.0.load(Ordering::Relaxed) {
                    echo.run()?;
                    std::hint::spin_loop();
                }
                Ok(())
            });
            let result = work(queue);
            done.0.store(true, Ordering::Relaxed);
            device.join().map_err(|_| anyhow!("The device panicked"))??;
            result
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::{queue::Wait, request::Request};
    use crate::tree::{HOT, Scale, Tree, check_content};
    use anyhow::ensure;
    use lair_virtiofs::fuse::{
        Opcode,
        wire::{AttrOut, EntryOut},
    };

    /// More than the indexes count to, so that they and the rings have wrapped.
    #[test]
    fn requests_go_round_and_round() {
        let requests = [Request::lookup(1, b"name"), Request::getattr(7), Request::read(7, 0, 0, 4096)];
        Loopback::new(Device::Empty)
            .unwrap()
            .run(|queue| {
                queue.set_wait(Wait::Polling);
                for number in 0..150_000 {
                    queue.exchange(&requests[number % requests.len()])?;
                }
                queue.set_wait(Wait::Sleeping);
                (0..1000).try_for_each(|_| queue.exchange(&requests[0]).map(drop))
            })
            .unwrap();
    }

    #[test]
    fn what_is_known_is_answered_whole() {
        let tree = Tree::new(Scale { store_paths: 3, large: 1 << 20 });
        let directory = tempfile::tempdir().unwrap();
        tree.write(directory.path()).unwrap();
        let mut known = Known::default();
        let entry = tree.entries.iter().find(|entry| entry.path == tree.hot).unwrap();
        let [hot, parent] = known.learn(entry).unwrap();
        assert_eq!(known.map(directory.path(), &tree.hot).unwrap(), hot);
        let (_, name) = entry.split().unwrap();
        Loopback::new(Device::Knowing(&known))
            .unwrap()
            .run(|queue| {
                for offset in [0_u32, 4096, 200 << 10] {
                    let request = Request::read(hot, 0, offset.into(), 40 << 10);
                    queue.spoil(0, &request);
                    let header = queue.exchange(&request)?;
                    let payload = queue.payload(0, &request, &header);
                    ensure!(payload.len() == 40 << 10);
                    check_content(&tree.hot, offset.into(), &payload)?;
                }
                let header = queue.exchange(&Request::lookup(parent, name.as_bytes()))?;
                ensure!(header.len as usize == size_of::<OutHeader>() + size_of::<EntryOut>());
                let entry: EntryOut = queue.body(0);
                ensure!((entry.nodeid, entry.attr.size) == (hot, HOT));
                let header = queue.exchange(&Request::getattr(hot))?;
                ensure!(header.len as usize == size_of::<OutHeader>() + size_of::<AttrOut>());
                ensure!(queue.body::<AttrOut>(0).attr == entry.attr);
                Ok(())
            })
            .unwrap();
        let missing = [parent.as_bytes(), b"missing\0"].concat();
        let header = InHeader { opcode: Opcode::Lookup as u32, nodeid: parent, ..InHeader::default() };
        assert!(known.answer(&header, &missing).is_none());
    }

    #[test]
    fn a_file_is_read_whole() {
        let tree = Tree::new(Scale { store_paths: 3, large: 1 << 20 });
        let directory = tempfile::tempdir().unwrap();
        tree.write(directory.path()).unwrap();
        let file = File::open(directory.path().join(&tree.hot)).unwrap();
        Loopback::new(Device::Reading(&file))
            .unwrap()
            .run(|queue| {
                for (offset, size) in [(0_u32, 40 << 10), (4096, 4096), (0, 1 << 20)] {
                    let request = Request::read(7, 0, offset.into(), size);
                    queue.spoil(0, &request);
                    let header = queue.exchange(&request)?;
                    let payload = queue.payload(0, &request, &header);
                    ensure!(payload.len() == size as usize);
                    check_content(&tree.hot, offset.into(), &payload)?;
                }
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn a_stale_reply_is_no_reply() {
        Loopback::new(Device::Empty)
            .unwrap()
            .run(|queue| {
                queue.exchange(&Request::getattr(1))?;
                let unique = queue.put(0, &Request::getattr(1));
                ensure!(queue.header(&Used { head: 0, length: 16 }, unique - 2).is_ok());
                ensure!(queue.header(&Used { head: 0, length: 16 }, unique).is_err());
                ensure!(queue.header(&Used { head: 0, length: 17 }, unique - 2).is_err());
                Ok(())
            })
            .unwrap();
    }
}
