//! What a confined process can call, tried in children of the test.

use super::status;
use lair_virtiofs::sandbox::{Identity, Sandbox, SandboxError, restrict_worker};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, openat2},
    libc::{self, c_long},
    sys::{
        signal::Signal,
        stat::Mode,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use std::{
    fs::{self, File, Permissions},
    os::{fd::AsFd, unix::fs::PermissionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
};

/// What becomes of a process that closes the sandbox, with a directory that anybody may change, and then does `work`, which gives
/// an exit status. In a worker's thread, if asked.
fn inside(in_worker: bool, work: impl FnOnce(&Path, &File) -> i32 + Send + 'static) -> WaitStatus {
    let temp = tempfile::tempdir().unwrap();
    fs::set_permissions(temp.path(), Permissions::from_mode(0o777)).unwrap();
    fs::write(temp.path().join("file"), "text").unwrap();
    fs::set_permissions(temp.path().join("file"), Permissions::from_mode(0o666)).unwrap();
    let directory = File::open(temp.path()).unwrap();
    let child = || {
        let identity = Identity::choose(None).unwrap();
        Sandbox::prepare([(temp.path(), directory.as_fd())], identity).unwrap().close().unwrap();
        let path = temp.path().to_owned();
        let directory = directory.try_clone().unwrap();
        let work = move || {
            if in_worker {
                restrict_worker();
                restrict_worker();
            }
            work(&path, &directory)
        };
        if in_worker { thread::spawn(work).join().unwrap() } else { work() }
    };
    // SAFETY: the child runs nothing but this, and ends without running what the test's process had registered. Of what other
    // threads may have held when it was made, it uses only memory allocation, of which the C library takes care.
    #[allow(unsafe_code)]
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let status = catch_unwind(AssertUnwindSafe(child)).unwrap_or(99);
            // SAFETY: nothing of this process is needed any more.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

/// What becomes of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It ends the process with SIGSYS.
    Killed,
    /// It fails with this, whoever says so.
    Fails(i32),
    /// It succeeds.
    Succeeds,
}
use Fate::{Fails, Killed, Succeeds};

fn fate(in_worker: bool, number: c_long, arguments: [c_long; 6]) -> Fate {
    let [a, b, c, d, e, f] = arguments;
    let call = move |_: &Path, _: &File| {
        Errno::clear();
        // SAFETY: the arguments in the table are no addresses, or ones that are never written to.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        if result == -1 { Errno::last_raw() } else { 0 }
    };
    match inside(in_worker, call) {
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => Killed,
        WaitStatus::Exited(_, 0) => Succeeds,
        WaitStatus::Exited(_, errno) => Fails(errno),
        other => panic!("{other:?}"),
    }
}

/// Calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLD: [c_long; 17] = [
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_creat,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_modify_ldt,
    libc::SYS_arch_prctl,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    // getpid() in the x32 numbering.
    0x4000_0000 | libc::SYS_getpid,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: [c_long; 0] = [];

#[test]
fn calls_that_end_the_process_wherever_they_come_from() {
    // Arguments are zeros, where nothing else is said.
    let plain = [
        // Connections, other files, other processes.
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_kcmp,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_tgkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        // What has had more holes than others.
        libc::SYS_ioctl,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_io_setup,
        libc::SYS_bpf,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_memfd_create,
        libc::SYS_memfd_secret,
        libc::SYS_shmget,
        libc::SYS_semget,
        libc::SYS_msgget,
        libc::SYS_mq_open,
        libc::SYS_splice,
        libc::SYS_vmsplice,
        libc::SYS_tee,
        libc::SYS_sendfile,
        libc::SYS_copy_file_range,
        libc::SYS_inotify_init1,
        libc::SYS_fanotify_init,
        libc::SYS_signalfd4,
        libc::SYS_timerfd_create,
        libc::SYS_timer_create,
        libc::SYS_mlock,
        libc::SYS_mlockall,
        libc::SYS_pkey_mprotect,
        libc::SYS_remap_file_pages,
        libc::SYS_personality,
        // Changing files.
        libc::SYS_truncate,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_mkdirat,
        libc::SYS_linkat,
        libc::SYS_symlinkat,
        libc::SYS_mknodat,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_setxattr,
        libc::SYS_utimensat,
        libc::SYS_pwrite64,
        libc::SYS_pwritev2,
        libc::SYS_open_by_handle_at,
        libc::SYS_chdir,
        libc::SYS_fchdir,
        libc::SYS_chroot,
        libc::SYS_pivot_root,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_fsopen,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        // Privileges, limits, the machine.
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
        libc::SYS_setfsuid,
        libc::SYS_capset,
        libc::SYS_setrlimit,
        libc::SYS_prlimit64,
        libc::SYS_setpriority,
        libc::SYS_sched_setscheduler,
        libc::SYS_setsid,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_sethostname,
        libc::SYS_syslog,
        libc::SYS_quotactl,
        // Never the kernel's.
        100_000,
    ];
    let pid = c_long::from(std::process::id());
    let (exec, thread) = (c_long::from(libc::PROT_EXEC | libc::PROT_READ), 0x003d_0f00);
    let anonymous = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let with_arguments = [
        (libc::SYS_mmap, [0, 4096, exec, anonymous, -1, 0]),
        (libc::SYS_mprotect, [0, 4096, exec, 0, 0, 0]),
        // Another's processors: this test's, which is the parent.
        (libc::SYS_sched_setaffinity, [pid, 0, 0, 0, 0, 0]),
        // The parent again.
        (libc::SYS_tgkill, [pid, pid, c_long::from(libc::SIGABRT), 0, 0, 0]),
        // As fork does it; a thread in namespaces of its own; one that is traced; a child that shares memory.
        (libc::SYS_clone, [c_long::from(libc::SIGCHLD), 0, 0, 0, 0, 0]),
        (libc::SYS_clone, [thread | c_long::from(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0]),
        (libc::SYS_clone, [thread | c_long::from(libc::CLONE_PTRACE), 0, 0, 0, 0, 0]),
        (libc::SYS_clone, [c_long::from(libc::CLONE_VM | libc::CLONE_VFORK), 0, 0, 0, 0, 0]),
        (libc::SYS_prctl, [c_long::from(libc::PR_SET_DUMPABLE), 1, 0, 0, 0, 0]),
        (libc::SYS_prctl, [c_long::from(libc::PR_SET_MM), 0, 0, 0, 0, 0]),
        (libc::SYS_prctl, [c_long::from(libc::PR_SET_PTRACER), -1, 0, 0, 0, 0]),
        (libc::SYS_seccomp, [c_long::from(libc::SECCOMP_SET_MODE_STRICT), 0, 0, 0, 0, 0]),
        (libc::SYS_fcntl, [0, c_long::from(libc::F_SETOWN), 0, 0, 0, 0]),
        (libc::SYS_fcntl, [0, c_long::from(libc::F_SETLEASE), 0, 0, 0, 0]),
        (libc::SYS_fcntl, [0, c_long::from(libc::F_DUPFD), 0, 0, 0, 0]),
        (libc::SYS_setsockopt, [0, c_long::from(libc::SOL_SOCKET), c_long::from(libc::SO_SNDBUF), 0, 0, 0]),
        (libc::SYS_getsockopt, [0, c_long::from(libc::SOL_SOCKET), c_long::from(libc::SO_PEERCRED), 0, 0, 0]),
        (
            libc::SYS_setsockopt,
            [0, c_long::from(libc::IPPROTO_TCP), c_long::from(libc::SO_RCVTIMEO), 0, 0, 0],
        ),
    ];
    for (number, arguments) in
        plain.into_iter().chain(OLD).map(|number| (number, [0; 6])).chain(with_arguments)
    {
        for in_worker in [false, true] {
            let fate = fate(in_worker, number, arguments);
            assert_eq!(fate, Killed, "call {number} with {arguments:?}, in a worker: {in_worker}");
        }
    }
}

#[test]
fn calls_with_other_fates() {
    let badf = Fails(libc::EBADF);
    let fault = Fails(libc::EFAULT);
    let refused = Fails(libc::ENOSYS);
    let (read, anonymous) =
        (c_long::from(libc::PROT_READ), c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS));
    let arg = |value: i32| c_long::from(value);
    for (number, arguments, elsewhere, in_worker) in [
        // Tried in vain by libraries. The path is a bad address; it is not even looked at.
        (libc::SYS_openat, [arg(libc::AT_FDCWD), 0, arg(libc::O_RDONLY), 0, 0, 0], refused, refused),
        (
            libc::SYS_openat,
            [arg(libc::AT_FDCWD), 0, arg(libc::O_RDWR | libc::O_CREAT), 0, 0, 0],
            refused,
            refused,
        ),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, [0; 6], refused, refused),
        (libc::SYS_getcwd, [0; 6], refused, refused),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_readlink, [0; 6], refused, refused),
        (libc::SYS_clone3, [0; 6], refused, Killed),
        // For all but workers.
        (libc::SYS_accept4, [-1, 0, 0, 0, 0, 0], badf, Killed),
        (libc::SYS_recvmsg, [-1, 0, 0, 0, 0, 0], badf, Killed),
        (libc::SYS_sendmsg, [-1, 0, 0, 0, 0, 0], badf, Killed),
        (libc::SYS_recvfrom, [-1, 0, 0, 0, 0, 0], badf, Killed),
        (libc::SYS_sendto, [-1, 0, 0, 0, 0, 0], badf, Killed),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_poll, [0; 6], Succeeds, Killed),
        (libc::SYS_pipe2, [0; 6], fault, Killed),
        (libc::SYS_eventfd2, [0; 6], Succeeds, Killed),
        (libc::SYS_epoll_create1, [0; 6], Succeeds, Killed),
        (libc::SYS_epoll_ctl, [-1, arg(libc::EPOLL_CTL_DEL), -1, 0, 0, 0], badf, Killed),
        (libc::SYS_fcntl, [-1, arg(libc::F_DUPFD_CLOEXEC), 0, 0, 0, 0], badf, Killed),
        (libc::SYS_setsockopt, [-1, arg(libc::SOL_SOCKET), arg(libc::SO_RCVTIMEO), 0, 0, 0], badf, Killed),
        (libc::SYS_getsockopt, [-1, arg(libc::SOL_SOCKET), arg(libc::SO_DOMAIN), 0, 0, 0], badf, Killed),
        (libc::SYS_getsockopt, [-1, arg(libc::SOL_SOCKET), arg(libc::SO_TYPE), 0, 0, 0], badf, Killed),
        (libc::SYS_getdents64, [-1, 0, 0, 0, 0, 0], badf, Killed),
        (libc::SYS_lseek, [-1, 0, 0, 0, 0, 0], badf, Killed),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_readlinkat, [-1, 0, 0, 1, 0, 0], fault, Killed),
        (libc::SYS_prctl, [arg(libc::PR_SET_NAME), 0, 0, 0, 0, 0], fault, Killed),
        (libc::SYS_sched_setaffinity, [0, 8, 0, 0, 0, 0], fault, Killed),
        (libc::SYS_getcpu, [0; 6], Succeeds, Killed),
        (libc::SYS_seccomp, [1, 0, 0, 0, 0, 0], fault, Killed),
        // For all.
        (libc::SYS_read, [-1, 0, 0, 0, 0, 0], badf, badf),
        (libc::SYS_write, [-1, 0, 0, 0, 0, 0], badf, badf),
        (libc::SYS_preadv2, [-1, 0, 0, 0, 0, 0], badf, badf),
        (libc::SYS_fcntl, [-1, arg(libc::F_GETFL), 0, 0, 0, 0], badf, badf),
        (libc::SYS_mmap, [0, 4096, read, anonymous, -1, 0], Succeeds, Succeeds),
    ] {
        for (in_worker, expected) in [(false, elsewhere), (true, in_worker)] {
            let fate = fate(in_worker, number, arguments);
            assert_eq!(fate, expected, "call {number} with {arguments:?}, in a worker: {in_worker}");
        }
    }
}

