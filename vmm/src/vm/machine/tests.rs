use super::*;
use crate::fleet::schema::Restart;
use proptest::prelude::*;

const FAILS: Restart = Restart::OnFailure;

fn at(moment: Moment, policy: Restart) -> Now {
    Now { moment, policy }
}

fn now() -> Now {
    at(0, FAILS)
}

fn life(state: State) -> Life {
    Life { state, ..Life::stopped(Wanted::Running) }
}

/// Starts a VM whose steps all succeed.
fn booting() -> Life {
    let (mut life, mut actions) = Life::stopped(Wanted::Stopped).request(Request::Start, 0).unwrap();
    assert_eq!(actions.remove(0), Action::Relax);
    let mut steps = 0;
    while let [Action::Perform(at)] = actions.as_slice() {
        (life, actions) = life.step(Input::StepDone(*at), now());
        steps += 1;
    }
    assert_eq!((&life.state, actions), (&State::Booting, vec![Action::Expect(Patience::Boot)]));
    assert_eq!((steps, life.wanted), (11, Wanted::Running));
    life
}

fn ready() -> Life {
    booting().step(Input::AgentReady, now()).0
}

fn crash(life: &Life, now: Now) -> Life {
    let (life, actions) = life.step(Input::Ended(Part::Hypervisor, "killed by SIGSEGV".into()), now);
    assert_eq!(actions, [Action::Relax, Action::CleanUp]);
    life.step(Input::Cleaned, now).0
}

/// The request, then an environment in which nothing answers but clean-ups.
fn driven(life: &Life, request: Request) -> Life {
    let mut life = life.request(request, 0).map_or_else(|_| life.clone(), |(life, _)| life);
    for _ in 0..8 {
        let input = match life.state {
            State::Cleaning(_) => Input::Cleaned,
            _ => Input::Deadline,
        };
        life = life.step(input, now()).0;
    }
    life
}

#[test]
fn a_start_performs_every_step_in_order_and_then_waits_for_the_agent() {
    let (life, actions) = booting().step(Input::AgentReady, now());
    assert_eq!((life.state, actions), (State::Ready, vec![Action::Relax]));
}

#[test]
fn a_step_before_anything_runs_fails_for_good_and_keeps_its_reason() {
    let (life, _) = Life::stopped(Wanted::Running).request(Request::Start, 0).unwrap();
    let (life, actions) = life.step(Input::StepFailed(Step::View, "no such path".into()), now());
    assert_eq!(actions, vec![Action::Relax, Action::CleanUp]);
    let (life, actions) = life.step(Input::Cleaned, now());
    let failure = Failure::StepFailed { step: Step::View, message: "no such path".into() };
    assert_eq!((life.state, actions), (State::Failed(failure), vec![]));
}

#[test]
fn cf5_a_vm_that_was_not_started_by_itself_is_failed_and_can_be_started() {
    let refused = Input::NotAdmitted("no memory".into());
    let (life, actions) = Life::stopped(Wanted::Running).step(refused.clone(), now());
    assert_eq!(actions, vec![]);
    assert_eq!(life.state, State::Failed(Failure::NotAdmitted { message: "no memory".into() }));
    assert!(life.request(Request::Start, 0).is_ok());
    // A later laird tries again.
    assert_eq!(life.lasting().state, State::Stopped);
    // It was overtaken by an operator's start.
    assert_eq!(ready().step(refused, now()), (ready(), vec![]));
}

#[test]
fn a_stop_gets_harder_until_the_hypervisor_ends_and_is_reported() {
    let (mut life, mut actions) = ready().request(Request::Stop, 1000).unwrap();
    for expected in [Stage::Agent, Stage::PowerButton, Stage::Terminate, Stage::Kill] {
        assert_eq!(life.state, State::Stopping(expected));
        assert_eq!(actions, stage(expected));
        // Whenever it ends, what ended it is known.
        let (ended, _) = life.step(Input::Ended(Part::Hypervisor, "ended".into()), at(3500, FAILS));
        let by = match expected {
            Stage::Agent => Ender::Agent,
            Stage::PowerButton => Ender::PowerButton,
            Stage::Terminate => Ender::Terminate,
            Stage::Kill => Ender::Kill,
        };
        let (ended, nothing) = ended.step(Input::Cleaned, now());
        assert_eq!((&ended.state, ended.wanted, nothing), (&State::Stopped, Wanted::Stopped, vec![]));
        assert_eq!(ended.last_stop, Some(StopReport { by, took_ms: 2500 }));
        (life, actions) = life.step(Input::Deadline, now());
    }
    // Not even SIGKILL ended it in time: what is left is for the clean-up to find out.
    assert_eq!(
        (&life.state, actions),
        (&State::Cleaning(Outcome::Stopped), vec![Action::Relax, Action::CleanUp])
    );
    assert_eq!(life.last_stop, None);
    let (life, _) = life.step(Input::NotCleaned("7 hypervisor".into()), now());
    assert_eq!(life.state, State::Quarantined("7 hypervisor".into()));
    assert!(life.state.holds_memory());
}

