#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lair_virtiofs::fuzzing::chain(input));
