//! Names, addresses and paths in a fleet file: what each may look like. Pure.
//!
//! They become parts of directories, sockets, hypervisor options and lines of files that other programs read, so each is
//! limited to what all of those take as it is. Errors are said after the place of what they are about.

use super::problem::quoted;
use std::net::SocketAddr;

/// The longest name of a VM, link or service.
pub(super) const NAME_MAX: usize = 64;

/// The longest name of a volume: it is the serial number by which the guest finds the disk, and virtio has 20 bytes for that.
pub(super) const VOLUME_NAME_MAX: usize = 20;

/// The longest path of a unix socket in bytes: `sun_path` less its final NUL.
const SOCKET_PATH_MAX: usize = 107;

/// The longest path of any other file in bytes: the kernel's PATH_MAX less the final NUL.
const PATH_MAX: usize = 4095;

/// A name with letters, digits and hyphens.
pub(super) fn name(text: &str, longest: usize) -> Result<(), String> {
    let legal = !text.is_empty()
        && text.len() <= longest
        && !text.starts_with('-')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if legal {
        return Ok(());
    }
    Err(format!("must be 1 to {longest} letters (a to z), digits and hyphens, the first no hyphen"))
}

/// The name of a credential: a file name in the guest, so dots and underscores as well.
pub(super) fn credential(text: &str) -> Result<(), String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=NAME_MAX).contains(&text.len()) && !text.starts_with(['-', '.']) && text.bytes().all(legal) {
        return Ok(());
    }
    Err(format!(
        "must be 1 to {NAME_MAX} letters (a to z), digits, hyphens, underscores and dots, the first a letter, a digit or an underscore"
    ))
}

/// The name of a systemd unit that can be restarted (systemd.unit(5)).
pub(super) fn unit(text: &str) -> Result<(), String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    let stem = [".service", ".socket", ".target"].iter().find_map(|kind| text.strip_suffix(kind));
    if text.len() <= 255
        && text.bytes().all(legal)
        && stem.is_some_and(|stem| !stem.is_empty() && !stem.starts_with(['-', '.']))
    {
        return Ok(());
    }
    Err(format!(
        "{} is not the name of a service, socket or target unit, such as \"nginx.service\"",
        quoted(text)
    ))
}

/// The name of an environment variable.
pub(super) fn variable(text: &str) -> Result<(), String> {
    let first = |byte: &u8| byte.is_ascii_alphabetic() || *byte == b'_';
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if text.len() <= 256 && text.as_bytes().first().is_some_and(first) && text.bytes().all(legal) {
        return Ok(());
    }
    Err("must be letters (a to z), digits and underscores, the first no digit, as names of environment variables are".into())
}

/// The name or number of a user or group, as shadow's tools take it.
pub(super) fn user(text: &str) -> Result<(), String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=32).contains(&text.len()) && !text.starts_with(['-', '.']) && text.bytes().all(legal) {
        return Ok(());
    }
    Err("must be the name or number of a user, or of a group with an @ before it".into())
}

/// An absolute path on one line, without `.` and `..`, as it will be used.
pub(super) fn path(text: &str) -> Result<(), String> {
    if !text.starts_with('/') {
        return Err(format!("{} is not an absolute path", quoted(text)));
    }
    if text.len() > PATH_MAX {
        return Err(format!("has {} bytes; paths have at most {PATH_MAX}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{} has a control character in it", quoted(text)));
    }
    if text.split('/').any(|part| part == "." || part == "..") {
        return Err(format!("{} has \".\" or \"..\" in it; write the path that it means", quoted(text)));
    }
    Ok(())
}

/// The path of a unix socket.
pub(super) fn socket_path(text: &str) -> Result<(), String> {
    path(text)?;
    if text.len() > SOCKET_PATH_MAX {
        return Err(format!(
            "has {} bytes; paths of unix sockets have at most {SOCKET_PATH_MAX}",
            text.len()
        ));
    }
    Ok(())
}

/// A loopback address with a port.
pub(super) fn loopback(text: &str) -> Result<SocketAddr, String> {
    let example = "such as 127.0.0.1:3000 or [::1]:3000";
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("{} is not an address in digits with a port, {example}", quoted(text)))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "{} can be reached from other machines; only loopback addresses are allowed, {example}",
            quoted(text)
        ));
    }
    if address.port() == 0 {
        return Err(format!("{} has the port 0; ports are 1 to 65535", quoted(text)));
    }
    Ok(address)
}

/// What a program accepts connections on: a loopback address with a port, or a unix socket.
pub(super) fn endpoint(text: &str) -> Result<(), String> {
    if text.starts_with('/') { socket_path(text) } else { loopback(text).map(|_| ()) }
}

/// The store path (`/nix/store/HASH-NAME`) in which `text` is, and what comes after it.
pub(super) fn store_path(text: &str) -> Result<(&str, &str), String> {
    path(text)?;
    let refused = || format!("{} is not in a store; it must begin with /nix/store/HASH-NAME", quoted(text));
    let rest = text.strip_prefix("/nix/store/").ok_or_else(refused)?;
    let name = rest.split('/').next().unwrap_or_default();
    let (hash, suffix) = name.split_once('-').ok_or_else(refused)?;
    // Nix's base 32 leaves out e, o, u and t.
    let in_hash = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'z') && !b"eout".contains(&byte);
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
    let legal = hash.len() == 32
        && hash.bytes().all(in_hash)
        && (1..=211).contains(&suffix.len())
        && suffix.bytes().all(in_name);
    if !legal {
        return Err(refused());
    }
    text.split_at_checked("/nix/store/".len().saturating_add(name.len())).ok_or_else(refused)
}

/// One store path, not something in it.
pub(super) fn whole_store_path(text: &str) -> Result<(), String> {
    match store_path(text)? {
        (_, "") => Ok(()),
        (whole, _) => Err(format!("{} is in a store path, not one; write {}", quoted(text), quoted(whole))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_paths_are_told_from_what_is_in_them() {
        let hash = "0123456789abcdfghijklmnpqrsvwxyz";
        let whole = format!("/nix/store/{hash}-hello-2.12");
        assert_eq!(store_path(&whole), Ok((whole.as_str(), "")));
        assert_eq!(store_path(&format!("{whole}/bin/hello")), Ok((whole.as_str(), "/bin/hello")));
        assert!(whole_store_path(&whole).is_ok());
        for text in [
            "/nix/store",
            "/nix/store/",
            "/nix/store/.links",
            "/nix/store/short-name",
            &format!("/nix/store/{hash}"),
            &format!("/nix/store/{hash}-"),
            &format!("/nix/store/{hash}-a,b"),
            &format!("/nix/store/{}-e", "e".repeat(32)),
            &format!("/nix/store/../{hash}-a"),
            &format!("/gnu/store/{hash}-a"),
            &format!("nix/store/{hash}-a"),
            &format!("{whole}/.."),
        ] {
            assert!(store_path(text).is_err(), "{text}");
        }
        for text in [format!("{whole}/bin"), format!("{whole}/")] {
            assert!(whole_store_path(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_loopback_is_listened_on() {
        for text in ["127.0.0.1:80", "127.8.9.1:1", "[::1]:65535"] {
            assert!(loopback(text).is_ok(), "{text}");
        }
        for text in
            ["0.0.0.0:80", "10.0.0.1:80", "[::]:80", "localhost:80", "127.0.0.1", "127.0.0.1:0", ":80", ""]
        {
            assert!(loopback(text).is_err(), "{text}");
        }
    }
}
