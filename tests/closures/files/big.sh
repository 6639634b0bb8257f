mkdir -p $out/many $out/odd $out/deep
cp -r $zones $out/many/zoneinfo
cp -r $headers $out/many/include
cd $out/odd
: >empty
printf 'x' >one
dd if=/dev/zero bs=4096 count=1 2>/dev/null | tr '\0' 'y' >page
# Every 4 KiB of it differs, so that a page in the wrong place is seen.
i=0
while [ $i -lt 1280 ]; do
  printf '%-4096d' $i
  i=$((i + 1))
done >five-mebibytes
printf 'echo run\n' >executable
chmod +x executable
ln executable hard-link
ln -s one relative
ln -s /etc/passwd outside
ln -s nowhere dangling
ln -s $busybox/bin/busybox reference
: >"$(printf 'latin-\351')"
: >"$(printf 'new\nline')"
: >"$(printf 'n%.0s' $(seq 255))"
: >' blank '
cd $out/deep
i=0
while [ $i -lt 60 ]; do
  mkdir d
  cd d
  i=$((i + 1))
done
echo bottom >bottom
