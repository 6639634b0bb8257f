//! Steps with their times.

use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// Counts steps and takes their times.
#[derive(Debug)]
pub(crate) struct Steps {
    began: Instant,
    number: u32,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), number: 0 }
    }

    /// Does one step; prints what it is, then what it says, then how long it took.
    pub(crate) fn step<T>(&mut self, what: &str, work: impl FnOnce(&mut Say) -> Result<T>) -> Result<T> {
        crate::check_interrupt()?;
        self.number += 1;
        println!("{:>3}. {what}", self.number);
        let began = Instant::now();
        let mut say = Say;
        let outcome = work(&mut say).with_context(|| format!("Step {} ({what})", self.number))?;
        println!("      {:.1} s", began.elapsed().as_secs_f64());
        Ok(outcome)
    }

    /// How long everything took until now.
    pub(crate) fn total(&self) -> Duration {
        self.began.elapsed()
    }
}

/// What a step says while it is done.
#[derive(Debug)]
pub(crate) struct Say;

impl Say {
    /// Prints text below the step.
    pub(crate) fn lines(&mut self, text: &str) {
        for line in text.lines() {
            println!("      {line}");
        }
    }
}
