//! A seccomp filter that denies AF_VSOCK to services and all that they start.
//!
//! AF_VSOCK ignores network namespaces, so a sandboxed build could reach the host's ports. The filter answers
//! `socket(AF_VSOCK, …)` as a kernel without vsock would. A socket could also be made by these ways, which it closes:
//!
//! - io_uring (`IORING_OP_SOCKET`, unseen by seccomp): `io_uring_setup` does not exist behind the filter;
//! - the 32-bit calls, which every x86-64 process can make: `socket` there is filtered alike, and `socketcall`, whose
//!   arguments are in memory where no filter sees them, makes no sockets at all. 32-bit programs of a C library
//!   that knows only `socketcall` have no network behind the filter;
//! - the x32 calls: none exists behind the filter.
//!
//! Any other architecture's call ends the process. The filter is written out, not compiled by `seccompiler`,
//! because that one ends every process of a second architecture, and 32-bit builds are a builder's business.
//! It comes with no_new_privs: a setuid program gains nothing below a service.

use nix::libc;
use seccompiler::{BpfProgram, sock_filter};

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h); the low half of an argument comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

// include/uapi/linux/bpf_common.h
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const NO_SUCH_FAMILY: u32 = errno(libc::EAFNOSUPPORT);
const NO_SUCH_CALL: u32 = errno(libc::ENOSYS);

const AF_VSOCK: u32 = 40;
/// The same number on every architecture.
const IO_URING_SETUP: u32 = 425;

/// One system call interface of the machine.
struct Interface {
    /// AUDIT_ARCH_… of include/uapi/linux/audit.h.
    architecture: u32,
    socket: u32,
    /// The call that multiplexes all of sockets, where there is one.
    socketcall: Option<u32>,
    /// A bit in the number that marks calls of yet another interface.
    foreign_bit: Option<u32>,
}

#[cfg(target_arch = "x86_64")]
const INTERFACES: [Interface; 2] = [
    Interface { architecture: 0xc000_003e, socket: 41, socketcall: None, foreign_bit: Some(0x4000_0000) },
    Interface { architecture: 0x4000_0003, socket: 359, socketcall: Some(102), foreign_bit: None },
];

#[cfg(target_arch = "aarch64")]
const INTERFACES: [Interface; 2] = [
    Interface { architecture: 0xc000_00b7, socket: 198, socketcall: None, foreign_bit: None },
    Interface { architecture: 0x4000_0028, socket: 281, socketcall: Some(102), foreign_bit: None },
];

const fn errno(number: i32) -> u32 {
    const RETURN_ERRNO: u32 = 0x0005_0000;
    RETURN_ERRNO | number.unsigned_abs()
}

/// The filter's program.
pub(super) fn program() -> BpfProgram {
    let mut program = Vec::new();
    for interface in &INTERFACES {
        let checks = interface.checks();
        let length = u8::try_from(checks.len()).unwrap_or(u8::MAX);
        program.push(load(ARCHITECTURE));
        program.push(instruction(JUMP_IF_EQUAL, 0, length, interface.architecture));
        program.extend(checks);
    }
    program.push(answer(KILL_PROCESS));
    program
}

impl Interface {
    /// The checks for calls of this interface. Each falls through to the next, the last allows.
    fn checks(&self) -> Vec<sock_filter> {
        let mut checks = vec![load(NUMBER)];
        if let Some(bit) = self.foreign_bit {
            checks.extend([instruction(JUMP_IF_ANY_BIT, 0, 1, bit), answer(NO_SUCH_CALL)]);
        }
        checks.extend([instruction(JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP), answer(NO_SUCH_CALL)]);
        checks.extend(deny_if_first_argument(self.socket, AF_VSOCK));
        if let Some(socketcall) = self.socketcall {
            /// SYS_SOCKET of include/uapi/linux/net.h.
            const MAKE_SOCKET: u32 = 1;
            checks.push(load(NUMBER));
            checks.extend(deny_if_first_argument(socketcall, MAKE_SOCKET));
        }
        checks.push(answer(ALLOW));
        checks
    }
}

/// With the call's number loaded: denies `call` if its first argument is `value`.
fn deny_if_first_argument(call: u32, value: u32) -> [sock_filter; 4] {
    [
        instruction(JUMP_IF_EQUAL, 0, 3, call),
        // The kernel takes an int here, so the upper half does not count.
        load(FIRST_ARGUMENT),
        instruction(JUMP_IF_EQUAL, 0, 1, value),
        answer(NO_SUCH_FAMILY),
    ]
}

