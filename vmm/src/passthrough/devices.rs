//! The devices that VMs have: performs what [`super::machine`] says, and keeps it on disk.
//!
//! All that goes together is one [`Holding`]. Steps of its life are taken one at a time, in turns; only the first, by which a VM takes it,
//! is a matter of a moment and excludes all others.

use super::{
    binding::{self, Function, Goal, Seen},
    certificate::{self, Certificate, Measure, Sums},
    fault::Fault,
    machine::{Action, Input, Life, Reason, Refusal, State},
    record::{self, Holding},
    reset::{self, ResetBy},
    select::{self, Unmet},
    window::Window,
    write::Writer,
};
use crate::{
    error::chain,
    fleet::gpus::Gpu,
    host::{
        pci::{Address, AerCounts, Bridge, Device, DeviceError, Inventory, InventoryError, Sysfs},
        thread,
    },
    state::{
        dirs::{self, Dirs},
        file::WriteError,
    },
    vm::checkpoint,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::broadcast,
    time::{Instant, sleep, timeout},
};

/// How long the effect of a write may take to be seen, and a device to answer after its reset.
const SETTLE: Duration = Duration::from_secs(5);

/// How long a look at devices may take.
const LOOK: Duration = Duration::from_secs(10);

/// The pause between two looks.
const POLL: Duration = Duration::from_millis(20);

/// The most writes to one function on its way.
const WRITES_MAX: usize = 12;

/// What happened to devices that go together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The lowest address among them.
    pub device: Address,
    /// The VM that has them, or is to have them; of a lease that is over, the one that had them.
    pub vm: Option<String>,
    /// What it was.
    pub what: What,
}

/// What happened to devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// They are in another state, or there is more to be told about the one that they are in.
    State {
        /// The state.
        state: &'static str,
        /// More about it.
        detail: Option<String>,
    },
    /// The guest says something against one of them, for the first time in this lease.
    Fault(Address, Fault),
    /// A lease is over.
    LeaseEnded(Box<Certificate>),
}

/// What a VM has been given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// The functions that it sees, by address.
    pub functions: Vec<Address>,
    /// The nodes of their IOMMU groups, which its hypervisor opens.
    pub nodes: Vec<PathBuf>,
    /// The windows of what it sees.
    pub windows: Vec<Window>,
}