#[test]
fn a_guest_that_does_not_become_ready_is_asked_to_end_and_has_failed_then() {
    let silent = ready().step(Input::AgentLost, now()).0;
    for booting in [booting(), silent] {
        let (life, actions) = booting.step(Input::Deadline, at(5, FAILS));
        assert_eq!((&life.state, actions), (&State::Stopping(Stage::Agent), stage(Stage::Agent)));
        let (life, _) = life.step(Input::EndFailed(Stage::Agent), now());
        assert_eq!(life.state, State::Stopping(Stage::PowerButton));
        let ended = Input::Ended(Part::Hypervisor, "ended".into());
        let (failed, _) = life.step(ended.clone(), at(7, FAILS));
        assert_eq!(failed.state, State::Cleaning(Outcome::Failed(Failure::ReadyTimeout)));
        assert_eq!(failed.last_stop, Some(StopReport { by: Ender::PowerButton, took_ms: 2 }));
        assert!(matches!(failed.step(Input::Cleaned, now()).0.state, State::Waiting { .. }));
        // An operator's stop makes it one.
        let stopped = life.request(Request::Stop, 6).unwrap().0.step(ended, now()).0;
        assert_eq!((&stopped.state, stopped.wanted), (&State::Cleaning(Outcome::Stopped), Wanted::Stopped));
    }
}

#[test]
fn a_withdrawal_is_told_from_a_stop_wherever_it_is() {
    let withdrawn = ready().step(Input::Withdraw(Stage::Agent), now()).0;
    let cleaning = withdrawn.step(Input::Ended(Part::Hypervisor, "ended".into()), now()).0;
    assert!(withdrawn.is_withdrawn() && cleaning.is_withdrawn());
    let stopping = ready().request(Request::Stop, 0).unwrap().0;
    let stopped = stopping.step(Input::Ended(Part::Hypervisor, "ended".into()), now()).0;
    let restarting = ready().request(Request::Restart, 0).unwrap().0;
    for life in [ready(), stopping, stopped, restarting, life(State::Stopped)] {
        assert!(!life.is_withdrawn(), "{life:?}");
    }
}

#[test]
fn a_stage_that_cannot_be_asked_for_is_not_waited_for() {
    let (life, _) = ready().request(Request::Stop, 0).unwrap();
    let (life, actions) = life.step(Input::EndFailed(Stage::Agent), now());
    assert_eq!((&life.state, actions), (&State::Stopping(Stage::PowerButton), stage(Stage::PowerButton)));
    // Late news of an earlier stage.
    assert_eq!(life.step(Input::EndFailed(Stage::Agent), now()), (life.clone(), vec![]));
}

#[test]
fn a_kill_asks_nobody_and_a_restart_comes_up_again() {
    for state in [ready(), booting(), ready().request(Request::Stop, 0).unwrap().0] {
        let (life, actions) = state.request(Request::Kill, 0).unwrap();
        assert_eq!((&life.state, actions), (&State::Stopping(Stage::Kill), stage(Stage::Kill)));
        assert_eq!(life.request(Request::Kill, 0).unwrap_err(), Refusal::Already("being killed"));
    }
    let (life, actions) = ready().request(Request::Restart, 0).unwrap();
    assert_eq!((&life.state, actions), (&State::Stopping(Stage::Agent), stage(Stage::Agent)));
    let (life, _) = life.step(Input::GuestPowerOff, now());
    let (life, _) = life.step(Input::Ended(Part::Hypervisor, "exited with status 0".into()), now());
    let (again, actions) = life.step(Input::Cleaned, now());
    assert_eq!(actions, [Action::Relax, Action::Perform(Step::FIRST)]);
    assert_eq!((again.state, again.wanted), (State::Starting(Step::FIRST), Wanted::Running));
    // A stop makes a stop of it.
    let (life, actions) = life.request(Request::Stop, 0).unwrap();
    assert_eq!(actions, []);
    assert_eq!(life.step(Input::Cleaned, now()).0.state, State::Stopped);
}

