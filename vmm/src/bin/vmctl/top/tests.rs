//! Rates, rows and what is drawn of them.

use super::{
    rows::{Sort, rows},
    sample::{Sample, Vm},
    view::{View, short, short_bytes},
};
use crate::terminal::on_a_terminal::restored_after;
use lair_vmm::{
    api::types::{HostStatus, VmStatus},
    fleet::{limits::HostFacts, units::Size},
};
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

/// A VM as the API tells it.
pub(super) fn vm_status(name: &str, state: &str) -> VmStatus {
    serde_json::from_value(serde_json::json!({
        "name": name, "role": "plain", "state": state, "detail": null, "since": "2026-01-01T00:00:00Z", "wanted": "running",
        "failure": null, "restarts": 0, "reboots": 0, "last_stop": null, "adoption": null, "vcpus": 2, "memory": "1GiB", "view": null,
        "boot_ms": null, "pending_restart": false, "processes": {}, "links": [], "counters": []
    }))
    .unwrap()
}

pub(super) fn host_status(vms: Vec<VmStatus>) -> HostStatus {
    let mut host: HostStatus = serde_json::from_value(serde_json::json!({
        "version": "0.0.0", "fleet_file": "/f", "applied": null, "engine": "kvm", "root": true, "users": "own", "limits": "cgroup",
        "vms": []
    }))
    .unwrap();
    host.vms = vms;
    host
}

const NOON: &str = "2026-01-01T12:00:00Z";

fn vm(name: &str, state: &str, since: &str, detail: Option<&str>) -> Vm {
    let (name, state, since) = (name.into(), state.into(), since.parse().unwrap());
    Vm { name, state, since, detail: detail.map(Into::into), memory: 2 << 30 }
}

/// Three VMs, `at` seconds after the start, with counters of `times` their usual growth in a second.
fn sample(at: f64, times: f64) -> Sample {
    let key = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    let link = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    Sample {
        at,
        time: NOON.parse().unwrap(),
        version: "1.2.3".into(),
        host: Some(HostFacts { cpus: 16, memory: Size(64 << 30) }),
        vms: vec![
            vm("hydra", "ready", "2026-01-01T08:47:00Z", None),
            vm("cuda-ada", "booting", "2026-01-01T11:59:48Z", None),
            vm(
                "cpu-builder-with-a-long-name-of-41-chars",
                "failed",
                "2025-12-30T12:00:00Z",
                Some("guest-panic: no init"),
            ),
        ],
        cpu: [
            (key("hydra", "hypervisor"), 1.5 * times),
            (key("hydra", "shim"), 0.25 * times),
            (key("cuda-ada", "hypervisor"), 12.0 * times),
            (key("", "laird"), 0.01 * times),
        ]
        .into(),
        resident: [("hydra".into(), 1_400_000_000.0), ("cuda-ada".into(), 52_428_800.0)].into(),
        store: [("hydra".into(), 12_345.0 * times), ("cuda-ada".into(), 7.0 * times)].into(),
        links: [
            (link("queue", "cuda-ada", "hydra"), (1_048_576.0 * times, 2_048.0 * times)),
            (link("web", "host", "hydra"), (100.0 * times, 900.0 * times)),
        ]
        .into(),
    }
}

#[test]
fn rates_are_of_the_time_that_passed_and_links_count_for_both_ends() {
    let (rows, totals) = rows(Some(&sample(10.0, 1.0)), &sample(12.0, 3.0), Sort::Name);
    let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["cpu-builder-with-a-long-name-of-41-chars", "cuda-ada", "hydra"]);
    let hydra = &rows[2];
    assert_eq!(hydra.cpu_percent, Some(175.0));
    assert_eq!(hydra.store_requests_per_second, Some(12_345.0));
    assert_eq!(hydra.received_bytes_per_second, Some(1_048_576.0 + 100.0));
    assert_eq!(hydra.sent_bytes_per_second, Some(2_048.0 + 900.0));
    assert_eq!(rows[1].sent_bytes_per_second, Some(1_048_576.0));
    assert_eq!(rows[0].cpu_percent, None);
    assert_eq!(totals.cpu_percent, Some(175.0 + 1200.0 + 1.0));
    assert_eq!(totals.memory_used_bytes, 1_452_428_800.0);
}

#[test]
fn rates_of_a_process_that_began_again_are_not_negative() {
    let (before, now) = (sample(10.0, 100.0), sample(11.0, 1.0));
    let (rows, _) = rows(Some(&before), &now, Sort::Name);
    assert_eq!(rows[2].cpu_percent, Some(175.0));
    assert_eq!(rows[2].store_requests_per_second, Some(12_345.0));
    assert_eq!(rows[1].sent_bytes_per_second, Some(1_048_576.0));
}

#[test]
fn what_was_not_there_before_has_no_rate_yet() {
    let now = sample(11.0, 1.0);
    let unknown = |before: Option<&Sample>| {
        let (rows, totals) = rows(before, &now, Sort::Name);
        assert!(
            rows.iter().all(|row| row.cpu_percent.is_none() && row.sent_bytes_per_second.is_none()),
            "{rows:?}"
        );
        assert_eq!(totals.cpu_percent, None);
        assert_eq!(rows[2].memory_used_bytes, Some(1_400_000_000.0));
    };
    unknown(None);
    unknown(Some(&Sample::default()));
    // No time has passed.
    unknown(Some(&now));
}

