# Env: dev, glibc, tcc (Debian's, patched), wrapper. The compiler as one would call it.
mkdir -p "$out/bin"
sed "s|@busybox@|$busybox|g; s|@dev@|$dev|g; s|@glibc@|$glibc|g; s|@tcc@|$tcc|g" "$wrapper" >"$out/bin/tcc"
chmod 755 "$out/bin/tcc"
ln -s tcc "$out/bin/cc"
