//! Devices of no use, in a thread of this process, which show what no backend can be faster than.
//!
//! [`Device::Empty`] answers each request at once: what a round trip to it takes is what the frontend itself costs. [`Device::Canned`]
//! also reads the request and fills the whole reply from memory of its own: what is left without looking at what was asked.
//! [`Device::Late`] is an empty one that takes its time: so it is seen how long a frontend that goes to sleep is still awake.

use super::{
    connection::Guest,
    event::Event,
    layout::{DESCRIPTOR, Layout, PAGE, Shape},
    memory::Memory,
    queue::{Descriptor, Queue, Used, Wait},
    request::Request,
};
use anyhow::{Context, Result, anyhow};
use lair_virtiofs::fuse::{
    Opcode,
    wire::{InHeader, OutHeader, ReadIn},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};
use zerocopy::FromBytes;

/// What the device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Replies with a header.
    Empty,
    /// Reads all of a request, and replies with as much as there is room for, out of this many bytes of its own: a READ gets
    /// those at its offset.
    Canned(usize),
    /// Replies with a header, so much later.
    Late(Duration),
}

struct Echo {
    memory: Arc<Memory>,
    layout: Layout,
    call: Arc<Event>,
    /// The next entry of both rings.
    next: u16,
    /// Whence replies are filled.
    source: Option<Vec<u8>>,
    /// How long it waits before it replies.
    late: Duration,
    /// Where requests and the beginnings of replies are, which this frontend puts into the same place each time.
    places: [usize; 8],
}

impl Echo {
    /// Answers all that there is.
    fn run(&mut self) -> Result<()> {
        let available = self.memory.atomic(self.layout.available_index());
        let used = self.memory.atomic(self.layout.used_index());
        while available.load(Ordering::Acquire) != self.next {
            // All that is known beforehand, at once: otherwise each step of what follows would wait for the other processor.
            self.places.iter().for_each(|&place| self.memory.fetch(place));
            let head: u16 = self.memory.get(self.layout.available_entry(self.next));
            let table: Descriptor = self.memory.get(self.layout.table() + DESCRIPTOR * usize::from(head));
            let request: Descriptor = self.memory.get(usize::try_from(table.address)?);
            let header: InHeader = self.memory.get(usize::try_from(request.address)?);
            if !self.late.is_zero() {
                let begin = Instant::now();
                while begin.elapsed() < self.late {}
            }
            let body = match &self.source {
                Some(source) => self.fill(source, &table, &header)?,
                None => 0,
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

impl Echo {
    /// Reads the arguments of the request whose indirect table this is, and fills its reply behind the header. How many bytes.
    fn fill(&self, source: &[u8], table: &Descriptor, header: &InHeader) -> Result<u32> {
        let mut arguments = [0; PAGE];
        let mut offset = 0;
        let mut filled = 0;
        let mut seen = 0;
        for number in 1..table.length as usize / DESCRIPTOR {
            let at = usize::try_from(table.address)? + DESCRIPTOR * number;
            let part: Descriptor = self.memory.get(at);
            let (address, length) = (usize::try_from(part.address)?, part.length as usize);
            if !part.is_written() {
                let arguments = arguments.get_mut(..length).context("Arguments of more than a page")?;
                self.memory.read(address, arguments);
                if header.opcode == Opcode::Read as u32 {
                    offset =
                        usize::try_from(ReadIn::read_from_prefix(arguments).unwrap_or_default().0.offset)?;
                }
            } else if seen == 0 {
                // The header's own.
                seen = length;
            } else {
                let from = source.get(offset + filled..).and_then(|rest| rest.get(..length));
                self.memory.write(address, from.context("A read of more than the device has")?);
                filled += length;
            }
        }
        Ok(u32::try_from(filled)?)
    }
}

/// Runs `work` on a queue behind which there is an echo.
pub fn with_echo<T>(device: Device, work: impl FnOnce(&mut Queue) -> Result<T>) -> Result<T> {
    let shape = Shape { queues: 1, depth: 1, pages: 256 };
    let (guest, mut queues) = Guest::new(shape)?;
    let queue = queues.first_mut().ok_or_else(|| anyhow!("no queue"))?;
    let source = match device {
        Device::Empty | Device::Late(_) => None,
        // Written to, so that it has memory of its own.
        Device::Canned(length) => Some((0..length).map(|n| n as u8).collect()),
    };
    let late = if let Device::Late(late) = device { late } else { Duration::ZERO };
    let layout = shape.layout(1);
    let (indirect, body) = (layout.indirect(0), layout.body(0));
    let places = [
        layout.table(),
        indirect,
        indirect + 64,
        layout.request(0),
        layout.arguments(0),
        layout.reply(0),
        body,
        body + 64,
    ];
    let mut echo =
        Echo { memory: guest.memory(), layout, call: guest.call(1)?, next: 0, source, late, places };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let device = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                echo.run()?;
                std::hint::spin_loop();
            }
            Ok(())
        });
        let result = work(queue);
        done.store(true, Ordering::Relaxed);
        device.join().map_err(|_| anyhow!("The echo panicked"))??;
        result
    })
}

/// What a round trip of these requests, in turn, costs with such a device: the median of this many, in nanoseconds.
pub fn round_trip(device: Device, requests: &[Request], wait: Wait, count: usize) -> Result<u64> {
    with_echo(device, |queue| {
        queue.set_wait(wait);
        let mut times = Vec::with_capacity(count);
        let mut last = Instant::now();
        for request in requests.iter().cycle().take(count) {
            queue.exchange(request)?;
            let now = Instant::now();
            times.push((now - last).as_nanos() as u64);
            last = now;
        }
        times.sort_unstable();
        times.get(count / 2).copied().context("Nothing was measured")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::ensure;
    use lair_virtiofs::fuse::wire::EntryOut;

    /// More than the indexes count to, so that they and the rings have wrapped.
    #[test]
    fn requests_go_round_and_round() {
        let requests = [Request::lookup(1, b"name"), Request::getattr(7), Request::read(7, 0, 0, 4096)];
        with_echo(Device::Empty, |queue| {
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
    fn a_canned_reply_is_whole_and_from_its_offset() {
        with_echo(Device::Canned(256 << 10), |queue| {
            for offset in [0_u32, 4096, 200 << 10] {
                let request = Request::read(7, 0, offset.into(), 40 << 10);
                queue.spoil(0, &request);
                let header = queue.exchange(&request)?;
                let payload = queue.payload(0, &request, &header);
                ensure!(payload.len() == 40 << 10);
                ensure!((offset..).zip(&payload).all(|(at, byte)| at as u8 == *byte), "{offset}");
            }
            let header = queue.exchange(&Request::lookup(1, b"name"))?;
            ensure!(header.len as usize == size_of::<OutHeader>() + size_of::<EntryOut>());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_stale_reply_is_no_reply() {
        with_echo(Device::Empty, |queue| {
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