#[test]
fn calls_of_the_other_architecture() {
    #[cfg(target_arch = "x86_64")]
    for in_worker in [false, true] {
        let call = |_: &Path, _: &File| {
            // getpid() of i386; in the numbers of x86_64, it is writev().
            let mut number: u32 = 20;
            // SAFETY: the call takes no arguments.
            #[allow(unsafe_code)]
            unsafe {
                std::arch::asm!("int 0x80", inout("eax") number, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
            number as i32 & 0x7f
        };
        assert!(matches!(inside(in_worker, call), WaitStatus::Signaled(_, Signal::SIGSYS, _)));
    }
    #[cfg(not(target_arch = "x86_64"))]
    println!("SKIPPED: calls of i386");
}

/// An errno as an exit status, or 0.
fn code<T>(result: nix::Result<T>) -> i32 {
    result.map_or_else(|errno| errno as i32, |_| 0)
}

#[test]
fn files_inside() {
    let open = |in_worker, absolute: bool, path: &'static str, flags: OFlag| {
        let work = move |dir: &Path, fd: &File| {
            let creates = flags.contains(OFlag::O_CREAT);
            let mode = if creates { Mode::S_IRWXU } else { Mode::empty() };
            let how = OpenHow::new().flags(flags).mode(mode);
            if absolute { code(openat2(fd, &dir.join(path), how)) } else { code(openat2(fd, path, how)) }
        };
        match inside(in_worker, work) {
            WaitStatus::Exited(_, code) => Errno::from_raw(code),
            other => panic!("{other:?}"),
        }
    };
    let (ok, denied) = (Errno::from_raw(0), Errno::EACCES);
    for in_worker in [false, true] {
        assert_eq!(open(in_worker, false, "file", OFlag::O_RDONLY), ok);
        assert_eq!(open(in_worker, false, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY), ok);
        assert_eq!(open(in_worker, false, "file", OFlag::O_WRONLY), denied);
        assert_eq!(open(in_worker, false, "file", OFlag::O_RDWR), denied);
        assert_eq!(open(in_worker, false, "file", OFlag::O_RDONLY | OFlag::O_TRUNC), denied);
        assert_eq!(open(in_worker, false, "new", OFlag::O_RDWR | OFlag::O_CREAT), denied);
        assert_eq!(open(in_worker, true, "/etc/passwd", OFlag::O_RDONLY), denied);
        assert_eq!(open(in_worker, true, "/proc/self/status", OFlag::O_RDONLY), denied);
        assert_eq!(open(in_worker, true, "/dev/null", OFlag::O_RDWR), denied);
        assert_eq!(open(in_worker, true, "..", OFlag::O_RDONLY | OFlag::O_DIRECTORY), denied);
    }
}

#[test]
fn an_abort_is_seen_as_one() {
    for in_worker in [false, true] {
        let status = inside(in_worker, |_, _| std::process::abort());
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, false)), "{status:?}");
    }
}

