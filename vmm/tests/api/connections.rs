//! Clients that ask badly, slowly, or not at all.

use crate::support::*;
use lair_vmm::api::{
    client::{Client, ClientError},
    limits::Limits,
    types::{API_VERSION, ErrorKind},
};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::{io::IoSlice, os::fd::AsRawFd, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time,
};

fn impatient() -> Limits {
    Limits { request: Duration::from_millis(300), ..Limits::default() }
}

#[tokio::test]
async fn cl4_what_is_too_long_or_ends_early_costs_the_connection_and_nothing_else() {
    let host = Host::new();
    let client = host.serve(&asked_for(&host.fleet(&[("a", 64)]))).await;
    let status = client.status().await.unwrap();
    let head = |path: &str, length: &str| {
        format!("POST {path} HTTP/1.1\r\nhost: laird\r\ncontent-length: {length}\r\n\r\n")
    };
    let start = "/v1/vms/a/start";
    let filler = |length| "x".repeat(length);
    for (request, expected) in [
        (head(start, "4294967295"), "has more than 65536 bytes"),
        (head(start, "1048577") + &filler(1 << 20), "has more than 65536 bytes"),
        (head("/v1/apply", "4294967295"), "has more than 4194304 bytes"),
        (head("/v1/apply", "99999999999999999999999999"), "HTTP/1.1 400 "),
        (head("/v1/apply", "-1"), "HTTP/1.1 400 "),
        // Without its length, it is known to be too long only when it has come.
        (
            format!(
                "POST {start} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n20000\r\n{}",
                filler(0x20000)
            ),
            "has more than 65536 bytes",
        ),
        (head("/v1/apply", "0"), "The request's body: EOF while parsing"),
        (format!("GET /v1/status HTTP/1.1\r\nx: {}\r\n\r\n", filler(20 << 10)), "HTTP/1.1 431 "),
        (format!("GET /{} HTTP/1.1\r\n\r\n", filler(20 << 10)), "HTTP/1.1 4"),
        ("\u{0}\u{1}\u{2}\r\n\r\n".into(), "HTTP/1.1 400 "),
        ("GET /v1/statsu HTTP/1.1\r\nhost: a\r\n\r\n".into(), "\"kind\":\"not_found\""),
        ("GET /v1/apply HTTP/1.1\r\nhost: a\r\n\r\n".into(), "\"kind\":\"invalid\""),
    ] {
        let answer = host.raw(request.as_bytes()).await;
        assert!(answer.contains(expected), "{} {answer}", &request[..request.len().min(90)]);
    }
    // Cut off at each byte: no answer, or one of an error.
    let whole = post("/v1/apply", "{\"dry_run\":true}");
    for length in 0..whole.len() {
        let mut stream = UnixStream::connect(host.dirs().api_socket()).await.unwrap();
        stream.write_all(&whole.as_bytes()[..length]).await.unwrap();
        stream.shutdown().await.unwrap();
        let said = answer(stream, b"").await;
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{length}: {said}");
    }
    assert_eq!(client.status().await.unwrap(), status);
}

/// Numbers that look random and are the same in each run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }
}

#[tokio::test]
async fn cl4_whatever_bytes_come_the_connection_ends_and_others_are_served() {
    let host = Host::new().with_source();
    let limits = Limits { request: Duration::from_millis(500), ..Limits::default() };
    let client = host.serve_within(limits, &asked_for(&host.fleet(&[("a", 64)]))).await;
    let status = client.status().await.unwrap();
    let wholes = [
        post("/v1/apply", "{\"file\":{\"name\":\"x.toml\",\"text\":\"schema = 1\"},\"dry_run\":true}"),
        post("/v1/vms/a/sessions", "{\"session\":{\"exec\":{\"command\":[\"ls\"]}}}"),
        "GET /v1/audit?limit=3&since=2026-01-01T00:00:00Z HTTP/1.1\r\nhost: l\r\nlair-api-version: 1\r\n\r\n"
            .into(),
        "POST /v1/apply HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n".into(),
    ];
    let mut numbers = Numbers(0x5eed_1234_abcd_9876);
    for _ in 0..20 {
        let mut talks = tokio::task::JoinSet::new();
        for _ in 0..30 {
            let mut bytes = wholes[numbers.below(wholes.len())].clone().into_bytes();
            for _ in 0..=numbers.below(6) {
                let at = numbers.below(bytes.len());
                match numbers.below(4) {
                    0 => bytes[at] = u8::try_from(numbers.below(256)).unwrap(),
                    1 => drop(bytes.drain(at..(at + numbers.below(40)).min(bytes.len()))),
                    2 => bytes.insert(at, b"\r\n\0 :{}\"9"[numbers.below(9)]),
                    _ => bytes.extend_from_within(at..),
                }
            }
            let stream = UnixStream::connect(host.dirs().api_socket()).await.unwrap();
            talks.spawn(async move {
                // What is no UTF-8 is no answer of ours.
                let said = answer(stream, &bytes).await;
                let ours = said.is_empty() || said.starts_with("HTTP/1.1 ");
                assert!(ours, "{} {said}", String::from_utf8_lossy(&bytes));
            });
        }
        talks.join_all().await;
    }
    assert_eq!(client.status().await.unwrap(), status);
}

