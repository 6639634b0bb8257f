# Env: deb. A package's shared files as they are.
dpkg-deb -x "$deb" tree
rm -rf tree/usr/share/doc tree/usr/share/lintian tree/usr/share/man
mv tree/usr/share "$out"
