//! A virtual machine in QEMU with several stores, and a line to the shell in it.

use anyhow::{Context, Result, bail, ensure};
use lair_guest::initramfs;
use lair_harness::testbed::Testbed;
use lair_vmm::{
    fleet::schema::Accel,
    host::facts::{Engine, engine},
};
use serde_json::json;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// What the guest's kernel needs to have loaded.
const MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtiofs", "virtio_blk", "erofs"];

/// Memory of the guest in MiB: all of the store fits in it.
const MEMORY: u64 = 1024;

/// How long the boot, or one line, may take under emulation.
const PATIENCE: Duration = Duration::from_secs(600);

/// A running guest. Dropping it ends it.
pub(super) struct Machine {
    qemu: Child,
    shell: BufReader<UnixStream>,
    console: std::path::PathBuf,
    pub(super) engine: Engine,
}

/// What a line in the guest came to.
pub(super) struct Ran {
    pub(super) seconds: f64,
    pub(super) output: String,
}

impl Machine {
    /// Boots it with files of its own in `directory`. `shares` are names and sockets of virtiofs backends; `disk` is an image
    /// that is read only.
    pub(super) fn boot(
        testbed: &Testbed,
        directory: &Path,
        shares: &[(&str, &Path)],
        disk: &Path,
    ) -> Result<Self> {
        let engine = engine(Accel::Auto)?;
        let initramfs = directory.join("initramfs");
        fs::write(&initramfs, archive(testbed, directory)?)?;
        let (socket, console) = (directory.join("shell.sock"), directory.join("console"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-smp", "1"]);
        let (accel, cpu) = match engine {
            Engine::Kvm => ("kvm", "host"),
            Engine::Tcg => ("tcg", "max"),
        };
        command.args(["-machine", &format!("q35,accel={accel},memory-backend=memory"), "-cpu", cpu]);
        command.args(["-m", &format!("{MEMORY}M"), "-object"]);
        let memory = json!({ "qom-type": "memory-backend-memfd", "id": "memory", "size": MEMORY << 20, "share": true });
        command.arg(memory.to_string());
        command.arg("-kernel").arg(testbed.physical(&testbed.kernel)).arg("-initrd").arg(initramfs);
        command.args(["-append", "console=hvc0 quiet panic=-1"]);
        for (number, (tag, socket)) in shares.iter().enumerate() {
            command.args(["-chardev", &format!("socket,id=share{number},path={}", socket.display())]);
            command.arg("-device").arg(
                json!({
                    "driver": "vhost-user-fs-pci", "chardev": format!("share{number}"), "tag": tag, "queue-size": 1024,
                })
                .to_string(),
            );
        }
        let image = json!({
            "driver": "raw", "node-name": "disk", "read-only": true,
            "file": { "driver": "file", "filename": disk, "read-only": true },
        });
        command.arg("-blockdev").arg(image.to_string());
        command.args(["-device", "virtio-blk-pci,drive=disk", "-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("file,id=console,path={}", console.display())]);
        command.args(["-device", "virtconsole,chardev=console", "-chardev"]);
        command.arg(format!("socket,id=shell,server=on,wait=off,path={}", socket.display()));
        command.args(["-device", "virtserialport,chardev=shell,name=bench"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(directory.join("qemu.log"))?);
        let mut qemu = command.spawn().context("Cannot start qemu-system-x86_64")?;
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    if qemu.try_wait()?.is_some() || Instant::now() > deadline {
                        let _ = qemu.kill();
                        let said = fs::read_to_string(directory.join("qemu.log")).unwrap_or_default();
                        return Err(error).with_context(|| format!("QEMU does not start: {said}"));
                    }
                    sleep(Duration::from_millis(20));
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut machine = Self { qemu, shell: BufReader::new(stream), console, engine };
        let hello = machine.line().context("The guest does not boot")?;
        ensure!(hello == "ready", "The guest says {hello:?}");
        Ok(machine)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let said = |machine: &Self| fs::read_to_string(&machine.console).unwrap_or_default();
        match self.shell.read_line(&mut line) {
            Ok(0) => bail!("The guest is gone; its console:\n{}", said(self)),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => {
                Err(error).with_context(|| format!("No word from the guest; its console:\n{}", said(self)))
            }
        }
    }

    /// Runs one line of shell in the guest, which has to succeed.
    pub(super) fn run(&mut self, script: &str) -> Result<Ran> {
        ensure!(!script.contains('\n'), "more than one line");
        self.shell.get_mut().write_all(format!("{script}\n").as_bytes())?;
        let mut output = String::new();
        loop {
            let line = self.line()?;
            let Some(end) = line.strip_prefix("@ ") else {
                output += &line;
                output.push('\n');
                continue;
            };
            let words: Vec<_> = end.split_whitespace().collect();
            let [status, begin, end] = words[..] else { bail!("The guest says {line:?}") };
            ensure!(
                status == "0",
                "{script}: status {status}\n{output}{}",
                fs::read_to_string(&self.console).unwrap_or_default()
            );
            return Ok(Ran { seconds: end.parse::<f64>()? - begin.parse::<f64>()?, output });
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The initramfs: the modules and `init`, then an archive with the shell.
fn archive(testbed: &Testbed, directory: &Path) -> Result<Vec<u8>> {
    let script = directory.join("init");
    fs::write(&script, include_str!("init"))?;
    let mut archive = initramfs::base(&script, &testbed.physical(&testbed.modules), MODULES)?;
    let busybox = testbed.physical(testbed.path("busybox")?).join("bin/busybox");
    let root = directory.join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    let packed = Command::new(&busybox)
        .args(["sh", "-c", "find . | cpio -o -H newc"])
        .current_dir(&root)
        .stderr(Stdio::null())
        .output()
        .context("Cannot run the test bed's busybox")?;
    ensure!(packed.status.success() && !packed.stdout.is_empty(), "busybox's cpio failed");
    archive.extend(packed.stdout);
    Ok(archive)
}
