use super::*;
use crate::{
    host::{
        confine::Confinement,
        process::{Launch, ProcessId, Sink},
    },
    vm::{
        failure::Failure,
        machine::{Action, Outcome, Stage, Step},
        plan,
        trace::{Mark, Start},
    },
};
use nix::sys::signal::Signal;

const BOOT: &str = "this boot";

/// A VM `a` of which an earlier `laird` left a record, with a process for each part.
struct Left {
    _directory: tempfile::TempDir,
    dirs: Dirs,
    processes: BTreeMap<Part, Process>,
}

impl Drop for Left {
    fn drop(&mut self) {
        for process in self.processes.values() {
            process.signal(Signal::SIGKILL);
        }
    }
}

impl Left {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let dirs = Dirs { state: directory.path().join("state"), run: directory.path().join("run") };
        dirs.vm("a").unwrap().create().unwrap();
        let sleep = |part| {
            let launch = Launch {
                program: "/bin/sleep".into(),
                arguments: vec!["600".into()],
                environment: vec![],
                output: Sink::File(directory.path().join("log")),
                confinement: Confinement::default(),
            };
            (part, Process::spawn(&launch).unwrap())
        };
        let processes = Part::ALL.into_iter().map(sleep).collect();
        Self { _directory: directory, dirs, processes }
    }

    fn record(&self, state: State) -> Record {
        let life = Life { state, ..Life::stopped(Wanted::Running) };
        let since = jiff::Timestamp::from_second(1).unwrap();
        let mut record = Record::new(BOOT, &life, since, &plan::example("a"));
        record.processes = self.processes.iter().map(|(part, process)| (*part, process.id())).collect();
        record
    }

    fn write(&self, record: &Record) {
        record.write(&self.dirs.vm("a").unwrap().record()).unwrap();
    }

    fn keep(&self, boot: &str, state: State, wanted: Wanted) {
        let life = Life { state, ..Life::stopped(wanted) };
        lasting::write(&self.dirs.vm("a").unwrap().lasting(), boot, &life).unwrap();
    }

    fn adopt(&self) -> Beginning {
        adopt("a", true, &self.dirs, BOOT, 0)
    }

    fn all_run(&self) -> bool {
        self.processes.values().all(|process| Process::adopt(process.id()).is_ok())
    }
}

#[tokio::test]
async fn sv1_a_vm_all_of_which_runs_is_adopted_with_its_uptime_and_its_own_plan() {
    let left = Left::new();
    let mut record = left.record(State::Ready);
    record.start = Start(vec![Mark { name: "start".into(), at_ms: 7, span: None }]);
    left.write(&record);
    let beginning = left.adopt();
    assert_eq!(beginning.verdict, Some(Verdict::Adopt));
    assert_eq!(*beginning.running.start(), record.start);
    assert_eq!((&beginning.life.state, beginning.since), (&State::Ready, record.since));
    assert_eq!((beginning.actions, beginning.running.plan().as_deref()), (vec![], Some(&record.plan)));
    assert_eq!(beginning.running.processes().len(), 4);
}

#[tokio::test]
async fn sv1_a_vm_that_lost_a_part_is_missing_and_undone() {
    let left = Left::new();
    let mut record = left.record(State::Ready);
    record.processes.remove(&Part::Shim);
    left.write(&record);
    let beginning = left.adopt();
    assert_eq!(beginning.verdict, Some(Verdict::Missing));
    let State::Cleaning(Outcome::Failed(failure)) = beginning.life.state else { panic!() };
    assert_eq!(failure.to_string(), "lair-shim ended while laird was not running");
    assert_eq!(beginning.actions, [Action::Relax, Action::CleanUp]);
    assert!(left.all_run(), "adoption itself ends nothing");
}

#[tokio::test]
async fn hv9_a_recorded_pid_that_is_anothers_now_is_quarantined_and_not_signalled() {
    let left = Left::new();
    let mut record = left.record(State::Ready);
    let id = record.processes[&Part::Hypervisor];
    record.processes.insert(Part::Hypervisor, ProcessId { start_time: id.start_time - 1, ..id });
    left.write(&record);
    let beginning = left.adopt();
    assert_eq!(beginning.verdict, Some(Verdict::Quarantine));
    assert!(
        matches!(&beginning.life.state, State::Quarantined(reason) if reason.ends_with("is another process now"))
    );
    assert_eq!((beginning.actions, beginning.running.processes().len()), (vec![], 0));
    assert!(left.all_run());
}

