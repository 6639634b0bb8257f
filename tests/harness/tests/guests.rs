//! Real guests: what they see of the store, and what they cannot do to it.

use anyhow::{Context, Result, ensure};
use lair_harness::{
    fleet::{empty, mib, vm, writable},
    host::Host,
    testbed::Testbed,
};
use lair_vmm::fleet::schema::{Fleet, Vm};
use std::{
    collections::BTreeSet,
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::Command,
    time::Duration,
};

/// Under emulation on a slow machine.
const BOOT: Duration = Duration::from_secs(300);

/// Boots one VM alone; `None` where there is no test bed.
fn boot(name: &str, roots: &[&str], change: impl FnOnce(&mut Vm)) -> Result<Option<(Testbed, Host)>> {
    let Some(testbed) = Testbed::find()? else { return Ok(None) };
    let mut host = Host::temporary(name)?;
    let mut fleet: Fleet = empty(&testbed);
    let mut guest = vm(&testbed, roots)?;
    change(&mut guest);
    fleet.vms.insert("guest".into(), guest);
    host.write_fleet(&fleet)?;
    host.start()?;
    host.wait_ready("guest", BOOT)?;
    Ok(Some((testbed, host)))
}

/// Every file's hash, every link's target, every file that may be executed, every directory: by one program on both sides.
const LISTING: &str = "find . -type f -print0 | sort -z | xargs -0 sha256sum; echo; \
    find . -type l -print0 | sort -z | xargs -0 -n 1 readlink -v; echo; \
    find . -type f -perm -0100 -print0 | sort -z; echo; find . -type d -print0 | sort -z";

