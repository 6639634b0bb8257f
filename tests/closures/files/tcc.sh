#!@busybox@/bin/sh
# tcc with the paths of this store: what it links runs wherever the closure is.
export LD_SO=@interpreter@
for argument; do
  case $argument in
  -c | -E | -v | -h | -hh | --version) exec @compiler@/bin/tcc -B@out@/lib/tcc -I@out@/include/x86_64-linux-gnu -I@out@/include "$@" ;;
  esac
done
exec @compiler@/bin/tcc -B@out@/lib/tcc -I@out@/include/x86_64-linux-gnu -I@out@/include -nostdlib -L@glibc@/lib -Wl,-rpath=@glibc@/lib \
  @out@/lib/crt1.o @out@/lib/crti.o "$@" @glibc@/lib/libc.so.6 @out@/lib/libc_nonshared.a @out@/lib/tcc/libtcc1.a \
  @out@/lib/crtn.o
