# Env: bootstrap, the folder that holds the static busybox.
bb=$bootstrap/busybox
$bb mkdir -p "$out/bin"
$bb cp "$bb" "$out/bin/busybox"
for command in $($bb --list); do
  [ "$command" = busybox ] || $bb ln -s busybox "$out/bin/$command"
done
