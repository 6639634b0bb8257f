//! A device of no use: it answers each request at once, in a thread of this process. What a round trip to it takes is what
//! the frontend itself costs.

use super::{
    connection::Guest,
    event::Event,
    layout::{DESCRIPTOR, Layout, Shape},
    memory::Memory,
    queue::{Descriptor, Queue, Used, Wait},
    request::Request,
};
use anyhow::{Context, Result, anyhow};
use lair_virtiofs::fuse::wire::{InHeader, OutHeader};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
    thread,
    time::Instant,
};

struct Echo {
    memory: Arc<Memory>,
    layout: Layout,
    call: Arc<Event>,
    /// The next entry of both rings.
    next: u16,
}

impl Echo {
    /// Answers all that there is.
    fn run(&mut self) -> Result<()> {
        let available = self.memory.atomic(self.layout.available_index());
        let used = self.memory.atomic(self.layout.used_index());
        while available.load(Ordering::Acquire) != self.next {
            let head: u16 = self.memory.get(self.layout.available_entry(self.next));
            let table: Descriptor = self.memory.get(self.layout.table() + DESCRIPTOR * usize::from(head));
            let request: Descriptor = self.memory.get(usize::try_from(table.address)?);
            let header: InHeader = self.memory.get(usize::try_from(request.address)?);
            let length = size_of::<OutHeader>() as u32;
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

/// Runs `work` on a queue behind which there is an echo.
pub fn with_echo<T>(work: impl FnOnce(&mut Queue) -> Result<T>) -> Result<T> {
    let shape = Shape { queues: 1, depth: 1, pages: 1 };
    let (guest, mut queues) = Guest::new(shape)?;
    let queue = queues.first_mut().ok_or_else(|| anyhow!("no queue"))?;
    let mut echo = Echo { memory: guest.memory(), layout: shape.layout(1), call: guest.call(1)?, next: 0 };
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

/// What a round trip costs with nothing behind it: the median of this many, in nanoseconds. No backend can be faster.
pub fn own_cost(wait: Wait, count: usize) -> Result<u64> {
    with_echo(|queue| {
        queue.set_wait(wait);
        let request = Request::lookup(1, b"name");
        let mut times = Vec::with_capacity(count);
        let mut last = Instant::now();
        for _ in 0..count {
            queue.exchange(&request)?;
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

    /// More than the indexes count to, so that they and the rings have wrapped.
    #[test]
    fn requests_go_round_and_round() {
        let requests = [Request::lookup(1, b"name"), Request::getattr(7), Request::read(7, 0, 0, 4096)];
        with_echo(|queue| {
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
    fn a_stale_reply_is_no_reply() {
        with_echo(|queue| {
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
