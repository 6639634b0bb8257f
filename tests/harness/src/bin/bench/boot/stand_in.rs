//! The programs that `laird` starts for a VM, as far as it can tell, without a guest: small, so that there can be many.
//!
//! The hypervisor's "guest" is ready when it is told to `cont`, which it says on its console; the shim listens there.

use anyhow::{Context, Result, bail};
use lair_guest::wire::{
    frame,
    message::{Answer, Ask},
};
use lair_vmm::{
    host::tools,
    shim::{
        config::ShimConfig,
        protocol::{AgentState, Control, ControlReply, ShimStatus},
    },
    vm::trace::{self, Times},
};
use serde_json::{Value, json};
use std::path::Path;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::watch,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The program in whose place it is
    program: String,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Is that program until it is killed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match arguments.program.as_str() {
            name if name == tools::VIRTIOFS.name => listen(arguments.after("--control")?).await,
            name if name == tools::VHOST_DEVICE_VSOCK.name => listen(arguments.after("--socket")?).await,
            name if name == tools::QEMU.name => {
                hypervisor(&arguments.chardev("console")?, &arguments.chardev("qmp")?).await
            }
            name if name == tools::SHIM.name => {
                shim(&ShimConfig::load(Path::new(arguments.after("--config")?))?).await
            }
            other => bail!("There is no stand-in for {other}"),
        }
    })
}

impl Arguments {
    fn after(&self, option: &str) -> Result<&str> {
        let at = self.arguments.iter().position(|argument| argument == option);
        let value = at.and_then(|at| self.arguments.get(at + 1));
        value.map(String::as_str).with_context(|| format!("No {option}"))
    }

    /// The path of a socket of QEMU's.
    fn chardev(&self, id: &str) -> Result<String> {
        let wanted = format!("id={id},");
        let options = self.arguments.iter().find(|argument| argument.contains(&wanted));
        let path = options.and_then(|options| options.rsplit_once("path="));
        path.map(|(_, path)| path.replace(",,", ",")).with_context(|| format!("No chardev {id}"))
    }
}

async fn listen(socket: &str) -> Result<()> {
    let _listener = UnixListener::bind(socket)?;
    std::future::pending().await
}

async fn hypervisor(console: &str, qmp: &str) -> Result<()> {
    let (runs, _) = watch::channel(false);
    let (consoles, qmps) = (UnixListener::bind(console)?, UnixListener::bind(qmp)?);
    loop {
        // What a connection ends with is nothing to the others.
        tokio::select! {
            stream = consoles.accept() => drop(tokio::spawn(console_of(stream?.0, runs.subscribe()))),
            stream = qmps.accept() => drop(tokio::spawn(qmp_of(stream?.0, runs.clone()))),
        }
    }
}

async fn console_of(mut stream: UnixStream, mut runs: watch::Receiver<bool>) -> Result<()> {
    runs.wait_for(|runs| *runs).await?;
    stream.write_all(b"ready\n").await?;
    let mut lines = BufReader::new(stream).lines();
    while lines.next_line().await?.is_some_and(|line| line != "poweroff") {}
    std::process::exit(0)
}

async fn qmp_of(stream: UnixStream, runs: watch::Sender<bool>) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    writer.write_all(b"{\"QMP\": {\"version\": {}}}\n").await?;
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await? {
        let command: Value = serde_json::from_str(&line)?;
        if command["execute"] == "cont" {
            runs.send_replace(true);
        }
        writer.write_all(format!("{}\n", json!({ "return": {}, "id": command["id"] })).as_bytes()).await?;
    }
    Ok(())
}

async fn shim(config: &ShimConfig) -> Result<()> {
    let mut times = Times::default();
    times.mark("shim", trace::now_ms());
    let (status, _) = watch::channel(ShimStatus {
        vm: config.vm.clone(),
        agent: AgentState::Absent,
        console: true,
        console_bytes: 0,
        links: vec![],
        silent_since_unix_ms: None,
        figures: None,
        times,
        devices: None,
    });
    let mut console = BufReader::new(UnixStream::connect(&config.console).await?);
    let controls = UnixListener::bind(&config.sockets.control)?;
    let mut line = String::new();
    let mut ready = false;
    loop {
        tokio::select! {
            read = console.read_line(&mut line), if !ready => {
                read?;
                ready = true;
                status.send_modify(|status| status.agent = AgentState::Ready { boot_id: "guest".into(), uptime_ms: 1 });
            }
            stream = controls.accept() => drop(tokio::spawn(control(stream?.0, status.clone()))),
        }
    }
}

async fn control(mut stream: UnixStream, status: watch::Sender<ShimStatus>) -> Result<()> {
    let mut changes = status.subscribe();
    loop {
        let reply = match frame::read_message::<Control, _>(&mut stream).await? {
            Control::Status => ControlReply::Status(status.borrow().clone()),
            Control::Watch => loop {
                let now = changes.borrow_and_update().clone();
                frame::write_message(&mut stream, &ControlReply::Status(now)).await?;
                changes.changed().await?;
            },
            Control::Ask { ask: Ask::PowerOff } => ControlReply::Answer { answer: Answer::Done },
            Control::Stop => std::process::exit(0),
            _ => ControlReply::Done,
        };
        frame::write_message(&mut stream, &reply).await?;
    }
}
