# Env: debs, libraries (store paths that may hold what they need), glibc, patchelf.
. "$unpack"
unpack_into "$out" $debs

# provider SONAME: the folder that holds it.
provider() {
  local dir
  for dir in "$glibc/lib" "$out/lib" $(printf '%s/lib ' $libraries) $(find "$out/lib" -mindepth 1 -type d); do
    if [ -e "$dir/$1" ]; then
      echo "$dir"
      return
    fi
  done
  echo "$1, which $file needs, is in none of: glibc, $libraries" >&2
  exit 1
}

# is_elf FILE: an ELF executable or shared object (types 2 and 3 of e_type), no relocatable one.
is_elf() {
  [ "$(head -c 4 "$1" | tr -d '\177')" = ELF ] || return
  case $(od -An -tu1 -j16 -N1 "$1" | tr -d ' ') in 2 | 3) ;; *) return 1 ;; esac
}

find "$out" -type f | while read -r file; do
  is_elf "$file" || continue
  mode=$(stat -c %a "$file")
  chmod u+w "$file"
  runpath=
  needed=$("$patchelf/bin/patchelf" --print-needed "$file")
  for soname in $needed; do
    dir=$(provider "$soname")
    case :$runpath: in *:$dir:*) ;; *) runpath=$runpath${runpath:+:}$dir ;; esac
  done
  [ -z "$runpath" ] || "$patchelf/bin/patchelf" --set-rpath "$runpath" "$file"
  if "$patchelf/bin/patchelf" --print-interpreter "$file" >/dev/null 2>&1; then
    "$patchelf/bin/patchelf" --set-interpreter "$glibc/lib/ld-linux-x86-64.so.2" "$file"
  fi
  chmod "$mode" "$file"
done