#[test]
fn a_step_that_was_overtaken_by_a_stop_changes_nothing() {
    let (life, _) = Life::stopped(Wanted::Running).request(Request::Start, 0).unwrap();
    let (life, actions) = life.request(Request::Stop, 0).unwrap();
    assert!(actions.contains(&Action::CleanUp));
    assert_eq!(life.step(Input::StepDone(Step::View), now()), (life.clone(), vec![]));
}

#[test]
fn cl8_requests_that_do_not_fit_are_refused_with_the_reason() {
    let stopping = || ready().request(Request::Stop, 0).unwrap().0;
    let cases = [
        (ready(), Request::Start, "It is already running"),
        (booting(), Request::Start, "It is already starting"),
        (Life::stopped(Wanted::Stopped), Request::Stop, "It is already stopped"),
        (stopping(), Request::Stop, "It is already stopping"),
        (stopping(), Request::Start, "It is being stopped; start it when it has stopped"),
        (stopping(), Request::Restart, "It is being stopped; start it when it has stopped"),
        (ready().request(Request::Restart, 0).unwrap().0, Request::Start, "It is already restarting"),
        (
            ready().step(Input::GuestPanic, now()).0,
            Request::Start,
            "It has failed (the guest's kernel panicked) and is being cleaned up; start it when that is done",
        ),
        (
            life(State::Quarantined("odd".into())),
            Request::Start,
            "It is quarantined (odd); stop it, which looks at it again, or kill it, which ends what is left of it",
        ),
    ];
    for (life, asked, reason) in cases {
        assert_eq!(life.request(asked, 0).unwrap_err().to_string(), reason);
    }
}

#[test]
fn hv3_the_death_of_any_part_is_a_failure_that_names_it() {
    for part in Part::ALL {
        let how = "killed by SIGSEGV".to_owned();
        let (life, _) = ready().step(Input::Ended(part, how.clone()), now());
        assert_eq!(life.state, State::Cleaning(Outcome::Failed(Failure::ProcessEnded { part, how })));
    }
}

#[test]
fn hv3_a_vm_that_crashes_is_started_again_until_it_has_crashed_too_often() {
    let (mut life, mut moment, mut pauses) = (ready(), 0, vec![]);
    loop {
        life = crash(&life, at(moment, FAILS));
        let State::Waiting { seconds, .. } = life.state else { break };
        pauses.push(seconds);
        moment += seconds * 1000;
        let (started, actions) = life.step(Input::Deadline, at(moment, FAILS));
        assert_eq!(actions, [Action::Relax, Action::Perform(Step::FIRST)]);
        life = Life { state: State::Booting, ..started };
    }
    assert_eq!(pauses, [1, 2, 4, 8]);
    let said = "it was started 5 times in 10 minutes and is not started again by itself; the last time the hypervisor killed by \
                SIGSEGV";
    assert_eq!(life.state.failure().unwrap().to_string(), said);
    // An operator may, and then it all begins anew.
    let (life, _) = life.request(Request::Start, moment).unwrap();
    assert_eq!(life.history.restarts(), 0);
}

#[test]
fn a_vm_that_was_ready_for_ten_minutes_has_made_up_for_its_crashes() {
    let mut life = crash(&crash(&ready(), now()).step(Input::Deadline, at(1000, FAILS)).0, at(1000, FAILS));
    assert!(matches!(life.state, State::Waiting { seconds: 2, .. }));
    life = Life { state: State::Booting, ..life }.step(Input::AgentReady, at(5000, FAILS)).0;
    let early = crash(&life, at(4999 + WINDOW, FAILS));
    assert!(matches!(early.state, State::Waiting { seconds: 2, .. }));
    let late = crash(&life, at(5000 + WINDOW, FAILS));
    assert!(matches!(late.state, State::Waiting { seconds: 1, .. }));
}

