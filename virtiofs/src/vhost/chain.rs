//! A descriptor chain as bytes to read and room to write, all of it checked.
//!
//! A chain is a guest's. Its walk is bounded by the library; an error in it looks like a shorter chain, which then disagrees with
//! the length in the request's header.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::ops::Deref;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor to read stands behind one to write.
    #[error("A descriptor to read stands behind one to write")]
    Order,
    /// The lengths add up to more than can be.
    #[error("The descriptors' lengths add up to more than 4 GiB")]
    TooLong,
    /// A descriptor is outside the guest's memory.
    #[error("A descriptor is outside the guest's memory")]
    Outside,
}

/// The buffers of a chain.
#[derive(Debug)]
pub struct Buffers {
    readable: Vec<(GuestAddress, u32)>,
    writable: Vec<(GuestAddress, u32)>,
    /// Bytes to read.
    pub length: u64,
    /// Room to write, in bytes.
    pub room: u64,
}

impl Buffers {
    /// Walks a chain.
    pub fn new<M>(chain: DescriptorChain<M>) -> Result<Self, ChainError>
    where
        M: Deref + Clone,
        M::Target: GuestMemory,
    {
        let mut buffers = Self { readable: vec![], writable: vec![], length: 0, room: 0 };
        for descriptor in chain {
            let buffer = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                buffers.writable.push(buffer);
                buffers.room = buffers.room.saturating_add(buffer.1.into());
            } else if buffers.writable.is_empty() {
                buffers.readable.push(buffer);
                buffers.length = buffers.length.saturating_add(buffer.1.into());
            } else {
                return Err(ChainError::Order);
            }
        }
        let most = buffers.length.max(buffers.room);
        if most > u64::from(u32::MAX) { Err(ChainError::TooLong) } else { Ok(buffers) }
    }

    /// Copies the beginning of what there is to read, at most `most` bytes. It is read once: what the guest changes later is not
    /// seen.
    pub fn read<M: GuestMemory>(&self, memory: &M, most: usize) -> Result<Vec<u8>, ChainError> {
        let wanted = usize::try_from(self.length).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; wanted];
        let mut rest = bytes.as_mut_slice();
        for (address, length) in &self.readable {
            let here = usize::try_from(*length).unwrap_or(usize::MAX).min(rest.len());
            let (part, others) = rest.split_at_mut(here);
            memory.read_slice(part, *address).map_err(|_| ChainError::Outside)?;
            rest = others;
        }
        Ok(bytes)
    }

    /// Writes `bytes` from place `skip` of the room on.
    pub fn write<M: GuestMemory>(&self, memory: &M, skip: usize, bytes: &[u8]) -> Result<(), ChainError> {
        let mut skip = skip;
        let mut rest = bytes;
        for (address, length) in &self.writable {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let from = skip.min(length);
            skip = skip.saturating_sub(length);
            let (part, others) = rest.split_at(rest.len().min(length.saturating_sub(from)));
            if !part.is_empty() {
                let offset = u64::try_from(from).map_err(|_| ChainError::TooLong)?;
                let at = address.0.checked_add(offset).ok_or(ChainError::Outside)?;
                memory.write_slice(part, GuestAddress(at)).map_err(|_| ChainError::Outside)?;
            }
            rest = others;
        }
        if rest.is_empty() { Ok(()) } else { Err(ChainError::TooLong) }
    }
}