/// Why a VM does not get its devices.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// There are none for it.
    #[error(transparent)]
    Unmet(#[from] Unmet),
    /// The host's devices cannot be listed.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// Something takes too long.
    #[error("{0} was not done within {1:?}")]
    Overdue(&'static str, Duration),
    /// There is no thread for it.
    #[error(transparent)]
    Thread(#[from] thread::ThreadError),
    /// What is done cannot be written down, so it is not done.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The device cannot be used.
    #[error("Device {device}: {reason}")]
    Device {
        /// The device.
        device: Address,
        /// Why.
        reason: Reason,
    },
    /// The device is not where the request makes sense.
    #[error("Device {device}: {refusal}")]
    Refused {
        /// The device.
        device: Address,
        /// Why.
        refusal: Refusal,
    },
    /// A task of ours was lost.
    #[error("Internal error: a task ended without a result")]
    Lost,
}

/// All devices that are not the host's.
#[derive(Debug)]
pub struct Devices {
    sysfs: Sysfs,
    directory: PathBuf,
    locks: PathBuf,
    boot_id: String,
    writer: Writer,
    held: Mutex<BTreeMap<Address, Holding>>,
    turns: Mutex<BTreeMap<Address, Arc<tokio::sync::Mutex<()>>>>,
    /// Held while a record is written, so that the last is what is.
    disk: Mutex<()>,
    /// What the VMs of the fleet ask for.
    wanted: Mutex<Vec<Gpu>>,
    /// What the guest of each VM has said since it booted.
    heard: Mutex<BTreeMap<String, Sums>>,
    told: broadcast::Sender<Told>,
    /// Hears all from the beginning.
    first: Mutex<broadcast::Receiver<Told>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// Those that an earlier `laird` has recorded below `dirs`.
    pub fn open(sysfs: Sysfs, dirs: &Dirs, boot_id: &str, writer: Writer) -> Arc<Self> {
        let directory = dirs.state.join("devices");
        let (told, first) = broadcast::channel(256);
        crate::state::file::remove_leftovers(&directory);
        Arc::new(Self {
            held: Mutex::new(record::read(&directory, boot_id)),
            sysfs,
            directory,
            locks: dirs.run.join("devices"),
            boot_id: boot_id.into(),
            writer,
            turns: Mutex::default(),
            disk: Mutex::default(),
            wanted: Mutex::default(),
            heard: Mutex::default(),
            told,
            first: Mutex::new(first),
        })
    }

    /// What happens from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Told> {
        self.told.subscribe()
    }

    /// What happens, and what has happened since this was opened. For one who asks once.
    pub fn told_since_the_start(&self) -> broadcast::Receiver<Told> {
        std::mem::replace(&mut *lock(&self.first), self.told.subscribe())
    }

    /// Where they are seen.
    pub(super) fn sysfs(&self) -> &Sysfs {
        &self.sysfs
    }

    /// All that are not the host's, by the lowest address of those that go together.
    pub fn held(&self) -> BTreeMap<Address, Holding> {
        lock(&self.held).clone()
    }

    /// Goes on where an earlier `laird` ended: what was under way is done, and what a VM had of which nothing runs is released. `active` are
    /// the VMs of which something may run, or whose clean-up is to come. It takes as long as the devices do, so it is done besides.
    pub fn resume(self: &Arc<Self>, active: BTreeSet<String>) {
        for (key, holding) in self.held() {
            let devices = Arc::clone(self);
            let ended = holding.life.state.vm().filter(|vm| !active.contains(*vm)).map(str::to_owned);
            if ended.is_none() && holding.life.resume().is_none() {
                continue;
            }
            tokio::spawn(async move {
                let outcome = match ended {
                    Some(vm) => devices.drive(key, Some(Input::Ended(vm))).await,
                    None => devices.drive(key, None).await,
                };
                devices.log(key, outcome);
                devices.settle().await;
            });
        }
    }

    /// What the VMs of the fleet ask for from now on. What none of them does goes back to the host.
    pub fn want(self: &Arc<Self>, wanted: Vec<Gpu>) {
        *lock(&self.wanted) = wanted;
        let devices = Arc::clone(self);
        tokio::spawn(async move { devices.settle().await });
    }

    /// The windows of what `vm` would get, or why it would not get what it asks for. Nothing is changed.
    pub async fn check(&self, vm: &str, wants: &[Gpu]) -> Result<Vec<Window>, DevicesError> {
        if wants.is_empty() {
            return Ok(vec![]);
        }
        let inventory = self.inventory().await?;
        // What is being reset or given back is waited for, when it comes to that; what it has itself, it gives back first.
        let mut held = self.held();
        held.retain(|_, holding| !is_transient(holding));
        let chosen = select::choose(vm, wants, &inventory, &held)?;
        Ok(chosen.iter().flat_map(select::Chosen::windows).collect())
    }

    /// Gives a VM of which nothing runs the devices that it asks for: bound to VFIO, reset, verified. Whatever becomes of it,
    /// [`Self::release`] undoes it.
    pub async fn acquire(self: &Arc<Self>, vm: &str, wants: &[Gpu]) -> Result<Vec<Given>, DevicesError> {
        self.release(vm).await;
        self.give(vm, wants).await
    }

    /// Gives a VM what it asks for. What it has of that already it keeps.
    async fn give(self: &Arc<Self>, vm: &str, wants: &[Gpu]) -> Result<Vec<Given>, DevicesError> {
        if wants.is_empty() {
            return Ok(vec![]);
        }
        let meant = |holding: &Holding| {
            wants.iter().any(|want| match want {
                Gpu::At(at) => holding.has(at.address),
                Gpu::Any(_) => true,
            })
        };
        for (key, _) in self.held().iter().filter(|(_, holding)| is_transient(holding) && meant(holding)) {
            // What comes of it is seen below.
            let _ = self.drive(*key, None).await;
        }
        let inventory = self.inventory().await?;
        let chosen = self.take(vm, wants, &inventory)?;
        let mut given = Vec::new();
        for chosen in &chosen {
            if let Err(error) = self.keep(chosen.key).await {
                // Nothing was done to it.
                self.forget_taken(&chosen.key, vm);
                return Err(error);
            }
        }
        for chosen in &chosen {
            self.drive(chosen.key, None).await?;
            let holding = self.held().remove(&chosen.key).ok_or(DevicesError::Lost)?;
            if holding.life.state != (State::Leased { vm: vm.into() }) {
                return Err(DevicesError::Lost);
            }
            let nodes = holding.groups().into_iter().map(|group| self.node(group)).collect();
            let functions = chosen.given.iter().copied().collect();
            given.push(Given { functions, nodes, windows: chosen.windows() });
        }
        Ok(given)
    }

    /// Chooses, and takes at once what was chosen: of two VMs that ask for the same one gets it.
    fn take(
        &self,
        vm: &str,
        wants: &[Gpu],
        inventory: &Inventory,
    ) -> Result<Vec<select::Chosen>, DevicesError> {
        let mut held = lock(&self.held);
        let chosen = select::choose(vm, wants, inventory, &held)?;
        let has = |held: &BTreeMap<Address, Holding>, key| {
            held.get(&key).is_some_and(|holding| holding.life.state.vm() == Some(vm))
        };
        let news: Vec<_> = chosen.iter().filter(|chosen| !has(&held, chosen.key)).collect();
        for chosen in news {
            let holding = held
                .entry(chosen.key)
                .or_insert_with(|| Holding::of(chosen.functions.clone(), &self.boot_id));
            let refused = |refusal| DevicesError::Refused { device: chosen.key, refusal };
            let (life, _) = holding.life.step(Input::Take(vm.into())).map_err(refused)?;
            (holding.life, holding.since) = (life, jiff::Timestamp::now());
            holding.places.clear();
        }
        Ok(chosen)
    }

    fn forget_taken(&self, key: &Address, vm: &str) {
        let mut held = lock(&self.held);
        let Some(holding) = held.get_mut(key) else { return };
        if holding.life.state == (State::Probed { vm: vm.into() }) {
            if holding.life.clean {
                holding.life.state = State::Free;
            } else {
                held.remove(key);
            }
        }
    }

    /// Takes back what a VM has, of which nothing runs any more: it is reset and free, or quarantined.
    pub async fn release(self: &Arc<Self>, vm: &str) {
        let keys = self.keys(|holding| holding.life.state.vm() == Some(vm));
        if keys.is_empty() {
            return;
        }
        self.end(vm, keys).await;
        self.settle().await;
    }

    /// Those of which this is true.
    fn keys(&self, which: impl Fn(&Holding) -> bool) -> BTreeSet<Address> {
        lock(&self.held).iter().filter(|(_, holding)| which(holding)).map(|(key, _)| *key).collect()
    }

    /// Takes back what a VM has, or was to have.
    async fn end(self: &Arc<Self>, vm: &str, keys: BTreeSet<Address>) {
        for key in keys {
            // In a task of its own: it goes on to its end whoever waits for it.
            let (devices, vm) = (Arc::clone(self), vm.to_owned());
            let task = tokio::spawn(async move {
                let outcome = devices.drive(key, Some(Input::Ended(vm))).await;
                devices.log(key, outcome);
            });
            let _ = task.await;
        }
    }

    /// Notes what was seen or reported of a device while `vm` has it. The VM goes on with it; when it has ended, the device is quarantined.
    /// The first word counts, all others are nothing. `false` where `vm` does not have the device, or somebody said so before.
    pub async fn blame(
        self: &Arc<Self>,
        vm: &str,
        address: Address,
        what: String,
    ) -> Result<bool, DevicesError> {
        let is_its =
            |holding: &Holding| holding.has(address) && holding.life.state == State::Leased { vm: vm.into() };
        let news = |holding: &Holding| is_its(holding) && holding.life.blame.is_none();
        let Some((key, _)) = self.held().into_iter().find(|(_, holding)| news(holding)) else {
            return Ok(false);
        };
        let reason = Reason::Faulty { address: address.to_string(), what };
        let (devices, vm) = (Arc::clone(self), vm.to_owned());
        // In a task of its own: it is written down whoever waits for it.
        tokio::spawn(async move {
            let turn = Arc::clone(lock(&devices.turns).entry(key).or_default());
            let _turn = turn.lock().await;
            if lock(&devices.held).get(&key).is_none_or(|holding| holding.life.state.vm() != Some(&vm)) {
                return Ok(false);
            }
            devices.advance(key, Input::Blame(reason)).await.map(|_| true)
        })
        .await
        .unwrap_or(Err(DevicesError::Lost))
    }

    /// What failed of the devices that `vm` has, one sentence each.
    pub fn faults(&self, vm: &str) -> Vec<String> {
        let held = lock(&self.held);
        let its = held.values().filter(|holding| holding.life.state == State::Leased { vm: vm.into() });
        its.filter_map(|holding| Some(holding.life.blame.as_ref()?.to_string())).collect()
    }

    /// Gives devices back to the host at an operator's word, also those that are quarantined.
    pub async fn give_back(self: &Arc<Self>, address: Address) -> Result<(), DevicesError> {
        let key = self.held().into_iter().find(|(_, holding)| holding.has(address)).map(|(key, _)| key);
        let refused = |refusal| DevicesError::Refused { device: address, refusal };
        let key = key.ok_or_else(|| refused(Refusal::NotTaken))?;
        let devices = Arc::clone(self);
        tokio::spawn(async move { devices.drive(key, Some(Input::Release)).await })
            .await
            .unwrap_or(Err(DevicesError::Lost))
    }

    /// Gives what is free and what nobody asks for back to the host.
    async fn settle(self: &Arc<Self>) {
        let free: Vec<_> =
            self.held().into_iter().filter(|(_, holding)| holding.life.state == State::Free).collect();
        if free.is_empty() {
            return;
        }
        let Ok(inventory) = self.inventory().await else { return };
        let wanted = lock(&self.wanted).clone();
        for (key, holding) in free {
            let mut devices = holding.functions.iter().filter_map(|f| inventory.devices.get(&f.address));
            let named = devices.any(|device| wanted.iter().any(|want| want.means(device)));
            if !named {
                let devices = Arc::clone(self);
                let task = tokio::spawn(async move {
                    let outcome = devices.drive(key, Some(Input::GiveBack)).await;
                    devices.log(key, outcome);
                });
                let _ = task.await;
            }
        }
    }

    fn log(&self, key: Address, outcome: Result<(), DevicesError>) {
        if let Err(error) = outcome {
            tracing::error!(device = %key, error = chain(&error), "a device is not as it should be");
        }
    }

    /// Takes an input, and does what follows from it until nothing does. Without an input it goes on with what is to be done.
    async fn drive(self: &Arc<Self>, key: Address, input: Option<Input>) -> Result<(), DevicesError> {
        let turn = Arc::clone(lock(&self.turns).entry(key).or_default());
        let _turn = turn.lock().await;
        let mut action = match input {
            Some(input) => self.advance(key, input).await?,
            None => self.next_action(key),
        };
        let mut failed = None;
        while let Some(now) = action {
            checkpoint::reach(&format!("{key}: before {now:?}"));
            let input = match self.perform(key, now).await {
                Ok(()) => Input::Done,
                Err(reason) => {
                    tracing::warn!(device = %key, action = ?now, %reason, "it could not be done");
                    failed.get_or_insert_with(|| reason.clone());
                    Input::Failed(reason)
                }
            };
            checkpoint::reach(&format!("{key}: after {now:?}"));
            action = self.advance(key, input).await?;
        }
        failed.map_or(Ok(()), |reason| Err(DevicesError::Device { device: key, reason }))
    }

    /// What is to be done about devices that were just taken, or whose way was cut short.
    fn next_action(&self, key: Address) -> Option<Action> {
        let held = lock(&self.held);
        let life = &held.get(&key)?.life;
        if matches!(life.state, State::Probed { .. }) { Some(Action::Bind) } else { life.resume() }
    }

    /// Takes an input, and writes down what becomes of it before anything is done about it.
    async fn advance(self: &Arc<Self>, key: Address, input: Input) -> Result<Option<Action>, DevicesError> {
        let (was, before, after, action, ended) = {
            let mut held = lock(&self.held);
            let refused = |refusal| DevicesError::Refused { device: key, refusal };
            let holding = held.get_mut(&key).ok_or_else(|| refused(Refusal::NotTaken))?;
            let was = holding.clone();
            let before = was.life.clone();
            let (life, action) = before.step(input).map_err(refused)?;
            if life == before {
                return Ok(None);
            }
            if life.state != before.state {
                holding.since = jiff::Timestamp::now();
            }
            holding.life = life;
            let Holding { life, lease, look, reset_ms, since, .. } = holding;
            let earlier = |vm: &str| lock(&self.heard).get(vm).cloned();
            let ended =
                certificate::follow(lease, &before.state, &life.state, look, *reset_ms, earlier, *since);
            (was, before, holding.clone(), action, ended)
        };
        if let Err(error) = self.keep(key).await {
            match after.life.state {
                // What a later `laird` would not know is not done. That a device has failed is known to this one at least.
                State::Probed { .. } | State::Bound { .. } | State::Leased { .. }
                    if before.state != after.life.state =>
                {
                    if let Some(holding) = lock(&self.held).get_mut(&key) {
                        *holding = was;
                    }
                    return Err(error);
                }
                // What would be done again, or is known from what is on disk.
                _ => {
                    tracing::error!(device = %key, error = chain(&error), "cannot write down what becomes of it")
                }
            }
        }
        self.tell(key, &before, &after);
        if let Some(lease) = ended {
            self.say(Told {
                device: key,
                vm: Some(lease.vm.clone()),
                what: What::LeaseEnded(Box::new(lease)),
            });
        }
        Ok(action)
    }

    fn tell(&self, key: Address, before: &Life, holding: &Holding) {
        let state = &holding.life.state;
        let reset = holding.reset_ms.map(|ms| format!("reset in {ms} ms")).unwrap_or_default();
        let detail = match state {
            State::Leased { .. } if before.state == *state => holding
                .life
                .blame
                .as_ref()
                .map(|reason| format!("{reason}; quarantined once the VM has ended")),
            State::Leased { .. } => Some(match &before.last {
                Some(last) => format!("{reset}, after VM {last} had it"),
                None => reset,
            }),
            State::Free => Some(reset),
            State::Quarantined { reason } => Some(reason.to_string()),
            State::Host => {
                let drivers: Vec<_> = holding.functions.iter().filter_map(|f| f.driver.clone()).collect();
                Some(if drivers.is_empty() { "no driver".into() } else { drivers.join(", ") })
            }
            State::Probed { .. } | State::Bound { .. } | State::Resetting | State::Returning => None,
        };
        let (vm, word) = (state.vm().map(str::to_owned), state.word());
        match state {
            State::Leased { .. } if holding.life.blame.is_some() => {
                tracing::error!(device = %key, state = word, vm, detail, "device")
            }
            State::Quarantined { .. } => tracing::error!(device = %key, state = word, detail, "device"),
            _ => tracing::info!(device = %key, state = word, vm, detail, "device"),
        }
        self.say(Told { device: key, vm, what: What::State { state: word, detail } });
    }

    /// Nobody has to listen.
    fn say(&self, told: Told) {
        let _ = self.told.send(told);
    }

    /// Writes down how it is now.
    async fn keep(self: &Arc<Self>, key: Address) -> Result<(), DevicesError> {
        checkpoint::reach(&format!("{key}: before it is recorded"));
        let devices = Arc::clone(self);
        let written = thread::run(move || {
            let _disk = lock(&devices.disk);
            let holding = lock(&devices.held).get(&key).cloned();
            let holding = holding.filter(|holding| holding.life.state != State::Host);
            if let Err(error) = dirs::create(&devices.directory, 0o700) {
                let source = io::Error::other(chain(&error));
                return Err(WriteError { path: devices.directory.clone(), step: "making it", source });
            }
            let written = record::write(&devices.directory, key, holding.as_ref());
            let mut held = lock(&devices.held);
            if held.get(&key).is_some_and(|holding| holding.life.state == State::Host) {
                held.remove(&key);
            }
            written
        });
        written.await??;
        checkpoint::reach(&format!("{key}: recorded"));
        Ok(())
    }

    async fn perform(&self, key: Address, action: Action) -> Result<(), Reason> {
        let holding = self.held().remove(&key).ok_or(Reason::Host { error: "it is not known".into() })?;
        match action {
            Action::Bind => {
                for function in &holding.functions {
                    self.bring(key, function, Goal::Vfio).await?;
                }
                Ok(())
            }
            Action::Return => {
                let mut first = Ok(());
                for function in &holding.functions {
                    first = first.and(self.bring(key, function, Goal::Host).await);
                }
                first
            }
            Action::Reset => {
                self.looked(key, vec![]);
                // Before it is looked who has them open: a hypervisor that lives on, after a card was taken out of it, opens them no more.
                self.own_nodes(&holding).await?;
                self.await_closed(&holding).await?;
                let began = Instant::now();
                self.reset(key, &holding).await?;
                let look = self.await_fine(&holding).await?;
                if let Some(holding) = lock(&self.held).get_mut(&key) {
                    holding.reset_ms = u64::try_from(began.elapsed().as_millis()).ok();
                }
                self.looked(key, look.clone());
                let lease = holding.lease.as_ref().filter(|lease| lease.is_open());
                lease.and_then(|lease| lease.lost_window(&look)).map_or(Ok(()), Err)
            }
            Action::Check => {
                self.await_closed(&holding).await?;
                self.looked(key, self.await_fine(&holding).await?);
                Ok(())
            }
        }
    }

    /// Keeps in mind how functions are now.
    fn looked(&self, key: Address, look: Vec<(Address, Measure)>) {
        if let Some(holding) = lock(&self.held).get_mut(&key) {
            holding.look = look;
        }
    }

    /// Writes, one after the other, what brings a function to its goal. What was written is read back each time.
    async fn bring(&self, key: Address, function: &Function, goal: Goal) -> Result<(), Reason> {
        let address = function.address;
        let (mut last, mut written) = (None, Instant::now());
        for _ in 0..WRITES_MAX {
            let write = loop {
                let device = match self.look(address).await {
                    Ok(device) => device,
                    // There is nothing to give back.
                    Err(Reason::Gone { .. }) if goal == Goal::Host => return Ok(()),
                    Err(reason) => return Err(reason),
                };
                match binding::next(function, goal, &Seen::of(&device)) {
                    None => return Ok(()),
                    Some(write) if last.as_ref() != Some(&write) => break write,
                    Some(write) if written.elapsed() > SETTLE => {
                        return Err(Reason::NoEffect {
                            address: address.to_string(),
                            wanted: write.wanted(),
                        });
                    }
                    Some(_) => sleep(POLL).await,
                }
            };
            let (path, text) = write.target(address);
            self.write(key, &path, &text).await?;
            (last, written) = (Some(write), Instant::now());
        }
        Err(Reason::NoEffect {
            address: address.to_string(),
            wanted: "another driver takes it again and again".into(),
        })
    }

    async fn write(&self, key: Address, path: &str, text: &str) -> Result<(), Reason> {
        checkpoint::reach(&format!("{key}: before {:?} to {path}", text.trim_end()));
        let lock = self.locks.join(format!("{key}.lock"));
        let written = self.writer.write(&lock, &self.sysfs.path(path), text).await;
        checkpoint::reach(&format!("{key}: after {:?} to {path}", text.trim_end()));
        written
    }

    async fn reset(&self, key: Address, holding: &Holding) -> Result<(), Reason> {
        let (sysfs, functions) = (self.sysfs.clone(), holding.functions.clone());
        let look = in_time(move || {
            let mut devices = Vec::new();
            let mut bridges = BTreeMap::new();
            for function in &functions {
                devices.push(Device::read(&sysfs, function.address).map_err(|error| unread(&error))?);
                let bridge = Bridge::above(&sysfs, function.address);
                let bridge = bridge.map_err(|error| Reason::Host { error: error.to_string() })?;
                bridges.extend(bridge.map(|bridge| (function.address, bridge)));
            }
            Ok((devices, bridges))
        });
        let (devices, bridges) = look.await?;
        for by in reset::plan(&devices, &bridges)? {
            let done = match by {
                ResetBy::File(path) => self.write(key, &path, "1").await,
                ResetBy::Vfio { function, groups } => {
                    checkpoint::reach(&format!("{key}: before VFIO resets it"));
                    let nodes: Vec<_> = groups.into_iter().map(|group| self.node(group)).collect();
                    let lock = self.locks.join(format!("{key}.lock"));
                    let done = self.writer.hot_reset(&lock, function, &nodes).await;
                    checkpoint::reach(&format!("{key}: after VFIO has reset it"));
                    done
                }
            };
            done.map_err(|reason| match reason {
                Reason::Refused { path, error, .. } => {
                    Reason::NoReset { address: key.to_string(), why: format!("{}: {error}", path.display()) }
                }
                other => other,
            })?;
        }
        Ok(())
    }

    /// Waits until all functions are as they were before they were taken; how they are.
    async fn await_fine(&self, holding: &Holding) -> Result<Vec<(Address, Measure)>, Reason> {
        let began = Instant::now();
        loop {
            let (sysfs, functions) = (self.sysfs.clone(), holding.functions.clone());
            let outcome = in_time(move || {
                let mut look = Vec::new();
                for function in &functions {
                    let device = Device::read(&sysfs, function.address).map_err(|error| unread(&error))?;
                    let numbers = sysfs.numbers(function.address);
                    let numbers = numbers.map_err(|error| Reason::Host { error: error.to_string() })?;
                    reset::check(function, &device, numbers)?;
                    let aer = AerCounts::read(&sysfs, function.address);
                    look.push((function.address, Measure::of(&device, aer)));
                }
                Ok(look)
            });
            match outcome.await {
                Err(Reason::Dead { .. } | Reason::Width { .. }) if began.elapsed() < SETTLE => {
                    sleep(POLL).await
                }
                outcome => return outcome,
            }
        }
    }

    async fn look(&self, address: Address) -> Result<Device, Reason> {
        let sysfs = self.sysfs.clone();
        in_time(move || Device::read(&sysfs, address).map_err(|error| unread(&error))).await
    }

    async fn inventory(&self) -> Result<Inventory, DevicesError> {
        let sysfs = self.sysfs.clone();
        let read = thread::run(move || Inventory::read(&sysfs));
        Ok(timeout(LOOK, read)
            .await
            .map_err(|_| DevicesError::Overdue("Looking at the PCI devices", LOOK))???)
    }
}

/// Whether it is on its way to where VMs can have it.
fn is_transient(holding: &Holding) -> bool {
    matches!(holding.life.state, State::Resetting | State::Returning)
}

fn unread(error: &DeviceError) -> Reason {
    match error {
        DeviceError::Missing(address) => Reason::Gone { address: address.to_string() },
        error => Reason::Host { error: chain(error) },
    }
}

/// Looks on a thread: also a read may hang where a device does.
async fn in_time<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    let host = |error: String| Reason::Host { error };
    match timeout(LOOK, thread::run(look)).await {
        Ok(outcome) => outcome.map_err(|error| host(chain(&error)))?,
        Err(_) => Err(host(format!("a look at the device was not done within {LOOK:?}"))),
    }
}

mod adjust;
mod nodes;
pub mod reports;
#[cfg(test)]
mod tests;
