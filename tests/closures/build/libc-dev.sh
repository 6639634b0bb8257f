# Env: debs, unpack, glibc. What a C compiler needs of libc: headers, start files, linker scripts.
. "$unpack"
unpack_into "$out" $debs
rm -rf "$out/bin"
# Headers of the kernel for other machines.
find "$out/lib/linux/uapi" -mindepth 1 -maxdepth 1 ! -name x86 ! -name asm-generic -exec rm -rf {} +
# These two are linker scripts with absolute paths; all others are links to where glibc is in Debian.
sed -i "s| /[^ ]*/\([^/ ]*\.so[.0-9]*\)| $glibc/lib/\1|g; s| /[^ ]*/\([^/ ]*\.a\)| $out/lib/\1|g" "$out/lib/libc.so" "$out/lib/libm.so"
find "$out/lib" -maxdepth 1 -type l | while read -r link; do
  target=$glibc/lib/$(basename "$(readlink "$link")")
  rm "$link"
  [ ! -e "$target" ] || ln -s "$target" "$link"
done
