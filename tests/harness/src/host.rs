//! A `laird` of one's own with its directories, and the `vmctl` that talks to it.

use anyhow::{Context, Result, bail};
use lair_vmm::api::types::{HostStatus, VmStatus};
use std::{
    fs,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// No `vmctl` of a test takes so many seconds, not even one that waits for a guest to boot.
const HANGS: u32 = 300;

/// No command in a guest takes so many.
const SHELL_HANGS: u32 = 180;

/// A `laird` with its directories below one.
#[derive(Debug)]
pub struct Host {
    directory: PathBuf,
    run: PathBuf,
    programs: PathBuf,
    laird: Option<Child>,
    /// Whether dropping it ends the VMs and removes the directory.
    pub keep: bool,
}

impl Host {
    /// A host with its files in `directory`, which should have a short path for the sake of the sockets below it.
    pub fn new(directory: &Path) -> Result<Self> {
        let programs = std::env::var_os("LAIR_BIN")
            .context("LAIR_BIN is not set: it names the directory of the built programs")?;
        Self::with_programs(directory, Path::new(&programs))
    }

    /// A host with other programs than those that were built.
    pub fn with_programs(directory: &Path, programs: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self {
            directory: directory.into(),
            run: directory.join("run"),
            programs: programs.into(),
            laird: None,
            keep: false,
        })
    }

    /// A host in a new directory of its own below the one for temporary files.
    pub fn temporary(name: &str) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("lair-{name}-{}", std::process::id()));
        if directory.exists() {
            bail!("{} is in the way", directory.display());
        }
        Self::new(&directory)
    }

    /// Has its run directory in memory, where `/run` is on a host. The name is for the directory.
    pub fn run_in_memory(mut self, name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            self.run = memory.join(format!("lair-{name}-{}", std::process::id()));
        }
        self
    }

    /// The directory that holds everything of this host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The fleet file.
    pub fn fleet_file(&self) -> PathBuf {
        self.directory.join("fleet.toml")
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("laird.sock")
    }

    /// A file or socket of a running VM.
    pub fn run_file(&self, vm: &str, name: &str) -> PathBuf {
        self.run.join("vms").join(vm).join(name)
    }

    /// A lasting file of a VM.
    pub fn state_file(&self, vm: &str, name: &str) -> PathBuf {
        self.directory.join("state/vms").join(vm).join(name)
    }

    /// A program of Lair's.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// Writes the fleet file.
    pub fn write_fleet(&self, fleet: &lair_vmm::fleet::schema::Fleet) -> Result<()> {
        Ok(fs::write(self.fleet_file(), toml::to_string(fleet)?)?)
    }

    /// Starts `laird` and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new().append(true).create(true).open(self.directory.join("laird.log"))?;
        let child = Command::new(self.program("laird"))
            .arg("--fleet")
            .arg(self.fleet_file())
            .arg("--state-dir")
            .arg(self.directory.join("state"))
            .arg("--run-dir")
            .arg(&self.run)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // An interrupt of the terminal is for the harness, which then ends things in order.
            .process_group(0)
            .spawn()
            .context("Cannot start laird")?;
        self.laird = Some(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.status().is_err() {
            if let Some(status) = self.laird.as_mut().and_then(|laird| laird.try_wait().ok().flatten()) {
                self.laird = None;
                bail!("laird ended with {status}:\n{}", self.laird_log());
            }
            if Instant::now() > deadline {
                bail!("laird does not answer:\n{}", self.laird_log());
            }
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// `laird`'s log.
    pub fn laird_log(&self) -> String {
        fs::read_to_string(self.directory.join("laird.log")).unwrap_or_default()
    }

    /// `laird`'s process id, if this harness started it.
    pub fn laird_pid(&self) -> Option<u32> {
        self.laird.as_ref().map(Child::id)
    }

    /// Ends a `laird` of this directory that another harness started, so that this one can start its own.
    pub fn replace_laird(&mut self) -> Result<()> {
        let lock = self.run.join("laird.lock");
        let pid = fs::read_to_string(&lock)?.trim().parse().context("laird's lock names no process")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.status().is_ok() {
            if Instant::now() > deadline {
                bail!("laird {pid} does not end");
            }
            sleep(Duration::from_millis(50));
        }
        self.start()
    }

    /// Kills `laird` (SIGKILL), and nothing else.
    pub fn kill_laird(&mut self) -> Result<()> {
        if let Some(mut laird) = self.laird.take() {
            laird.kill()?;
            laird.wait()?;
        }
        Ok(())
    }

    /// A `vmctl` of this host with arguments.
    pub fn vmctl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program("vmctl"));
        command.arg("--socket").arg(self.socket()).args(arguments);
        command
    }

    /// Runs `vmctl`; its failure is an error with what it said.
    pub fn run_vmctl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.bounded(HANGS).args(arguments).stdin(Stdio::null()).output();
        success(&format!("vmctl {}", arguments.join(" ")), output.context("Cannot run vmctl")?)
    }

    /// A `vmctl` that ends after so many seconds with status 124: one that hangs should not end the whole run.
    fn bounded(&self, seconds: u32) -> Command {
        let mut command = Command::new("timeout");
        command.arg(seconds.to_string()).arg(self.program("vmctl")).arg("--socket").arg(self.socket());
        command
    }

    /// The host and its VMs.
    pub fn status(&self) -> Result<HostStatus> {
        Ok(serde_json::from_str(&self.run_vmctl(&["--json", "status"])?)?)
    }

    /// One VM.
    pub fn vm(&self, vm: &str) -> Result<VmStatus> {
        Ok(serde_json::from_str(&self.run_vmctl(&["--json", "status", vm])?)?)
    }

    /// Waits until a VM is ready.
    pub fn wait_ready(&self, vm: &str, patience: Duration) -> Result<VmStatus> {
        self.wait_for(vm, patience, |status| status.state == "ready")
    }

    /// Waits until a VM is as `done` says; a VM that fails meanwhile is an error with its console.
    pub fn wait_for(
        &self,
        vm: &str,
        patience: Duration,
        done: impl Fn(&VmStatus) -> bool,
    ) -> Result<VmStatus> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.vm(vm)?;
            if done(&status) {
                return Ok(status);
            }
            let failed = status.state == "failed" || status.state == "quarantined";
            if failed || Instant::now() > deadline {
                let console = fs::read(self.state_file(vm, "console.log")).unwrap_or_default();
                let detail = status.detail.unwrap_or_default();
                bail!(
                    "{vm} is {} {detail}\n--- its console\n{}\n--- laird\n{}",
                    status.state,
                    String::from_utf8_lossy(&console),
                    self.laird_log()
                );
            }
            sleep(Duration::from_millis(100));
        }
    }

    /// Runs a shell script in a VM; returns its standard output.
    pub fn shell(&self, vm: &str, script: &str) -> Result<String> {
        let output = self.try_shell(vm, script)?;
        success(&format!("{vm}: {script}"), output)
    }

    /// Runs a shell script in a VM, whatever its exit status.
    pub fn try_shell(&self, vm: &str, script: &str) -> Result<Output> {
        self.bounded_shell(vm, script).stdin(Stdio::null()).output().context("Cannot run vmctl")
    }

    fn bounded_shell(&self, vm: &str, script: &str) -> Command {
        let mut command = self.bounded(SHELL_HANGS);
        command.args(["exec", vm, "--", "sh", "-euc", script]);
        command
    }

    /// Runs a shell script in a VM with standard input, whatever its exit status.
    pub fn try_shell_with(&self, vm: &str, script: &str, input: &[u8]) -> Result<Output> {
        let mut child = self
            .bounded_shell(vm, script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no standard input")?.write_all(input)?;
        Ok(child.wait_with_output()?)
    }

    /// Writes a file in a VM.
    pub fn write_file(&self, vm: &str, path: &str, contents: &[u8]) -> Result<()> {
        let script = format!("mkdir -p \"$(dirname '{path}')\" && cat > '{path}'");
        success(&format!("{vm}: write {path}"), self.try_shell_with(vm, &script, contents)?).map(drop)
    }

    /// Stops all VMs and `laird`, and removes the directory.
    pub fn stop(&mut self) -> Result<()> {
        if let Ok(status) = self.status() {
            let active: Vec<_> = status
                .vms
                .iter()
                .filter(|vm| !matches!(vm.state.as_str(), "stopped" | "quarantined"))
                .map(|vm| vm.name.as_str())
                .collect();
            for vm in &active {
                // One that stops already is as good.
                let _ = self.run_vmctl(&["stop", vm]);
            }
            for vm in &active {
                self.wait_for(vm, Duration::from_secs(90), |status| status.state == "stopped")?;
            }
        }
        if let Some(laird) = &mut self.laird {
            let pid = nix::unistd::Pid::from_raw(laird.id().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
            laird.wait()?;
            self.laird = None;
        }
        if self.run.exists() {
            fs::remove_dir_all(&self.run)?;
        }
        fs::remove_dir_all(&self.directory)?;
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.keep || !self.directory.exists() {
            return;
        }
        // A laird that was killed leaves VMs that only another one can end.
        if self.laird.is_none() && self.fleet_file().exists() && self.run.join("vms").exists() {
            let _ = self.start();
        }
        if let Err(error) = self.stop() {
            eprintln!("Cannot end the host in {}: {error:#}", self.directory.display());
        }
    }
}

fn success(what: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{what}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
