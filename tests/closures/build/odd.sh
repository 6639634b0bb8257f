# What a file server gets wrong: names, sizes, links and folders out of the ordinary. All of it is the same every time.
mkdir "$out"
cd "$out"

mkdir names
printf x >"names/$(printf 'latin1-caf\351')"
printf x >"names/$(printf 'not-utf8-\377\376\200')"
printf x >"names/$(printf 'newline\nand tab\t')"
# shellcheck disable=SC2016 # as it stands
printf x >'names/ spaces and "quotes" \backslash $dollar *star* '
printf x >names/-dash
printf x >names/...
printf x >names/Case
printf x >names/case
printf x >"names/$(head -c 255 /dev/zero | tr '\0' n)"

mkdir sizes
for size in 0 1 4095 4096 4097 65536 131071 131073; do
  seq 1 100000 | head -c "$size" >"sizes/$size"
done
seq 1 1000000 | head -c 5242880 >sizes/5MiB
truncate -s 1048576 sizes/zeros

mkdir modes
printf '#!%s/bin/sh\necho runs\n' "$busybox" >modes/executable
chmod 755 modes/executable
printf x >modes/plain

mkdir links
ln -s ../sizes/4096 links/relative
ln -s nowhere links/dangling
ln -s loop links/loop
ln -s .. links/up
ln -s "$busybox/bin/busybox" links/absolute
# The longest target that Linux takes, but for the last byte.
ln -s "$(head -c 4094 /dev/zero | tr '\0' t)" links/long
ln sizes/4097 links/hard-1
ln sizes/4097 links/hard-2

mkdir empty
mkdir many
seq 1 3000 | sed 's|^|many/entry-|' | xargs touch

deep=deep
for level in $(seq 1 100); do
  deep=$deep/$level
done
mkdir -p "$deep"
printf bottom >"$deep/file"
