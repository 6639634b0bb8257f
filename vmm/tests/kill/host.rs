//! A host in a directory of its own: its programs, its fleet file, and the `laird` of the moment.

use crate::{kernel::Kernel, stand_in, store};
use lair_vmm::{
    api::{
        client::{Client, ClientError},
        types::{ApplyRequest, VmStatus},
    },
    cgroup,
    host::{facts, tools},
    state::dirs::Dirs,
    vm::orphan,
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// No wait of these tests is longer: far above what anything takes, also on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

const POLL: Duration = Duration::from_millis(5);

/// What happens without anybody's asking happens within this.
const QUIET: Duration = Duration::from_millis(200);

/// A store path that is valid in the host's source.
const ROOT: &str = "0123456789abcdfghijklmnpqrsvwxyz-root";

/// Looks until there is something to see.
pub(crate) fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < LIMIT, "it does not happen");
        std::thread::sleep(POLL);
    }
}

pub(crate) struct Host {
    directory: TempDir,
    laird: Option<Child>,
    /// Who runs `laird`, if not who runs the test.
    pub(crate) user: Option<u32>,
    /// The devices of the host, where it has some that a test may have.
    pub(crate) kernel: Option<Kernel>,
    /// Where `laird` has its cgroups, if VMs are limited.
    delegated: Option<Delegated>,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::within(Path::new("/tmp"))
    }

    fn within(directory: &Path) -> Self {
        // Short, for the sockets below it.
        let directory = TempDir::with_prefix_in("lk", directory).unwrap();
        let host = Self { directory, laird: None, user: None, kernel: None, delegated: None };
        for name in ["kernel", "guest"] {
            fs::write(host.path(name), name).unwrap();
        }
        fs::create_dir(host.path("modules")).unwrap();
        fs::write(host.path("modules/modules.dep"), "").unwrap();
        let wanted = lair_guest::initramfs::WANTED_MODULES;
        let builtin: String = wanted.iter().map(|module| format!("kernel/{module}.ko\n")).collect();
        fs::write(host.path("modules/modules.builtin"), builtin).unwrap();
        fs::create_dir(host.path("bin")).unwrap();
        // Programs beside it come before those in PATH, so it is not run where it was built.
        let laird = host.path("bin/laird");
        if fs::hard_link(env!("CARGO_BIN_EXE_laird"), &laird).is_err() {
            fs::copy(env!("CARGO_BIN_EXE_laird"), &laird).unwrap();
        }
        for tool in [tools::QEMU, tools::VHOST_DEVICE_VSOCK, tools::VIRTIOFS, tools::SHIM] {
            host.stand_in(tool);
        }
        host.script(tools::GUEST.name, "exit 1");
        host.script(tools::MKFS.name, "exit 0");
        host.script("systemctl", "echo running");
        store::make(&host.path("source"), &[ROOT]);
        host
    }

    /// Gives all of it to a user that runs nothing else. Whoever is not root stays who it is.
    pub(crate) fn give_to(&mut self, user: u32) {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut all = vec![self.directory.path().to_owned()];
        list(self.directory.path(), &mut all);
        for path in all {
            std::os::unix::fs::lchown(path, Some(user), Some(user)).unwrap();
        }
        self.user = Some(user);
    }

    /// One that limits its VMs and has KVM, or why there can be none.
    pub(crate) fn limited() -> Result<Self, String> {
        facts::kvm().map_err(|reason| reason.to_string())?;
        let delegated = Delegated::new()?;
        // On a disk, where there is one whose reads and writes can be limited.
        let disk = std::env::var_os("LAIR_HOST_VM_DISK").unwrap_or("/tmp".into());
        let mut host = Self::within(Path::new(&disk));
        host.delegated = Some(delegated);
        Ok(host)
    }

    /// The cgroup of a VM.
    pub(crate) fn cgroup(&self, vm: &str) -> PathBuf {
        self.delegated.as_ref().unwrap().0.join("lair/vms").join(vm)
    }

    /// Puts a stand-in in a program's place.
    pub(crate) fn stand_in(&self, tool: tools::Tool) {
        // Anybody may run it here, wherever it was built; it is too large for copies.
        let (built, here) = (std::env::current_exe().unwrap(), self.path("stand-in"));
        let linked = here.exists() || fs::hard_link(&built, &here).is_ok();
        let test = if linked { here } else { built };
        let script = format!(
            "IFS='\n'\n{arguments}=\"$*\" {program}={name} exec {test} --exact stand_in::stand_in --ignored --nocapture --quiet",
            arguments = stand_in::ARGUMENTS,
            program = stand_in::PROGRAM,
            name = tool.name,
            test = test.display(),
        );
        self.script(tool.name, &script);
    }

    /// Puts a shell script in a program's place.
    pub(crate) fn script(&self, name: &str, script: &str) {
        let (file, beside) = (self.path("bin").join(name), self.path(&format!("{name}.new")));
        fs::write(&beside, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(beside, file).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn dirs(&self) -> Dirs {
        Dirs { state: self.path("state"), run: self.path("run") }
    }

    /// Writes a fleet file with these VMs, each with more keys.
    pub(crate) fn fleet(&self, vms: &[(&str, &str)]) {
        let directory = self.directory.path().display();
        let vm = |(name, keys): &(&str, &str)| {
            format!(
                "[vms.{name}]\nvcpus = 1\nmemory = \"64MiB\"\nkernel = \"{directory}/kernel\"\nmodules = \"{directory}/modules\"\n\
                 roots = [\"/nix/store/{ROOT}\"]\n{keys}\n"
            )
        };
        let vms: String = vms.iter().map(vm).collect();
        let host = match self.delegated {
            None => "accel = \"tcg\", limits = \"none\"",
            Some(_) => "accel = \"kvm\"",
        };
        let fleet = format!(
            "schema = 1\nhost = {{ {host}, users = \"shared\" }}\nstore.sources = [{{ root = \"{directory}/source\" }}]\n{vms}"
        );
        // In one go: a laird that is just starting may read it.
        fs::write(self.path("fleet.new"), fleet).unwrap();
        fs::rename(self.path("fleet.new"), self.path("fleet.toml")).unwrap();
    }

    /// Starts `laird`, to be killed at the given point.
    pub(crate) fn laird(&mut self, kill_at: Option<usize>) {
        let log = File::options().append(true).create(true).open(self.path("laird.log")).unwrap();
        let laird = self.path("bin/laird");
        let mut command = match &self.delegated {
            None => Command::new(laird),
            Some(delegated) => delegated.enter(&laird),
        };
        for (option, name) in [("--fleet", "fleet.toml"), ("--state-dir", "state"), ("--run-dir", "run")] {
            command.arg(option).arg(self.path(name));
        }
        command
            .env("LAIR_LOG", "info")
            .env("NO_COLOR", "1")
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()))
            .env("LAIR_CHECKPOINTS", self.path("checkpoints"))
            .env_remove("LAIR_KILL_AT")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(kernel) = &self.kernel {
            command.env("LAIR_SYSFS", kernel.root()).env("LAIR_SYSFS_WRITER", kernel.program());
        }
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        if let Some(at) = kill_at {
            command.env("LAIR_KILL_AT", at.to_string());
        }
        self.laird = Some(command.spawn().unwrap());
    }

    /// The process of `laird`.
    pub(crate) fn laird_pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.laird.as_ref().unwrap().id().cast_signed())
    }

    /// What `laird` said, all of them.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("laird.log")).unwrap()
    }

    /// Whether `laird` has ended.
    pub(crate) fn is_dead(&mut self) -> bool {
        self.laird.as_mut().is_none_or(|laird| laird.try_wait().unwrap().is_some())
    }

    /// Waits until `laird` reaches no more points; whether it lives then.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let (mut seen, mut since) = (0, Instant::now());
        while since.elapsed() < QUIET {
            let now = fs::metadata(self.path("checkpoints")).map_or(0, |file| file.len());
            if now != seen || self.is_writing() {
                (seen, since) = (now, Instant::now());
            }
            std::thread::sleep(POLL);
        }
        !self.is_dead()
    }

    /// Whether something is being written about devices, by this `laird` or for an earlier one.
    fn is_writing(&self) -> bool {
        fs::read_dir(self.dirs().run.join("devices")).into_iter().flatten().flatten().any(|lock| {
            let lock = File::options().write(true).open(lock.path());
            lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)))
        })
    }

    /// Waits until `laird`, which is being killed, has ended.
    pub(crate) fn await_death(&mut self) {
        let began = Instant::now();
        while !self.is_dead() {
            assert!(began.elapsed() < LIMIT, "laird lives");
            std::thread::sleep(POLL);
        }
        self.laird = None;
    }

    /// Kills `laird`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut laird) = self.laird.take() {
            let _ = laird.kill();
            let _ = laird.wait();
        }
    }

    /// Has `laird` end by SIGTERM and waits for its end.
    pub(crate) fn terminate(&mut self) {
        nix::sys::signal::kill(self.laird_pid(), nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = self.laird.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Asks `laird`, however long it takes to listen; an error if it ends meanwhile.
    pub(crate) fn ask<T>(
        &mut self,
        question: impl AsyncFn(Client) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (client, began) = (Client::new(&self.dirs().api_socket()), Instant::now());
        loop {
            let answer = runtime.block_on(question(client.clone()));
            match answer {
                // It has not come so far yet.
                Err(ClientError::Down(_)) if !self.is_dead() && began.elapsed() < LIMIT => {
                    std::thread::sleep(POLL)
                }
                answer => return answer,
            }
        }
    }

    pub(crate) fn start(&mut self, vm: &str) -> Result<(), ClientError> {
        self.ask(async |client| client.start(vm).await)
    }

    pub(crate) fn stop(&mut self, vm: &str) -> Result<(), ClientError> {
        self.ask(async |client| client.stop(vm).await)
    }

    pub(crate) fn restart(&mut self, vm: &str) -> Result<(), ClientError> {
        self.ask(async |client| client.restart(vm).await)
    }

    pub(crate) fn kill_vm(&mut self, vm: &str) -> Result<(), ClientError> {
        self.ask(async |client| client.kill(vm).await)
    }

    pub(crate) fn apply(&mut self) -> Result<(), ClientError> {
        self.ask(async |client| client.apply(&ApplyRequest::default()).await.map(drop))
    }

    pub(crate) fn status(&mut self) -> Result<BTreeMap<String, VmStatus>, ClientError> {
        let status = self.ask(async |client| client.status().await)?;
        Ok(status.vms.into_iter().map(|vm| (vm.name.clone(), vm)).collect())
    }

    /// Waits until all VMs are as `wanted` says, and nothing else is there. `None` if `laird` ends before.
    pub(crate) fn settled(&mut self, wanted: &[(&str, &str)]) -> Option<BTreeMap<String, VmStatus>> {
        let began = Instant::now();
        loop {
            if let Ok(vms) = self.status() {
                let states: Vec<_> = vms.values().map(|vm| (vm.name.as_str(), vm.state.as_str())).collect();
                if states == wanted {
                    return Some(vms);
                }
                assert!(began.elapsed() < LIMIT, "{states:?} does not become {wanted:?}\n{}", self.log());
            } else if self.is_dead() {
                return None;
            }
            std::thread::sleep(POLL);
        }
    }

    /// The names of points that `laird` has reached since this was asked last.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("checkpoints")).unwrap_or_default();
        let _ = fs::remove_file(self.path("checkpoints"));
        text.lines().map(Into::into).collect()
    }

    /// What is there of VMs once nothing is being written: on a busy machine a write may take longer than what counts as quiet.
    pub(crate) fn traces_at_rest(&self) -> Traces {
        let began = Instant::now();
        loop {
            let traces = self.traces();
            if !traces.files.iter().any(|file| file.ends_with(".new")) || began.elapsed() > LIMIT {
                return traces;
            }
            std::thread::sleep(POLL);
        }
    }

    /// What is there of VMs: files by name, and processes by what they are for.
    pub(crate) fn traces(&self) -> Traces {
        let mut files = Vec::new();
        for directory in [self.dirs().run, self.dirs().state.join("vms"), self.dirs().state.join("devices")] {
            list(&directory, &mut files);
        }
        files.sort();
        let root = self.directory.path();
        let files = files.iter().map(|file| file.strip_prefix(root).unwrap().display().to_string()).collect();
        let mut processes: Vec<_> = orphan::tagged(&self.dirs().run)
            .into_iter()
            .map(|tagged| format!("{} {}", tagged.vm, tagged.part))
            .collect();
        processes.sort();
        Traces { files, processes }
    }
}