#[test]
fn the_restart_policy_decides_what_a_power_off_and_a_crash_lead_to() {
    let power_off = |policy| {
        let (life, _) = ready().step(Input::GuestPowerOff, at(0, policy));
        let (life, _) =
            life.step(Input::Ended(Part::Hypervisor, "exited with status 0".into()), at(7, policy));
        life.step(Input::Cleaned, at(7, policy)).0
    };
    for policy in [Restart::Never, Restart::OnFailure] {
        let life = power_off(policy);
        assert_eq!((&life.state, life.wanted), (&State::Stopped, Wanted::Stopped));
        assert_eq!(life.last_stop, Some(StopReport { by: Ender::Guest, took_ms: 7 }));
    }
    assert_eq!(power_off(Restart::Always).state, State::Waiting { failure: Failure::PoweredOff, seconds: 1 });
    assert!(matches!(
        crash(&ready(), at(0, Restart::Never)).state,
        State::Failed(Failure::ProcessEnded { .. })
    ));
    assert!(matches!(crash(&ready(), at(0, Restart::Always)).state, State::Waiting { .. }));
}

#[test]
fn hv4_a_guest_whose_hypervisor_is_silent_as_well_is_unresponsive() {
    let (life, actions) = ready().step(Input::AgentLost, now());
    assert_eq!(actions, [Action::Expect(Patience::Boot), Action::Probe]);
    let (silent, actions) = life.step(Input::Silent, now());
    assert_eq!(silent.state, State::Cleaning(Outcome::Failed(Failure::Unresponsive)));
    assert_eq!(actions, [Action::Relax, Action::CleanUp]);
    // Its agent is back before the hypervisor was given up.
    let (back, _) = life.step(Input::AgentReady, now());
    assert_eq!(back.step(Input::Silent, now()), (back.clone(), vec![]));
}

#[test]
fn a_guest_that_panics_failed_and_did_not_power_off() {
    let (life, _) = ready().step(Input::GuestPanic, now());
    assert_eq!(life.state, State::Cleaning(Outcome::Failed(Failure::GuestPanic)));
    assert_eq!(life.step(Input::GuestPowerOff, now()), (life.clone(), vec![]));
}

#[test]
fn sv12_a_vm_that_is_withdrawn_ends_and_is_wanted_as_before() {
    let inputs = [Stage::Agent, Stage::Kill].map(Input::Withdraw);
    for input in inputs {
        for life in [ready(), booting(), crash(&ready(), now())] {
            let mut life = life.step(input.clone(), now()).0;
            for _ in 0..8 {
                let next =
                    if matches!(life.state, State::Cleaning(_)) { Input::Cleaned } else { Input::Deadline };
                life = life.step(next, now()).0;
            }
            assert_eq!((life.state, life.wanted), (State::Stopped, Wanted::Running));
        }
    }
    let (life, actions) = ready().step(Input::Withdraw(Stage::Kill), now());
    assert_eq!((&life.state, actions), (&State::Stopping(Stage::Kill), stage(Stage::Kill)));
    // An operator's kill is noted, though there is nothing more to do.
    let (life, actions) = life.request(Request::Kill, 0).unwrap();
    assert_eq!((life.wanted, actions), (Wanted::Stopped, vec![]));
}

