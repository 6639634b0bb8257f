//! What the kernel tells of PCI devices as it happens (uevents), by a netlink socket.
//!
//! A message is `ACTION@PATH`, then `KEY=VALUE` for what else is told, each with a NUL at its end (Linux, lib/kobject_uevent.c). Programs could
//! send such messages as well: what is not the kernel's is nothing.

use super::address::Address;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket},
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The kernel's own messages; what udev says of them goes to another group.
const KERNEL: u32 = 1;

/// Longer than any message is, in bytes: 2 KiB of values, and a path.
const LENGTH: usize = 8 << 10;

/// What happened to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The device.
    pub device: Address,
    /// What.
    pub what: Happened,
}

/// What happens to devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// It is not there any more.
    Removed,
    /// Its driver was taken away.
    Unbound,
    /// An error of it was found, or dealt with: one word of the kernel's, such as `BEGIN_RECOVERY`.
    Error(String),
    /// Anything else.
    Other,
}

/// What is heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Something happened to a PCI device.
    Event(Event),
    /// So much happened at once that some of it was not heard.
    Missed,
}

/// Hears of PCI devices.
#[derive(Debug)]
pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Listens from now on. Needs no rights; in a network namespace of its own nothing is heard.
    pub fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        #[expect(
            deprecated,
            reason = "unsound only for types that lie about their descriptor; an OwnedFd does not"
        )]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE)?;
        Ok(Self(socket))
    }

    /// Waits for the next that is told of a PCI device.
    pub async fn next(&self) -> io::Result<Heard> {
        let mut message = [0; LENGTH];
        loop {
            let mut ready = self.0.readable().await?;
            let Ok(received) = ready.try_io(|socket| Ok(recvfrom(socket.as_raw_fd(), &mut message)?)) else {
                continue;
            };
            let (length, sender) = match received {
                Ok(received) => received,
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    return Ok(Heard::Missed);
                }
                Err(error) => return Err(error),
            };
            // The kernel's number; others have one of their own, which it gives them.
            let from_kernel = sender.is_some_and(|sender: NetlinkAddr| sender.pid() == 0);
            if let Some(event) = message.get(..length).filter(|_| from_kernel).and_then(parse) {
                return Ok(Heard::Event(event));
            }
        }
    }
}

/// What a message says, if it is of a PCI device.
fn parse(message: &[u8]) -> Option<Event> {
    let mut words =
        message.split(|byte| *byte == 0).map(|word| std::str::from_utf8(word).unwrap_or_default());
    let (action, _) = words.next()?.split_once('@')?;
    let (mut is_pci, mut device, mut error) = (false, None, None);
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        match key {
            "SUBSYSTEM" => is_pci = value == "pci",
            "PCI_SLOT_NAME" => device = value.parse().ok(),
            "ERROR_EVENT" => error = Some(value),
            _ => {}
        }
    }
    let is_word =
        |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphabetic() || b == b'_');
    let what = match (action, error.filter(is_word)) {
        ("remove", _) => Happened::Removed,
        ("unbind", _) => Happened::Unbound,
        (_, Some(error)) => Happened::Error(error.into()),
        _ => Happened::Other,
    };
    is_pci.then_some(Event { device: device?, what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{MsgFlags, sendto};
    use proptest::prelude::*;
    use std::time::Duration;
    use tokio::time::timeout;

    fn message(words: &[&str]) -> Vec<u8> {
        words.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect()
    }

    fn of(action: &str, more: &[&str]) -> Option<Event> {
        let header = format!("{action}@/devices/pci0000:00/0000:00:11.0/0000:01:00.0");
        let words = [&[header.as_str(), "SUBSYSTEM=pci", "PCI_SLOT_NAME=0000:01:00.0"], more].concat();
        parse(&message(&words))
    }

    #[test]
    fn vf11_what_happens_to_a_device_is_understood() {
        let what = |action, more: &[&str]| of(action, more).map(|event| event.what);
        assert_eq!(of("remove", &[]).unwrap().device.to_string(), "0000:01:00.0");
        assert_eq!(what("remove", &["SEQNUM=7"]), Some(Happened::Removed));
        assert_eq!(what("unbind", &[]), Some(Happened::Unbound));
        assert_eq!(
            what("change", &["ERROR_EVENT=BEGIN_RECOVERY", "DEVICE_ONLINE=0"]),
            Some(Happened::Error("BEGIN_RECOVERY".into()))
        );
        for other in
            [what("change", &["ERROR_EVENT=\u{1b}[2J"]), what("add", &[]), what("bind", &["DRIVER=x"])]
        {
            assert_eq!(other, Some(Happened::Other));
        }
    }

    #[test]
    fn what_is_of_no_pci_device_or_not_the_kernels_is_nothing() {
        let of_a_disk =
            message(&["remove@/devices/x/block/sda", "SUBSYSTEM=block", "PCI_SLOT_NAME=0000:01:00.0"]);
        let of_udev = message(&["libudev", "remove@/x", "SUBSYSTEM=pci", "PCI_SLOT_NAME=0000:01:00.0"]);
        let nameless = message(&["remove@/x", "SUBSYSTEM=pci", "PCI_SLOT_NAME=../../x"]);
        for message in [of_a_disk, of_udev, nameless, vec![], b"remove@".to_vec(), b"\0\0=\0@=".to_vec()] {
            assert_eq!(parse(&message), None, "{message:?}");
        }
    }

    /// Who is root can send what looks like the kernel's.
    #[tokio::test]
    async fn vf11_what_a_program_says_is_nothing() {
        let uevents = match Uevents::listen() {
            Ok(uevents) => uevents,
            Err(error) => return println!("SKIPPED: there are no uevents here: {error}"),
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let sender =
            socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent);
        let forged = message(&["remove@/x", "SUBSYSTEM=pci", "PCI_SLOT_NAME=0000:01:00.0"]);
        assert!(parse(&forged).is_some());
        let to = NetlinkAddr::new(0, KERNEL);
        if let Err(error) = sendto(sender.unwrap().as_raw_fd(), &forged, &to, MsgFlags::empty()) {
            return println!("SKIPPED: nobody may send uevents here: {error}");
        }
        assert!(timeout(Duration::from_millis(300), uevents.next()).await.is_err());
    }

    proptest! {
        #[test]
        fn no_message_panics(message in prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(b'='), Just(b'@')], 0..200)) {
            parse(&message);
        }

        #[test]
        fn what_else_is_told_changes_nothing(
            action in "[a-z]{1,10}", keys in prop::collection::vec("[A-Z]{1,9}(=[ -~]{0,20})?", 0..8), bus in any::<u8>(),
        ) {
            let address = format!("0000:{bus:02x}:00.0");
            let mut words = vec![format!("{action}@/devices/x"), "SUBSYSTEM=pci".into(), format!("PCI_SLOT_NAME={address}")];
            words.extend(keys.into_iter().filter(|key| !key.starts_with("SUBSYSTEM")));
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            prop_assert_eq!(parse(&message(&words)).unwrap().device.to_string(), address);
        }
    }
}
