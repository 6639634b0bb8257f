//! The life of a device that VMs are given, with all that goes with it: a pure state machine. Inputs in, a life and actions out, no I/O.
//!
//! ```text
//!            take           bound, verified        reset, verified
//!   Host ----------> Probed ---------------> Bound ---------------> Leased
//!    ^                 | ^                     |                      |
//!    |      failed,    | | take                | failed               | the VM has ended
//!    |     VM ended    v |                     v                      v
//!    '----- Returning <--+-- Free <-------------------------------- Resetting
//!               ^     give back               Quarantined <-----------'
//!               '------ an operator's release ------'           failed
//! ```
//!
//! Every state but `Host` is on disk before anything is done that follows from it; so a later `laird` goes on where an earlier one ended.

use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf};

/// Where a device is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// The host's own. Nothing is recorded of it.
    Host,
    /// Its drivers are recorded, and it is being taken from them.
    Probed {
        /// For whom.
        vm: String,
    },
    /// It is VFIO's, and is being made ready.
    Bound {
        /// For whom.
        vm: String,
    },
    /// A VM has it.
    Leased {
        /// Which.
        vm: String,
    },
    /// The VM has ended, and it is being reset.
    Resetting,
    /// It is VFIO's and reset, and nobody has it.
    Free,
    /// It is being given back to its drivers.
    Returning,
    /// Nobody gets it until an operator releases it.
    Quarantined {
        /// Why.
        reason: Reason,
    },
}

/// Why a device is not to be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reason {
    /// A write has not returned: a driver does not let go, or the device hangs.
    #[error("writing {text:?} to {path} has not returned within {seconds} s, and is not tried again")]
    Stuck {
        /// The file.
        path: PathBuf,
        /// What was written.
        text: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A reset by VFIO has not returned: the device hangs.
    #[error(
        "the hot reset of {address} by {path} has not returned within {seconds} s, and is not tried again"
    )]
    StuckReset {
        /// The function that it was begun with.
        address: String,
        /// The node of its IOMMU group.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The kernel refused a write.
    #[error("the kernel refused {text:?} for {path}: {error}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was written.
        text: String,
        /// Why.
        error: String,
    },
    /// A write was taken and had no effect.
    #[error("{address} did not become what it should: {wanted}")]
    NoEffect {
        /// The device.
        address: String,
        /// What should have been.
        wanted: String,
    },
    /// It is not there any more.
    #[error("{address} is gone: it was unplugged, or its link is down")]
    Gone {
        /// The device.
        address: String,
    },
    /// Another device is in its place.
    #[error("{address} is another device now: {found}, not {wanted}")]
    Other {
        /// The device.
        address: String,
        /// What is there.
        found: String,
        /// What was.
        wanted: String,
    },
    /// It does not answer.
    #[error("{address} does not answer: its configuration reads 0xffffffff")]
    Dead {
        /// The device.
        address: String,
    },
    /// It lost lanes of its link.
    #[error("the link of {address} has {found} lanes of the {wanted} that it had")]
    Width {
        /// The device.
        address: String,
        /// How many lanes.
        found: u8,
        /// How many before.
        wanted: u8,
    },
    /// It cannot be reset.
    #[error("{address} cannot be reset: {why}")]
    NoReset {
        /// The device.
        address: String,
        /// Why.
        why: String,
    },
    /// Somebody has it open.
    #[error("IOMMU group {group} is still open in a process {seconds} s after its VM gave it back")]
    Open {
        /// The group.
        group: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// What is recorded of it makes no sense.
    #[error("what was recorded of it is damaged: {error}")]
    Damaged {
        /// How.
        error: String,
    },
    /// It failed while a VM had it.
    #[error("{address} failed while a VM had it: {what}")]
    Faulty {
        /// The device.
        address: String,
        /// What was seen or reported of it.
        what: String,
    },
    /// Something of the host failed.
    #[error("{error}")]
    Host {
        /// What.
        error: String,
    },
}