#[tokio::test]
async fn sv3_a_record_that_is_not_understood_is_unparseable_and_nothing_is_touched() {
    let left = Left::new();
    let path = left.dirs.vm("a").unwrap().record();
    let text = serde_json::to_vec(&left.record(State::Ready)).unwrap();
    let mut newer = left.record(State::Ready);
    newer.schema = 99;
    for damage in
        [vec![], text[..text.len() / 2].to_vec(), b"\0\xff".to_vec(), serde_json::to_vec(&newer).unwrap()]
    {
        std::fs::write(&path, &damage).unwrap();
        let beginning = left.adopt();
        assert_eq!(beginning.verdict, Some(Verdict::Unparseable));
        assert!(matches!(beginning.life.state, State::Quarantined(_)));
        assert_eq!(std::fs::read(&path).unwrap(), damage);
    }
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert_eq!(left.adopt().verdict, Some(Verdict::Quarantine));
    std::fs::remove_file(&path).unwrap();
    // The lasting state as well, where nothing else is known.
    std::fs::write(left.dirs.vm("a").unwrap().lasting(), "{").unwrap();
    assert_eq!(left.adopt().verdict, Some(Verdict::Unparseable));
    left.write(&left.record(State::Ready));
    assert_eq!(left.adopt().verdict, Some(Verdict::Adopt));
    assert!(left.all_run());
}

#[tokio::test]
async fn sv13_after_a_power_failure_nothing_is_adopted_and_what_was_wanted_holds() {
    let left = Left::new();
    let starting = State::Starting(Step::FIRST);
    // What is below /run may outlive a boot where it is no tmpfs.
    let record = Record { boot_id: "an earlier boot".into(), ..left.record(State::Ready) };
    left.write(&record);
    left.keep("an earlier boot", starting.clone(), Wanted::Running);
    let beginning = left.adopt();
    assert_eq!((beginning.verdict, &beginning.life.state), (None, &State::Stopped));
    assert_eq!((beginning.life.wanted, beginning.actions), (Wanted::Running, vec![]));
    assert!(!left.dirs.vm("a").unwrap().run.exists());
    assert!(left.all_run());
    // Even one that was given up in the earlier boot.
    left.keep("an earlier boot", State::Failed(Failure::ReadyTimeout), Wanted::Running);
    assert_eq!(left.adopt().life, Life::stopped(Wanted::Running));
    left.keep("an earlier boot", State::Stopped, Wanted::Stopped);
    assert_eq!(left.adopt().life, Life::stopped(Wanted::Stopped));
    std::fs::remove_file(left.dirs.vm("a").unwrap().lasting()).unwrap();
    assert_eq!(left.adopt().life, Life::stopped(Wanted::Running));
    assert_eq!(adopt("a", false, &left.dirs, BOOT, 0).life, Life::stopped(Wanted::Stopped));
}

#[tokio::test]
async fn sv1_the_lasting_state_goes_on_in_the_same_boot() {
    let left = Left::new();
    left.keep(BOOT, State::Failed(Failure::ReadyTimeout), Wanted::Running);
    assert_eq!(left.adopt().life.state, State::Failed(Failure::ReadyTimeout));
    // Killed before there was a record.
    left.keep(BOOT, State::Starting(Step::FIRST), Wanted::Running);
    assert_eq!(left.adopt().life.state, State::Cleaning(Outcome::Again));
    left.keep(BOOT, State::Cleaning(Outcome::Stopped), Wanted::Stopped);
    assert_eq!(left.adopt().life.state, State::Cleaning(Outcome::Stopped));
    // A stop that was written down, and no more.
    left.dirs.vm("a").unwrap().create().unwrap();
    left.write(&left.record(State::Ready));
    let beginning = left.adopt();
    assert_eq!(beginning.life.state, State::Stopping(Stage::Agent));
    assert_eq!((beginning.life.wanted, beginning.verdict), (Wanted::Stopped, Some(Verdict::Adopt)));
}
