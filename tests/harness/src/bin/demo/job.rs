//! The steps of the job, as an operator and Hydra would do them.

use crate::{
    disturb::{self, Disturbance},
    fleet::{CACHE_ADDRESS, Keys, SIGNING_KEY},
    steps::Steps,
};
use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD as BASE64};
use lair_harness::{host::Host, testbed::Testbed};
use std::{
    fmt::Write,
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

/// The VMs in the order of the story.
pub(crate) const VMS: [&str; 3] = ["hydra", "cache", "builder"];

/// How long all guests may take to become ready: under emulation on a slow machine.
pub(crate) const BOOT: Duration = Duration::from_secs(300);

/// Waits for the guests and sets up hydra's ssh.
pub(crate) fn boot(steps: &mut Steps, host: &Host) -> Result<()> {
    steps.step("three microVMs boot, each with its own view of the store", |say| {
        for vm in VMS {
            let status = host.wait_ready(vm, BOOT)?;
            let (view, boot) = (status.view.context("no view")?, status.boot_ms.unwrap_or_default());
            say.lines(&format!("{vm}: ready {boot} ms after its kernel started, {} store paths", view.paths));
        }
        Ok(())
    })
}

/// The program, its test and what the builder makes of them. `pause` gives others time to do something meanwhile.
fn expression(testbed: &Testbed, pause: u32) -> Result<String> {
    let (busybox, tcc) = (testbed.path("busybox")?, testbed.path("tcc")?);
    Ok(format!(
        r#"let
  busybox = builtins.storePath "{busybox}";
  tcc = builtins.storePath "{tcc}";
in derivation {{
  name = "lair-demo";
  system = "x86_64-linux";
  builder = "${{busybox}}/bin/busybox";
  PATH = "${{tcc}}/bin:${{busybox}}/bin";
  source = ''
    #include <stdio.h>
    int main(int argc, char **argv) {{
      long sum = 0;
      for (int i = 1; i <= 100; i++) sum += i;
      printf("%ld\n", sum);
      return sum != 5050;
    }}
  '';
  args = [ "sh" "-euc" ''
    echo "compiling in the sandbox"
    printf '%s' "$source" > sum.c
    mkdir -p $out/bin
    tcc sum.c -o $out/bin/sum
    sleep {pause}
    test "$($out/bin/sum)" = 5050
    echo "test passed"
  '' ];
}}
"#
    ))
}

/// Builds on the builder, from hydra, over ssh through a link.
pub(crate) fn build(
    steps: &mut Steps,
    host: &mut Host,
    testbed: &Testbed,
    keys: &Keys,
    disturbance: Disturbance,
) -> Result<()> {
    steps.step("hydra gets a machines file whose only builder is behind a link", |say| {
        // The machines file wants the whole public key, base64 once more.
        let host_key = BASE64.encode(&keys.builder_host.public);
        let machine = format!("ssh://builder x86_64-linux /run/credentials/lair/ssh-key 1 1 - - {host_key}\n");
        say.lines(machine.trim_end());
        let ssh = "Host builder\n  ProxyCommand lair-guest connect build\nHost cache\n  ProxyCommand lair-guest connect push\n\
                   Host *\n  User root\n  IdentityFile /run/credentials/lair/ssh-key\n  IdentitiesOnly yes\n  BatchMode yes\n  \
                   StrictHostKeyChecking yes\n  UserKnownHostsFile /run/credentials/lair/known-hosts\n";
        host.write_file("hydra", "/root/.ssh/config", ssh.as_bytes())?;
        host.write_file("hydra", "/root/machines", machine.as_bytes())?;
        host.write_file("hydra", "/root/demo.nix", expression(testbed, disturbance.seconds())?.as_bytes())
    })?;
    let what = match disturbance {
        Disturbance::None => "nix-build in hydra with max-jobs = 0: only the builder can build it".into(),
        Disturbance::Kill => "nix-build in hydra with max-jobs = 0; laird is killed while it runs".into(),
        Disturbance::Restarts { times, seconds } => format!(
            "nix-build in hydra with max-jobs = 0, {seconds} s; laird is killed and started {times} times while it runs"
        ),
    };
    steps.step(&what, |say| {
        let script =
            "cd /root && nix-build demo.nix --out-link result --max-jobs 0 --builders @/root/machines";
        let mut child = host
            .vmctl(&["exec", "hydra", "--", "sh", "-euc", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stderr.take().context("no standard error")?).lines();
        let (mut log, mut disturbed) = (String::new(), false);
        for line in lines {
            let line = line?;
            say.lines(&line);
            if line.contains("compiling in the sandbox") {
                disturbed = true;
                match disturbance {
                    Disturbance::None => {}
                    Disturbance::Kill => {
                        host.kill_laird()?;
                        say.lines("(laird killed with SIGKILL)");
                    }
                    // What the build says meanwhile waits in the pipe.
                    Disturbance::Restarts { times, seconds } => {
                        let span = Duration::from_secs(u64::from(seconds)).mul_f64(0.9);
                        disturb::restart(host, times, span)?.iter().for_each(|line| say.lines(line));
                    }
                }
            }
            writeln!(log, "{line}")?;
        }
        let status = child.wait()?;
        ensure!(status.success(), "nix-build failed: {status}");
        ensure!(log.contains("on 'ssh://builder'"), "the log does not say that the builder built it");
        ensure!(log.contains("copying 0 paths"), "inputs were copied that the builder's view has");
        ensure!(disturbed && log.contains("test passed"), "the derivation's test did not run");
        if disturbance == Disturbance::Kill {
            disturb::revive(host)?;
            say.lines("(laird started again: all VMs adopted)");
        }
        Ok(())
    })?;
    steps.step("the output is in hydra, and runs there", |say| {
        let output = host.shell("hydra", "readlink /root/result; /root/result/bin/sum")?;
        say.lines(&output);
        ensure!(output.lines().nth(1) == Some("5050"), "the program does not say 5050");
        Ok(())
    })
}

/// Signs in the cache, serves over HTTP, substitutes in the builder.
pub(crate) fn serve_and_substitute(
    steps: &mut Steps,
    host: &Host,
    testbed: &Testbed,
    keys: &Keys,
) -> Result<()> {
    let output = host.shell("hydra", "readlink /root/result")?.trim().to_owned();
    let name = output
        .rsplit('/')
        .next()
        .and_then(|name| name.split('-').next())
        .context("no store path")?
        .to_owned();
    steps.step("hydra pushes the output to the cache over ssh", |say| {
        host.shell("hydra", &format!("nix copy --no-check-sigs --to ssh://cache {output}"))?;
        say.lines(&output);
        Ok(())
    })?;
    steps.step("the cache signs it with the key that only it has, and serves it", |say| {
        host.shell("cache", &format!("publish {output}"))?;
        let narinfo = host.shell("cache", &format!("cat /srv/cache/{name}.narinfo"))?;
        let signature = narinfo.lines().find(|line| line.starts_with("Sig: ")).context("no signature")?;
        say.lines(signature);
        ensure!(signature.contains(SIGNING_KEY), "signed with another key");
        Ok(())
    })?;
    steps.step("the signing key is nowhere else", |say| {
        let secret = fs::read_to_string(&keys.signing)?;
        let secret = secret.trim().split_once(':').context("no key")?.1.to_owned();
        for vm in ["hydra", "builder"] {
            // By standard input, so that no audit log has it. The store is the host's and is searched there.
            let script =
                "read -r key; grep -rlF -- \"$key\" /run/credentials /etc /root /tmp /var /srv 2>/dev/null";
            let found = host.try_shell_with(vm, script, format!("{secret}\n").as_bytes())?;
            ensure!(
                found.stdout.is_empty(),
                "the key is in {vm}: {}",
                String::from_utf8_lossy(&found.stdout)
            );
        }
        let here = host.shell("cache", "grep -c lair-demo-1: /run/credentials/lair/signing-key")?;
        ensure!(here.trim() == "1", "the cache has no key");
        let store = testbed.store_root.join("nix/store");
        let files = VMS.into_iter().map(|vm| host_files_of(host, vm)).collect::<Result<Vec<_>>>()?.concat();
        let found = Command::new("grep").args(["-rlF", "--", &secret]).arg(&store).args(files).output()?;
        ensure!(
            found.status.code() == Some(1),
            "the key is on the host: {}",
            String::from_utf8_lossy(&found.stdout)
        );
        say.lines(
            "looked for in hydra, builder, the host's store, and every file that the host keeps for a VM",
        );
        Ok(())
    })?;
    steps.step("the builder forgets it, then substitutes it by link, checking the signature", |say| {
        host.shell("builder", &format!("nix-store --delete --ignore-liveness {output}"))?;
        ensure!(!host.try_shell("builder", &format!("test -e {output}"))?.status.success(), "still there");
        let copy = |key: &str| {
            format!(
                "nix-store --realise {output} --option substituters http://{CACHE_ADDRESS} --option require-sigs true \
                 --option trusted-public-keys '{key}'"
            )
        };
        let stranger = format!("{SIGNING_KEY}:{}", "A".repeat(43) + "=");
        let refused = host.try_shell("builder", &copy(&stranger))?;
        ensure!(!refused.status.success(), "it was taken with a stranger's key");
        host.shell("builder", &copy(&keys.signing_public))?;
        let said = host.shell("builder", &format!("{output}/bin/sum"))?;
        say.lines("with a stranger's key: refused");
        say.lines(&format!("with the cache's key: substituted, and says {}", said.trim()));
        ensure!(said.trim() == "5050", "the program does not say 5050");
        Ok(())
    })
}

/// What is not possible.
pub(crate) fn refusals(steps: &mut Steps, host: &Host, testbed: &Testbed) -> Result<()> {
    let secret = testbed.path("secret")?;
    steps.step("a path outside the view does not exist in a VM", |say| {
        ensure!(testbed.physical(secret).exists(), "the path is not on the host either");
        for vm in VMS {
            let seen = host
                .try_shell(vm, &format!("ls -d {secret} || ls /nix/store | grep \"$(basename {secret})\""))?;
            ensure!(!seen.status.success(), "{vm} sees {secret}");
        }
        say.lines(&format!("{secret}: on the host, in no VM"));
        Ok(())
    })?;
    steps.step("a link that no rule allows is refused", |say| {
        let before = host.vm("builder")?;
        let said = host.try_shell("builder", "lair-guest connect push </dev/null")?;
        ensure!(!said.status.success(), "the builder was connected to push");
        say.lines(&String::from_utf8_lossy(&said.stderr));
        let after = host.vm("builder")?;
        ensure!(before.counters == after.counters, "bytes went somewhere");
        Ok(())
    })?;
    steps.step("a derivation that opens AF_VSOCK from its sandbox gets nowhere", |say| {
        host.write_file("hydra", "/root/escape.nix", escape(testbed)?.as_bytes())?;
        let script = "cd /root && nix-build escape.nix --no-out-link --max-jobs 0 --builders @/root/machines 2>/dev/null | xargs cat";
        let said = host.shell("hydra", script)?;
        say.lines(&said);
        ensure!(said.contains("socket(AF_VSOCK): refused"), "the sandbox opened a vsock socket");
        ensure!(!said.contains("connected"), "the sandbox reached the host");
        Ok(())
    })
}

/// Tries what a hostile build would: a vsock socket, and io_uring, which opens sockets past system call filters.
fn escape(testbed: &Testbed) -> Result<String> {
    let (busybox, tcc) = (testbed.path("busybox")?, testbed.path("tcc")?);
    Ok(format!(
        r#"let
  busybox = builtins.storePath "{busybox}";
  tcc = builtins.storePath "{tcc}";
in derivation {{
  name = "lair-escape";
  system = "x86_64-linux";
  builder = "${{busybox}}/bin/busybox";
  PATH = "${{tcc}}/bin:${{busybox}}/bin";
  source = ''
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    #include <errno.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    struct address {{ unsigned short family, zero; unsigned port, cid; unsigned char rest[4]; }};
    int main(void) {{
      char params[256];
      int fd = socket(40, SOCK_STREAM, 0);
      printf("socket(AF_VSOCK): %s (%s)\n", fd < 0 ? "refused" : "opened", strerror(fd < 0 ? errno : 0));
      for (unsigned port = 1; fd >= 0 && port < 8; port++) {{
        struct address host = {{ 40, 0, port, 2 }};
        if (connect(fd, (struct sockaddr *)&host, sizeof host) == 0) printf("connected to port %u\n", port);
      }}
      memset(params, 0, sizeof params);
      int ring = syscall(425, 4, params);
      printf("io_uring_setup: %s (%s)\n", ring < 0 ? "refused" : "opened", strerror(ring < 0 ? errno : 0));
      return 0;
    }}
  '';
  args = [ "sh" "-euc" ''
    printf '%s' "$source" > escape.c
    tcc escape.c -o escape
    ./escape > $out
  '' ];
}}
"#
    ))
}

/// What went over each link, once for each direction that the fleet file allows.
pub(crate) fn link_table(host: &Host) -> Result<String> {
    let status = host.status()?;
    let mut table = String::new();
    writeln!(
        table,
        "{:<12} {:<8} {:<8} {:>11} {:>8} {:>12} {:>12}",
        "LINK", "FROM", "TO", "CONNECTIONS", "REFUSED", "SENT", "RECEIVED"
    )?;
    // Counted where the link is opened.
    for vm in &status.vms {
        for link in vm.counters.iter().filter(|link| link.from == vm.name) {
            writeln!(
                table,
                "{:<12} {:<8} {:<8} {:>11} {:>8} {:>12} {:>12}",
                link.link, link.from, link.to, link.connections, link.refused, link.bytes_out, link.bytes_in
            )?;
        }
    }
    if table.lines().count() < 2 {
        bail!("no link was counted");
    }
    Ok(table)
}

/// Every file below the VM's directories on the host, sockets apart; images of volumes too.
fn host_files_of(host: &Host, vm: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for directory in [host.run_file(vm, ""), host.state_file(vm, "")] {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}