/// What is on the host for the store paths that the guest's root directory shows.
fn host_listing(testbed: &Testbed, view: &BTreeSet<String>) -> Result<String> {
    let busybox = testbed.physical(testbed.path("busybox")?).join("bin/busybox");
    let names = view.iter().map(|name| format!("./{name}")).collect::<Vec<_>>().join(" ");
    let script = LISTING.replace("find .", &format!("find {names}"));
    let output = Command::new(busybox)
        .args(["sh", "-euc", &script])
        .current_dir(testbed.store_root.join("nix/store"))
        .env_clear()
        .env("LC_ALL", "C")
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn guest_listing(host: &Host) -> Result<String> {
    let listing = host.shell("guest", &format!("cd /nix/store; export LC_ALL=C; {LISTING}"))?;
    // Here the root itself is the first directory; on the host its members are listed.
    Ok(listing.replacen("\n.\0", "\n", 1))
}

/// The names in the view, as the host has them.
fn view(host: &Host) -> Result<BTreeSet<String>> {
    let id = host.vm("guest")?.view.context("no view")?.id;
    let text = std::fs::read_to_string(host.directory().join("state/generations").join(id).join("view"))?;
    Ok(text.lines().filter_map(|line| line.strip_prefix("/nix/store/")).map(Into::into).collect())
}

fn first_difference(a: &str, b: &str) -> String {
    let pair = a.lines().zip(b.lines()).find(|(a, b)| a != b);
    format!("{} and {} lines; first difference: {pair:?}", a.lines().count(), b.lines().count())
}

#[test]
fn a_guest_reads_every_file_of_its_view_as_the_host_has_it() -> Result<()> {
    let Some((testbed, host)) = boot("read", &["profile-plain", "big"], |_| {})? else { return Ok(()) };
    let view = view(&host)?;
    let shown: BTreeSet<String> = host.shell("guest", "ls -A /nix/store")?.lines().map(Into::into).collect();
    assert_eq!(shown, view, "the root directory is the view");
    let (here, there) = (host_listing(&testbed, &view)?, guest_listing(&host)?);
    let files = here.lines().take_while(|line| !line.is_empty()).count();
    assert!(files >= 1000, "only {files} files");
    assert!(here == there, "{}", first_difference(&here, &there));
    println!("{files} files in {} store paths have the same hashes", view.len());
    Ok(())
}

#[test]
fn st7_a_path_outside_the_view_does_not_exist() -> Result<()> {
    let Some((testbed, host)) = boot("outside", &["profile-plain"], |_| {})? else { return Ok(()) };
    for name in ["secret", "big"] {
        let path = testbed.path(name)?;
        assert!(testbed.physical(path).exists());
        let seen = host.try_shell("guest", &format!("stat {path}"))?;
        assert!(!seen.status.success());
        assert!(String::from_utf8_lossy(&seen.stderr).contains("No such file"), "{seen:?}");
    }
    // Neither by way of the host's own directories.
    let escaped =
        host.try_shell("guest", "ls /nix/store/../store/../../nix/store/.. | grep -v -x -e store -e var")?;
    assert!(escaped.stdout.is_empty(), "{escaped:?}");
    Ok(())
}

/// Tries every kind of write with the system call itself, so that no shell or library refuses first.
const WRITES: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

static int wrong;
static void tried(const char *what, long outcome) {
  if (outcome >= 0) { printf("%s: DONE\n", what); wrong = 1; }
  else if (errno == EROFS) printf("%s: EROFS\n", what);
  else printf("%s: %s\n", what, strerror(errno));
}

int main(int argc, char **argv) {
  const char *file = argv[1], *directory = argv[2];
  char inside[4096], other[4096], buffer[16] = "written";
  snprintf(inside, sizeof inside, "%s/new", directory);
  snprintf(other, sizeof other, "%s/other", directory);
  tried("create", open(inside, O_CREAT | O_WRONLY | O_EXCL, 0644));
  tried("mkdir", mkdir(inside, 0755));
  tried("mknod", mknod(inside, S_IFIFO | 0644, 0));
  tried("symlink", symlink("/etc/passwd", inside));
  tried("link", link(file, inside));
  tried("rename", rename(file, inside));
  tried("rename2", syscall(SYS_renameat2, AT_FDCWD, file, AT_FDCWD, inside, 1));
  tried("unlink", unlink(file));
  tried("rmdir", rmdir(directory));
  tried("chmod", chmod(file, 0777));
  tried("chown", chown(file, 1, 1));
  tried("truncate", truncate(file, 0));
  tried("utimes", utimes(file, 0));
  tried("setxattr", syscall(SYS_setxattr, file, "user.x", buffer, 7, 0));
  tried("removexattr", syscall(SYS_removexattr, file, "user.x"));
  tried("tmpfile", open(directory, 020200000 | O_RDWR, 0644));
  int fd = open(file, O_RDWR);
  if (fd < 0) tried("open for writing", fd);
  else {
    int from = open(file, O_RDONLY);
    tried("write", write(fd, buffer, 7) < 0 || fsync(fd) < 0 ? -1 : 0);
    tried("pwrite", pwrite(fd, buffer, 7, 0) < 0 || fsync(fd) < 0 ? -1 : 0);
    tried("fallocate", syscall(SYS_fallocate, fd, 0, 0L, 4096L));
    long zero = 0, end = 4096;
    tried("copy_file_range", syscall(SYS_copy_file_range, from, &zero, fd, &end, 16, 0));
    tried("ftruncate", ftruncate(fd, 0));
  }
  return wrong;
}
"#;

/// All counters of the store backend.
fn store_counters(host: &Host) -> Result<String> {
    let mut stream = UnixStream::connect(host.run_file("guest", "store-control.sock"))?;
    stream.write_all(b"stats\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn fu3_root_in_a_guest_that_mounts_it_read_write_changes_nothing() -> Result<()> {
    let Some((testbed, host)) = boot("write", &["profile-builder", "big"], |guest| guest.memory = mib(768))?
    else {
        return Ok(());
    };
    let view = view(&host)?;
    let before = host_listing(&testbed, &view)?;
    host.write_file("guest", "/tmp/writes.c", WRITES.as_bytes())?;
    host.shell("guest", "cd /tmp && tcc writes.c -o writes && mount -o remount,rw /nix/store")?;
    let mounts = host.shell("guest", "grep ' /nix/store ' /proc/mounts")?;
    ensure!(mounts.contains(" rw,"), "the store is not mounted read-write: {mounts}");
    let big = testbed.path("big")?;
    let script = format!(
        "f=$(find {big} -type f -size +0 | head -n 1); d=$(dirname \"$f\"); /tmp/writes \"$f\" \"$d\"; sync"
    );
    let said = host.try_shell("guest", &script)?;
    let said = (said.status.success(), String::from_utf8_lossy(&said.stdout).into_owned());
    println!("{}", said.1);
    ensure!(said.0 && !said.1.contains("DONE"), "a write went through:\n{}", said.1);
    for line in said.1.lines() {
        ensure!(
            line.ends_with("EROFS") || line.starts_with("setxattr") || line.starts_with("removexattr"),
            "{line}"
        );
    }
    let counters = store_counters(&host)?;
    let mut reached = 0;
    for opcode in ["create", "mkdir", "mknod", "symlink", "link", "rename", "unlink", "rmdir", "setattr"] {
        let count = |what: &str| {
            let wanted = format!("{what}{{opcode=\"{opcode}\"}} ");
            counters
                .lines()
                .find_map(|line| line.strip_prefix(&wanted))
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0)
        };
        let (requests, errors) = (count("lair_virtiofs_requests_total"), count("lair_virtiofs_errors_total"));
        assert_eq!(requests, errors, "{opcode}: each one that reaches the backend is refused");
        reached += requests;
    }
    assert!(reached > 0, "the guest's kernel let nothing through to the backend:\n{counters}");
    // From the backend again, not from the guest's cache.
    host.shell("guest", "echo 3 > /proc/sys/vm/drop_caches")?;
    assert!(before == host_listing(&testbed, &view)?, "the host's files have changed");
    let seen = guest_listing(&host)?;
    assert!(before == seen, "{}", first_difference(&before, &seen));
    Ok(())
}

/// A counter of the store backend.
fn counter(host: &Host, name: &str) -> Result<u64> {
    let text = store_counters(host)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(" 0");
    Ok(line.trim().parse()?)
}

#[test]
fn hv7_a_guest_that_reboots_is_served_by_the_same_backend() -> Result<()> {
    let Some((_, host)) = boot("reboot", &["profile-plain"], |guest| guest.overlay = writable())? else {
        return Ok(());
    };
    // Seen from the backend: the vsock device may lose a guest that is reset, and with it the way to ask the guest itself.
    let sessions = "lair_virtiofs_requests_total{opcode=\"init\"}";
    let reads = "lair_virtiofs_requests_total{opcode=\"read\"}";
    let backend = host.vm("guest")?.processes;
    assert_eq!(counter(&host, sessions)?, 1);
    let before = counter(&host, reads)?;
    // Of its own accord and after the command has ended, so that the command does not wait for a guest that is gone.
    host.shell("guest", "(sleep 1; echo b > /proc/sysrq-trigger) >/dev/null 2>&1 &")?;
    let deadline = std::time::Instant::now() + BOOT;
    // The guest mounts the store anew, and its init reads programs from it.
    while counter(&host, sessions)? < 2 || counter(&host, reads)? <= before {
        ensure!(std::time::Instant::now() < deadline, "no second boot: {}", store_counters(&host)?);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(host.vm("guest")?.processes, backend, "the same processes");
    Ok(())
}

#[test]
fn a_guest_goes_by_switch_root_into_debians_systemd() -> Result<()> {
    let Some(testbed) = Testbed::find()? else { return Ok(()) };
    let init = format!("{}/init", testbed.path("debian-system")?);
    let Some((_, host)) = boot("systemd", &["debian-system"], |guest| {
        guest.profile = None;
        guest.init = Some(init.into());
        guest.memory = mib(768);
    })?
    else {
        return Ok(());
    };
    assert_eq!(host.shell("guest", "cat /proc/1/comm")?.trim(), "systemd");
    let state = host.try_shell("guest", "systemctl is-system-running --wait")?;
    let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
    let failed = host.shell("guest", "systemctl --failed --no-legend --plain")?;
    assert_eq!((state.as_str(), failed.trim()), ("running", ""));
    let version = host.shell("guest", "systemctl --version | head -n 1")?;
    println!("{}", version.trim());
    Ok(())
}

#[test]
fn vs9_a_process_that_opens_vsock_itself_is_refused_without_the_ticket() -> Result<()> {
    const FORGE: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
struct address { unsigned short family, zero; unsigned port, cid; unsigned char rest[4]; };
int main(void) {
  const char *text = "{\"version\":1,\"ticket\":\"0000000000000000000000000000000000000000000000000000000000000000\",\"link\":\"out\"}";
  unsigned char head[5] = { 0, strlen(text), 0, 0, 0 }, reply[4096];
  struct address host = { 40, 0, PORT, 2 };
  int fd = socket(40, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof host)) return printf("no connection: %s\n", strerror(errno)), 0;
  write(fd, head, 5);
  write(fd, text, strlen(text));
  int n = read(fd, reply, sizeof reply);
  printf("reply: %.*s\n", n > 5 ? n - 5 : 0, reply + 5);
  n = read(fd, reply, sizeof reply);
  printf("then %s\n", n <= 0 ? "closed" : "data");
}
"#;
    let Some(testbed) = Testbed::find()? else { return Ok(()) };
    let mut host = Host::temporary("forge")?;
    let echo = host.directory().join("echo.sock");
    let listener = std::os::unix::net::UnixListener::bind(&echo)?;
    listener.set_nonblocking(true)?;
    let mut fleet = empty(&testbed);
    // Not a builder: there, the socket itself is refused, which the demo shows.
    fleet.vms.insert("guest".into(), vm(&testbed, &["profile-builder"])?);
    let to = lair_vmm::fleet::schema::Target::Host(lair_vmm::fleet::schema::HostTarget { host: echo });
    fleet
        .links
        .insert("out".into(), lair_vmm::fleet::schema::Link { from: vec!["guest".into()], listen: None, to });
    host.write_fleet(&fleet)?;
    host.start()?;
    host.wait_ready("guest", BOOT)?;
    host.write_file("guest", "/tmp/forge.c", FORGE.as_bytes())?;
    let port = lair_guest::wire::LINK_PORT;
    let said = host.shell("guest", &format!("cd /tmp && tcc -DPORT={port}u forge.c -o forge && ./forge"))?;
    assert!(said.contains("refused") && said.contains("then closed"), "{said}");
    assert!(listener.accept().is_err(), "the forged connection reached the host's socket");
    let audit = std::fs::read_to_string(host.state_file("guest", "audit.jsonl"))?;
    assert!(audit.lines().any(|line| line.contains("refused")), "{audit}");
    // With the ticket, which the agent adds, the same link is open.
    let answer = std::thread::spawn(move || -> Result<()> {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok((mut stream, _)) = listener.accept() {
                stream.set_nonblocking(false)?;
                let mut text = String::new();
                stream.read_to_string(&mut text)?;
                stream.write_all(text.to_uppercase().as_bytes())?;
                return Ok(());
            }
            ensure!(std::time::Instant::now() < deadline, "nobody connected");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(host.shell("guest", "echo hello | lair-guest connect out")?, "HELLO\n");
    answer.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
    Ok(())
}
