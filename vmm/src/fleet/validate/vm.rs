//! Checks of one VM.

use super::{HOST, Unique, Verdict, file};
use crate::fleet::{
    gpus::{COUNT_MAX, Gpu},
    limits::{HostFacts, MEMORY_MIN, MEMORY_STEP},
    names,
    problem::{Finding, Path, Spot, listed, nearest, quoted},
    schema::{Credential, Overlay, Service, Vm, Volume},
    units::Size,
};

use crate::host::pci::NVIDIA;

/// The most volumes: each takes a slot of the PCI bus.
const VOLUMES_MAX: usize = 16;

/// The most roots, services, arguments, variables or credentials.
const LIST_MAX: usize = 1024;

/// The most units that a change of one credential restarts.
const RESTART_MAX: usize = 32;

/// Sizes of volumes: what ext4 can be made on, and what a mistyped unit exceeds.
const VOLUME_SIZES: (Size, Size) = (Size(16 << 20), Size(256 << 40));

/// The longest addition to a kernel's command line. The kernel reads 2048 bytes with the final NUL, of which Lair needs some.
const CMDLINE_MAX: usize = 1792;

/// Words of a kernel's command line that decide how Lair starts and watches a guest.
const RESERVED_WORDS: [&str; 10] =
    ["--", "console", "init", "initrd", "noinitrd", "panic", "rdinit", "reboot", "root", "rootfstype"];

/// Directories that a volume would hide from what Lair put there.
const RESERVED_MOUNTS: [&str; 6] = ["/dev", "/nix/store", "/proc", "/run/lair", "/sys", "/lair"];

pub(super) fn check(name: &str, vm: &Vm, path: &Path, host: &HostFacts, verdict: &mut Verdict) {
    verdict.key(path, names::name(name, names::NAME_MAX));
    if name == HOST {
        verdict.error(Finding::at_key(
            path,
            format!("no VM can be called \"{HOST}\"; links mean the host by it"),
        ));
    }
    processors(vm.vcpus, &path.key("vcpus"), host, verdict);
    verdict.value(&path.key("memory"), memory(vm.memory, host));
    verdict.value(&path.key("kernel"), file(&vm.kernel));
    verdict.value(&path.key("modules"), file(&vm.modules));
    verdict.value(&path.key("cmdline"), cmdline(&vm.cmdline));
    view(vm, path, verdict);
    volumes(&vm.volumes, &path.key("volumes"), verdict);
    overlay(vm, &path.key("overlay"), verdict);
    gpus(&vm.gpus, &path.key("gpus"), verdict);
    credentials(vm, &path.key("credentials"), verdict);
    services(&vm.services, &path.key("services"), verdict);
    limits(vm, &path.key("limits"), verdict);
}

/// The least that is read or written a second. A VM with less would never boot.
const IO_MIN: Size = Size(1 << 20);

/// What is read and written a second at most, in operations.
const OPS_MIN: u32 = 10;

/// The most of the store in the page cache.
const STORE_CACHE_MAX: Size = Size(1 << 40);

fn limits(vm: &Vm, path: &Path, verdict: &mut Verdict) {
    if let Some(cache) = vm.limits.store_cache
        && cache > STORE_CACHE_MAX
    {
        let message = format!("{cache} of page cache; at most {STORE_CACHE_MAX} are allowed");
        verdict.error(Finding::at(&path.key("store_cache"), message));
    }
    let Some(io) = &vm.limits.io else { return };
    let path = path.key("io");
    for (key, rate) in [("read", io.read), ("write", io.write)] {
        if let Some(rate) = rate.filter(|rate| *rate < IO_MIN) {
            verdict
                .error(Finding::at(&path.key(key), format!("{rate} a second; at least {IO_MIN} are needed")));
        }
    }
    for (key, rate) in [("read_ops", io.read_ops), ("write_ops", io.write_ops)] {
        if let Some(rate) = rate.filter(|rate| *rate < OPS_MIN) {
            verdict.error(Finding::at(
                &path.key(key),
                format!("{rate} a second; at least {OPS_MIN} are needed"),
            ));
        }
    }
    if vm.volumes.is_empty() {
        verdict.warnings.push(Finding::at(&path, "limits nothing: the VM has no volumes"));
    }
}

fn count(length: usize) -> Result<(), String> {
    if length <= LIST_MAX {
        Ok(())
    } else {
        Err(format!("has {length} entries; at most {LIST_MAX} are allowed"))
    }
}

fn processors(vcpus: u32, path: &Path, host: &HostFacts, verdict: &mut Verdict) {
    if vcpus > host.cpus {
        let message = format!(
            "{vcpus} virtual CPUs are more than the host's {}; they will wait for each other",
            host.cpus
        );
        verdict.warnings.push(Finding::at(path, message));
    }
}

fn memory(memory: Size, host: &HostFacts) -> Result<(), String> {
    if memory < MEMORY_MIN || memory > host.memory {
        return Err(format!(
            "{memory} of memory; {MEMORY_MIN} to {} are allowed, all that the host has",
            host.memory
        ));
    }
    if !memory.0.is_multiple_of(MEMORY_STEP.0) {
        return Err(format!("{memory} of memory; a multiple of {MEMORY_STEP} is needed"));
    }
    Ok(())
}

