//! Where a request was, and so where the next one probably is.
//!
//! What the guest has just written is in the cache of its processor. A request is found in four steps, each of which needs what the one
//! before has read: ring, descriptor, indirect table, buffers; so each waits for the guest's processor by itself. But a guest that sends
//! one request after the other uses the same places again, since Linux takes what was freed last. So all of these are fetched
//! at once as soon as there is a request, and those for the reply as well. A wrong guess costs next to nothing: nothing is read or written here.

#![allow(unsafe_code)] // A hint to the processor.

use super::chain::Chain;
use vm_memory::VolatileSlice;

/// Bytes that are fetched together.
const LINE: usize = 64;

/// The most lines that are kept, of each kind: those of a LOOKUP or of the beginning of a READ.
const LINES: usize = 10;

/// The most lines of one buffer: processors find out by themselves how a long one goes on.
const OF_BUFFER: usize = 3;

/// Addresses, never looked behind.
#[derive(Debug, Default)]
struct Lines {
    addresses: [usize; LINES],
    count: usize,
}

/// The lines of the last request.
#[derive(Debug, Default)]
pub(super) struct Trail {
    read: Lines,
    written: Lines,
}

impl Lines {
    fn add(&mut self, slice: &VolatileSlice<'_>) {
        let begin = slice.ptr_guard().as_ptr().addr();
        let lines = slice.len().div_ceil(LINE).min(OF_BUFFER);
        for line in 0..lines {
            let Some(address) = self.addresses.get_mut(self.count) else { return };
            *address = begin.wrapping_add(line.wrapping_mul(LINE));
            self.count = self.count.wrapping_add(1);
        }
    }

    fn each(&self) -> impl Iterator<Item = usize> {
        self.addresses.iter().copied().take(self.count)
    }
}

impl Trail {
    /// Keeps where a request was, whose descriptor was here.
    pub(super) fn keep(&mut self, descriptor: Option<VolatileSlice<'_>>, chain: &Chain<'_>) {
        (self.read.count, self.written.count) = (0, 0);
        descriptor.iter().for_each(|part| self.read.add(part));
        chain.indirect.iter().chain(&chain.readable).for_each(|part| self.read.add(part));
        chain.writable.iter().for_each(|part| self.written.add(part));
    }

    /// Fetches what was used then.
    pub(super) fn fetch(&self) {
        self.read.each().for_each(fetch::<false>);
        self.written.each().for_each(fetch::<true>);
    }
}

/// Has the processor fetch a line, to read or to write it. The address need not be one of anything by now.
#[cfg(target_arch = "x86_64")]
pub fn fetch<const WRITE: bool>(address: usize) {
    use std::arch::{
        asm,
        x86_64::{_MM_HINT_T0, _mm_prefetch},
    };
    let pointer = std::ptr::without_provenance::<i8>(address);
    // SAFETY: It is a hint: it reads and writes nothing that the program could see, and faults at no address. Processors of this architecture
    // that do not know the one for writing ignore it; the compiler's own name for it does without where it is not sure of that.
    unsafe {
        if WRITE {
            asm!("prefetchw [{}]", in(reg) pointer, options(nostack, preserves_flags, readonly));
        } else {
            _mm_prefetch::<_MM_HINT_T0>(pointer);
        }
    }
}

/// Does nothing: how it is done is not known for this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn fetch<const WRITE: bool>(_address: usize) {}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_of_each_part_are_kept_and_no_more() {
        let mut trail = Trail::default();
        {
            let mut bytes = vec![0u8; 8192];
            let begin = bytes.as_ptr().addr();
            let whole = VolatileSlice::from(bytes.as_mut_slice());
            let part = |at, length| whole.subslice(at, length).unwrap();
            let mut chain = Chain::default();
            chain.indirect = Some(part(64, 80));
            chain.readable.push(part(256, 40));
            chain.writable.extend([part(512, 16), part(1024, 4096)]);
            for _ in 0..2 {
                trail.keep(Some(part(0, 16)), &chain);
            }
            let read: Vec<_> = trail.read.each().map(|address| address - begin).collect();
            let written: Vec<_> = trail.written.each().map(|address| address - begin).collect();
            assert_eq!((read, written), (vec![0, 64, 128, 256], vec![512, 1024, 1088, 1152]));
            chain.writable.extend((0..20).map(|_| part(0, 64)));
            trail.keep(None, &chain);
            assert_eq!((trail.read.count, trail.written.count), (3, LINES));
            trail.fetch();
        }
        // What is gone is fetched in vain.
        trail.fetch();
    }
}
