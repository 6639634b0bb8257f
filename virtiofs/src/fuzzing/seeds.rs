//! Inputs to begin with, each of which does something of note. `tests/corpus.rs` writes them to `fuzz/seeds`.

mod chain;
mod fuse;
mod index;
mod session;

use crate::fuse::{
    Opcode,
    wire::{InHeader, InitIn, ReadIn},
};
use zerocopy::IntoBytes;

/// A name and an input.
pub type Seed = (&'static str, Vec<u8>);

/// The seeds of each fuzzer.
pub fn all() -> [(&'static str, Vec<Seed>); 4] {
    [
        ("chain", chain::seeds()),
        ("fuse", fuse::seeds()),
        ("index", index::seeds()),
        ("session", session::seeds()),
    ]
}

/// A request with this unique.
fn request(unique: u64, opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode, unique, nodeid, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

/// INIT as a guest of this version sends it that offers these features.
fn init(major: u32, minor: u32, flags: u32) -> Vec<u8> {
    let init = InitIn { major, minor, max_readahead: 131_072, flags, flags2: u32::MAX, ..InitIn::default() };
    request(2, Opcode::Init as u32, 0, init.as_bytes())
}

fn getattr(node: u64) -> Vec<u8> {
    request(4, Opcode::Getattr as u32, node, &[0; 16])
}

/// READ, READDIR or READDIRPLUS.
fn read(opcode: Opcode, node: u64, offset: u64, size: u32) -> Vec<u8> {
    let read = ReadIn { offset, size, ..ReadIn::default() };
    request(6, opcode as u32, node, read.as_bytes())
}
