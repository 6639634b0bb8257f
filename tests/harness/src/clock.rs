//! What it takes to measure.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// How often the clock is read to see what that takes.
const READS: u32 = 10_000;

/// What one look at the clock takes now, the mean of many: for an answer that comes after some hundred nanoseconds, a tenth of what is measured.
pub fn cost() -> Duration {
    let begin = Instant::now();
    for _ in 1..READS {
        black_box(Instant::now());
    }
    begin.elapsed() / READS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_takes_some_time_but_not_much() {
        let cost = cost();
        assert!(cost > Duration::ZERO && cost < Duration::from_micros(100), "{cost:?}");
    }
}
