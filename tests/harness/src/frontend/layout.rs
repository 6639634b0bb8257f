//! Where things are in a guest's memory: for each queue its rings, then a slot for each request that may be in flight.

/// Descriptors in each queue: the most that QEMU allows, and the default of Cloud Hypervisor.
pub const QUEUE_SIZE: u16 = 1024;

/// A page of the guest.
pub const PAGE: usize = 4096;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;

const RINGS: usize = 8 * PAGE;
const TABLE: usize = 0;
const AVAILABLE: usize = 4 * PAGE;
const USED: usize = 5 * PAGE;

/// What the queues of a guest are to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Request queues; the high-priority queue comes on top of them.
    pub queues: usize,
    /// Requests that may be in flight in each.
    pub depth: u16,
    /// Pages of data in the reply to a request, a power of two.
    pub pages: usize,
}

/// Where a queue is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    base: usize,
    shape: Shape,
}

impl Shape {
    fn slot(self) -> usize {
        // Request, reply, indirect table, data.
        (2 + (4 + self.pages) * DESCRIPTOR / PAGE + 1 + self.pages) * PAGE
    }

    fn queue(self) -> usize {
        RINGS + usize::from(self.depth) * self.slot()
    }

    /// Bytes of memory for all of it.
    pub(super) fn memory(self) -> usize {
        (self.queues + 1) * self.queue()
    }

    pub(super) fn layout(self, queue: usize) -> Layout {
        Layout { base: queue * self.queue(), shape: self }
    }
}

impl Layout {
    /// The descriptor table.
    pub(super) fn table(self) -> usize {
        self.base + TABLE
    }

    pub(super) fn available(self) -> usize {
        self.base + AVAILABLE
    }

    pub(super) fn available_index(self) -> usize {
        self.available() + 2
    }

    pub(super) fn available_entry(self, index: u16) -> usize {
        self.available() + 4 + 2 * usize::from(index % QUEUE_SIZE)
    }

    /// Where the driver says after which entry it wants an interrupt.
    pub(super) fn used_event(self) -> usize {
        self.available() + 4 + 2 * usize::from(QUEUE_SIZE)
    }

    pub(super) fn used(self) -> usize {
        self.base + USED
    }

    pub(super) fn used_index(self) -> usize {
        self.used() + 2
    }

    pub(super) fn used_entry(self, index: u16) -> usize {
        self.used() + 4 + 8 * usize::from(index % QUEUE_SIZE)
    }

    /// Where the device says after which entry it wants a kick.
    pub(super) fn available_event(self) -> usize {
        self.used() + 4 + 8 * usize::from(QUEUE_SIZE)
    }

    /// A slot's request: the header, and on another cache line the arguments.
    pub(super) fn request(self, slot: u16) -> usize {
        assert!(slot < self.shape.depth, "no such slot");
        self.base + RINGS + usize::from(slot) * self.shape.slot()
    }

    pub(super) fn arguments(self, slot: u16) -> usize {
        self.request(slot) + 64
    }

    /// A slot's reply: the header, and on another cache line the body.
    pub(super) fn reply(self, slot: u16) -> usize {
        self.request(slot) + PAGE
    }

    pub(super) fn body(self, slot: u16) -> usize {
        self.reply(slot) + 64
    }

    pub(super) fn indirect(self, slot: u16) -> usize {
        self.request(slot) + 2 * PAGE
    }

    /// The lines that a slot's request is written to: of the descriptors, as many as a READ of a page has.
    pub(super) fn request_lines(self, slot: u16) -> [usize; 5] {
        let table = self.indirect(slot);
        [
            self.request(slot),
            self.arguments(slot),
            table,
            table + 64,
            self.table() + DESCRIPTOR * usize::from(slot),
        ]
    }

    /// Those that its reply is written to: a header, and a body of up to two.
    pub(super) fn reply_lines(self, slot: u16) -> [usize; 3] {
        [self.reply(slot), self.body(slot), self.body(slot) + 64]
    }

    /// A page of a slot's data. No page is behind the one before it, as in a guest that has run for a while: nothing is
    /// gained by joining neighbours.
    pub(super) fn page(self, slot: u16, page: usize) -> usize {
        let count = self.shape.pages;
        let scattered = if count < 4 { page } else { page * (count / 2 + 1) % count };
        self.data(slot) + scattered * PAGE
    }

    /// All pages of a slot's data, in the order of their addresses.
    pub(super) fn data(self, slot: u16) -> usize {
        self.request(slot) + self.shape.slot() - self.shape.pages * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn nothing_overlaps() {
        for shape in [
            Shape { queues: 1, depth: 1, pages: 1 },
            Shape { queues: 4, depth: 32, pages: 16 },
            Shape { queues: 2, depth: 3, pages: 256 },
        ] {
            let mut seen = BTreeSet::new();
            let mut claim = |at: usize, length: usize| {
                for page in at / PAGE..(at + length).div_ceil(PAGE) {
                    assert!(seen.insert(page), "{shape:?}: page {page}");
                }
            };
            for queue in 0..=shape.queues {
                let layout = shape.layout(queue);
                claim(layout.table(), DESCRIPTOR * usize::from(QUEUE_SIZE));
                claim(layout.available(), layout.used_event() + 2 - layout.available());
                claim(layout.used(), layout.available_event() + 2 - layout.used());
                for slot in 0..shape.depth {
                    claim(layout.request(slot), PAGE);
                    claim(layout.reply(slot), PAGE);
                    claim(layout.indirect(slot), DESCRIPTOR * (4 + shape.pages));
                    (0..shape.pages).for_each(|page| claim(layout.page(slot, page), PAGE));
                }
            }
            assert!(seen.last().unwrap() * PAGE < shape.memory());
        }
    }

    #[test]
    fn pages_of_data_are_no_neighbours() {
        let layout = Shape { queues: 1, depth: 1, pages: 256 }.layout(1);
        assert!((1..256).all(|page| layout.page(0, page).abs_diff(layout.page(0, page - 1)) > PAGE));
    }
}
