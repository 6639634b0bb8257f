//! The services of a guest without an init of its own: started in order, kept running, their output on the console.
//!
//! A service starts when the one before it accepts connections (or runs, if it says no more). The guest is ready
//! when the last one does.

use super::{
    Agent,
    bucket::Bucket,
    log::{Log, MAX_LINE},
    target::Target,
    vsock_filter,
};
use crate::sys;
use lair_guest::boot::Service;
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::watch,
};

/// The shortest and the longest wait before a service is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// After so long a service counts as running well, and the wait is short again.
const RAN_WELL: Duration = Duration::from_secs(60);

/// How long a service may take to end when it is restarted.
const GRACE: Duration = Duration::from_secs(10);

/// How often a socket is tried until it accepts.
const PROBE: Duration = Duration::from_millis(100);

/// Lines of one service that reach the console: so many at once, then one in each interval.
const LINES: (u32, Duration) = (1000, Duration::from_millis(10));

/// Starts the services, in the background.
pub(super) fn start(agent: &Arc<Agent>, services: Vec<Service>, deny_vsock: bool) {
    let agent = agent.clone();
    tokio::spawn(async move {
        for service in services {
            let (name, probe) = (service.name.clone(), service.ready.clone());
            let (runs, mut running) = watch::channel(false);
            tokio::spawn(keep(agent.clone(), service, deny_vsock, runs));
            // The keeper never ends, so its side of the channel does not close.
            let _ = running.wait_for(|runs| *runs).await;
            match probe.map(|probe| probe.parse::<Target>()) {
                None => {}
                Some(Ok(target)) => until_it_accepts(&target).await,
                // The guest never becomes ready, and the console says why.
                Some(Err(error)) => {
                    agent.log.say(&format!("service `{name}` can not become ready: {error}"));
                    return;
                }
            }
            agent.trace.mark(&format!("service-{name}"));
        }
        agent.set_ready();
    });
}

async fn until_it_accepts(target: &Target) {
    while target.dial().await.is_err() {
        tokio::time::sleep(PROBE).await;
    }
}

/// Runs one service again and again.
async fn keep(agent: Arc<Agent>, service: Service, deny_vsock: bool, runs: watch::Sender<bool>) {
    let bucket = Arc::new(Mutex::new(Bucket::new(LINES.0, LINES.1, Instant::now())));
    let mut wait = BACK_OFF.0;
    loop {
        let started = Instant::now();
        let how = match run(&agent, &service, deny_vsock, &bucket, &runs).await {
            Ok(End::Itself(status)) => in_words(status),
            Ok(End::Asked) => {
                agent.log.say(&format!(
                    "service `{}` is restarted: a credential of it was replaced",
                    service.name
                ));
                continue;
            }
            Err(error) => format!("could not start: {error}"),
        };
        wait = next_wait(wait, started.elapsed());
        let name = &service.name;
        agent.log.say(&format!("service `{name}` ended ({how}); it is started again in {wait:?}"));
        // Without a control channel nobody hears it.
        let _ = agent.ended.send((name.clone(), how));
        tokio::time::sleep(wait).await;
    }
}

fn next_wait(last: Duration, ran: Duration) -> Duration {
    if ran >= RAN_WELL { BACK_OFF.0 } else { last.saturating_mul(2).min(BACK_OFF.1) }
}

/// How a run of a service ended.
enum End {
    Itself(ExitStatus),
    /// It was ended because a restart was asked for.
    Asked,
}