#[test]
fn rows_are_sorted_by_each_key() {
    let order = |sort| {
        let (rows, _) = rows(Some(&sample(10.0, 1.0)), &sample(11.0, 2.0), sort);
        rows.iter().map(|row| row.name.chars().take(3).collect::<String>()).collect::<Vec<_>>().join(" ")
    };
    let orders: Vec<_> = Sort::ALL.into_iter().map(|sort| format!("{sort:?}: {}", order(sort))).collect();
    insta::assert_snapshot!(orders.join("\n"), @r"
    Name: cpu cud hyd
    State: cud cpu hyd
    Cpu: cud hyd cpu
    Memory: hyd cud cpu
    Store: hyd cud cpu
    Received: hyd cud cpu
    Sent: cud hyd cpu
    Since: cpu hyd cud
    ");
    let all: Vec<_> = std::iter::successors(Some(Sort::Name), |sort| Some(sort.next())).take(9).collect();
    assert_eq!(all[..8], Sort::ALL);
    assert_eq!(all[8], Sort::Name);
}

fn view() -> View {
    let mut view = View::new(sample(10.0, 1.0), false);
    view.take(Ok(sample(11.0, 2.0)));
    view
}

fn press(view: &mut View, codes: &[KeyCode]) {
    for code in codes {
        assert!(!view.key(KeyEvent::new(*code, KeyModifiers::NONE)));
    }
}

fn drawn(view: &mut View, columns: u16, lines: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal.draw(|frame| view.draw(frame)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn a_screen_of_80_columns() {
    insta::assert_snapshot!(drawn(&mut view(), 80, 24));
}

#[test]
fn a_screen_of_120_columns_with_a_selection() {
    let mut view = view();
    press(&mut view, &[KeyCode::Char('s'), KeyCode::Down, KeyCode::Down]);
    insta::assert_snapshot!(drawn(&mut view, 120, 40));
}

#[test]
fn the_first_reading_has_no_rates_and_a_laird_that_is_gone_is_told() {
    let mut view = View::new(sample(10.0, 1.0), false);
    view.take(Err("laird is not running: nothing listens on /run/lair/laird.sock".into()));
    let shown = drawn(&mut view, 80, 12);
    insta::assert_snapshot!(shown);
    // The next reading takes its place.
    view.take(Ok(sample(11.0, 2.0)));
    assert!(!drawn(&mut view, 80, 12).contains("not running"));
}

#[test]
fn a_screen_of_any_size_is_drawn() {
    for (columns, lines) in [(1, 1), (7, 3), (20, 5), (300, 2), (300, 100)] {
        let mut view = view();
        press(&mut view, &[KeyCode::End]);
        drawn(&mut view, columns, lines);
    }
}

#[test]
fn a_fleet_that_is_longer_than_the_screen_scrolls_to_the_selection() {
    let mut many = sample(10.0, 1.0);
    many.vms = (0..100).map(|n| vm(&format!("vm-{n:02}"), "stopped", NOON, None)).collect();
    let mut view = View::new(many.clone(), false);
    press(&mut view, &[KeyCode::PageDown, KeyCode::End]);
    let shown = drawn(&mut view, 80, 12);
    assert!(shown.contains("vm-99") && !shown.contains("vm-00"), "{shown}");
    press(&mut view, &[KeyCode::Home]);
    let shown = drawn(&mut view, 80, 12);
    assert!(shown.contains("vm-00") && !shown.contains("vm-99"), "{shown}");
    // The selection is a VM, not a line, and ends with it.
    many.vms.remove(0);
    view.take(Ok(many));
    press(&mut view, &[KeyCode::Up]);
    assert!(drawn(&mut view, 80, 12).contains("vm-99 stopped"));
}

#[test]
fn keys_end_it() {
    let mut view = view();
    assert!(view.key(KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE)));
    assert!(view.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    assert!(!view.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::NONE)));
}

#[test]
fn cl14_a_name_with_control_characters_draws_none() {
    let mut hostile = sample(10.0, 1.0);
    hostile.vms = vec![vm("a\x1b[31mb\x07\u{9b}", "rea\x1bdy", NOON, Some("\x1b]0;x\x07"))];
    let mut view = View::new(hostile, true);
    press(&mut view, &[KeyCode::Down]);
    let shown = drawn(&mut view, 80, 12);
    assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
}

#[test]
fn numbers_are_short() {
    let numbers = [0.0, 0.04, 9.94, 99.96, 999.4, 999.6, 1234.0, 99_960.0, 1e6, 1.5e15];
    assert_eq!(numbers.map(short), ["0", "0", "10", "100", "999", "1.0k", "1.2k", "100k", "1.0M", "1.5P"]);
    assert_eq!([512.0, 1023.0, 1_536.0, 1e30].map(short_bytes), ["512", "1.0K", "1.5K", "much"]);
}

/// Run by the test below, on a terminal.
#[test]
#[ignore = "needs the terminal that the test below gives it"]
fn panics_while_open() {
    let _screen = super::screen::Screen::open().unwrap();
    panic!("on the other screen");
}

#[test]
fn a_panic_leaves_the_other_screen() {
    let shown = restored_after("top::tests::panics_while_open", "on the other screen");
    let (entered, left) = (shown.find("\x1b[?1049h").unwrap(), shown.rfind("\x1b[?1049l").unwrap());
    assert!(entered < left, "{shown:?}");
}