fn cmdline(text: &str) -> Result<(), String> {
    if text.len() > CMDLINE_MAX {
        return Err(format!("has {} bytes; at most {CMDLINE_MAX} are allowed", text.len()));
    }
    if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err("has a line break, another control character or a letter outside of ASCII".into());
    }
    if !text.bytes().filter(|byte| *byte == b'"').count().is_multiple_of(2) {
        return Err("has an opening quote without a closing one".into());
    }
    // As the kernel does: a quote may begin a word, and - and _ are one. A blank in quotes ends a word only here, which
    // refuses rather too much.
    for word in text.split(' ') {
        let key = word.trim_matches('"').split('=').next().unwrap_or_default().replace('_', "-");
        if RESERVED_WORDS.contains(&key.as_str()) {
            return Err(format!("sets \"{key}\"; Lair sets {} itself", listed(RESERVED_WORDS)));
        }
    }
    Ok(())
}

/// What is seen of the store.
fn view(vm: &Vm, path: &Path, verdict: &mut Verdict) {
    let roots = path.key("roots");
    verdict.value(&roots, count(vm.roots.len()));
    if vm.roots.is_empty() {
        verdict.error(Finding::at(&roots, "is empty; name at least one store path"));
    }
    for (index, root) in vm.roots.iter().take(LIST_MAX).enumerate() {
        verdict.value(&roots.index(index), names::whole_store_path(&root.to_string_lossy()));
    }
    if let Some(init) = &vm.init {
        verdict.value(&path.key("init"), names::store_path(&init.to_string_lossy()).map(|_| ()));
        for (key, given) in [("profile", vm.profile.is_some()), ("services", !vm.services.is_empty())] {
            if given {
                let message = "is for VMs without \"init\", whose agent runs services; here the system does";
                verdict.error(Finding::at_key(&path.key(key), message).other(Spot::Key(path.key("init"))));
            }
        }
    }
    if let Some(profile) = &vm.profile {
        verdict.value(&path.key("profile"), names::whole_store_path(&profile.to_string_lossy()));
    }
}

fn volumes(volumes: &[Volume], path: &Path, verdict: &mut Verdict) {
    if volumes.len() > VOLUMES_MAX {
        verdict.error(Finding::at(
            path,
            format!("has {} volumes; at most {VOLUMES_MAX} are allowed", volumes.len()),
        ));
    }
    let (mut names, mut mounts) = (Unique::new(), Unique::new());
    for (index, volume) in volumes.iter().enumerate().take(VOLUMES_MAX) {
        let path = path.index(index);
        let (name_path, mount_path) = (path.key("name"), path.key("mount"));
        verdict.value(&name_path, names::name(&volume.name, names::VOLUME_NAME_MAX));
        if let Some(first) = names.insert(&volume.name, &name_path) {
            let message = format!("another volume of this VM is called {}", quoted(&volume.name));
            verdict.error(Finding::at(&name_path, message).other(Spot::Value(first)));
        }
        let (least, most) = VOLUME_SIZES;
        if !(least..=most).contains(&volume.size) {
            let message = format!("{} for a volume; {least} to {most} are allowed", volume.size);
            verdict.error(Finding::at(&path.key("size"), message));
        }
        verdict.value(&mount_path, mount(&volume.mount));
        if let Some(first) = mounts.insert(&volume.mount, &mount_path) {
            let message = "another volume of this VM is mounted there";
            verdict.error(Finding::at(&mount_path, message).other(Spot::Value(first)));
        }
    }
}

fn mount(path: &std::path::Path) -> Result<(), String> {
    file(path)?;
    let hides =
        |reserved: &&str| path.starts_with(reserved) || std::path::Path::new(reserved).starts_with(path);
    match RESERVED_MOUNTS.iter().find(|reserved| hides(reserved)) {
        Some(reserved) => Err(format!(
            "{} would hide or be hidden by {reserved}, which Lair mounts",
            quoted(&path.to_string_lossy())
        )),
        None => Ok(()),
    }
}

/// The most entries: each is a device or more.
const GPUS_MAX: usize = 16;

fn gpus(gpus: &[Gpu], path: &Path, verdict: &mut Verdict) {
    if gpus.len() > GPUS_MAX {
        let message = format!("has {} entries; at most {GPUS_MAX} are allowed", gpus.len());
        verdict.error(Finding::at(path, message));
    }
    let mut addresses = Unique::new();
    for (index, gpu) in gpus.iter().enumerate().take(GPUS_MAX) {
        let path = path.index(index);
        match gpu {
            Gpu::At(at) => {
                let path = path.key("address");
                if let Some(first) = addresses.insert(at.address, &path) {
                    let message = "this VM asks for the same device twice";
                    verdict.error(Finding::at(&path, message).other(Spot::Value(first)));
                }
            }
            Gpu::Any(any) => {
                if !(1..=COUNT_MAX).contains(&any.count) {
                    let message = format!("must be 1 to {COUNT_MAX}, not {}", any.count);
                    verdict.error(Finding::at(&path.key("count"), message));
                }
                if any.arch.is_some() && any.vendor.0 != NVIDIA {
                    let message = "only generations of NVIDIA's are known; leave it out for other vendors";
                    verdict.error(Finding::at(&path.key("arch"), message));
                }
            }
        }
    }
}

