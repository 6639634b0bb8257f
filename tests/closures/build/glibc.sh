# Env: debs. Nothing to patch: the loader is loaded by its path, and all others have loaded libc before.
. "$unpack"
unpack_into "$out" $debs
# Character sets beyond the built-in ones.
rm -rf "$out/lib/gconv"