impl Reason {
    /// Whether its drivers may be tried again without an operator. What hangs or is gone is left alone.
    fn may_be_undone(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::NoEffect { .. }
            | Self::Other { .. }
            | Self::Open { .. }
            | Self::Host { .. } => true,
            Self::Stuck { .. }
            | Self::StuckReset { .. }
            | Self::Gone { .. }
            | Self::Dead { .. }
            | Self::Width { .. }
            | Self::NoReset { .. }
            | Self::Faulty { .. }
            | Self::Damaged { .. } => false,
        }
    }
}

/// A device's life: where it is, and as much of its past as decides its future.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Where it is.
    #[serde(flatten)]
    pub state: State,
    /// Whether it has been reset, and was fine, since anybody used it.
    pub clean: bool,
    /// The VM that had it last.
    pub last: Option<String>,
    /// Why it is quarantined once its VM has ended: what was seen or reported first while the VM has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blame: Option<Reason>,
}

/// What happens to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A VM is to have it.
    Take(String),
    /// The action is done, and what came of it was verified.
    Done,
    /// The action could not be done.
    Failed(Reason),
    /// It fails while a VM has it. The VM keeps it; no other gets it.
    Blame(Reason),
    /// The VM, of which nothing runs any more, is to have it no longer.
    Ended(String),
    /// The fleet file no longer names it.
    GiveBack,
    /// An operator releases it.
    Release,
}

/// What is to be done. Each answers with [`Input::Done`] or [`Input::Failed`], and may be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Have all of it go to `vfio-pci`.
    Bind,
    /// See to it that nobody has it open, reset it, and see whether it is as it was.
    Reset,
    /// See whether it is as it was.
    Check,
    /// Have all of it go to its first drivers.
    Return,
}

/// Why an input was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A VM has it.
    #[error("VM {0} has it; stop the VM first")]
    Leased(String),
    /// It is on its way.
    #[error("it is being {0}; try again when that is done")]
    Busy(&'static str),
    /// It is not to be used.
    #[error("it is quarantined: {0}; `vmctl gpu release` gives it back to the host")]
    Quarantined(Reason),
    /// It is the host's.
    #[error("no VM has it, and it is the host's already")]
    NotTaken,
}

impl Life {
    /// The life of a device that is the host's.
    pub fn of_the_host() -> Self {
        Self { state: State::Host, clean: false, last: None, blame: None }
    }

