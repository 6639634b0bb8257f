# Env: tools (store paths), etc (folders), scripts (files), and the store paths that @NAME@ stands for in these.
# A guest's profile: bin is its PATH, etc becomes its /etc. Of two things with one name the later one counts.
fill() {
  sed -i "s|@profile@|$out|g; s|@busybox@|$busybox|g; s|@nix@|$nix|g; s|@openssh@|$openssh|g; s|@tcc@|$tcc|g" "$@"
}

mkdir -p "$out/bin" "$out/etc"
for tool in $tools; do
  ln -sf "$tool"/bin/* "$out/bin/"
done
for script in $scripts; do
  # Without the hash that the store puts before the name.
  name=${script##*/}
  name=$out/bin/${name#*-}
  rm -f "$name"
  cp "$script" "$name"
  chmod 755 "$name"
  fill "$name"
done
for folder in $etc; do
  cp -r "$folder/." "$out/etc"
  chmod -R u+w "$out/etc"
done
fill $(find "$out/etc" -type f)
if [ -n "${library:-}" ]; then
  cp "$library" "$out/lib.nix"
  chmod u+w "$out/lib.nix"
  fill "$out/lib.nix"
fi
