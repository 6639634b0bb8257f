# What every builder begins with: busybox's applets in PATH, and patchelf with the libraries that it came with.
export HOME=$TMPDIR LC_ALL=C
mkdir -p "$TMPDIR/applets"
"$tools/bin/busybox" --install -s "$TMPDIR/applets"
export PATH=$TMPDIR/applets
patchelf() { "$tools/lib/ld-linux-x86-64.so.2" --library-path "$tools/lib" "$tools/bin/patchelf" "$@"; }
umask 022