#[tokio::test]
async fn cl4_a_request_that_does_not_come_is_not_waited_for() {
    let host = Host::new();
    let client = host.serve_within(impatient(), &host.fleet(&[])).await;
    // None of these is ever finished, and all are hung up on, long before hyper's own 30 s.
    let soon = Duration::from_secs(20);
    for request in ["", "GET /v1/sta", "GET /v1/status HTTP/1.1\r\nhost: l"] {
        let answer = time::timeout(soon, host.raw(request.as_bytes())).await.unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
    let answer = host.raw(b"POST /v1/apply HTTP/1.1\r\nhost: l\r\ncontent-length: 10\r\n\r\n{").await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("\"kind\":\"timed_out\""), "{answer}");
    // A byte now and then does not help.
    let mut slow = UnixStream::connect(host.dirs().api_socket()).await.unwrap();
    let dripping = async {
        for byte in "GET /v1/status HTTP/1.1\r\n".bytes().cycle() {
            if slow.write_all(&[byte]).await.is_err() {
                return;
            }
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    time::timeout(soon, dripping).await.unwrap();
    assert!(client.status().await.is_ok());
}

#[tokio::test]
async fn cl5_of_many_idle_connections_the_oldest_are_closed_and_the_next_is_served() {
    let host = Host::new();
    let limits = Limits { per_uid: 8, ..Limits::default() };
    let client = host.serve_within(limits, &host.fleet(&[])).await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(UnixStream::connect(host.dirs().api_socket()).await.unwrap());
    }
    // It takes them in order, so all of them are taken when this is answered.
    client.status().await.unwrap();
    for stream in &mut idle[..190] {
        let closed = time::timeout(LIMIT, stream.read(&mut [0])).await.unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)));
    }
    let newest = idle.pop().unwrap();
    let answer = answer(newest, b"GET /v1/version HTTP/1.1\r\nhost: l\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn cl5_without_a_slot_there_is_a_typed_refusal() {
    let host = Host::new();
    let limits = Limits { per_uid: 2, reserved: 1, ..Limits::default() };
    let client = host.serve_within(limits, &host.fleet(&[])).await;
    let query = lair_vmm::api::types::EventsQuery { follow: true, after: None };
    let mut busy = vec![];
    for _ in 0..3 {
        busy.push(client.events(&query).await.unwrap());
    }
    let answer = host.raw(b"").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"kind\":\"busy\""), "{answer}");
    drop(busy);
    let served = async {
        while client.status().await.is_err() {
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(LIMIT, served).await.unwrap();
}

#[tokio::test]
async fn cl6_requests_that_are_none_are_typed_errors_and_change_nothing() {
    let host = Host::new().with_source();
    let client = host.serve(&asked_for(&host.fleet(&[("a", 64)]))).await;
    let status = client.status().await.unwrap();
    for (path, body, expected) in [
        ("/v1/apply", "{\"fiel\":null}", "unknown field `fiel`, expected `file` or `dry_run`"),
        ("/v1/apply", "{\"dry_run\":true,\"dry_run\":false}", "duplicate field `dry_run`"),
        ("/v1/apply", "{\"dry_run\":1}", "invalid type: integer `1`, expected a boolean"),
        ("/v1/apply", "[", "EOF while parsing"),
        ("/v1/vms/a/sessions", "{\"session\":\"dance\"}", "unknown variant `dance`"),
        ("/v1/vms/a/start?wiat=true", "", "unknown field `wiat`"),
        ("/v1/vms/a/start?wait=maybe", "", "provided string was not `true` or `false`"),
        ("/v1/vms/a/start?wait=true&wait=true", "", "duplicate field `wait`"),
        ("/v1/vms/%ff/start", "", "The path is not UTF-8"),
    ] {
        let answer = host.raw(post(path, body).as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let error: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(head.starts_with("HTTP/1.1 400 ") && error["kind"] == "invalid", "{answer}");
        let message = error["message"].as_str().unwrap().replace('\\', "");
        assert!(message.contains(expected), "{message}, not {expected}");
    }
    assert_eq!(client.status().await.unwrap(), status);
    let audit = host.audit();
    assert_eq!(audit.len(), 9);
    assert!(audit.iter().all(|attempt| attempt["verdict"] == "refused" && attempt["reason"].is_string()));
}

#[tokio::test]
async fn cl10_descriptors_that_come_unasked_are_closed_and_the_request_is_answered() {
    let host = Host::new();
    let client = host.serve(&host.fleet(&[])).await;
    let (mut mine, theirs) = UnixStream::pair().unwrap();
    let stream = UnixStream::connect(host.dirs().api_socket()).await.unwrap();
    stream.writable().await.unwrap();
    let request = b"GET /v1/version HTTP/1.1\r\nhost: l\r\n\r\n";
    let rights = [ControlMessage::ScmRights(&[theirs.as_raw_fd()])];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(request)], &rights, MsgFlags::empty(), None).unwrap();
    drop(theirs);
    assert!(answer(stream, b"").await.starts_with("HTTP/1.1 200 "));
    // The other end of the pair is closed only when nobody holds it.
    let closed = time::timeout(LIMIT, mine.read(&mut [0])).await.unwrap();
    assert_eq!(closed.unwrap(), 0);
    let metrics = client.metrics().await.unwrap();
    assert!(metrics.contains("lair_api_surplus_descriptors_total 1\n"), "{metrics}");
}

