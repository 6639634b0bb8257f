# Env: openssh (Debian's, patched), wrapper. OpenSSH whose sshd makes the folder that Debian's start script would make.
mkdir -p "$out/bin"
ln -s "$openssh"/bin/* "$out/bin"
ln -s "$openssh/lib" "$out/lib"
rm "$out/bin/sshd"
sed "s|@busybox@|$busybox|g; s|@openssh@|$openssh|g" "$wrapper" >"$out/bin/sshd"
chmod 755 "$out/bin/sshd"