fn load(offset: u32) -> sock_filter {
    instruction(LOAD, 0, 0, offset)
}

fn answer(value: u32) -> sock_filter {
    instruction(RETURN, 0, 0, value)
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // A jump beyond the program fails the test, as it should.
mod tests {
    use super::*;
    use std::process::Output;
    use tokio::process::Command;

    /// What the kernel would do: runs the program on one call.
    fn verdict(architecture: u32, number: u32, first_argument: u32) -> u32 {
        let program = program();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD => {
                    loaded = match step.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        FIRST_ARGUMENT => first_argument,
                        other => panic!("offset {other}"),
                    }
                }
                JUMP_IF_EQUAL => at += usize::from(if loaded == step.k { step.jt } else { step.jf }),
                JUMP_IF_ANY_BIT => at += usize::from(if loaded & step.k != 0 { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("code {other}"),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_way_to_a_vsock_socket_is_closed() {
        const X86_64: u32 = 0xc000_003e;
        const I386: u32 = 0x4000_0003;
        const AF_INET: u32 = 2;
        for (architecture, number, argument, expected) in [
            (X86_64, 41, AF_VSOCK, NO_SUCH_FAMILY),
            (X86_64, 41, AF_INET, ALLOW),
            (X86_64, 42, AF_VSOCK, ALLOW),
            (X86_64, 102, 1, ALLOW), // getuid
            (X86_64, 425, 0, NO_SUCH_CALL),
            (X86_64, 0x4000_0029, AF_INET, NO_SUCH_CALL),
            (X86_64, 0x4000_01a9, 0, NO_SUCH_CALL),
            (X86_64, u32::MAX, 0, NO_SUCH_CALL), // the kernel's -1
            (I386, 359, AF_VSOCK, NO_SUCH_FAMILY),
            (I386, 359, AF_INET, ALLOW),
            (I386, 102, 1, NO_SUCH_FAMILY),
            (I386, 102, 3, ALLOW), // connect, on a socket that is there
            (I386, 425, 0, NO_SUCH_CALL),
            (I386, 41, AF_VSOCK, ALLOW), // dup
            (0xc000_00b7, 198, AF_INET, KILL_PROCESS),
        ] {
            assert_eq!(
                verdict(architecture, number, argument),
                expected,
                "{architecture:x} {number} {argument}"
            );
        }
    }

    /// A program's output behind the filter.
    async fn behind_the_filter(command: &[&str]) -> Output {
        let mut child = Command::new(command[0]);
        child.args(&command[1..]);
        crate::sys::isolate(&mut child, Some(program()));
        child.output().await.unwrap()
    }

    /// Tries calls and prints their error numbers. Rust, so that no interpreter has to be installed: this test
    /// program calls itself with this one test selected.
    #[test]
    #[ignore = "runs as the child of `a_child_has_neither_vsock_nor_io_uring`"]
    fn child() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        for family in [AddressFamily::Vsock, AddressFamily::Unix, AddressFamily::Inet] {
            let made = socket(family, SockType::Stream, SockFlag::empty(), None);
            println!("{family:?} {:?}", made.err());
        }
        println!("io_uring {:?}", io_uring_setup_errno());
    }

    #[allow(unsafe_code)]
    fn io_uring_setup_errno() -> Option<i32> {
        let mut parameters = [0_u8; 120];
        // SAFETY: the second argument points to a struct io_uring_params of 120 bytes, all zero.
        let made = unsafe { libc::syscall(i64::from(IO_URING_SETUP), 1, parameters.as_mut_ptr()) };
        (made < 0).then(nix::errno::Errno::last_raw)
    }

    #[tokio::test]
    async fn a_child_has_neither_vsock_nor_io_uring() {
        let me = std::env::current_exe().unwrap();
        let name = "agent::vsock_filter::tests::child";
        let output =
            behind_the_filter(&[me.to_str().unwrap(), "--ignored", "--exact", name, "--nocapture"]).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        for line in ["Vsock Some(EAFNOSUPPORT)", "Unix None", "Inet None", "io_uring Some(38)"] {
            assert!(text.contains(line), "{text}");
        }
        // And what a child starts is behind it as well.
        let output =
            behind_the_filter(&["sh", "-c", "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status"]).await;
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "NoNewPrivs:\t1\nSeccomp:\t2\n");
    }
}
