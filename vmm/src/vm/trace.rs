//! The boot trace of a VM: what happened when, on the host and in the guest, on one time line.
//!
//! Each machine notes moments by its own CLOCK_BOOTTIME, which nobody can set: all processes of the host share one. The guest's
//! begins with its kernel; when that was on the host's clock follows from an answer of the agent that told both.
//!
//! What `laird` does itself is told apart from what it waits for: see [`Span`].

use super::part::{Part, Step};
use lair_guest::wire::message::Moment;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

/// Which machine saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `laird`, which starts all the others.
    Laird,
    /// The VM's shim, on the host.
    Host,
    /// The guest, in its own words.
    Guest,
}

/// One point of a boot trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// What happened.
    pub name: String,
    /// Who saw it.
    pub source: Source,
    /// Milliseconds since the first point of the host's.
    pub at_ms: u64,
    /// Of a step of `laird`'s that ends here: what it was made of. It began where the one before it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub span: Option<Span>,
}

/// What the time that a step took was made of, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// `laird` itself worked, or waited for a disk or a processor.
    pub worked_us: u64,
    /// `laird` waited for another program to end, to listen or to answer, or for the guest.
    pub waited_us: u64,
}

/// Microseconds of `laird`'s own work in a boot trace.
pub fn worked_us(points: &[Point]) -> u64 {
    points.iter().filter_map(|point| point.span).fold(0, |sum, span| sum.saturating_add(span.worked_us))
}

/// A moment of `laird`'s part of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What happened: a step's name as in JSON, `started-` and the word of a process, or `ready`.
    pub name: Cow<'static, str>,
    /// Milliseconds of the host's CLOCK_BOOTTIME.
    pub at_ms: u64,
    /// Of a step: what it was made of. None where the `laird` that began it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub span: Option<Span>,
}

/// `laird`'s part of a start, as it is written down: from the decision to start until the guest was seen to be ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Start(pub Vec<Mark>);

impl Start {
    fn mark(&mut self, name: &'static str, span: Option<Span>) {
        self.0.push(Mark { name: Cow::Borrowed(name), at_ms: now_ms(), span });
    }
}

/// The name of the first mark.
const START: &str = "start";
/// The name of the last mark.
const READY: &str = "ready";

/// Takes the time of a start.
#[derive(Debug, Clone, Default)]
pub struct Stopwatch {
    start: Arc<Start>,
    /// The span that is being measured: since when, and how much of it was waiting. None after adoption.
    span: Option<(Instant, Duration)>,
}

impl Stopwatch {
    /// Of a start that was decided on at `began`, a moment ago.
    pub fn start(began: Instant) -> Self {
        let ago = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mark = Mark { name: START.into(), at_ms: now_ms().saturating_sub(ago), span: None };
        Self { start: Arc::new(Start(vec![mark])), span: Some((began, Duration::ZERO)) }
    }

    /// Of a start that an earlier `laird` made.
    pub fn adopted(start: Start) -> Self {
        Self { start: Arc::new(start), span: None }
    }

    /// What has been noted.
    pub fn noted(&self) -> Arc<Start> {
        Arc::clone(&self.start)
    }

    /// `laird` has waited for somebody else.
    pub fn waited(&mut self, time: Duration) {
        if let Some((_, waited)) = &mut self.span {
            *waited = waited.saturating_add(time);
        }
    }

    /// All since the last step was waiting.
    pub fn only_waited(&mut self) {
        if let Some((began, waited)) = &mut self.span {
            *waited = began.elapsed();
        }
    }

    /// A process was started.
    pub fn process(&mut self, part: Part) {
        let name = match part {
            Part::Hypervisor => "started-hypervisor",
            Part::StoreBackend => "started-store",
            Part::VsockDevice => "started-vsock",
            Part::Shim => "started-shim",
        };
        self.mark(name, None);
    }

    /// A step is done, and the next one begins.
    pub fn step(&mut self, step: Step) {
        self.end(step.word());
    }

    /// The guest is ready, and that is about to be told. Once in a start: it may be so again after a reboot.
    pub fn ready(&mut self) {
        let open = !self.start.0.is_empty() && self.start.0.iter().all(|mark| mark.name != READY);
        if open {
            self.end(READY);
        }
    }

    fn mark(&mut self, name: &'static str, span: Option<Span>) {
        // Whoever has seen it has seen all until now.
        Arc::make_mut(&mut self.start).mark(name, span);
    }

    fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let span = self.span.map(|(began, waited)| {
            let worked = now.saturating_duration_since(began).saturating_sub(waited);
            Span { worked_us: us(worked), waited_us: us(waited) }
        });
        self.span = self.span.map(|_| (now, Duration::ZERO));
        self.mark(name, span);
    }
}

/// What is known of a boot, each machine's moments by its own clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// The host's, milliseconds of its CLOCK_BOOTTIME.
    pub host: Vec<Moment>,
    /// The guest's, milliseconds since its kernel's start.
    pub guest: Vec<Moment>,
    /// When the guest's kernel started by the host's clock, once that is known.
    pub guest_start_ms: Option<u64>,
}

impl Times {
    /// Adds a moment of the host.
    pub fn mark(&mut self, name: &str, at_ms: u64) {
        self.host.push(Moment { name: name.into(), at_ms });
    }

    /// Whether it is the first boot of this start. With a reboot everything begins anew, and the shim is there already.
    fn is_first(&self) -> bool {
        self.host.iter().any(|moment| moment.name == "shim")
    }
}

/// Puts everybody's moments on one time line that begins with the first of the host's: a guest has no say in where the others stand,
/// and what it puts before them stands at their beginning. Without the time of the guest's start its moments have no place and are left
/// out; of a later boot than the first, the start has none. Equal times keep the order of [`Source`].
pub fn merge(start: &Start, times: Option<&Times>) -> Vec<Point> {
    let marks = start.0.iter().filter(|_| times.is_none_or(Times::is_first)).map(|mark| Point {
        name: mark.name.clone().into_owned(),
        source: Source::Laird,
        at_ms: mark.at_ms,
        span: mark.span,
    });
    let point = |source, start: u64| {
        move |moment: &Moment| Point {
            name: moment.name.clone(),
            source,
            at_ms: start.saturating_add(moment.at_ms),
            span: None,
        }
    };
    let host = times.into_iter().flat_map(|times| times.host.iter().map(point(Source::Host, 0)));
    let guest = times.into_iter().filter_map(|times| Some((times.guest_start_ms?, &times.guest)));
    let guest = guest.flat_map(|(start, guest)| guest.iter().map(point(Source::Guest, start)));
    let mut points: Vec<_> = marks.chain(host).chain(guest).collect();
    let first = points.iter().filter(|point| point.source != Source::Guest).map(|point| point.at_ms).min();
    let Some(first) = first else { return Vec::new() };
    for point in &mut points {
        point.at_ms = point.at_ms.saturating_sub(first);
    }
    points.sort_by_key(|point| point.at_ms);
    points
}