fn overlay(vm: &Vm, path: &Path, verdict: &mut Verdict) {
    match &vm.overlay {
        None => {}
        Some(Overlay::Tmpfs(size)) => {
            let least = Size(1 << 20);
            if *size < least || *size > vm.memory {
                let memory = vm.memory;
                let message =
                    format!("{size} in memory; {least} to {memory} are allowed, the memory of the VM");
                verdict.error(Finding::at(&path.key("tmpfs"), message));
            }
        }
        Some(Overlay::Volume(name)) => {
            let names = || vm.volumes.iter().map(|volume| volume.name.as_str());
            if !names().any(|volume| volume == name) {
                verdict.error(unknown(&path.key("volume"), "this VM has no volume", name, names().collect()));
            }
        }
    }
}

/// `name` is none of `names`.
pub(super) fn unknown(path: &Path, what: &str, name: &str, names: Vec<&str>) -> Finding {
    let meant = nearest(name, names.iter().copied());
    let meant = meant.map(|near| format!("; did you mean {}?", quoted(near))).unwrap_or_default();
    let finding = Finding::at(path, format!("{what} {}{meant}", quoted(name)));
    match names.len() {
        0 => finding.hint("there is none at all"),
        1..=20 => finding.hint(format!("there are: {}", listed(names))),
        more => finding.hint(format!("there are {more}")),
    }
}

fn credentials(vm: &Vm, path: &Path, verdict: &mut Verdict) {
    verdict.value(path, count(vm.credentials.len()));
    for (name, credential) in vm.credentials.iter().take(LIST_MAX) {
        let path = path.key(name);
        verdict.key(&path, names::credential(name));
        let rotated = match credential {
            Credential::File(source) => {
                verdict.value(&path, file(source));
                continue;
            }
            Credential::Rotated(rotated) => rotated,
        };
        verdict.value(&path.key("file"), file(&rotated.file));
        let path = path.key("restart");
        if rotated.restart.len() > RESTART_MAX {
            let message = format!("has {} entries; at most {RESTART_MAX} are allowed", rotated.restart.len());
            verdict.error(Finding::at(&path, message));
        }
        for (index, restarted) in rotated.restart.iter().enumerate().take(RESTART_MAX) {
            let checked = if vm.init.is_some() { names::unit(restarted) } else { service_of(vm, restarted) };
            verdict.value(&path.index(index), checked);
        }
    }
}

/// Whether the agent runs a service of this name.
fn service_of(vm: &Vm, name: &str) -> Result<(), String> {
    let mut known = vm.services.iter().map(|service| service.name.as_str());
    if known.any(|service| service == name) {
        return Ok(());
    }
    let known = listed(vm.services.iter().take(LIST_MAX).map(|service| service.name.as_str()));
    let known = if known.is_empty() { "it has none".into() } else { format!("it has {known}") };
    Err(format!("this VM has no service {}; {known}", quoted(name)))
}

fn services(services: &[Service], path: &Path, verdict: &mut Verdict) {
    verdict.value(path, count(services.len()));
    let mut names = Unique::new();
    for (index, service) in services.iter().enumerate().take(LIST_MAX) {
        let path = path.index(index);
        let name_path = path.key("name");
        verdict.value(&name_path, names::name(&service.name, names::NAME_MAX));
        if let Some(first) = names.insert(&service.name, &name_path) {
            let message = format!("another service of this VM is called {}", quoted(&service.name));
            verdict.error(Finding::at(&name_path, message).other(Spot::Value(first)));
        }
        command(&service.command, &path.key("command"), verdict);
        let environment = path.key("environment");
        verdict.value(&environment, count(service.environment.len()));
        for (name, value) in service.environment.iter().take(LIST_MAX) {
            verdict.key(&environment.key(name), names::variable(name));
            verdict.value(&environment.key(name), no_nul(value));
        }
        if let Some(ready) = &service.ready {
            verdict.value(&path.key("ready"), names::endpoint(ready));
        }
    }
}

fn command(command: &[String], path: &Path, verdict: &mut Verdict) {
    verdict.value(path, count(command.len()));
    match command.first() {
        None => verdict.error(Finding::at(path, "is empty; name a program")),
        Some(program) => verdict.value(&path.index(0), names::path(program)),
    }
    for (index, argument) in command.iter().enumerate().take(LIST_MAX).skip(1) {
        verdict.value(&path.index(index), no_nul(argument));
    }
}

/// Programs take anything but this.
fn no_nul(text: &str) -> Result<(), String> {
    if text.contains('\0') { Err("has a NUL character in it".into()) } else { Ok(()) }
}
