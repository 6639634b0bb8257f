# Env: perl, zoneinfo, odd. References of both kinds: in a link's target and in a file's text.
mkdir "$out"
ln -s "$perl" "$out/perl"
ln -s "$odd" "$out/odd"
echo "$zoneinfo" >"$out/zoneinfo"