/// A cgroup as systemd delegates one to `laird`. It is gone after the test.
struct Delegated(PathBuf);

impl Delegated {
    fn new() -> Result<Self, String> {
        let controllers = cgroup::available().map_err(|error| error.to_string())?;
        let top = Path::new("/sys/fs/cgroup");
        for controller in controllers {
            let _ = fs::write(top.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lair-kill-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let delegated = Self(top.join(name));
        fs::create_dir_all(delegated.0.join("supervisor")).map_err(|error| error.to_string())?;
        Ok(delegated)
    }

    /// What starts `program` in it.
    fn enter(&self, program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "echo 0 >\"$0/supervisor/cgroup.procs\" && exec \"$@\""])
            .arg(&self.0)
            .arg(program);
        command
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let began = Instant::now();
        while self.0.exists() && began.elapsed() < LIMIT {
            remove_cgroup(&self.0);
            std::thread::sleep(POLL);
        }
    }
}

fn remove_cgroup(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

/// What is there of VMs.
#[derive(Debug, PartialEq)]
pub(crate) struct Traces {
    pub(crate) files: Vec<String>,
    pub(crate) processes: Vec<String>,
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        files.push(entry.path());
        if entry.file_type().unwrap().is_dir() {
            list(&entry.path(), files);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        for tagged in orphan::tagged(&self.dirs().run) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(tagged.id.pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}
