//! NVIDIA's driver in the guest, and what its tool tells of GPUs.

use super::{
    super::environment::Environment,
    pci::{self, cut, text},
};
use crate::sys;
use lair_guest::wire::message::{EccCounts, GpuFigures, NvidiaDriver};
use std::{io, path::Path, process::Stdio, time::Duration};
use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
    time::timeout,
};

/// The tool, looked up in the guest's PATH.
pub(super) const PROGRAM: &str = "nvidia-smi";

/// How long it may take. Where no daemon keeps the GPU awake it takes seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// The most of its output that is read, in bytes.
const OUTPUT_MAX: u64 = 64 << 10;

/// The most GPUs that are told.
pub(super) const GPUS_MAX: usize = 16;

/// What it is asked for, in this order.
const FIELDS: &str = "pci.bus_id,temperature.gpu,power.draw,utilization.gpu,memory.used,memory.total,\
                      ecc.errors.corrected.volatile.total,ecc.errors.uncorrected.volatile.total,\
                      ecc.errors.corrected.aggregate.total,ecc.errors.uncorrected.aggregate.total";

/// The driver, by the files below `root`.
pub(super) fn driver(root: &Path) -> NvidiaDriver {
    let version = text(&root.join("sys/module/nvidia/version")).map(|text| cut(&text, 64));
    let version = version
        .or_else(|| version_in(&text(&root.join("proc/driver/nvidia/version"))?))
        .filter(|version| !version.is_empty());
    match version {
        Some(version) => NvidiaDriver::Loaded { version: Some(version) },
        None if root.join("sys/module/nvidia").exists() => NvidiaDriver::Loaded { version: None },
        None => NvidiaDriver::Absent,
    }
}

/// The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  …`, or `… Open Kernel Module for x86_64  550.54.14  …`.
fn version_in(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    line.split_ascii_whitespace().find(is_version).map(|version| cut(version, 64))
}

/// Asks the tool. What it tells, and the process, which was killed if it took too long but need not have ended.
pub(super) async fn figures(
    program: &Path,
    environment: &Environment,
) -> (io::Result<Vec<GpuFigures>>, Option<Child>) {
    let mut command = Command::new(program);
    command.arg(format!("--query-gpu={FIELDS}")).arg("--format=csv,noheader,nounits");
    command.env_clear().envs(environment.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    sys::isolate(&mut command, None);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return (Err(error), None),
    };
    let told = match timeout(PATIENCE, output(&mut child)).await {
        Ok(told) => told,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {PATIENCE:?}"))),
    };
    let _ = child.start_kill();
    (told, Some(child))
}

/// What it tells until its end. Of several GPUs one may be lost: then it fails, and tells of the others all the same.
async fn output(child: &mut Child) -> io::Result<Vec<GpuFigures>> {
    let mut bytes = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(OUTPUT_MAX).read_to_end(&mut bytes).await?;
    }
    let status = child.wait().await?;
    if bytes.len() as u64 == OUTPUT_MAX {
        return Err(io::Error::other(format!("it said {OUTPUT_MAX} bytes and more")));
    }
    match parse(&String::from_utf8_lossy(&bytes)) {
        figures if figures.is_empty() && !status.success() => {
            Err(io::Error::other(format!("it ended with {status}")))
        }
        figures => Ok(figures),
    }
}

/// Reads a line for each GPU.
fn parse(text: &str) -> Vec<GpuFigures> {
    text.lines().filter_map(gpu).take(GPUS_MAX).collect()
}

/// What a GPU does not have is `[N/A]` or `[Not Supported]`, depending on the release; what is wrong is in brackets as well.
fn gpu(line: &str) -> Option<GpuFigures> {
    let mut fields = line.split(',').map(str::trim);
    let address = pci::address(fields.next()?)?;
    let mut number = || fields.next().and_then(thousandths);
    let whole = |thousandths: Option<u64>| thousandths.and_then(|value| value.checked_div(1000));
    let small = |thousandths: Option<u64>| whole(thousandths).and_then(|value| u32::try_from(value).ok());
    let mebibytes =
        |thousandths: Option<u64>| whole(thousandths).and_then(|value| value.checked_mul(1 << 20));
    Some(GpuFigures {
        address,
        temperature: small(number()),
        power: number(),
        utilization: small(number()),
        memory_used: mebibytes(number()),
        memory_total: mebibytes(number()),
        ecc_volatile: EccCounts { corrected: whole(number()), uncorrected: whole(number()) },
        ecc_aggregate: EccCounts { corrected: whole(number()), uncorrected: whole(number()) },
    })
}