#[tokio::test]
async fn cl11_both_ends_say_their_version_and_another_one_is_refused() {
    let host = Host::new();
    let client = host.serve(&host.fleet(&[])).await;
    let version = client.version().await.unwrap();
    assert_eq!((version.api, version.laird.as_str()), (API_VERSION, env!("CARGO_PKG_VERSION")));
    let ask = |path: &str, version: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: l\r\n{version}\r\n");
        let host = &host;
        async move { host.raw(request.as_bytes()).await }
    };
    for version in ["lair-api-version: 1\r\n", ""] {
        let answer = ask("/v1/status", version).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.contains("\r\nlair-api-version: 1\r\n"),
            "{answer}"
        );
    }
    let answer = ask("/v1/status", "lair-api-version: 99\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 406 ") && answer.contains("\r\nlair-api-version: 1\r\n"),
        "{answer}"
    );
    assert!(answer.contains("This client speaks version 99 of the API, laird speaks version 1"), "{answer}");
    // Whichever it is, it can find out.
    assert!(ask("/v1/version", "lair-api-version: 99\r\n").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn cl11_a_client_does_not_read_what_another_version_says() {
    let host = Host::new();
    let listener = UnixListener::bind(host.dirs().api_socket()).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let said = std::str::from_utf8(&request[..length]).unwrap().contains("lair-api-version: 1\r\n");
            assert!(said, "the client says its version");
            let head = "HTTP/1.1 200 OK\r\nlair-api-version: 7\r\ncontent-length: 2\r\n\r\n{}";
            stream.write_all(head.as_bytes()).await.unwrap();
        }
    });
    let error = Client::new(&host.dirs().api_socket()).status().await.unwrap_err();
    assert!(matches!(&error, ClientError::Version(theirs) if theirs == "7"), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Version);
    let output = host.vmctl(&["--json", "status"]).await;
    assert_eq!(output.status.code(), Some(1));
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["kind"], "version");
    assert_eq!(error["message"], "laird speaks version 7 of the API, this client speaks version 1");
}
