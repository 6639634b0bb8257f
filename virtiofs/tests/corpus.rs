//! Replays what fuzzers begin with and what they found, on any compiler: `cargo test -p lair-virtiofs --features fuzzing`.
//!
//! With `LAIR_WRITE_SEEDS=1` it writes `fuzz/seeds` anew.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)] // Clippy takes only `#[test]` functions for tests.

use lair_virtiofs::fuzzing::{chain, fuse, index, requests_served, seeds, session};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// How long one input may take. A bound against hanging, not a promise.
const PATIENCE: Duration = Duration::from_secs(60);

/// A panic in any thread is the end, also where nobody waits for the thread. One test at a time, as they count descriptors.
fn prepare() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::abort();
    }));
    lock
}

fn directory(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind).join(target)
}

/// The inputs in a directory, with their names.
fn inputs(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(files) = fs::read_dir(directory) else { return Vec::new() };
    let mut inputs: Vec<_> = files
        .map(|file| file.unwrap())
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

/// Runs one input, and gives up if it hangs.
fn run(target: fn(&[u8]), name: &str, input: &[u8]) {
    println!("{name}");
    let (sender, receiver) = mpsc::channel();
    let input = input.to_vec();
    let thread = thread::spawn(move || {
        target(&input);
        let _ = sender.send(());
    });
    assert!(receiver.recv_timeout(PATIENCE).is_ok(), "{name} hangs");
    thread.join().unwrap();
}

/// Changes an input a little, in a way that depends on `random` alone.
fn change(input: &[u8], random: &mut u64) -> Vec<u8> {
    let mut next = |below: usize| {
        // xorshift64
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        usize::try_from(*random % below.max(1) as u64).unwrap()
    };
    let mut bytes = input.to_vec();
    for _ in 0..=next(4) {
        let at = next(bytes.len());
        match next(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at.min(bytes.len()), next(256) as u8),
            2 => {
                let count = next(16).min(bytes.len() - at);
                bytes.drain(at..at + count);
            }
            3 => {
                let again = bytes[at..].to_vec();
                bytes.extend(again.into_iter().take(next(200)));
            }
            kind => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = if kind == 4 { *byte ^ 1 << next(8) } else { [0, 1, 0x7f, 0x80, 0xff][next(5)] };
                }
            }
        }
    }
    bytes
}

/// Runs all there is for a fuzzer, and each seed with so many changes at random.
fn replay(name: &str, target: fn(&[u8]), changes: usize) {
    let _lock = prepare();
    let seeds = inputs(&directory("seeds", name));
    assert!(!seeds.is_empty(), "no seeds for {name}");
    for (file, input) in seeds.iter().chain(&inputs(&directory("regressions", name))) {
        run(target, &format!("{name}/{file}"), input);
    }
    let mut random = 0x9e37_79b9_7f4a_7c15;
    for (file, input) in &seeds {
        for number in 0..changes {
            run(target, &format!("{name}/{file}, change {number}"), &change(input, &mut random));
        }
    }
}

#[test]
fn fuse_inputs() {
    replay("fuse", fuse, 300);
}

#[test]
fn chain_inputs() {
    replay("chain", chain, 100);
}

#[test]
fn session_inputs() {
    replay("session", session, 4);
    let served = requests_served();
    assert!(served > 40, "{served} requests: hardly any session got as far as one");
}

#[test]
fn index_inputs() {
    replay("index", index, 100);
}

/// The seeds are what `lair_virtiofs::fuzzing::seeds` makes, so that they follow the formats.
#[test]
fn seeds_are_up_to_date() {
    let _lock = prepare();
    let mut bytes = 0;
    for (target, seeds) in seeds::all() {
        let directory = directory("seeds", target);
        let mut made: Vec<_> = seeds.into_iter().map(|(name, input)| (name.to_owned(), input)).collect();
        made.sort();
        bytes += made.iter().map(|(_, input)| input.len()).sum::<usize>();
        if std::env::var_os("LAIR_WRITE_SEEDS").is_some() {
            let _ = fs::remove_dir_all(&directory);
            fs::create_dir_all(&directory).unwrap();
            made.iter().for_each(|(name, input)| fs::write(directory.join(name), input).unwrap());
        }
        let names =
            |inputs: &[(String, Vec<u8>)]| inputs.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let there = inputs(&directory);
        assert_eq!(names(&there), names(&made), "of {target}; LAIR_WRITE_SEEDS=1 writes them anew");
        for ((name, there), (_, made)) in there.iter().zip(&made) {
            assert!(
                there == made,
                "{target}/{name} is out of date; LAIR_WRITE_SEEDS=1 writes the seeds anew"
            );
        }
    }
    assert!(bytes < 200 << 10, "{bytes} bytes of seeds");
}