#[test]
fn sv1_a_life_that_was_cut_short_goes_on() {
    let all_run = Found { missing: vec![] };
    let none = Found { missing: Part::ALL.into() };
    let run = |state, found: &Found, wanted| {
        let (life, actions) = life(state).resume(found, wanted, 0);
        (life.state, actions)
    };
    let clean = |outcome| (State::Cleaning(outcome), vec![Action::Relax, Action::CleanUp]);
    use Wanted::{Running, Stopped};
    assert_eq!(run(State::Ready, &all_run, Running), (State::Ready, vec![]));
    assert_eq!(
        run(State::Booting, &all_run, Running),
        (State::Booting, vec![Action::Expect(Patience::Boot)])
    );
    // The stop was written down, and no more.
    assert_eq!(run(State::Ready, &all_run, Stopped), (State::Stopping(Stage::Agent), stage(Stage::Agent)));
    assert_eq!(run(State::Ready, &none, Stopped), clean(Outcome::Stopped));
    let how = "ended while laird was not running".into();
    let lost = Failure::ProcessEnded { part: Part::Shim, how };
    let without_shim = Found { missing: vec![Part::Shim] };
    assert_eq!(run(State::Ready, &without_shim, Running), clean(Outcome::Failed(lost)));
    for step in [Step::View, Step::Shim, Step::Resume] {
        assert_eq!(run(State::Starting(step), &none, Running), clean(Outcome::Again));
        assert_eq!(run(State::Starting(step), &all_run, Running), clean(Outcome::Again));
        assert_eq!(run(State::Starting(step), &all_run, Stopped), clean(Outcome::Stopped));
    }
    assert_eq!(run(State::Cleaning(Outcome::Again), &none, Running), clean(Outcome::Again));
    let (stopping, _) = ready().request(Request::Restart, 0).unwrap();
    let (life, actions) = stopping.clone().resume(&all_run, Running, 0);
    assert_eq!((life.state, actions), (State::Stopping(Stage::Agent), stage(Stage::Agent)));
    let (life, _) = stopping.resume(&none, Running, 0);
    assert_eq!(life.state, State::Cleaning(Outcome::Again));
    let failed = State::Failed(Failure::ReadyTimeout);
    assert_eq!(run(failed.clone(), &none, Running), (failed, vec![]));
    let waiting = State::Waiting { failure: Failure::ReadyTimeout, seconds: 8 };
    let pause = vec![Action::Expect(Patience::Pause(8))];
    assert_eq!(run(waiting.clone(), &none, Running), (waiting, pause));
}

#[test]
fn sv15_100000_starts_and_stops_leave_a_life_as_small_as_before() {
    let mut life = Life::stopped(Wanted::Stopped);
    let mut sizes = std::collections::BTreeSet::new();
    for round in 0..100_000_u64 {
        let (next, _) = life.request(Request::Start, round).unwrap();
        let (next, _) = next.request(Request::Stop, round).unwrap();
        (life, _) = next.step(Input::Cleaned, at(round, FAILS));
        assert_eq!(life.state, State::Stopped);
        if round % 10_000 == 0 {
            sizes.insert(
                serde_json::to_string(&Life { history: History::default(), ..life.clone() }).unwrap(),
            );
        }
    }
    assert_eq!(sizes.len(), 1);
}

#[derive(Debug, Clone)]
enum Event {
    Input(Input),
    Request(Request),
    /// laird is killed and started again, with all of the VM's processes or none; what is wanted may have been written down later
    /// than the rest.
    Crash(bool, Option<Wanted>),
}

fn any_event() -> impl Strategy<Value = Event> {
    let at = prop::sample::select(vec![Step::View, Step::Volumes, Step::Hypervisor, Step::Resume]);
    let part = prop::sample::select(vec![Part::Hypervisor, Part::StoreBackend, Part::Shim]);
    let stage = prop::sample::select(vec![Stage::Agent, Stage::PowerButton, Stage::Terminate, Stage::Kill]);
    prop_oneof![
        4 => prop::sample::select(vec![Request::Start, Request::Stop, Request::Restart, Request::Kill])
            .prop_map(Event::Request),
        1 => (any::<bool>(), prop::sample::select(vec![None, Some(Wanted::Running), Some(Wanted::Stopped)]))
            .prop_map(|(all, wanted)| Event::Crash(all, wanted)),
        2 => at.prop_map(|s| Event::Input(Input::StepFailed(s, "x".into()))),
        2 => part.prop_map(|p| Event::Input(Input::Ended(p, "x".into()))),
        2 => stage.prop_map(|s| Event::Input(Input::EndFailed(s))),
        12 => prop::sample::select(vec![
            Input::NotAdmitted("x".into()),
            Input::AgentReady,
            Input::AgentLost,
            Input::Silent,
            Input::GuestPowerOff,
            Input::GuestPanic,
            Input::Deadline,
            Input::Cleaned,
            Input::NotCleaned("x".into()),
            Input::Withdraw(Stage::Agent),
            Input::Withdraw(Stage::Kill),
        ])
        .prop_map(Event::Input),
        // What a start needs most to get on.
        12 => Just(Event::Input(Input::StepDone(Step::FIRST))),
    ]
}

