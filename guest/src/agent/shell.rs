//! Root's login shell.

use super::environment::Environment;
use nix::unistd::{AccessFlags, access};
use std::{
    ffi::OsString,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};
use tokio::process::Command;

/// Where NixOS has a shell, should its `/etc/passwd` not be made yet.
const NIXOS: &str = "/run/current-system/sw/bin/bash";

/// Where nearly every system has one.
const FALLBACK: &str = "/bin/sh";

/// As much of `/etc/passwd` as is read, in bytes. Root is in its first line.
const PASSWD_BYTES: u64 = 64 << 10;

/// A command that is root's shell as a login starts it.
pub(super) fn login(environment: &Environment) -> Command {
    let variable =
        |name: &str| environment.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let path = variable("PATH").unwrap_or_default();
    let shell = find(&passwd(), path, |path| access(path, AccessFlags::X_OK).is_ok() && path.is_file());
    let mut command = Command::new(&shell);
    // By this a shell knows that it is a login shell (login(1), bash(1) "INVOCATION").
    let mut name = OsString::from("-");
    name.push(shell.file_name().unwrap_or_default());
    command
        .arg0(name)
        .env_clear()
        .envs(environment.iter().cloned())
        .env("USER", "root")
        .env("LOGNAME", "root")
        .env("SHELL", &shell);
    let home = variable("HOME").map(Path::new);
    command.current_dir(home.filter(|home| home.is_dir()).unwrap_or(Path::new("/")));
    command
}

fn passwd() -> String {
    let mut bytes = Vec::new();
    // A system without the file, or with one that cannot be read, has a shell nevertheless.
    let _ = File::open("/etc/passwd").and_then(|file| file.take(PASSWD_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first of what may be the shell that can be started: what `passwd` says (passwd(5), the seventh field of the user with id
/// 0), the usual places, `sh` in `path`.
fn find(passwd: &str, path: &str, usable: impl Fn(&Path) -> bool) -> PathBuf {
    let named = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        match fields.as_slice() {
            [_, _, "0", _, _, _, shell, ..] => Some(*shell),
            _ => None,
        }
    });
    let in_path = path.split(':').map(|directory| Path::new(directory).join("sh"));
    let candidates = named.into_iter().chain([NIXOS, FALLBACK]).map(PathBuf::from).chain(in_path);
    let mut usable = candidates.filter(|path| path.is_absolute() && usable(path));
    usable.next().unwrap_or_else(|| FALLBACK.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_is_roots_own_or_one_that_is_there() {
        let passwd = "daemon:x:1:1::/:/bin/no\nroot:x:0:0:Root:/root:/nix/store/x/bin/fish\n";
        assert_eq!(find(passwd, "", |_| true), Path::new("/nix/store/x/bin/fish"));
        assert_eq!(find(passwd, "", |path| path == Path::new(NIXOS)), Path::new(NIXOS));
        for passwd in ["", "root:x:0:0\n", "root:x:0:0:::\n", "root:x:0:0:::bin/sh\n"] {
            assert_eq!(find(passwd, "", |path| path != Path::new(NIXOS)), Path::new(FALLBACK), "{passwd:?}");
        }
        let in_path = |path: &Path| path.starts_with("/opt");
        assert_eq!(find(passwd, "/bin:/opt/bin:relative", in_path), Path::new("/opt/bin/sh"));
        assert_eq!(find(passwd, ":relative", |_| false), Path::new(FALLBACK), "for the error's sake");
    }
}
