# Debian's own systemd, as a guest's init: the packages' tree as it is, under one store path.
{ run, deb, closure }:

run {
  name = "debian-system";
  script = ./build/system.sh;
  init = ./bin/init;
  # What fails or idles in a small guest: it has no modules to load, no terminals, no disk for a journal, and its /tmp is
  # in memory anyway. Without logind `systemctl poweroff` complains, and does it all the same.
  masked = [
    "ldconfig.service"
    "modprobe@.service"
    "proc-sys-fs-binfmt_misc.automount"
    "sys-fs-fuse-connections.mount"
    "sys-kernel-config.mount"
    "sys-kernel-debug.mount"
    "sys-kernel-tracing.mount"
    "systemd-journal-flush.service"
    "systemd-logind.service"
    "systemd-modules-load.service"
    "systemd-random-seed.service"
    "systemd-remount-fs.service"
    "tmp.mount"
  ];
  debs = map deb (closure {
    names = [ "systemd" "systemd-sysv" "dbus" "mount" "base-files" "base-passwd" "libkmod2" ];
    # Only scripts of packages need these; busybox serves as shell and as all small tools.
    without = [ "adduser" "debconf" "init-system-helpers" "libdebconfclient0" ];
  });
}
