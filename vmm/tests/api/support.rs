//! A supervisor with its API in a directory of its own.

use crate::{machine::Machine, store};
use lair_vmm::{
    api::{
        client::Client,
        limits::Limits,
        server,
        types::{ApiError, VmStatus},
    },
    fleet::{self, limits::HostFacts, units::Size},
    host::{
        self,
        confine::Confinement,
        facts::Engine,
        pci::Sysfs,
        process::{Launch, Process, Sink},
        tools::{self, Tools},
    },
    passthrough::{Devices, write::Writer},
    state::dirs::Dirs,
    supervisor::Supervisor,
    vm::{
        machine::{Life, Part, State, Wanted},
        plan::{self, Generation},
        record::Record,
    },
};
use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Output, time::Duration};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    process::Command,
    time,
};

/// Of its memory VMs may have 1678 MiB: just enough for guests of 1024 and 512 MiB with their processes.
pub(crate) const HOST: HostFacts = HostFacts { cpus: 2, memory: Size(2190 << 20) };

/// The id of the boot in which all tests take place.
const BOOT: &str = "4b1d0000-0000-4000-8000-000000000000";

/// No wait of these tests is longer: far above what anything takes, also on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A host and what runs on it.
pub(crate) struct Host {
    directory: TempDir,
    /// Who writes to the kernel's files.
    pub(crate) writer: Writer,
    asleep: Vec<Process>,
}

impl Host {
    pub(crate) fn new() -> Self {
        let writer = Writer { program: env!("CARGO_BIN_EXE_laird").into(), ..Writer::of_this_program() };
        let host = Self { directory: TempDir::new().unwrap(), writer, asleep: vec![] };
        fs::write(host.path("kernel"), "no kernel").unwrap();
        fs::create_dir(host.path("modules")).unwrap();
        fs::create_dir(host.path("bin")).unwrap();
        for tool in tools::ALL {
            host.install(tool);
        }
        host.dirs().create().unwrap();
        host
    }

