//! The programs that `laird` starts, as far as it can tell.
//!
//! The hypervisor's "guest" is up when it is told to `cont`, which it says on its console, and powers off when the console or the power
//! button tells it to. The shim listens to that console and tells `laird` on its control socket.

use lair_guest::wire::{
    frame,
    message::{Answer, Ask},
};
use lair_vmm::{
    shim::{
        config::ShimConfig,
        protocol::{AgentState, Control, ControlReply, LinkCounters, ShimStatus},
    },
    vm::trace::{self, Times},
};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// The variable that names the program, and the one with its arguments, a line each.
pub(crate) const PROGRAM: &str = "LAIR_STAND_IN";
pub(crate) const ARGUMENTS: &str = "LAIR_STAND_IN_ARGUMENTS";

/// Beside a shim's configuration: what its guest says of its devices, from the next SIGUSR2 on.
pub(crate) const SAID_OF_DEVICES: &str = "said-of-devices.json";

/// Not a test: the body of all stand-ins.
#[test]
#[ignore = "it is executed by the other tests in place of the programs that laird starts"]
fn stand_in() {
    let program = std::env::var(PROGRAM).expect("it is for the other tests");
    let arguments = std::env::var(ARGUMENTS).unwrap();
    let arguments: Vec<&str> = arguments.lines().collect();
    let after = |flag: &str| {
        let at = arguments.iter().position(|argument| *argument == flag).expect(flag);
        arguments[at + 1]
    };
    let chardev = |id: &str| {
        let wanted = format!("id={id},");
        let options = arguments.iter().find(|argument| argument.contains(&wanted)).unwrap();
        options.rsplit_once("path=").unwrap().1.to_owned()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match program.as_str() {
            "lair-virtiofs" if arguments[0] == "index" => {}
            "lair-virtiofs" => listen_for_ever(&[after("--control")]).await,
            "vhost-device-vsock" => listen_for_ever(&[after("--socket")]).await,
            "qemu-system-x86_64" => hypervisor(&chardev("console"), &chardev("qmp"), named(&arguments)).await,
            "lair-shim" => shim(Path::new(after("--config"))).await,
            other => panic!("{other}"),
        }
    });
}

