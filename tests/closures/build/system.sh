# Env: debs, init, masked (units).
mkdir tree "$out"
for deb in $debs; do
  dpkg-deb -x "$deb" tree
done
mv tree/usr tree/etc "$out"
cd "$out"
find usr/share -mindepth 1 -maxdepth 1 ! -name dbus-1 ! -name base-passwd -exec rm -rf {} +

for tool in "$busybox"/bin/*; do
  name=${tool##*/}
  [ -e "usr/bin/$name" ] || [ -e "usr/sbin/$name" ] || ln -s "$tool" "usr/bin/$name"
done

# What packages do when they are installed: users, and the units to start.
sed 's|:/bin/bash$|:/bin/sh|' usr/share/base-passwd/passwd.master >etc/passwd
cp usr/share/base-passwd/group.master etc/group
libraries=usr/lib/x86_64-linux-gnu
"$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/systemd" usr/bin/systemd-sysusers --root="$out"
ln -s /usr/lib/systemd/system/multi-user.target etc/systemd/system/default.target

# Nobody logs in at a terminal: commands come through the agent. There is no udev either, so a getty's device would be
# waited for in vain.
mkdir etc/systemd/system-generators
ln -s /dev/null etc/systemd/system-generators/systemd-getty-generator
for unit in $masked; do
  ln -s /dev/null "etc/systemd/system/$unit"
done

sed "s|@busybox@|$busybox|g; s|@system@|$out|g" "$init" >"$out/init"
chmod 755 "$out/init"
