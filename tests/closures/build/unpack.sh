# Sourced: unpack_into DIR DEB...: Debian's layout turned into the store's (bin, lib, include, etc), without documents.
unpack_into() {
  local dir=$1 deb
  shift
  mkdir tree "$dir"
  for deb in "$@"; do
    dpkg-deb -x "$deb" tree
  done
  move tree/usr/lib/x86_64-linux-gnu "$dir/lib"
  rm -rf tree/usr/lib/x86_64-linux-gnu
  move tree/usr/lib "$dir/lib"
  move tree/usr/bin "$dir/bin"
  move tree/usr/sbin "$dir/bin"
  move tree/usr/libexec "$dir/libexec"
  move tree/usr/include "$dir/include"
  rm -rf tree
}

# move FROM TO: FROM's entries, if there are any, except those that TO has: sbin's links to bin of the same name.
move() {
  [ -d "$1" ] || return 0
  mkdir -p "$2"
  find "$1" -mindepth 1 -maxdepth 1 | while read -r entry; do
    [ -e "$2/${entry##*/}" ] || mv "$entry" "$2"
  done
}
