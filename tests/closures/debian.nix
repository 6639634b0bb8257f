# Debian packages as store paths with real references: ELF files find their interpreter and libraries in the store.
{ debs, run }:

let
  index = builtins.fromJSON (builtins.readFile (debs + "/index.json"));

  deb =
    name:
    builtins.path {
      name = "${name}.deb";
      path = debs + "/${name}.deb";
    };

  inherit (builtins) attrNames elem filter head match;

  # Only these can hold what an ELF file needs.
  isLibrary = name: match "(lib|zlib).*" name != null && match ".*-(perl|dev)|libpam-.*" name == null;

  # What Debian says a package needs, as far as it was downloaded (of alternatives that is the one that apt chose).
  dependencies = name: filter (other: index ? ${other}) index.${name}.depends;

  patchelf = run {
    name = "patchelf";
    script = ./build/patchelf.sh;
    debs = map deb [ "patchelf" "libc6" "libgcc-s1" "libstdc++6" ];
  };

  # They need each other.
  core = [ "libc6" "libgcc-s1" ];

  glibc = run {
    name = "glibc";
    script = ./build/glibc.sh;
    unpack = ./build/unpack.sh;
    debs = map deb core;
  };

  # package NAME DEBS: these Debian packages as one store path. Libraries come in by what Debian declares.
  package =
    name: names:
    run {
      inherit name;
      script = ./build/package.sh;
      unpack = ./build/unpack.sh;
      inherit glibc patchelf;
      debs = map deb names;
      libraries = map (name: libraries.${name}) (
        filter (name: isLibrary name && !elem name (core ++ names)) (builtins.concatMap dependencies names)
      );
    };

  libraries = builtins.mapAttrs (name: _: package name [ name ]) index;
in
{
  inherit deb glibc package;

  versions = builtins.mapAttrs (_: entry: entry.version) index;

  # The one package whose name matches a regular expression.
  only =
    pattern:
    let
      found = filter (name: match pattern name != null) (attrNames index);
    in
    if builtins.length found == 1 then
      head found
    else
      throw "Package ${pattern}: 1 expected, ${toString (builtins.length found)} were downloaded";

  # All packages that these need, and these, without those whose name is in `without`.
  closure =
    { names, without }:
    map (node: node.key) (
      builtins.genericClosure {
        startSet = map (key: { inherit key; }) names;
        operator =
          node: map (key: { inherit key; }) (filter (name: !elem name without) (dependencies node.key));
      }
    );
}