    /// A program of that name, which does nothing.
    fn install(&self, tool: tools::Tool) {
        let file = self.path("bin").join(tool.name);
        fs::write(&file, "#!/bin/false\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A host that lacks a program.
    pub(crate) fn without(self, tool: tools::Tool) -> Self {
        fs::remove_file(self.path("bin").join(tool.name)).unwrap();
        self
    }

    /// Makes the source that fleets name, without which an apply is refused. No VM may start then.
    pub(crate) fn with_source(self) -> Self {
        store::make(&self.path("source"), &["0123456789abcdfghijklmnpqrsvwxyz-root"]);
        self
    }

    /// Devices of a machine, which must outlive this.
    pub(crate) fn with_devices(self, machine: &Machine) -> Self {
        std::os::unix::fs::symlink(machine.root(), self.path("machine")).unwrap();
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn dirs(&self) -> Dirs {
        Dirs { state: self.path("state"), run: self.path("run") }
    }

    /// A fleet file with these VMs, each with its memory in MiB. There is no source but with [`Self::with_source`], so that no start gets
    /// beyond the view.
    pub(crate) fn fleet(&self, vms: &[(&str, u64)]) -> String {
        let directory = self.directory.path().display();
        let vm = |(name, memory): &(&str, u64)| {
            format!(
                "[vms.{name}]\nvcpus = 1\nmemory = \"{memory}MiB\"\nkernel = \"{directory}/kernel\"\n\
                 modules = \"{directory}/modules\"\n\
                 roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root\"]\n"
            )
        };
        let vms: String = vms.iter().map(vm).collect();
        format!("schema = 1\nstore.sources = [{{ root = \"{directory}/source\" }}]\n{vms}")
    }

    /// Leaves behind what an earlier `laird` would have of a VM of `fleet` that is ready.
    pub(crate) fn running(&mut self, name: &str, fleet: &str) {
        let fleet = load(fleet).fleet;
        let view = self.path("view");
        let generation =
            Generation { id: "g".into(), view: view.clone(), registration: view, paths: 1, bytes: 1 };
        let plan = plan::plan(name, &fleet.vms[name], &fleet, &self.dirs(), Engine::Tcg, generation).unwrap();
        let life = Life { state: State::Ready, ..Life::stopped(Wanted::Running) };
        let mut record = Record::new(BOOT, &life, jiff::Timestamp::now(), &plan);
        for part in [Part::Hypervisor, Part::StoreBackend, Part::VsockDevice, Part::Shim] {
            let launch = Launch {
                program: "/bin/sleep".into(),
                arguments: vec!["600".into()],
                environment: vec![],
                output: Sink::File(self.path("sleep.log")),
                confinement: Confinement::default(),
            };
            let process = Process::spawn(&launch).unwrap();
            record.processes.insert(part, process.id());
            self.asleep.push(process);
        }
        let dirs = self.dirs().vm(name).unwrap();
        dirs.create().unwrap();
        record.write(&dirs.record()).unwrap();
        // Nobody waits for a hypervisor that hangs up at once.
        let control = UnixListener::bind(dirs.socket("qmp.sock")).unwrap();
        tokio::spawn(async move { while control.accept().await.is_ok() {} });
    }

    /// Starts the supervisor with `fleet`, and serves its API.
    pub(crate) async fn serve(&self, fleet: &str) -> Client {
        self.serve_within(Limits::default(), fleet).await
    }

    /// [`Self::serve`] with other limits.
    pub(crate) async fn serve_within(&self, limits: Limits, fleet: &str) -> Client {
        let file = self.path("fleet.toml");
        fs::write(&file, fleet).unwrap();
        let host = host::Host {
            facts: HOST,
            engine: Engine::Tcg,
            tools: Tools { directories: vec![self.path("bin")] },
            boot_id: BOOT.into(),
            cgroups: None,
            ids: None,
            address_bits: None,
            devices: Devices::open(Sysfs::at(&self.path("machine")), &self.dirs(), BOOT, self.writer.clone()),
            sysfs: Sysfs::at(&self.path("machine")),
            happened: host::happenings(),
        };
        let supervisor = Supervisor::start(self.dirs(), host, file, load(fleet)).await;
        let socket = self.dirs().api_socket();
        tokio::spawn(server::serve_within(limits, UnixListener::bind(&socket).unwrap(), supervisor));
        Client::new(&socket)
    }

    /// Runs `vmctl` and waits for its end.
    pub(crate) async fn vmctl(&self, arguments: &[&str]) -> Output {
        let mut vmctl = self.vmctl_command(arguments);
        time::timeout(LIMIT, vmctl.output()).await.expect("vmctl does not end").unwrap()
    }

    /// `vmctl`, to be run otherwise.
    pub(crate) fn vmctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.arg("--socket").arg(self.dirs().api_socket()).args(arguments).kill_on_drop(true);
        command
    }

    /// Sends bytes to the API, and gives what it answers until it closes the connection.
    pub(crate) async fn raw(&self, request: &[u8]) -> String {
        let stream = tokio::net::UnixStream::connect(self.dirs().api_socket()).await.unwrap();
        answer(stream, request).await
    }

    /// What there is of a VM on disk, besides what [`Self::running`] makes.
    pub(crate) fn traces(&self, name: &str) -> Vec<PathBuf> {
        let dirs = self.dirs().vm(name).unwrap();
        [dirs.run, dirs.state, self.dirs().generations()].into_iter().filter(|path| path.exists()).collect()
    }

    /// The records of the audit log.
    pub(crate) fn audit(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.dirs().audit_log()).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for process in &self.asleep {
            process.signal(nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Sends bytes, and gives what is answered until the connection is closed.
pub(crate) async fn answer(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    request: &[u8],
) -> String {
    let mut bytes = Vec::new();
    let talk = async {
        // The other end may have closed already.
        let _ = stream.write_all(request).await;
        let _ = stream.read_to_end(&mut bytes).await;
    };
    time::timeout(LIMIT, talk).await.expect("the connection stays open");
    String::from_utf8(bytes).unwrap()
}

/// A request with a body.
pub(crate) fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: laird\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// The same fleet, of which `laird` starts nothing by itself.
pub(crate) fn asked_for(fleet: &str) -> String {
    fleet.replace("vcpus", "autostart = false\nvcpus")
}

fn load(fleet: &str) -> fleet::Loaded {
    fleet::load("fleet.toml", fleet.as_bytes(), &HOST).unwrap()
}

/// The VM once it is in `state`.
pub(crate) async fn until(client: &Client, vm: &str, state: &str) -> VmStatus {
    let reached = async {
        loop {
            // It may not be there yet.
            if let Ok(status) = client.vm(vm).await
                && status.state == state
            {
                return status;
            }
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(LIMIT, reached).await.unwrap_or_else(|_| panic!("{vm} does not become {state}"))
}

/// What `laird` said no with.
pub(crate) fn refused<T: std::fmt::Debug>(
    outcome: Result<T, lair_vmm::api::client::ClientError>,
) -> ApiError {
    match outcome {
        Err(lair_vmm::api::client::ClientError::Api(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// The exit status and both outputs, for a snapshot.
pub(crate) fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    format!(
        "status {}\n--- stdout\n{}--- stderr\n{}",
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr)
    )
}
