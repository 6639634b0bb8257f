//! `laird` is killed at every point that it reaches during an operation, and started again: the end is that of an undisturbed run, and
//! nothing is left over.

use crate::host::{Host, Traces, until};
use lair_vmm::{api::client::ClientError, vm::machine::Wanted};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A volume makes the step that formats it count.
const ASKED_FOR: &str = "autostart = false\nvolumes = [{ name = \"v\", size = \"16MiB\", mount = \"/v\" }]";
const BY_ITSELF: &str = "volumes = [{ name = \"v\", size = \"16MiB\", mount = \"/v\" }]";

/// One operation.
pub(crate) struct Operation {
    /// Brings the host where the operation begins; `laird` runs then.
    pub(crate) before: fn(&mut Host),
    /// The operation, as an operator asks for it.
    pub(crate) ask: fn(&mut Host) -> Result<(), ClientError>,
    /// The states in the end.
    pub(crate) after: &'static [(&'static str, &'static str)],
}

impl Operation {
    /// Performs it once; `laird` is killed at a point, and started again.
    fn run(&self, kill_at: Option<usize>, and: fn(&mut Host)) -> Run {
        let mut host = Host::new();
        (self.before)(&mut host);
        assert!(host.is_quiet());
        host.kill();
        host.checkpoints();
        // Adoption is a part of it.
        host.laird(kill_at);
        let taken = match (self.ask)(&mut host) {
            Ok(()) => true,
            Err(ClientError::Api(error)) => panic!("{error}"),
            // It ended before its answer.
            Err(_) => false,
        };
        let settled = taken && host.settled(self.after).is_some();
        // It may be killed while it writes down what can be seen already.
        let killed = !settled || !host.is_quiet();
        if killed {
            host.await_death();
            host.laird(None);
            // An operator who had no answer asks again. One who had one does not have to.
            if !taken {
                match (self.ask)(&mut host) {
                    Ok(()) | Err(ClientError::Api(_)) => {}
                    Err(error) => panic!("{error}\n{}", host.log()),
                }
            }
            host.settled(self.after).expect("laird does not end");
            assert!(host.is_quiet());
        }
        let points = host.checkpoints();
        and(&mut host);
        // All that runs is known.
        let vms = host.status().unwrap();
        let known: usize = vms.values().map(|vm| vm.processes.len()).sum();
        let traces = host.traces_at_rest();
        assert_eq!(traces.processes.len(), known, "{traces:?}");
        let vms = vms.into_values().map(|vm| {
            let links = vm.counters.into_iter().map(|counters| counters.link).collect();
            (vm.name, vm.state, vm.wanted, links)
        });
        let devices = host.devices();
        Run { end: End { traces, vms: vms.collect(), devices }, points, killed }
    }

    pub(crate) fn killed_at_every_step(&self) {
        self.killed_at_every_step_and(|_| {});
    }

    /// As well, what is asserted in the end of each run.
    pub(crate) fn killed_at_every_step_and(&self, and: fn(&mut Host)) {
        let Run { end: undisturbed, points, killed } = self.run(None, and);
        assert!(points.len() > 3 && !killed, "{points:?}");
        // Half of each run is waiting.
        let (next, missed) = (AtomicUsize::new(1), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Relaxed);
                        let Some(point) = points.get(at - 1) else { return };
                        let run = self.run(Some(at), and);
                        assert_eq!(run.end, undisturbed, "killed at point {at}: {point}");
                        if !run.killed {
                            // What follows in a row may be written down as one, so not every run has as many points.
                            assert!(
                                run.points.len() < at,
                                "it reached point {at} and lived: {:?}",
                                run.points
                            );
                            missed.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
        });
        let missed = missed.into_inner();
        assert!(
            missed <= points.len() / 2,
            "{missed} of {} points were not reached: {points:?}",
            points.len()
        );
    }
}

/// How a run went.
struct Run {
    end: End,
    /// The points that `laird` reached.
    points: Vec<String>,
    /// Whether it was killed.
    killed: bool,
}

/// What is there in the end.
#[derive(Debug, PartialEq)]
struct End {
    traces: Traces,
    /// Each VM: its state, what is wanted of it, and the links that its shim has.
    vms: Vec<(String, String, Wanted, Vec<String>)>,
    /// Each device of the kernel, and what `laird` has recorded of it.
    devices: Vec<String>,
}

fn ready(host: &mut Host) {
    host.fleet(&[("a", ASKED_FOR)]);
    host.laird(None);
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
}

#[test]
fn sv1_start() {
    let operation = Operation {
        before: |host| {
            host.fleet(&[("a", ASKED_FOR)]);
            host.laird(None);
            host.settled(&[("a", "stopped")]).unwrap();
        },
        ask: |host| host.start("a"),
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step();
}

#[test]
fn sv1_stop() {
    let operation = Operation { before: ready, ask: |host| host.stop("a"), after: &[("a", "stopped")] };
    operation.killed_at_every_step();
}

#[test]
fn sv1_apply_adds_and_removes() {
    let operation = Operation {
        before: |host| {
            host.fleet(&[("a", BY_ITSELF)]);
            host.laird(None);
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| {
            host.fleet(&[("b", BY_ITSELF)]);
            host.apply()
        },
        after: &[("b", "ready")],
    };
    operation.killed_at_every_step();
}

#[test]
fn sv1_apply_changes_the_links_of_a_vm_that_runs() {
    const LINKED: &str = "[links.cache]\nfrom = [\"a\"]\nto = { host = \"/run/cache.sock\" }";
    let operation = Operation {
        before: |host| {
            host.fleet(&[("a", BY_ITSELF)]);
            host.laird(None);
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| {
            let keys = format!("{BY_ITSELF}\n{LINKED}");
            host.fleet(&[("a", &keys)]);
            host.apply()
        },
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step_and(|host| {
        let has = |host: &mut Host| host.status().unwrap()["a"].counters.iter().any(|l| l.link == "cache");
        until(|| has(host).then_some(()));
    });
}

#[test]
fn sv1_remove() {
    let operation = Operation {
        before: ready,
        ask: |host| {
            host.fleet(&[]);
            host.apply()
        },
        after: &[],
    };
    operation.killed_at_every_step();
}

#[test]
fn sv1_restart() {
    let operation = Operation {
        before: ready,
        ask: |host| {
            // One that is on its way counts as taken: it is not restarted twice.
            let before = host.status()?["a"].clone();
            let runs = matches!(before.state.as_str(), "ready" | "booting");
            if runs && before.last_stop.is_none() { host.restart("a") } else { Ok(()) }
        },
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step_and(|host| {
        assert!(host.status().unwrap()["a"].last_stop.is_some(), "it was restarted");
    });
}
