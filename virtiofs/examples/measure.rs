//! Measures indexing, starting with an index, and single requests, in this process and without a virtqueue:
//! `cargo run --profile lto -p lair-virtiofs --example measure -- STORE INDEX`, where STORE is a directory of store paths and INDEX
//! is where to make the index. One store path of 10,000 entries is needed for the lookups in a large directory.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use lair_virtiofs::{
    files::Files,
    fuse::{
        Opcode, Outcome, Request, Server, Session,
        wire::{InHeader, InitIn, ReadIn},
    },
    index::{Index, NodeId, Origin, Tree, update},
    stats::Requests,
    store::StorePath,
    view::View,
};
use std::{
    env, fs,
    hint::black_box,
    num::NonZero,
    path::PathBuf,
    time::{Duration, Instant},
};
use zerocopy::IntoBytes;

/// Room for a reply.
const ROOM: usize = 1 << 20;

/// A READDIRPLUS as Linux sends it, more or less.
const LISTING: u32 = 32 << 10;

fn main() {
    let args: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [store, index] = args.as_slice() else {
        eprintln!("STORE and INDEX are needed");
        return;
    };
    let names = fs::read_dir(store).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let paths = names.filter_map(|name| StorePath::from_base_name(&name).ok());
    let view = View::new(paths).unwrap();
    let files = Files::open_stores(&[store]).unwrap();

    let begin = Instant::now();
    let jobs = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    let made = update(index, files.stores(), view.paths(), jobs, |_, _| ()).unwrap();
    let per_inode = made.bytes as f64 / made.inodes as f64;
    println!("{} store paths, {} inodes, {per_inode:.1} bytes each", made.paths, made.inodes);
    let fresh = if made.present == 0 { "" } else { ", most of it was there" };
    println!("index: {:?} with {jobs} jobs{fresh}", begin.elapsed());
    let begin = Instant::now();
    update(index, files.stores(), view.paths(), jobs, |_, _| ()).unwrap();
    println!("index again: {:?}", begin.elapsed());

    let mut index_open = None;
    let mut load = |indexed: bool| {
        let begin = Instant::now();
        let index = indexed.then(|| Index::open(index).unwrap());
        let origin = Origin { stores: files.stores(), index: index.as_ref() };
        let (tree, added) = Tree::load(origin, &view).unwrap();
        assert_eq!(added.unindexed.count(), 0);
        let time = begin.elapsed();
        index_open = index;
        (tree, time)
    };
    let mut times: Vec<Duration> = (0..21).map(|_| load(true).1).collect();
    times.sort();
    println!("start with the index: {:?} (first {:?})", times[10], load(true).1);
    println!("start without: {:?}", load(false).1);
    let server = Server::new(load(true).0);
    let bench = Bench::new(&server);

    let tree = server.tree();
    let roots: Vec<_> = view
        .paths()
        .iter()
        .map(|path| request(Opcode::Lookup, 1, &c_name(path.base_name().as_bytes())))
        .collect();
    bench.run("LOOKUP in the root", &roots);
    // All names below, in the order of a walk, and the largest directory by itself.
    let (mut below, mut large, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
    for entry in tree.entries() {
        for number in 0..entry.manifest.len() {
            let Some(inode) = entry.manifest.inode(number) else { continue };
            let id = NodeId::Inode { slot: entry.slot, number }.to_wire();
            nodes.push(request(Opcode::Getattr, id, &[0; 16]));
            let Some((_, children)) = entry.manifest.children(inode) else { continue };
            let lookups =
                children.iter().map(|child| request(Opcode::Lookup, id, &c_name(entry.manifest.name(child))));
            if children.len() >= 10_000 { large.extend(lookups) } else { below.extend(lookups) }
        }
    }
    bench.run("LOOKUP of each name, in order", &below);
    shuffle(&mut below);
    bench.run("LOOKUP of each name, at random", &below);
    below.truncate(1000);
    bench.run("LOOKUP of 1000 names", &below);
    bench.run("LOOKUP in a directory of 10,000, in order", &large);
    shuffle(&mut large);
    bench.run("LOOKUP in a directory of 10,000, at random", &large);
    shuffle(&mut nodes);
    bench.run("GETATTR of each inode, at random", &nodes);
    nodes.truncate(1000);
    bench.run("GETATTR of 1000 inodes", &nodes);
    let missing: Vec<_> = (0..1000)
        .map(|n| request(Opcode::Lookup, 1, &c_name(format!("{n:032}-missing").as_bytes())))
        .collect();
    bench.run("LOOKUP of missing store paths", &missing);
    let list = ReadIn { size: LISTING, ..ReadIn::default() };
    bench.run("READDIRPLUS of 32 KiB of the root", &[request(Opcode::Readdirplus, 1, list.as_bytes())]);
    let list = ReadIn { size: LISTING, offset: view.paths().len() as u64 / 2, ..ReadIn::default() };
    bench.run("the same from its middle", &[request(Opcode::Readdirplus, 1, list.as_bytes())]);
}

struct Bench<'a> {
    server: &'a Server,
    session: Session,
    stats: Requests,
}

impl<'a> Bench<'a> {
    fn new(server: &'a Server) -> Self {
        let bench = Self { server, session: Session::new(), stats: Requests::default() };
        let init = InitIn { major: 7, minor: 41, flags: u32::MAX, ..InitIn::default() };
        bench.handle(&request(Opcode::Init, 0, init.as_bytes()), &mut Vec::new());
        bench
    }

    fn handle(&self, bytes: &[u8], reply: &mut Vec<u8>) {
        let request = Request { bytes, total: bytes.len() as u64 };
        let outcome =
            self.server.handle(&self.server.tree(), &self.session, &self.stats, request, ROOM, reply);
        assert!(matches!(outcome, Outcome::Reply));
        black_box(&reply);
    }

    /// The fastest of several rounds over all requests.
    fn run(&self, what: &str, requests: &[Vec<u8>]) {
        if requests.is_empty() {
            println!("{what}: nothing to measure");
            return;
        }
        let mut reply = Vec::new();
        let rounds = (1_000_000 / requests.len()).clamp(5, 200);
        let round = |reply: &mut Vec<u8>| {
            let begin = Instant::now();
            requests.iter().for_each(|request| self.handle(request, reply));
            begin.elapsed()
        };
        let best = (0..rounds).map(|_| round(&mut reply)).min().unwrap_or_default();
        println!("{what}: {:.0} ns", best.as_nanos() as f64 / requests.len() as f64);
    }
}

fn request(opcode: Opcode, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode: opcode as u32, unique: 2, nodeid: node, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

fn c_name(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

/// Always in the same way.
fn shuffle<T>(all: &mut [T]) {
    let mut state = 1u64;
    for at in (1..all.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        all.swap(at, (state >> 33) as usize % (at + 1));
    }
}