    /// Takes what happens, or says why not. What does not fit and is nobody's request was overtaken, and changes nothing.
    pub fn step(&self, input: Input) -> Result<(Self, Option<Action>), Refusal> {
        use State::{Bound, Free, Host, Leased, Probed, Quarantined, Resetting, Returning};
        let to = |state| Self { state, ..self.clone() };
        Ok(match (&self.state, input) {
            (Host | Free, Input::Take(vm)) => (to(Probed { vm }), Some(Action::Bind)),
            (Quarantined { reason }, Input::Take(_)) => return Err(Refusal::Quarantined(reason.clone())),
            (_, Input::Take(_)) => return Err(self.busy()),
            (Probed { vm }, Input::Done) => {
                let ready = if self.clean { Action::Check } else { Action::Reset };
                (to(Bound { vm: vm.clone() }), Some(ready))
            }
            (Bound { vm }, Input::Done) => {
                // From now on it has been used.
                let state = Leased { vm: vm.clone() };
                (Self { state, clean: false, last: Some(vm.clone()), blame: None }, None)
            }
            (Leased { .. }, Input::Blame(reason)) if self.blame.is_none() => {
                (Self { blame: Some(reason), ..self.clone() }, None)
            }
            (Resetting, Input::Done) => match &self.blame {
                Some(reason) => (
                    Self { state: Quarantined { reason: reason.clone() }, blame: None, ..self.clone() },
                    None,
                ),
                None => (Self { state: Free, clean: true, ..self.clone() }, None),
            },
            (Returning, Input::Done) => (Self::of_the_host(), None),
            (Probed { .. }, Input::Failed(reason)) if reason.may_be_undone() => {
                (to(Returning), Some(Action::Return))
            }
            (Probed { .. } | Bound { .. } | Resetting | Returning, Input::Failed(reason)) => {
                // What failed first is the cause.
                let reason = self.blame.clone().unwrap_or(reason);
                (Self { state: Quarantined { reason }, clean: false, blame: None, ..self.clone() }, None)
            }
            // Nobody has used it. What is clean stays where it is.
            (Bound { vm }, Input::Ended(ended)) if *vm == ended && self.clean => (to(Free), None),
            (Probed { vm } | Bound { vm }, Input::Ended(ended)) if *vm == ended => {
                (to(Returning), Some(Action::Return))
            }
            (Leased { vm }, Input::Ended(ended)) if *vm == ended => (to(Resetting), Some(Action::Reset)),
            (Free, Input::GiveBack | Input::Release) | (Quarantined { .. }, Input::Release) => {
                (to(Returning), Some(Action::Return))
            }
            (_, Input::Release) => return Err(self.busy()),
            // In no state something is done that is not told of here.
            (_, Input::Done | Input::Failed(_) | Input::Blame(_) | Input::Ended(_) | Input::GiveBack) => {
                (self.clone(), None)
            }
        })
    }

    /// What is to be done next about a life that an earlier `laird` wrote down. What was being taken waits for its VM, which is started
    /// anew or has ended.
    pub fn resume(&self) -> Option<Action> {
        match self.state {
            State::Resetting => Some(Action::Reset),
            State::Returning => Some(Action::Return),
            State::Host
            | State::Probed { .. }
            | State::Bound { .. }
            | State::Leased { .. }
            | State::Free
            | State::Quarantined { .. } => None,
        }
    }

    /// Why nobody else can have it now.
    fn busy(&self) -> Refusal {
        match &self.state {
            State::Probed { .. } | State::Bound { .. } => Refusal::Busy("taken for a VM"),
            State::Leased { vm } => Refusal::Leased(vm.clone()),
            State::Resetting => Refusal::Busy("reset"),
            State::Returning => Refusal::Busy("given back to the host"),
            State::Quarantined { reason } => Refusal::Quarantined(reason.clone()),
            State::Host | State::Free => Refusal::NotTaken,
        }
    }

    /// Why no VM can have it now, if none can.
    pub fn obstacle(&self) -> Option<Refusal> {
        (!matches!(self.state, State::Host | State::Free)).then(|| self.busy())
    }
}