#[test]
fn a_panic_is_survived_with_a_backtrace_and_without() {
    for in_worker in [false, true] {
        let work = |_: &Path, _: &File| {
            // What a panic does where RUST_BACKTRACE is set. Names are not found, as the program's file cannot be read.
            let text = std::backtrace::Backtrace::force_capture().to_string();
            let panicked = catch_unwind(|| panic!("a test's")).is_err();
            if panicked && !text.is_empty() { 7 } else { 8 }
        };
        assert!(matches!(inside(in_worker, work), WaitStatus::Exited(_, 7)));
    }
}

#[test]
fn memory_grows_up_to_the_limit() {
    for in_worker in [false, true] {
        let work = |_: &Path, _: &File| {
            // Small and large pieces, which grow.
            let mut small: Vec<Vec<u8>> = (0..1000).map(|i| vec![1; i * 10]).collect();
            small.iter_mut().for_each(|piece| piece.resize(50_000, 2));
            let mut large = vec![1u8; 1 << 20];
            large.resize(64 << 20, 2);
            let mut beyond = Vec::<u8>::new();
            i32::from(beyond.try_reserve_exact(300 << 20).is_ok())
        };
        assert!(matches!(inside(in_worker, work), WaitStatus::Exited(_, 0)));
    }
}

#[test]
fn several_threads_cannot_be_confined() {
    let temp = tempfile::tempdir().unwrap();
    let directory = File::open(temp.path()).unwrap();
    let sandbox =
        Sandbox::prepare([(temp.path(), directory.as_fd())], Identity::choose(None).unwrap()).unwrap();
    // This process has the test's thread and the one that waits for it, at least.
    assert!(matches!(sandbox.close(), Err(SandboxError::Threads(2..))));
    let status = status(Path::new("/proc/thread-self/status"));
    assert_eq!((&*status["Seccomp"], &*status["NoNewPrivs"]), ("0", "0"));
}

#[test]
fn a_thread_of_a_process_that_is_not_confined_stays_so() {
    restrict_worker();
    assert_eq!(status(Path::new("/proc/thread-self/status"))["Seccomp"], "0");
}
