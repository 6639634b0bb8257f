//! Which system calls are allowed, in which threads, with which arguments; as data.
//!
//! A call that is on no list ends the process (SIGSYS), so that it is seen. The lists are what the test suite was seen to use, and
//! what panics, growth of memory and logging use. Calls whose arguments do not matter cost next to nothing: since Linux 5.11 the
//! kernel remembers that they are allowed, without running the filters.

use nix::libc::{self, c_int, c_long};

/// A system call, and the arguments with which it is allowed: all of one of these lists, or any at all if there are none.
pub(super) type Call = (c_long, &'static [&'static [Argument]]);

/// A test of one argument, by its number from 0 on.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// It is this, in its lower 32 bits.
    Is(u8, u32),
    /// None of these bits is set in it.
    Lacks(u8, u32),
    /// It is this, in all its bits but those of the mask that comes last.
    IsBut(u8, u64, u64),
    /// It is this process's id.
    IsOwnPid(u8),
}

use Argument::{Is, IsBut, IsOwnPid, Lacks};

const ANY: &[&[Argument]] = &[];

/// For mmap and mprotect: no memory becomes code.
const NOT_EXECUTABLE: &[&[Argument]] = &[&[Lacks(2, libc::PROT_EXEC as u32)]];

/// For fcntl: to make a descriptor non-blocking. In debug builds, Rust looks whether what it closes is open.
const DESCRIPTOR_FLAGS: &[&[Argument]] =
    &[&[Is(1, libc::F_GETFL as u32)], &[Is(1, libc::F_SETFL as u32)], &[Is(1, libc::F_GETFD as u32)]];

/// What queues' workers and cold reads need: reading files, guest memory, waking each other, memory of their own, a log line.
pub(super) const WORKER: &[Call] = &[
    // Files: openat2 cannot be looked into here, as its flags are in memory; Landlock has it open for reading only.
    (libc::SYS_openat2, ANY),
    (libc::SYS_fstat, ANY),
    (libc::SYS_newfstatat, ANY),
    (libc::SYS_statx, ANY),
    (libc::SYS_pread64, ANY),
    (libc::SYS_preadv2, ANY),
    (libc::SYS_close, ANY),
    (libc::SYS_fcntl, DESCRIPTOR_FLAGS),
    // Where there is no readlink, a panic tries this; see below.
    #[cfg(not(target_arch = "x86_64"))]
    (libc::SYS_readlinkat, ANY),
    // Kicks and calls, which are eventfds; log lines.
    (libc::SYS_read, ANY),
    (libc::SYS_write, ANY),
    (libc::SYS_writev, ANY),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_epoll_wait, ANY),
    (libc::SYS_epoll_pwait, ANY),
    // Ends the connection when a worker ends.
    (libc::SYS_shutdown, ANY),
    // Memory.
    (libc::SYS_brk, ANY),
    (libc::SYS_mmap, NOT_EXECUTABLE),
    (libc::SYS_mprotect, NOT_EXECUTABLE),
    (libc::SYS_mremap, ANY),
    (libc::SYS_munmap, ANY),
    (libc::SYS_madvise, ANY),
    // Threads and time.
    (libc::SYS_futex, ANY),
    (libc::SYS_sched_yield, ANY),
    (libc::SYS_clock_gettime, ANY),
    (libc::SYS_clock_nanosleep, ANY),
    (libc::SYS_restart_syscall, ANY),
    (libc::SYS_gettid, ANY),
    (libc::SYS_getpid, ANY),
    (libc::SYS_sched_getaffinity, ANY),
    // Hash tables' seeds.
    (libc::SYS_getrandom, ANY),
    // SIGBUS, when a mapped file became shorter; the stacks of signal handlers.
    (libc::SYS_rt_sigaction, ANY),
    (libc::SYS_rt_sigprocmask, ANY),
    (libc::SYS_rt_sigreturn, ANY),
    (libc::SYS_sigaltstack, ANY),
    // The end of a thread, of the process, and of one that finds itself broken.
    (libc::SYS_exit, ANY),
    (libc::SYS_exit_group, ANY),
    (libc::SYS_tgkill, &[&[IsOwnPid(0), Is(2, libc::SIGABRT as u32)]]),
];

/// For setsockopt: how long a client of the control socket may take.
const TIMEOUTS: &[&[Argument]] = &[
    &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_RCVTIMEO as u32)],
    &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_SNDTIMEO as u32)],
];

/// For getsockopt: whether a descriptor is a unix socket, which the vhost-user library asks of one for messages of ours.
const KIND_OF_SOCKET: &[&[Argument]] = &[
    &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_DOMAIN as u32)],
    &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_TYPE as u32)],
];

/// What other threads need besides: those that accept connections, talk to the hypervisor, start workers, answer on the control
/// socket.
pub(super) const OTHERS: &[Call] = &[
    // Connections.
    (libc::SYS_accept4, ANY),
    (libc::SYS_recvmsg, ANY),
    (libc::SYS_recvfrom, ANY),
    (libc::SYS_sendmsg, ANY),
    (libc::SYS_sendto, ANY),
    (libc::SYS_setsockopt, TIMEOUTS),
    (libc::SYS_getsockopt, KIND_OF_SOCKET),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, ANY),
    (libc::SYS_ppoll, ANY),
    (libc::SYS_pipe2, ANY),
    // Granting: the metadata of store paths. The C library sets FD_CLOEXEC on directories.
    (libc::SYS_getdents64, ANY),
    (libc::SYS_lseek, ANY),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlinkat, ANY),
    // Making room for threads that look for many store paths, by going from this processor to another one oneself.
    (libc::SYS_sched_setaffinity, &[&[Is(0, 0)]]),
    (libc::SYS_getcpu, ANY),
    // Workers' events.
    (libc::SYS_eventfd2, ANY),
    (libc::SYS_epoll_create1, ANY),
    (libc::SYS_epoll_ctl, ANY),
    (libc::SYS_fcntl, &[&[Is(1, libc::F_DUPFD_CLOEXEC as u32)], &[Is(1, libc::F_SETFD as u32)]]),
    // Threads: with exactly what makes a thread (musl adds CLONE_DETACHED, which means nothing).
    (libc::SYS_clone, &[&[IsBut(0, THREAD, CLONE_DETACHED)]]),
    (libc::SYS_set_robust_list, ANY),
    (libc::SYS_rseq, ANY),
    (libc::SYS_prctl, &[&[Is(0, libc::PR_SET_NAME as u32)], &[Is(0, libc::PR_SET_NO_NEW_PRIVS as u32)]]),
    // Further filters, by which workers give up what is on this list.
    (libc::SYS_seccomp, &[&[Is(0, libc::SECCOMP_SET_MODE_FILTER)]]),
];

/// Calls that libraries try and do without: the C library looks for the number of CPUs, and a panic that is to show a backtrace
/// for the program's own file.
pub(super) const FUTILE: &[c_long] = &[
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// clone3(2), whose flags are in memory, so that it cannot be told whether it makes a thread. The C library then takes clone(2).
pub(super) const CLONE3: c_long = libc::SYS_clone3;

/// What [`FUTILE`] calls and clone3 get, as if the kernel did not have them.
pub(super) const REFUSED: c_int = libc::ENOSYS;

const CLONE_DETACHED: u64 = 0x0040_0000;

const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
