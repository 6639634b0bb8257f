//! What goes on: progress, events, the audit log, metrics.

use crate::support::*;
use lair_vmm::api::types::EventsQuery;
use std::{fs, process::Stdio};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, UnixListener},
    process::Child,
    time::timeout,
};

/// The next line of a program that goes on.
async fn line(from: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> serde_json::Value {
    let mut text = String::new();
    timeout(LIMIT, from.read_line(&mut text)).await.expect("no line comes").unwrap();
    serde_json::from_str(&text).unwrap()
}

/// `vmctl` that goes on, and its output.
fn follow(host: &Host, arguments: &[&str]) -> (Child, BufReader<tokio::process::ChildStdout>) {
    let mut child = host.vmctl_command(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

#[tokio::test]
async fn a_change_is_waited_for_and_its_end_is_the_exit_status() {
    let mut host = Host::new();
    let fleet = asked_for(&host.fleet(&[("a", 64), ("b", 64), ("c", 64)]));
    for vm in ["a", "b", "c"] {
        host.running(vm, &fleet);
    }
    host.serve(&fleet).await;
    let output = host.vmctl(&["stop", "--wait", "a"]).await;
    insta::assert_snapshot!(said(&output));
    let output = host.vmctl(&["stop", "a"]).await;
    insta::assert_snapshot!(said(&output));
    let output = host.vmctl(&["kill", "--wait", "b"]).await;
    assert_eq!(said(&output), "status 0\n--- stdout\n--- stderr\n");
    // It comes down, and not up again: there is no store.
    let output = host.vmctl(&["restart", "--wait", "c"]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("vmctl: VM c failed: in the step view: Cannot use a source"), "{text}");
    // One that is down is started.
    assert_eq!(host.vmctl(&["restart", "--wait", "a"]).await.status.code(), Some(1));
    let verbs: Vec<_> =
        host.audit().iter().map(|r| (r["verb"].to_string(), r["verdict"].to_string())).collect();
    let verbs: Vec<_> =
        verbs.iter().map(|(verb, verdict)| format!("{verb} {verdict}").replace('"', "")).collect();
    assert_eq!(verbs, ["stop allowed", "stop refused", "kill allowed", "restart allowed", "restart allowed"]);
}

#[tokio::test]
async fn a_wait_that_takes_too_long_is_status_5_and_the_change_goes_on() {
    let mut host = Host::new();
    let fleet = asked_for(&host.fleet(&[("a", 64), ("b", 64)]));
    host.running("a", &fleet);
    let client = host.serve(&fleet).await;
    let output = host.vmctl(&["stop", "--timeout", "0", "a"]).await;
    assert_eq!(output.status.code(), Some(5));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text, "vmctl: VM a is stopping, not stopped, after 0 s; it goes on\n");
    until(&client, "a", "stopped").await;
}

#[tokio::test]
async fn a_wait_goes_on_while_laird_is_restarted() {
    let host = Host::new();
    // A `laird` that ends in the midst of its answer, and one that is there instead.
    let listener = UnixListener::bind(host.dirs().api_socket()).unwrap();
    let reply = |media: &str, length: usize, body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nlair-api-version: 1\r\ncontent-type: {media}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    let starting =
        "{\"vm\":\"a\",\"state\":\"starting\",\"detail\":\"view\",\"elapsed_ms\":1,\"outcome\":null}\n";
    let served = tokio::spawn(async move {
        let answers = [reply("application/jsonl", 9999, starting)];
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let fleet = asked_for(&host.fleet(&[("a", 64)]));
    let mut vmctl = host.vmctl_command(&["start", "--wait", "a"]).stderr(Stdio::piped()).spawn().unwrap();
    timeout(LIMIT, served).await.unwrap().unwrap();
    std::fs::remove_file(host.dirs().api_socket()).unwrap();
    let client = host.serve(&fleet).await;
    assert!(vmctl.try_wait().unwrap().is_none(), "it waits");
    // The new one finds the VM as it is, and it fails a while later.
    client.start("a").await.unwrap();
    let output = timeout(LIMIT, vmctl.wait_with_output()).await.unwrap().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.starts_with("vmctl: VM a failed: in the step view: Cannot use a source"), "{text}");
}

#[tokio::test]
async fn cl11_all_that_a_later_laird_tells_of_an_event_is_passed_on() {
    let host = Host::new();
    let listener = UnixListener::bind(host.dirs().api_socket()).unwrap();
    let event =
        r#"{"id":7,"time":"1970-01-01T00:00:00Z","event":"migrated","vm":"a","to":{"host":"b","ms":[1,2]}}"#;
    let known = r#"{"id":8,"time":"1970-01-01T00:00:00Z","event":"forgotten","vm":"a","why":"it was old"}"#;
    let body = format!("{event}\n{known}\n");
    let served = tokio::spawn(async move {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            let head = "HTTP/1.1 200 OK\r\nlair-api-version: 1\r\ncontent-type: application/jsonl\r\n";
            let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let output = host.vmctl(&["--json", "events"]).await;
    let parsed = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let told: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().map(parsed).collect();
    assert_eq!(told, [parsed(event), parsed(known)]);
    // For people it is one line each.
    let text = String::from_utf8(host.vmctl(&["events"]).await.stdout).unwrap();
    let [unknown, gone] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
    assert!(unknown.contains("laird is of a later release") && gone.ends_with("gone"), "{text}");
    timeout(LIMIT, served).await.unwrap().unwrap();
}

#[tokio::test]
async fn changes_of_several_vms_are_one_document() {
    let mut host = Host::new();
    let fleet = asked_for(&host.fleet(&[("a", 64), ("b", 64), ("c", 64)]));
    for vm in ["a", "b"] {
        host.running(vm, &fleet);
    }
    host.serve(&fleet).await;
    // The one that is down is refused; the others are stopped nevertheless.
    let output = host.vmctl(&["--json", "stop", "--wait", "b", "c", "a"]).await;
    assert_eq!(output.status.code(), Some(1));
    let mut ends: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for end in ends.as_array_mut().unwrap() {
        assert!(end["elapsed_ms"].take().is_u64());
    }
    insta::assert_json_snapshot!(ends);
    insta::assert_snapshot!(String::from_utf8(output.stderr).unwrap());
}

#[tokio::test]
async fn events_tell_what_happens_in_order_and_go_on() {
    let mut host = Host::new().with_source();
    let fleet = asked_for(&host.fleet(&[("a", 64), ("b", 64)]));
    host.running("a", &fleet);
    let client = host.serve(&fleet).await;
    let (_child, mut events) = follow(&host, &["--json", "events", "-f"]);
    let mut last = 0;
    let mut next = async || {
        let mut event = line(&mut events).await;
        let id = event["id"].take().as_u64().unwrap();
        assert!(id > last && event["time"].take().is_string());
        last = id;
        let fields = event.as_object().unwrap().iter().filter(|(_, value)| !value.is_null());
        fields.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ").replace('"', "")
    };
    assert_eq!(next().await, "adopted=true event=known state=ready vm=a");
    assert_eq!(next().await, "adopted=false event=known state=stopped vm=b");
    client.change("a", "kill", None).await.unwrap();
    assert_eq!(next().await, "detail=kill event=state from=ready state=stopping vm=a");
    let mut rest = vec![];
    while rest.last().is_none_or(|event: &String| !event.contains(" state=stopped ")) {
        rest.push(next().await);
    }
    // A reader that is there in time sees each, but for one that lasts a moment.
    assert!(
        rest.len() <= 2 && rest.last().unwrap().ends_with("event=state from=cleaning state=stopped vm=a"),
        "{rest:?}"
    );
    fs::write(host.path("fleet.toml"), asked_for(&host.fleet(&[("a", 128)]))).unwrap();
    client.apply(&lair_vmm::api::types::ApplyRequest::default()).await.unwrap();
    let mut applied = [next().await, next().await];
    applied.sort();
    assert_eq!(applied[0], "added=[] event=applied links_changed=false pending_restart=[] removed=[b]");
    assert_eq!(applied[1], "event=forgotten vm=b");

    // Those who come later read the same, and may leave out what they know.
    let text = String::from_utf8(host.vmctl(&["events"]).await.stdout).unwrap();
    assert!(text.lines().next().unwrap().ends_with("  a             adopted, ready"), "{text}");
    assert!(text.ends_with("gone\n") || text.contains("fleet file applied; gone: b"), "{text}");
    let mut after = client.events(&EventsQuery { follow: false, after: Some(last) }).await.unwrap();
    assert_eq!(after.next().await.unwrap(), None);
}

#[tokio::test]
async fn audit_is_laird_s_and_all_shims_records_by_time_and_goes_on() {
    let host = Host::new();
    let client = host.serve(&asked_for(&host.fleet(&[("a", 64)]))).await;
    let shim = host.dirs().vm("a").unwrap();
    shim.create().unwrap();
    let record = "{\"time\":\"2026-01-01T00:00:00Z\",\"kind\":\"link\",\"link\":\"web\",\"from\":\"host\",\"to\":\"a\",\
                  \"verdict\":\"allowed\",\"bytes_out\":1,\"bytes_in\":2,\"duration_ms\":3}\n";
    fs::write(shim.state.join("audit.jsonl"), record).unwrap();
    client.stop("a").await.unwrap_err();
    let (_child, mut records) = follow(&host, &["--json", "audit", "-f"]);
    let first = line(&mut records).await;
    assert_eq!(
        (&first["source"], &first["vm"], &first["link"]),
        (&"shim".into(), &"a".into(), &"web".into())
    );
    let second = line(&mut records).await;
    assert_eq!(
        (&second["source"], &second["verb"], &second["verdict"]),
        (&"laird".into(), &"stop".into(), &"refused".into())
    );
    assert_eq!(
        (&second["role"], &second["reason"]),
        (&"administer".into(), &"VM a: It is already stopped".into())
    );
    assert!(second["duration_ms"].is_u64() && second["uid"].is_u64() && second["gid"].is_u64());
    // That the log is read is in it.
    assert_eq!(line(&mut records).await["verb"], "audit");
    client.start("b").await.unwrap_err();
    assert_eq!(line(&mut records).await["reason"], "There is no VM b; did you mean a?");

    let output = host.vmctl(&["audit", "--vm", "a", "-n", "2"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.starts_with("2026-01-01 00:00:00  -         link      a           allowed  web; host > a; 1 B sent, 2 B received\n"), "{text}");
    let output = host.vmctl(&["audit", "--since", "1h", "--vm", "a"]).await;
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 1);
    assert_eq!(host.vmctl(&["audit", "--since", "yesterday"]).await.status.code(), Some(2));
}

#[tokio::test]
async fn metrics_are_told_on_the_socket_and_where_the_fleet_file_says() {
    let mut host = Host::new().with_source();
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let fleet = asked_for(&host.fleet(&[("a", 64)]));
    host.running("a", &fleet);
    let listening = fleet.replacen(
        "schema = 1
",
        &format!(
            "schema = 1
metrics.listen = \"{address}\"
"
        ),
        1,
    );
    let client = host.serve(&listening).await;
    client.stop("b").await.unwrap_err();
    let output = host.vmctl(&["metrics"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    for expected in [
        "\nlair_vm_state{vm=\"a\",state=\"ready\"} 1\n",
        "\nlair_vm_starts_total{vm=\"a\"} 0\n",
        "\nlair_process_resident_bytes{vm=\"a\",part=\"hypervisor\"} ",
        "\nlair_process_cpu_seconds_total{vm=\"\",part=\"laird\"} ",
        "\nlair_audit_attempts_total{verdict=\"refused\"} 1\n",
        "\nlair_api_connections 1\n",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(text.ends_with("# EOF\n"));

    let get = async |path: &str| {
        let stream = async {
            loop {
                if let Ok(stream) = TcpStream::connect(address).await {
                    return stream;
                }
                tokio::task::yield_now().await;
            }
        };
        let stream = timeout(LIMIT, stream).await.unwrap();
        answer(stream, format!("GET {path} HTTP/1.1\r\nhost: l\r\n\r\n").as_bytes()).await
    };
    let scraped = get("/metrics").await;
    assert!(
        scraped.starts_with("HTTP/1.1 200 ")
            && scraped.contains("content-type: application/openmetrics-text")
    );
    assert!(scraped.contains("lair_vm_state{vm=\"a\",state=\"ready\"} 1\n"), "{scraped}");
    // Nothing else is told there.
    assert!(get("/v1/status").await.starts_with("HTTP/1.1 404 "));
    // It follows the fleet file.
    fs::write(host.path("fleet.toml"), &fleet).unwrap();
    client.apply(&lair_vmm::api::types::ApplyRequest::default()).await.unwrap();
    let closed = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, closed).await.unwrap();
}

#[tokio::test]
async fn a_dry_run_says_what_would_change_and_changes_nothing() {
    let mut host = Host::new().with_source();
    let before = host.fleet(&[("a", 1024), ("old", 64)]);
    host.running("a", &before);
    host.running("old", &before);
    let client = host.serve(&before).await;
    let status = client.status().await.unwrap();
    let links =
        "[links.web]\nfrom = [\"host\"]\nlisten = \"127.0.0.1:3000\"\nto = { vm = \"a\", port = 3000 }\n";
    let after =
        host.fleet(&[("a", 512), ("new", 64)]).replace("schema = 1\n", "schema = 1\nhost.accel = \"tcg\"\n")
            + links;
    fs::write(host.path("other.toml"), after).unwrap();
    let other = host.path("other.toml");
    let output = host.vmctl(&["apply", "--dry-run", other.to_str().unwrap()]).await;
    insta::assert_snapshot!(said(&output).replace(&host.path("").display().to_string(), "DIR/"));
    let output = host.vmctl(&["apply", "--dry-run", "--json", other.to_str().unwrap()]).await;
    insta::assert_snapshot!(said(&output).replace(&host.path("").display().to_string(), "DIR/"));
    assert_eq!(client.status().await.unwrap(), status);
    assert_eq!(host.traces("new"), Vec::<std::path::PathBuf>::new());
    let attempt = &host.audit()[0];
    assert_eq!(attempt["detail"], format!("{} (dry run)", other.display()));
    // The same file with a problem is refused as by an apply.
    fs::write(&other, "schema = 1\n").unwrap();
    let output = host.vmctl(&["apply", "--dry-run", other.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test]
async fn cl13_a_reader_that_has_seen_enough_ends_vmctl_silently() {
    let host = Host::new();
    let names: Vec<String> = (0..200).map(|number| format!("vm{number}")).collect();
    let vms: Vec<_> = names.iter().map(|name| (name.as_str(), 64)).collect();
    let _client = host.serve(&asked_for(&host.fleet(&vms))).await;
    for arguments in
        [&["status"][..], &["--json", "status"], &["events"], &["metrics"], &["events", "-f"], &["schema"]]
    {
        let mut child =
            host.vmctl_command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = timeout(LIMIT, child.wait_with_output()).await.expect("vmctl does not end").unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert!(output.status.success() || signal == Some(13), "{arguments:?}: {:?}", output.status);
        assert_eq!(output.stderr, b"", "{arguments:?}");
    }
}