async fn listen_for_ever(sockets: &[&str]) {
    let _listeners: Vec<_> = sockets.iter().map(|socket| UnixListener::bind(socket).unwrap()).collect();
    std::future::pending().await
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Guest {
    Paused,
    Up,
    Off,
}

/// The devices that have a name.
fn named(arguments: &[&str]) -> BTreeSet<String> {
    let devices = arguments.iter().filter_map(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    devices.filter_map(|device| Some(device.get("id")?.as_str()?.to_owned())).collect()
}

/// Devices as they come and go. The tests read their names in a file.
#[derive(Clone)]
struct Devices(Arc<Mutex<BTreeSet<String>>>, PathBuf);

impl Devices {
    fn change(&self, change: impl FnOnce(&mut BTreeSet<String>)) {
        let mut names = self.0.lock().unwrap();
        change(&mut names);
        std::fs::write(&self.1, names.iter().map(|name| format!("{name}\n")).collect::<String>()).unwrap();
    }

    fn answer(&self, command: &serde_json::Value) -> serde_json::Value {
        let id = || command["arguments"]["id"].as_str().unwrap().to_owned();
        match command["execute"].as_str().unwrap() {
            "qom-list" => {
                let names = self.0.lock().unwrap();
                // As long as a test says so, it has no more.
                let one_port = self.1.with_file_name("one-port").exists();
                let is_there = |name: &&String| !one_port || *name == "port1" || name.starts_with("port1-");
                return names
                    .iter()
                    .filter(is_there)
                    .map(|name| serde_json::json!({ "name": name }))
                    .collect();
            }
            "device_add" => self.change(|names| assert!(names.insert(id()), "it is there")),
            // Its guest lets go of all that is in the port, a moment later, or when a test no longer says that it keeps it.
            "device_del" => {
                let (port, names) = (id().split_once('-').unwrap().0.to_owned() + "-", self.clone());
                assert!(self.0.lock().unwrap().contains(&id()), "it is not there");
                let keeps = self.1.with_file_name("keeps");
                std::fs::write(keeps.with_file_name("asked"), "").unwrap();
                tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    while keeps.exists() {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                    names.change(|names| names.retain(|name| !name.starts_with(&port)));
                });
            }
            other => panic!("{other}"),
        }
        serde_json::json!({})
    }
}

async fn hypervisor(console: &str, qmp: &str, devices: BTreeSet<String>) {
    let (guest, _) = watch::channel(Guest::Paused);
    let devices = Devices(Arc::new(Mutex::new(devices)), Path::new(qmp).with_file_name("devices"));
    devices.change(|_| ());
    let (console, qmp) = (UnixListener::bind(console).unwrap(), UnixListener::bind(qmp).unwrap());
    let mut forget = signal(SignalKind::user_defined1()).unwrap();
    let mut control = tokio::task::JoinSet::new();
    let mut eat = signal(SignalKind::user_defined2()).unwrap();
    loop {
        tokio::select! {
            // As if a hypervisor leaked memory.
            _ = eat.recv() => {
                let mut eaten = Vec::new();
                loop {
                    eaten.push(vec![1_u8; 1 << 20]);
                }
            }
            Ok((stream, _)) = console.accept() => { tokio::spawn(serve_console(stream, guest.clone())); }
            Ok((stream, _)) = qmp.accept() => { control.spawn(serve_qmp(stream, guest.clone(), devices.clone())); }
            // As if it had closed its control socket and ran on.
            _ = forget.recv() => control.abort_all(),
        }
    }
}

async fn serve_console(stream: UnixStream, guest: watch::Sender<Guest>) {
    let (reader, mut writer) = stream.into_split();
    let (mut lines, mut changes) = (BufReader::new(reader).lines(), guest.subscribe());
    loop {
        let now = *changes.borrow_and_update();
        if now == Guest::Up && writer.write_all(b"ready\n").await.is_err() {
            return;
        }
        tokio::select! {
            _ = changes.changed() => {}
            line = lines.next_line() => match line {
                Ok(Some(line)) if line == "poweroff" => drop(guest.send_replace(Guest::Off)),
                Ok(Some(_)) => {}
                _ => return,
            }
        }
    }
}

async fn serve_qmp(stream: UnixStream, guest: watch::Sender<Guest>, devices: Devices) {
    let (reader, mut writer) = stream.into_split();
    let (mut lines, mut changes) = (BufReader::new(reader).lines(), guest.subscribe());
    writer.write_all(b"{\"QMP\": {\"version\": {}}}\n").await.unwrap();
    loop {
        tokio::select! {
            _ = changes.changed() => {
                if *changes.borrow_and_update() == Guest::Off {
                    let event = "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n";
                    let _ = writer.write_all(event.as_bytes()).await;
                    std::process::exit(0);
                }
            }
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                let command: serde_json::Value = serde_json::from_str(&line).unwrap();
                let mut answer = serde_json::json!({});
                // As long as a test says so, it is at work on it and hears nothing else.
                let busy = devices.1.with_file_name("busy");
                if command["execute"] == "device_add" && busy.exists() {
                    std::fs::write(busy.with_file_name("at-work"), "").unwrap();
                    while busy.exists() {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                }
                match command["execute"].as_str().unwrap() {
                    "cont" => drop(guest.send_replace(Guest::Up)),
                    "system_powerdown" | "quit" => drop(guest.send_replace(Guest::Off)),
                    "qmp_capabilities" | "query-status" => {}
                    // As long as a test says so.
                    "device_add" if devices.1.with_file_name("refuses").exists() => {
                        let error = serde_json::json!({ "class": "GenericError", "desc": "not now" });
                        let answer = format!("{}\n", serde_json::json!({ "error": error, "id": command["id"] }));
                        let _ = writer.write_all(answer.as_bytes()).await;
                        continue;
                    }
                    _ => answer = devices.answer(&command),
                }
                let answer = format!("{}\n", serde_json::json!({ "return": answer, "id": command["id"] }));
                let _ = writer.write_all(answer.as_bytes()).await;
            }
        }
    }
}

/// The links of a configuration, none of which was used.
fn links(config: &ShimConfig) -> Vec<LinkCounters> {
    let link = |name: &str, to: &str| LinkCounters {
        link: name.into(),
        from: config.vm.clone(),
        to: to.into(),
        connections: 0,
        open: 0,
        refused: 0,
        bytes_out: 0,
        bytes_in: 0,
    };
    config.outgoing.iter().map(|outgoing| link(&outgoing.link.name, "elsewhere")).collect()
}

async fn shim(path: &Path) {
    let config = &ShimConfig::load(path).unwrap();
    let mut times = Times::default();
    times.mark("shim", trace::now_ms());
    let status = ShimStatus {
        vm: config.vm.clone(),
        agent: AgentState::Absent,
        console: true,
        console_bytes: 0,
        links: links(config),
        silent_since_unix_ms: None,
        figures: None,
        times,
        devices: None,
    };
    let console = UnixStream::connect(&config.console).await.unwrap();
    let (reader, mut console) = console.into_split();
    let (status, _) = watch::channel(status);
    let told = status.clone();
    tokio::spawn(async move {
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(_)) = lines.next_line().await {
            told.send_modify(|status| {
                status.agent = AgentState::Ready { boot_id: "guest".into(), uptime_ms: 1 };
            });
        }
    });
    let mut lose = signal(SignalKind::user_defined1()).unwrap();
    let mut report = signal(SignalKind::user_defined2()).unwrap();
    let (ask, mut asked) = tokio::sync::mpsc::channel::<()>(1);
    let controls = UnixListener::bind(&config.sockets.control).unwrap();
    loop {
        tokio::select! {
            Ok((stream, _)) = controls.accept() => {
                tokio::spawn(serve_control(stream, path.to_owned(), status.clone(), ask.clone()));
            }
            // As if the agent did not answer any more.
            _ = lose.recv() => status.send_modify(|status| status.agent = AgentState::Absent),
            // As if the guest said this of its devices.
            _ = report.recv() => {
                let said = std::fs::read(path.with_file_name(SAID_OF_DEVICES)).unwrap();
                let said = serde_json::from_slice(&said).unwrap();
                status.send_modify(|status| status.devices = Some(said));
            }
            Some(()) = asked.recv() => console.write_all(b"poweroff\n").await.unwrap(),
        }
    }
}

async fn serve_control(
    mut stream: UnixStream,
    config: PathBuf,
    status: watch::Sender<ShimStatus>,
    ask: tokio::sync::mpsc::Sender<()>,
) {
    let mut changes = status.subscribe();
    while let Ok(control) = frame::read_message::<Control, _>(&mut stream).await {
        let reply = match control {
            Control::Status => ControlReply::Status(status.borrow().clone()),
            Control::Watch => loop {
                let now = changes.borrow_and_update().clone();
                if frame::write_message(&mut stream, &ControlReply::Status(now)).await.is_err()
                    || changes.changed().await.is_err()
                {
                    return;
                }
            },
            Control::Ask { ask: Ask::PowerOff } => {
                ask.send(()).await.unwrap();
                ControlReply::Answer { answer: Answer::Done }
            }
            Control::Reload => {
                let links = links(&ShimConfig::load(&config).unwrap());
                status.send_modify(|status| status.links = links);
                ControlReply::Done
            }
            Control::Stop => std::process::exit(0),
            _ => ControlReply::Done,
        };
        if frame::write_message(&mut stream, &reply).await.is_err() {
            return;
        }
    }
}
