# Debian's own systemd, as a guest's init: the packages' tree as it is, under one store path.
{ run, deb, closure }:

run {
  name = "debian-system";
  script = ./build/system.sh;
  init = ./bin/init;
  masked = [ ];
  debs = map deb (closure {
    names = [ "systemd" "systemd-sysv" "dbus" "mount" "base-files" "base-passwd" ];
    # Only scripts of packages need these; busybox serves as shell and as all small tools.
    without = [ "adduser" "debconf" "init-system-helpers" "libdebconfclient0" ];
  });
}