/// A decimal in thousandths; what is beyond those is cut.
fn thousandths(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let fraction: String = fraction.chars().chain("000".chars()).take(3).collect();
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, path::PathBuf};

    #[test]
    fn each_driver_tells_its_version_in_its_own_way_and_none_is_a_state() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let loaded = |version: Option<&str>| NvidiaDriver::Loaded { version: version.map(Into::into) };
        assert_eq!(driver(root.path()), NvidiaDriver::Absent);
        fs::create_dir_all(root.path().join("sys/module/nvidia")).unwrap();
        assert_eq!(driver(root.path()), loaded(None));
        write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May\nGCC version:  gcc version 12.2.0\n",
        );
        assert_eq!(driver(root.path()), loaded(Some("470.256.02")));
        write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build\n",
        );
        assert_eq!(driver(root.path()), loaded(Some("565.57.01")));
        write("sys/module/nvidia/version", "570.144\n");
        assert_eq!(driver(root.path()), loaded(Some("570.144")));
    }

    #[test]
    fn figures_are_read_as_the_tool_writes_them_and_what_it_does_not_tell_is_none() {
        let gpus = parse(
            "00000000:01:00.0, 41, 70.25, 98, 10240, 20475, 3, 0, 17, [N/A]\n\
             00000000:02:00.0, 35, [Not Supported], [N/A], 1, 8192, N/A, [N/A], [N/A], [N/A]\n\
             No devices were found\n00000000:03:00.0, [GPU is lost]\n",
        );
        let mib = |n: u64| Some(n << 20);
        let first = GpuFigures {
            address: "0000:01:00.0".into(),
            temperature: Some(41),
            power: Some(70_250),
            utilization: Some(98),
            memory_used: mib(10_240),
            memory_total: mib(20_475),
            ecc_volatile: EccCounts { corrected: Some(3), uncorrected: Some(0) },
            ecc_aggregate: EccCounts { corrected: Some(17), uncorrected: None },
        };
        assert_eq!(gpus[0], first);
        let second = GpuFigures {
            address: "0000:02:00.0".into(),
            temperature: Some(35),
            memory_used: mib(1),
            memory_total: mib(8192),
            ..GpuFigures::default()
        };
        assert_eq!(gpus[1], second);
        assert_eq!(gpus[2], GpuFigures { address: "0000:03:00.0".into(), ..GpuFigures::default() });
        assert_eq!(gpus.len(), 3);
    }

    proptest! {
        #[test]
        fn vs4_no_output_panics(text in "(\\PC|\n|,|[0-9]){0,300}") {
            prop_assert!(parse(&text).len() <= GPUS_MAX);
        }
    }

    fn program(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("tool");
        super::super::tests::write_program(&path, &format!("#!/bin/sh\n{script}\n"));
        path
    }

    #[tokio::test]
    async fn the_tool_is_asked_with_the_guests_environment_and_no_longer_than_it_may_take() {
        let directory = tempfile::tempdir().unwrap();
        let environment = vec![("PATH".to_owned(), std::env::var("PATH").unwrap())];
        let asked = async |script: &str| figures(&program(directory.path(), script), &environment).await.0;
        let told = asked("echo \"$*\" >\"$0.said\"; echo '00000000:01:00.0, 41'").await.unwrap();
        assert_eq!(told[0].temperature, Some(41));
        let said = fs::read_to_string(directory.path().join("tool.said")).unwrap();
        assert!(said.starts_with("--query-gpu=pci.bus_id,temperature.gpu,power.draw,"), "{said}");
        assert!(
            said.trim_end().ends_with("ecc.errors.uncorrected.aggregate.total --format=csv,noheader,nounits"),
            "{said}"
        );
        let error = asked("echo 'Field \"x\" is not a valid field to query.'; exit 2").await.unwrap_err();
        assert!(error.to_string().contains("exit status: 2"), "{error}");
        // One of three is lost.
        let told = asked(
            "echo '00000000:01:00.0, 41'; echo 'Unable to determine the device handle'; echo '00000000:03:00.0, 43'; exit 15",
        );
        assert_eq!(told.await.unwrap().len(), 2);
        // More than is read: it gets SIGPIPE, and nothing is taken from it.
        assert!(asked("while :; do echo '00000000:01:00.0, 41'; done").await.is_err());
        let missing = figures(Path::new("/nonexistent/tool"), &environment).await.0.unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tool_that_hangs_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let environment = vec![("PATH".to_owned(), std::env::var("PATH").unwrap())];
        let error = figures(&program(directory.path(), "exec sleep 600"), &environment).await.0.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
