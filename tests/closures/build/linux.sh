# Env: deb, version, kmod. Kernel, its configuration, its modules.
dpkg-deb -x "$deb" tree
mkdir -p "$out/lib"
mv "tree/boot/vmlinuz-$version" "$out/vmlinuz"
mv "tree/boot/config-$version" "$out/config"
mv tree/usr/lib/modules "$out/lib/modules"
# Debian runs depmod when it installs the package. It looks for modules in usr/lib.
ln -s . "$out/usr"
"$kmod/bin/depmod" -b "$out" "$version"
rm "$out/usr"
