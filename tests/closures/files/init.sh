#!@busybox@/bin/sh
# Makes a root for Debian's systemd around the tree in the store, as NixOS does for its own, and starts it.
export PATH=@busybox@/bin
for name in usr; do ln -sfn @out@/$name /$name; done
for name in bin sbin lib lib64; do ln -sfn usr/$name /$name; done
mkdir -p /etc /var/log /var/lib /var/tmp /tmp /root /home
chmod 1777 /tmp /var/tmp
cp -r @out@/etc/. /etc/
chmod -R u+w /etc
ln -sfn /run /var/run
printf 'root:x:0:0:root:/root:/bin/sh\nmessagebus:x:101:101::/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n' >/etc/passwd
printf 'root:x:0:\nmessagebus:x:101:\nnogroup:x:65534:\n' >/etc/group
: >/etc/fstab
: >/etc/machine-id
ln -sfn /usr/lib/systemd/system/multi-user.target /etc/systemd/system/default.target
# What has nothing to do in a microVM.
for unit in getty@tty1.service serial-getty@hvc0.service systemd-networkd.service systemd-timesyncd.service systemd-resolved.service \
  systemd-logind.service systemd-hwdb-update.service systemd-firstboot.service ldconfig.service systemd-binfmt.service \
  e2scrub_reap.service systemd-udevd.service systemd-udev-trigger.service systemd-udev-settle.service \
  systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-sysusers.service systemd-pcrphase.service \
  sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount systemd-modules-load.service systemd-pstore.service \
  systemd-tmpfiles-setup-dev.service systemd-tmpfiles-setup-dev-early.service systemd-journal-catalog-update.service \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer; do
  ln -sfn /dev/null /etc/systemd/system/$unit
done
exec /usr/lib/systemd/systemd "$@"
