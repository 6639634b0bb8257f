# Env: deb, version, kmod, liblzma. Kernel, its configuration, its modules.
dpkg-deb -x "$deb" tree
mkdir -p "$out/lib"
mv "tree/boot/vmlinuz-$version" "$out/vmlinuz"
mv "tree/boot/config-$version" "$out/config"
mv tree/usr/lib/modules "$out/lib/modules"
# Debian runs depmod when it installs the package. It looks for modules in usr/lib.
ln -s . "$out/usr"
# depmod opens liblzma by name when it meets a compressed module, and finds no dependencies where it cannot.
LD_LIBRARY_PATH=$liblzma/lib "$kmod/bin/depmod" -b "$out" "$version"
rm "$out/usr"
grep -q '/9p.ko.xz: .*/9pnet.ko.xz' "$out/lib/modules/$version/modules.dep" || {
  echo "depmod found no dependencies" >&2
  exit 1
}