proptest! {
    /// Whatever happens in whatever order: there is one pending effect where one is waited for, and one deadline where one counts; a VM is
    /// called down only after a clean-up; memory is held while anything may run; no window has more starts by itself than allowed; and a
    /// stop always leads to a VM that is stopped and stays so.
    #[test]
    fn sv1_invariants(
        events in prop::collection::vec((any_event(), 0..200_000_u64), 0..80),
        policy in prop::sample::select(vec![Restart::Never, Restart::OnFailure, Restart::Always]),
    ) {
        let (mut life, mut deadline, mut dirty) = (Life::stopped(Wanted::Stopped), false, false);
        let (mut performing, mut cleaning) = (None, false);
        let (mut moment, mut starts): (_, Vec<Moment>) = (0, vec![]);
        for (event, pause) in events {
            moment += pause;
            let (before, waiting) = (life.clone(), matches!(life.state, State::Waiting { .. }));
            let cleaned = matches!(&event, Event::Input(Input::Cleaned));
            let (next, actions) = match event {
                // The step that is being done, whichever that is.
                Event::Input(Input::StepDone(_)) => match performing {
                    Some(step) => life.step(Input::StepDone(step), at(moment, policy)),
                    None => continue,
                },
                // Nobody sends these unasked.
                Event::Input(Input::Cleaned | Input::NotCleaned(_)) if !cleaning => continue,
                Event::Input(Input::Deadline) if !deadline => continue,
                Event::Input(input) => {
                    if input == Input::Deadline {
                        deadline = false;
                    }
                    life.step(input, at(moment, policy))
                }
                Event::Request(request) => match life.request(request, moment) {
                    Ok(turn) => turn,
                    Err(_) => continue,
                },
                Event::Crash(all, wanted) => {
                    (performing, cleaning, deadline) = (None, false, false);
                    let runs = matches!(life.state, State::Booting | State::Ready | State::Stopping(_));
                    let missing = if runs && all { vec![] } else { Part::ALL.into() };
                    let text = serde_json::to_string(&if runs { life.clone() } else { life.lasting() }).unwrap();
                    let read: Life = serde_json::from_str(&text).unwrap();
                    read.resume(&Found { missing }, wanted.unwrap_or(life.wanted), moment)
                }
            };
            if !matches!(next.state, State::Starting(_)) {
                performing = None;
            }
            if !matches!(next.state, State::Cleaning(_)) {
                cleaning = false;
            }
            for action in &actions {
                match action {
                    Action::Expect(_) => deadline = true,
                    Action::Relax => deadline = false,
                    Action::Perform(step) => {
                        dirty = true;
                        prop_assert_eq!(&next.state, &State::Starting(*step));
                        prop_assert_eq!(performing.replace(*step).filter(|before| before == step), None);
                    }
                    Action::CleanUp => {
                        prop_assert!(matches!(next.state, State::Cleaning(_)));
                        prop_assert!(!cleaning, "two clean-ups at once");
                        cleaning = true;
                    }
                    Action::End(stage) => prop_assert_eq!(&next.state, &State::Stopping(*stage)),
                    Action::Probe => prop_assert_eq!(&next.state, &State::Booting),
                }
            }
            if cleaned {
                dirty = matches!(next.state, State::Starting(_));
            }
            match &next.state {
                State::Starting(step) => prop_assert_eq!(performing, Some(*step)),
                State::Cleaning(_) => prop_assert!(cleaning),
                State::Booting | State::Stopping(_) | State::Waiting { .. } => {
                    prop_assert!(deadline, "{:?} could last for ever", next.state);
                }
                State::Ready => prop_assert!(!deadline),
                State::Stopped | State::Failed(_) => {
                    prop_assert!(!deadline && !dirty, "{:?} without clean-up", next.state);
                }
                State::Quarantined(_) => prop_assert!(next.state.holds_memory()),
            }
            prop_assert_eq!(next.stop.is_some(), matches!(next.state, State::Stopping(_)));
            if next.history.restarts() == 0 {
                starts.clear();
            }
            if actions.contains(&Action::Perform(Step::FIRST)) {
                starts.push(moment);
                let recent = starts.iter().filter(|start| moment - **start < WINDOW).count();
                let by_itself = waiting && next.history.restarts() > 0;
                prop_assert!(!by_itself || recent <= STARTS_MAX, "{recent} starts, {before:?}");
            }
            life = next;
            for request in [Request::Stop, Request::Kill] {
                let stopped = driven(&life, request);
                prop_assert_eq!(&stopped.state, &State::Stopped, "{:?} from {:?}", request, life.state);
                prop_assert!(life.state == State::Stopped || stopped.wanted == Wanted::Stopped);
            }
        }
    }
}
