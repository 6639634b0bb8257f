//! The programs of a VM, started without `laird`: with the arguments and the environment that it had given them, in the same order, each
//! as soon as the one before it listens.

use super::pairs::{POLL, Start, ready};
use anyhow::{Context, Result, bail, ensure};
use lair_vmm::{
    host::process::pipe,
    shim::client,
    vm::{part::Part, plan::Plan, record::Record, trace::now_ms},
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::Value;
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// How long a program may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// All that is needed to start a VM's programs.
pub(super) struct Recipe {
    plan: Plan,
    store: Program,
    vsock: Program,
    hypervisor: Program,
    shim: Program,
    /// The files that were in its run directory while it ran.
    files: Vec<(PathBuf, Vec<u8>)>,
}

/// A program as `laird` had started it.
#[derive(Clone)]
struct Program {
    arguments: Vec<String>,
    environment: Vec<(OsString, OsString)>,
}

impl Recipe {
    /// Of a VM that runs now.
    pub(super) fn of(record: &Record) -> Result<Self> {
        let program = |part| {
            let id = record.processes.get(&part).with_context(|| format!("{part} does not run"))?;
            Program::of(id.pid).with_context(|| format!("Cannot read how {part} was started"))
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(&record.plan.dirs.run)? {
            let path = entry?.path();
            if path.is_file() && path != record.plan.dirs.record() {
                let content = fs::read(&path)?;
                files.push((path, content));
            }
        }
        Ok(Self {
            plan: record.plan.clone(),
            store: program(Part::StoreBackend)?,
            vsock: program(Part::VsockDevice)?,
            hypervisor: program(Part::Hypervisor)?,
            shim: program(Part::Shim)?,
            files,
        })
    }

    /// Starts them, waits until the guest is ready, and ends them. All files are there before.
    pub(super) fn start(&self, runtime: &Runtime) -> Result<Start> {
        self.plan.dirs.create()?;
        for (path, content) in &self.files {
            fs::write(path, content)?;
        }
        let mut running = Running(Vec::new());
        let start = self.run(&mut running, runtime);
        drop(running);
        fs::remove_dir_all(&self.plan.dirs.run)?;
        start
    }

    fn run(&self, running: &mut Running, runtime: &Runtime) -> Result<Start> {
        let (plan, shim) = (&self.plan, &self.plan.shim.sockets.control);
        let (began, began_ms) = (Instant::now(), now_ms());
        let mut logs = Vec::new();
        let mut output = |part: Part| -> Result<OwnedFd> {
            let (reader, writer) = pipe()?;
            logs.push((plan.dirs.log(part.word()), reader));
            Ok(writer)
        };

        let mut store = self.store.clone();
        let listener: OwnedFd = UnixListener::bind(&plan.machine.store_socket)?.into();
        *store.after("--fd")? = listener.as_raw_fd().to_string();
        let control = PathBuf::from(store.after("--control")?.as_str());
        running.add(store.spawn(output(Part::StoreBackend)?, &[listener])?);
        appears(&control)?;

        running.add(self.vsock.spawn(output(Part::VsockDevice)?, &[])?);
        appears(&plan.machine.vsock_socket)?;

        running.add(self.hypervisor.spawn(output(Part::Hypervisor)?, &[])?);
        let mut qmp = Qmp::connect(&plan.machine.control_socket)?;

        let mut program = self.shim.clone();
        for argument in &mut program.arguments {
            if let Some((_, file)) = argument.split_once('=')
                && let Some((_, pipe)) = logs.iter().find(|(log, _)| log == Path::new(file))
            {
                *argument = format!("{}={file}", pipe.as_raw_fd());
            }
        }
        let pipes: Vec<_> = logs.into_iter().map(|(_, pipe)| pipe).collect();
        let log = File::options().append(true).create(true).open(plan.dirs.log(Part::Shim.word()))?;
        running.add(program.spawn(log.into(), &pipes)?);
        drop(pipes);
        appears(shim)?;
        let deadline = Instant::now() + PATIENCE;
        while !runtime.block_on(client::status(shim)).is_ok_and(|status| status.console) {
            ensure!(Instant::now() < deadline, "The shim is not connected to the console");
            sleep(POLL);
        }
        qmp.execute("cont")?;
        let runs_ms = now_ms().saturating_sub(began_ms) as f64;
        ready(runtime, shim)?;
        Ok(Start { runs_ms, ready_ms: began.elapsed().as_secs_f64() * 1e3 })
    }
}

impl Program {
    fn of(pid: i32) -> Result<Self> {
        let strings = |name: &str| -> Result<Vec<OsString>> {
            let bytes = fs::read(format!("/proc/{pid}/{name}"))?;
            let strings = bytes.split(|byte| *byte == 0).map(|string| OsString::from_vec(string.into()));
            let mut strings: Vec<_> = strings.collect();
            // Each ends with a NUL.
            strings.pop();
            Ok(strings)
        };
        let arguments = strings("cmdline")?.into_iter().map(|argument| {
            argument.into_string().map_err(|argument| anyhow::anyhow!("{argument:?} is no text"))
        });
        let variable = |variable: OsString| {
            let variable = variable.into_string().ok()?;
            let (name, value) = variable.split_once('=')?;
            Some((name.into(), value.into()))
        };
        Ok(Self {
            arguments: arguments.collect::<Result<_>>()?,
            environment: strings("environ")?.into_iter().filter_map(variable).collect(),
        })
    }

    /// The value of an option.
    fn after(&mut self, option: &str) -> Result<&mut String> {
        let at = self.arguments.iter().position(|argument| argument == option);
        let value = at.and_then(|at| self.arguments.get_mut(at + 1));
        value.with_context(|| format!("The program was started without {option}"))
    }

    /// Starts it with these descriptors open, by their numbers here.
    fn spawn(&self, output: OwnedFd, passed: &[OwnedFd]) -> Result<Child> {
        let [program, arguments @ ..] = self.arguments.as_slice() else { bail!("A program without a name") };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .current_dir("/")
            .process_group(0);
        let inherit =
            |flag| passed.iter().try_for_each(|fd| fcntl(fd.as_fd(), FcntlArg::F_SETFD(flag)).map(drop));
        inherit(FdFlag::empty())?;
        let child = command.spawn();
        inherit(FdFlag::FD_CLOEXEC)?;
        child.with_context(|| format!("Cannot start {program}"))
    }
}

/// What was started, the last one being ended first.
struct Running(Vec<Child>);

impl Running {
    fn add(&mut self, child: Child) {
        self.0.push(child);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn appears(socket: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "{} does not appear", socket.display());
        sleep(POLL);
    }
    Ok(())
}

/// As much of QMP as a start needs.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error).context("QEMU does not listen"),
                Err(_) => sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self(BufReader::new(stream));
        ensure!(qmp.line()?.get("QMP").is_some(), "QEMU does not greet");
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn execute(&mut self, command: &str) -> Result<()> {
        writeln!(self.0.get_mut(), "{{\"execute\": \"{command}\"}}")?;
        loop {
            let line = self.line()?;
            ensure!(line.get("error").is_none(), "QEMU refused {command}: {line}");
            if line.get("return").is_some() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_read_and_started_again_with_its_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let script = "while read -r line; do :; done; test -S /proc/self/fd/$2 && echo \"$1 $VARIABLE\"";
        let mut first = Command::new("/bin/sh")
            .args(["-c", script, "--fd", "", "7"])
            .env_clear()
            .env("VARIABLE", "a=b")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // Until it has become the shell.
        let mut program = loop {
            let program = Program::of(first.id().cast_signed()).unwrap();
            if program.arguments.len() == 6 && program.arguments[0] == "/bin/sh" {
                break program;
            }
            sleep(POLL);
        };
        first.kill().unwrap();
        first.wait().unwrap();
        assert_eq!(program.environment, [("VARIABLE".into(), "a=b".into())]);
        assert!(program.clone().after("--none").is_err());
        // Its value is the first argument to the script, the second one the descriptor.
        *program.after("--fd").unwrap() = "value".into();
        let listener: OwnedFd = UnixListener::bind(directory.path().join("socket")).unwrap().into();
        *program.arguments.last_mut().unwrap() = listener.as_raw_fd().to_string();
        let (reader, writer) = pipe().unwrap();
        let mut child = program.spawn(writer, &[listener]).unwrap();
        assert!(child.wait().unwrap().success());
        let mut said = String::new();
        std::io::Read::read_to_string(&mut File::from(reader), &mut said).unwrap();
        assert_eq!(said, "value a=b\n");
    }
}