async fn run(
    agent: &Agent,
    service: &Service,
    deny_vsock: bool,
    bucket: &Arc<Mutex<Bucket>>,
    runs: &watch::Sender<bool>,
) -> std::io::Result<End> {
    let [program, arguments @ ..] = service.command.as_slice() else {
        return Err(std::io::Error::other("it has no command"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(agent.environment.iter().cloned())
        .envs(&service.environment)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sys::isolate(&mut command, deny_vsock.then(vsock_filter::program));
    // What was asked for before is fulfilled by this start.
    let mut restart = agent.restarts.get(&service.name).map(watch::Sender::subscribe);
    let mut child = command.spawn()?;
    runs.send_replace(true);
    // Tasks of their own: what a service leaves behind may keep its pipes open and write on.
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(print(agent.log.clone(), service.name.clone(), bucket.clone(), stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(print(agent.log.clone(), service.name.clone(), bucket.clone(), stderr));
    }
    let asked = async {
        match &mut restart {
            // The sender lives as long as the agent.
            Some(restart) => drop(restart.changed().await),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        status = child.wait() => status.map(End::Itself),
        () = asked => {
            end(&mut child).await?;
            Ok(End::Asked)
        }
    }
}

/// Ends a service: SIGTERM to it, then SIGKILL to all of its process group.
async fn end(child: &mut Child) -> std::io::Result<()> {
    // It has a session, and so a group, of its own.
    let Some(group) = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw) else {
        return Ok(());
    };
    let _ = kill(group, Signal::SIGTERM);
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        let _ = killpg(group, Signal::SIGKILL);
        child.wait().await?;
    }
    Ok(())
}

fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// Carries a service's output to the log, line by line; what exceeds its rate is dropped and counted.
async fn print<R: AsyncRead + Unpin>(log: Log, name: String, bucket: Arc<Mutex<Bucket>>, mut from: R) {
    let mut lines = Lines::default();
    let mut buffer = [0; MAX_LINE];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        lines.push(buffer.get(..n).unwrap_or_default(), |line| {
            let passes = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
            match passes {
                Some(0) => log.line(&name, line),
                Some(dropped) => {
                    log.say(&format!("{dropped} lines of `{name}` were dropped: too many at once"));
                    log.line(&name, line);
                }
                None => {}
            }
        });
    }
    lines.finish(|line| log.line(&name, line));
}

/// Cuts a stream into lines of at most [`MAX_LINE`] bytes.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for &byte in bytes {
            if byte != b'\n' {
                self.rest.push(byte);
            }
            if byte == b'\n' || self.rest.len() >= MAX_LINE {
                line(&self.rest);
                self.rest.clear();
            }
        }
    }

    fn finish(self, mut line: impl FnMut(&[u8])) {
        if !self.rest.is_empty() {
            line(&self.rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agent;
    use super::*;
    use std::collections::BTreeMap;

    fn service(name: &str, script: &str, ready: Option<String>) -> Service {
        Service {
            name: name.into(),
            command: vec!["sh".into(), "-c".into(), script.into()],
            environment: BTreeMap::from([("DIR".into(), "x".into())]),
            ready,
        }
    }

    #[test]
    fn output_is_cut_into_lines() {
        let (mut lines, mut got) = (Lines::default(), Vec::new());
        for part in [&b"one\ntw"[..], b"o\n\n", &[b'x'; MAX_LINE + 1]] {
            lines.push(part, |line| got.push(String::from_utf8(line.to_vec()).unwrap()));
        }
        lines.finish(|line| got.push(String::from_utf8(line.to_vec()).unwrap()));
        assert_eq!(got, ["one", "two", "", &"x".repeat(MAX_LINE), "x"]);
    }

    #[test]
    fn waits_grow_and_are_forgotten() {
        assert_eq!(next_wait(BACK_OFF.0, Duration::ZERO), 2 * BACK_OFF.0);
        assert_eq!(next_wait(BACK_OFF.1, Duration::ZERO), BACK_OFF.1);
        assert_eq!(next_wait(BACK_OFF.1, RAN_WELL), BACK_OFF.0);
    }

    #[tokio::test]
    async fn a_service_that_ends_is_reported_and_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let agent = Arc::new(agent(false));
        let mut ended = agent.ended.subscribe();
        let script =
            format!("echo ${{NIX_REMOTE-unset}} $DIR $HOME >>{}/starts; exit 4", dir.path().display());
        start(&agent, vec![service("daemon", &script, None)], false);
        for _ in 0..2 {
            let next = tokio::time::timeout(Duration::from_secs(20), ended.recv()).await;
            assert_eq!(next.unwrap().unwrap(), ("daemon".to_string(), "exit status 4".to_string()));
        }
        let starts = std::fs::read_to_string(dir.path().join("starts")).unwrap();
        assert!(starts.starts_with("unset x /root\nunset x /root\n"), "{starts}");
        assert!(agent.ready.borrow().is_some(), "a service without a probe counts once it runs");
    }

    #[tokio::test]
    async fn the_next_service_waits_for_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, second) = (dir.path().join("socket"), dir.path().join("second"));
        let agent = Arc::new(agent(false));
        let first = service("first", "sleep 300", Some(socket.to_str().unwrap().into()));
        let script = format!("touch {}; sleep 300", second.display());
        start(&agent, vec![first, service("second", &script, None)], true);
        tokio::time::sleep(5 * PROBE).await;
        assert!(!second.exists() && agent.ready.borrow().is_none());

        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut ready = agent.ready.subscribe();
        let ready = tokio::time::timeout(Duration::from_secs(20), ready.wait_for(Option::is_some)).await;
        ready.unwrap().unwrap();
        tokio::time::sleep(5 * PROBE).await;
        assert!(second.exists());
    }

    #[tokio::test]
    async fn a_restart_that_is_asked_for_is_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let starts =
            || std::fs::read_to_string(dir.path().join("starts")).unwrap_or_default().lines().count();
        let until = async |count| {
            let reached = async {
                while starts() < count {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), reached).await.expect("not started");
        };
        let mut agent = agent(false);
        agent.restarts.insert("web".into(), watch::Sender::new(0));
        let agent = Arc::new(agent);
        let mut ended = agent.ended.subscribe();
        assert!(!agent.restart("other"));
        // Asked for before there is anything to restart: the first start fulfils it.
        assert!(agent.restart("web"));
        let script = format!("echo x >>{}/starts; exec sleep 300", dir.path().display());
        start(&agent, vec![service("web", &script, None)], false);
        until(1).await;
        assert!(agent.restart("web"));
        until(2).await;
        tokio::time::sleep(2 * PROBE).await;
        assert_eq!(starts(), 2);
        assert!(ended.try_recv().is_err(), "The host need not be told");
    }

    #[tokio::test]
    async fn a_service_that_can_not_start_is_no_readiness() {
        let agent = Arc::new(agent(false));
        let mut ended = agent.ended.subscribe();
        let mut broken = service("broken", "", None);
        broken.command = vec!["/no/such/program".into()];
        start(&agent, vec![broken], false);
        let (_, how) = ended.recv().await.unwrap();
        assert_eq!(how, "could not start: No such file or directory (os error 2)");
        assert!(agent.ready.borrow().is_none());
    }
}