impl State {
    /// One word, as in JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Probed { .. } => "probed",
            Self::Bound { .. } => "bound",
            Self::Leased { .. } => "leased",
            Self::Resetting => "resetting",
            Self::Free => "free",
            Self::Returning => "returning",
            Self::Quarantined { .. } => "quarantined",
        }
    }

    /// The VM that has it, or is to have it.
    pub fn vm(&self) -> Option<&str> {
        match self {
            Self::Probed { vm } | Self::Bound { vm } | Self::Leased { vm } => Some(vm),
            Self::Host | Self::Resetting | Self::Free | Self::Returning | Self::Quarantined { .. } => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        match self {
            Self::Quarantined { reason } => write!(f, ": {reason}"),
            state => state.vm().map_or(Ok(()), |vm| write!(f, " for VM {vm}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason() -> impl Strategy<Value = Reason> {
        prop::sample::select(vec![
            Reason::Stuck { path: "/p".into(), text: "x".into(), seconds: 30 },
            Reason::StuckReset { address: "a".into(), path: "/p".into(), seconds: 30 },
            Reason::Refused { path: "/p".into(), text: "x".into(), error: "no".into() },
            Reason::Gone { address: "a".into() },
            Reason::Dead { address: "a".into() },
            Reason::NoReset { address: "a".into(), why: "no".into() },
        ])
    }

    fn input() -> impl Strategy<Value = Input> {
        let vm = || prop::sample::select(vec!["a".to_owned(), "b".to_owned()]);
        prop_oneof![
            3 => vm().prop_map(Input::Take),
            8 => Just(Input::Done),
            2 => reason().prop_map(Input::Failed),
            4 => vm().prop_map(Input::Ended),
            1 => reason().prop_map(Input::Blame),
            1 => Just(Input::GiveBack),
            1 => Just(Input::Release),
        ]
    }

    /// What happens to the device itself, as far as others care.
    #[derive(Default)]
    struct World {
        /// Who has used it since it was reset.
        used_by: Option<String>,
        /// The action that is being done.
        doing: Option<Action>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// VF8, VF9, VF10, VF14: whatever happens in whichever order, and wherever `laird` ends and starts again.
        #[test]
        fn vf14_nobody_gets_what_another_has_used_before_it_was_reset(inputs in prop::collection::vec((input(), prop::bool::weighted(0.1)), 0..60)) {
            let (mut life, mut world) = (Life::of_the_host(), World::default());
            for (input, dies) in inputs {
                if dies {
                    let text = serde_json::to_string(&life).unwrap();
                    prop_assert_eq!(&serde_json::from_str::<Life>(&text).unwrap(), &life);
                    world.doing = life.resume();
                }
                // Effects answer while they are under way, and then only.
                if matches!(input, Input::Done | Input::Failed(_)) && world.doing.is_none() {
                    continue;
                }
                let before = life.clone();
                let Ok((after, action)) = life.step(input.clone()) else {
                    prop_assert!(matches!(input, Input::Take(_) | Input::Release));
                    continue;
                };
                if matches!(input, Input::Done) && world.doing == Some(Action::Reset) {
                    world.used_by = None;
                }
                if matches!(input, Input::Done | Input::Failed(_)) {
                    world.doing = None;
                }
                if after != before {
                    world.doing = action;
                } else {
                    prop_assert_eq!(action, None);
                }
                // VF10: who has it keeps it until it has ended.
                if let State::Leased { vm } = &before.state {
                    let ended = input == Input::Ended(vm.clone());
                    prop_assert_eq!(after.state == before.state, !ended);
                    // VF9: and it is reset then, and not before.
                    prop_assert_eq!(action, ended.then_some(Action::Reset));
                }
                // VF8: a quarantine is an operator's to end.
                if matches!(before.state, State::Quarantined { .. }) && after.state != before.state {
                    prop_assert_eq!(&input, &Input::Release);
                }
                if let State::Leased { vm } = &after.state {
                    prop_assert!(world.used_by.is_none() || world.used_by.as_ref() == Some(vm), "{:?}", after);
                    world.used_by = Some(vm.clone());
                }
                if after.state == State::Free {
                    prop_assert!(after.clean && world.used_by.is_none());
                    prop_assert_eq!(&before.blame, &None);
                }
                // The host may have used it, which forgets the rest.
                if after.state == State::Host {
                    world.used_by = None;
                }
                life = after;
            }
        }

        /// Nothing is left half done: with effects that succeed, every life comes to rest.
        #[test]
        fn it_comes_to_rest(inputs in prop::collection::vec(input(), 0..20)) {
            let mut life = Life::of_the_host();
            for input in inputs {
                if let Ok((after, _)) = life.step(input) {
                    life = after;
                }
            }
            if let Some(vm) = life.state.vm().map(str::to_owned) {
                life = life.step(Input::Ended(vm)).unwrap().0;
            }
            let mut action = life.resume();
            for _ in 0..3 {
                if action.is_some() {
                    (life, action) = life.step(Input::Done).unwrap();
                }
            }
            prop_assert!(action.is_none());
            prop_assert!(matches!(life.state, State::Host | State::Free | State::Quarantined { .. }), "{:?}", life);
        }
    }

    #[test]
    fn vf10_a_second_vm_is_told_who_has_it() {
        let leased = Life {
            state: State::Leased { vm: "a".into() },
            clean: false,
            last: Some("a".into()),
            blame: None,
        };
        let refusal = leased.step(Input::Take("b".into())).unwrap_err();
        assert_eq!(refusal.to_string(), "VM a has it; stop the VM first");
        assert_eq!(leased.step(Input::Release).unwrap_err(), refusal);
        // The end of another VM is not that of this one.
        assert_eq!(leased.step(Input::Ended("b".into())).unwrap(), (leased.clone(), None));
    }

    #[test]
    fn vf5_what_hangs_is_not_tried_again_and_what_was_refused_is_undone() {
        let probed = Life { state: State::Probed { vm: "a".into() }, clean: false, last: None, blame: None };
        let stuck = Reason::Stuck { path: "/p".into(), text: "x".into(), seconds: 30 };
        let (life, action) = probed.step(Input::Failed(stuck.clone())).unwrap();
        assert_eq!((life.state, action), (State::Quarantined { reason: stuck }, None));
        let refused = Reason::Refused { path: "/p".into(), text: "x".into(), error: "no".into() };
        let (life, action) = probed.step(Input::Failed(refused)).unwrap();
        assert_eq!((life.state, action), (State::Returning, Some(Action::Return)));
    }

    #[test]
    fn vf11_what_failed_in_a_vm_is_reset_when_that_has_ended_and_then_nobodys() {
        let leased = Life {
            state: State::Leased { vm: "a".into() },
            clean: false,
            last: Some("a".into()),
            blame: None,
        };
        let faulty = |what: &str| Reason::Faulty { address: "d".into(), what: what.into() };
        let (blamed, action) = leased.step(Input::Blame(faulty("first"))).unwrap();
        assert_eq!((&blamed.state, action), (&leased.state, None));
        // The first is the cause.
        assert_eq!(blamed.step(Input::Blame(faulty("second"))).unwrap(), (blamed.clone(), None));
        let text = serde_json::to_string(&blamed).unwrap();
        assert_eq!(serde_json::from_str::<Life>(&text).unwrap(), blamed);
        let (resetting, action) = blamed.step(Input::Ended("a".into())).unwrap();
        assert_eq!((&resetting.state, action), (&State::Resetting, Some(Action::Reset)));
        let (life, action) = resetting.step(Input::Done).unwrap();
        assert_eq!((life.state, action), (State::Quarantined { reason: faulty("first") }, None));
        assert_eq!(life.blame, None);
        // Also where the reset fails as well.
        let (life, _) = resetting.step(Input::Failed(faulty("the reset"))).unwrap();
        assert_eq!((life.state, life.blame), (State::Quarantined { reason: faulty("first") }, None));
        // Nobody is blamed for what no VM has.
        let free = Life { state: State::Free, clean: true, last: None, blame: None };
        assert_eq!(free.step(Input::Blame(faulty("late"))).unwrap(), (free, None));
    }

    #[test]
    fn what_is_clean_is_not_reset_again_for_the_next_vm() {
        let free = Life { state: State::Free, clean: true, last: Some("a".into()), blame: None };
        let (probed, action) = free.step(Input::Take("b".into())).unwrap();
        assert_eq!(action, Some(Action::Bind));
        let (bound, action) = probed.step(Input::Done).unwrap();
        assert_eq!(action, Some(Action::Check));
        let (leased, action) = bound.step(Input::Done).unwrap();
        assert_eq!((leased.clean, leased.last.as_deref(), action), (false, Some("b"), None));
        // A start that was given up used nothing.
        assert_eq!(bound.step(Input::Ended("b".into())).unwrap(), (free, None));
    }
}
