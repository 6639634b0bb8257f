# Env: debs. The one program that runs by an explicit loader, because it is what sets interpreters.
mkdir tree "$out" "$out/bin" "$out/lib"
for deb in $debs; do
  dpkg-deb -x "$deb" tree
done
cp -L tree/usr/lib/x86_64-linux-gnu/*.so.* "$out/lib"
cp tree/usr/bin/patchelf "$out/lib/patchelf"
cat >"$out/bin/patchelf" <<END
#!$busybox/bin/sh
exec $out/lib/ld-linux-x86-64.so.2 --library-path $out/lib $out/lib/patchelf "\$@"
END
chmod 755 "$out/bin/patchelf"
