//! The console log.

use crate::support::*;
use tokio::{io::AsyncWriteExt, net::UnixListener};

#[tokio::test]
async fn hv6_a_flood_is_drained_into_two_bounded_files() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.console_limit = 1 << 16;
    let shim = host.start(config.clone()).await;
    let hypervisor = UnixListener::bind(&config.console).unwrap();
    let (mut console, _) = within(hypervisor.accept()).await.unwrap();
    let before = shim.resident_kib();
    let line = "0123456789abcde\n".repeat(4096);
    within(async {
        for _ in 0..512 {
            console.write_all(line.as_bytes()).await.unwrap();
        }
        console.write_all(b"the last line\n").await.unwrap();
    })
    .await;
    let log = || std::fs::read(&config.console_log).unwrap_or_default();
    until(async || log().ends_with(b"the last line\n").then_some(())).await;
    let status = shim.status().await;
    assert!(status.console);
    assert_eq!(status.console_bytes, 512 * 65536 + 14);
    assert!(log().len() <= 1 << 16);
    let older = host.path("builder-console.log.1");
    assert!(std::fs::metadata(&older).unwrap().len() <= 1 << 16);
    assert!(shim.resident_kib() < before + 8192, "{before} to {} KiB", shim.resident_kib());
    assert_eq!(shim.stderr(), "");
}

#[tokio::test]
async fn the_console_is_followed_from_one_hypervisor_to_the_next() {
    let host = Host::new();
    let config = host.config("builder");
    let shim = host.start(config.clone()).await;
    assert!(!shim.status().await.console);
    for text in ["first boot\n", "second boot\n"] {
        let hypervisor = UnixListener::bind(&config.console).unwrap();
        let (mut console, _) = within(hypervisor.accept()).await.unwrap();
        until(async || shim.status().await.console.then_some(())).await;
        console.write_all(text.as_bytes()).await.unwrap();
        drop((console, hypervisor));
        std::fs::remove_file(&config.console).unwrap();
        until(async || (!shim.status().await.console).then_some(())).await;
    }
    let log = || std::fs::read_to_string(&config.console_log).unwrap_or_default();
    until(async || (log() == "first boot\nsecond boot\n").then_some(())).await;
}

#[tokio::test]
async fn a_log_that_cannot_be_written_never_holds_the_console() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.console_log = host.path("missing/console.log");
    config.audit_log = host.path("missing/audit");
    let shim = host.start(config.clone()).await;
    let hypervisor = UnixListener::bind(&config.console).unwrap();
    let (mut console, _) = within(hypervisor.accept()).await.unwrap();
    let block = vec![b'x'; 1 << 20];
    within(async {
        for _ in 0..64 {
            console.write_all(&block).await.unwrap();
        }
    })
    .await;
    until(async || (shim.status().await.console_bytes == 64 << 20).then_some(())).await;
    assert_eq!(shim.stderr().lines().count(), 1, "{}", shim.stderr());
    // With a disk again, the log goes on.
    std::fs::create_dir(host.path("missing")).unwrap();
    until(async || {
        console.write_all(b"again\n").await.unwrap();
        std::fs::read(&config.console_log).ok()
    })
    .await;
}