/// The host's clock for moments: milliseconds since its kernel's start.
pub fn now_ms() -> u64 {
    // Linux has had this clock since 2.6.39, and no privilege is needed to read it.
    let since = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(of: &[(&str, u64)]) -> Vec<Moment> {
        of.iter().map(|(name, at_ms)| Moment { name: (*name).into(), at_ms: *at_ms }).collect()
    }

    fn told(points: &[Point]) -> Vec<(&str, Source, u64)> {
        points.iter().map(|point| (point.name.as_str(), point.source, point.at_ms)).collect()
    }

    fn times(host: &[(&str, u64)], guest: &[(&str, u64)], guest_start_ms: Option<u64>) -> Times {
        Times { host: moments(host), guest: moments(guest), guest_start_ms }
    }

    fn alone(times: &Times) -> Vec<Point> {
        merge(&Start::default(), Some(times))
    }

    fn mark(name: &'static str, at_ms: u64) -> Mark {
        Mark { name: name.into(), at_ms, span: None }
    }

    #[test]
    fn all_share_a_time_line() {
        let host = [("shim", 10_000), ("ready", 12_600), ("agent", 11_000)];
        let guest = [("kernel", 0), ("init", 300), ("ready", 2_100)];
        let span = Some(Span { worked_us: 1, waited_us: 2 });
        let start = Start(vec![
            mark("start", 9_900),
            Mark { span, ..mark("resume", 10_000) },
            Mark { span, ..mark("ready", 12_600) },
        ]);
        let points = merge(&start, Some(&times(&host, &guest, Some(10_400))));
        assert_eq!(
            told(&points),
            [
                ("start", Source::Laird, 0),
                ("resume", Source::Laird, 100),
                ("shim", Source::Host, 100),
                ("kernel", Source::Guest, 500),
                ("init", Source::Guest, 800),
                ("agent", Source::Host, 1_100),
                ("ready", Source::Guest, 2_600),
                ("ready", Source::Laird, 2_700),
                ("ready", Source::Host, 2_700),
            ]
        );
        assert_eq!(worked_us(&points), 2);
        // Before there is a shim.
        assert_eq!(merge(&start, None).len(), 3);
    }

    #[test]
    fn a_reboot_was_not_started_by_laird() {
        let start = Start(vec![mark("start", 1)]);
        let host = [("lost", 60), ("agent", 90)];
        let points = merge(&start, Some(&times(&host, &[("kernel", 0)], Some(70))));
        assert_eq!(
            told(&points),
            [("lost", Source::Host, 0), ("kernel", Source::Guest, 10), ("agent", Source::Host, 30)]
        );
    }

    #[test]
    fn without_the_guests_start_only_the_hosts_moments_have_a_place() {
        let (host, guest) = ([("shim", 7)], [("kernel", 0)]);
        assert_eq!(told(&alone(&times(&host, &guest, None))), [("shim", Source::Host, 0)]);
        // A guest whose hypervisor was started before this shim.
        let points = alone(&times(&host, &guest, Some(3)));
        assert_eq!(told(&points), [("shim", Source::Host, 0), ("kernel", Source::Guest, 0)]);
        assert!(alone(&times(&[], &[("kernel", 0)], Some(3))).is_empty());
        assert!(alone(&times(&[], &[], Some(3))).is_empty());
    }

    #[test]
    fn vs10_times_that_make_no_sense_are_only_the_guests_own() {
        let forged = times(&[("shim", 5), ("ready", 9)], &[("forged", u64::MAX)], Some(u64::MAX));
        let points = alone(&forged);
        assert_eq!(told(&points)[..2], [("shim", Source::Host, 0), ("ready", Source::Host, 4)]);
        assert_eq!(points.len(), 3);
        // Nor do those that come long before.
        let forged =
            times(&[("shim", 50_000), ("ready", 50_009)], &[("forged", 0), ("ready", 50_004)], Some(0));
        assert_eq!(
            told(&alone(&forged)),
            [
                ("shim", Source::Host, 0),
                ("forged", Source::Guest, 0),
                ("ready", Source::Guest, 4),
                ("ready", Source::Host, 9)
            ]
        );
    }

    #[test]
    fn a_step_has_one_name() {
        let mut step = Some(Step::FIRST);
        while let Some(at) = step {
            assert_eq!(serde_json::to_value(at).unwrap(), at.word());
            step = at.next();
        }
    }

    #[test]
    fn work_and_waiting_are_all_that_a_start_takes() {
        let began = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        let mut watch = Stopwatch::start(began);
        watch.process(Part::Shim);
        let noted = watch.noted();
        let [start, process] = noted.0.as_slice() else { panic!() };
        assert!(process.at_ms >= start.at_ms + 19, "{start:?} {process:?}");
        watch.waited(Duration::from_millis(5));
        watch.step(Step::StoreBackend);
        std::thread::sleep(Duration::from_millis(20));
        watch.only_waited();
        watch.ready();
        watch.ready();
        let took = began.elapsed();
        let noted = watch.noted();
        let names: Vec<_> = noted.0.iter().map(|mark| &*mark.name).collect();
        assert_eq!(names, ["start", "started-shim", "store_backend", "ready"]);
        let spans: Vec<_> = watch.noted().0.iter().filter_map(|mark| mark.span).collect();
        assert_eq!(spans[0].waited_us, 5_000);
        assert!(spans[0].worked_us >= 15_000 && spans[1].waited_us >= 20_000, "{spans:?}");
        // Each is cut to whole microseconds.
        let sum: u64 = spans.iter().map(|span| span.worked_us + span.waited_us).sum();
        assert!(u128::from(sum) <= took.as_micros(), "{spans:?}");
        assert!(sum >= 40_000 - 4);
    }

    #[test]
    fn a_later_laird_tells_what_it_knows() {
        let mut watch = Stopwatch::adopted(Start(vec![mark("start", 1), mark("resume", 2)]));
        watch.only_waited();
        watch.ready();
        let noted = watch.noted();
        let last = noted.0.last().unwrap();
        assert_eq!((&*last.name, last.span), ("ready", None));
        // Of one that an earlier release started nothing is known.
        let mut watch = Stopwatch::adopted(Start::default());
        watch.ready();
        assert!(watch.noted().0.is_empty());
    }
}
