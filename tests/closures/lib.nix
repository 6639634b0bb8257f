# How store paths are made from Debian's files: no nixpkgs, only busybox and patchelf.
{ base, bootstrap, generated }:
let
  inherit (builtins) attrValues concatStringsSep elem filter listToAttrs map mapAttrs path;
  data = import generated;
  tools = path { name = "bootstrap"; path = bootstrap; };

  # Runs a shell script with busybox's applets in a sandbox.
  run =
    name: attributes: script:
    derivation (
      {
        inherit name tools;
        system = "x86_64-linux";
        builder = "${tools}/bin/busybox";
        args = [
          "sh"
          "-euc"
          (builtins.readFile ./prelude.sh + script)
        ];
      }
      // attributes
    );

  # One file of Debian's tree as a store path, so that a package depends on its own files only.
  file = name: place: path { inherit name; path = base + "/${place}"; };

  # What belongs to glibc is one package: its parts need each other.
  glibcNames = [
    "libc.so.6"
    "ld-linux-x86-64.so.2"
    "libm.so.6"
    "libmvec.so.1"
    "libresolv.so.2"
    "libpthread.so.0"
    "libdl.so.2"
    "librt.so.1"
    "libutil.so.1"
    "libanl.so.1"
    "libnss_files.so.2"
    "libnss_dns.so.2"
  ];
  glibc =
    let
      copy = name: "cp ${file name "usr/lib/x86_64-linux-gnu/${name}"} $out/lib/${name}";
    in
    run "glibc" { } ''
      mkdir -p $out/lib
      ${concatStringsSep "\n" (map copy glibcNames)}
      chmod +x $out/lib/*
    '';
  interpreter = "${glibc}/lib/ld-linux-x86-64.so.2";

  packageOf = soname: if elem soname glibcNames then glibc else libraries.${soname};
  unique = list: attrValues (listToAttrs (map (p: { name = builtins.unsafeDiscardStringContext (baseNameOf (toString p)); value = p; }) list));
  rpath = needed: concatStringsSep ":" (map (p: "${p}/lib") (unique (map packageOf needed)));

  # A package per shared library, with the packages of the libraries that it needs as its search path.
  libraries = mapAttrs (
    soname:
    { file, needed }:
    run (builtins.replaceStrings [ "+" ] [ "x" ] soname)
      {
        source = path { name = baseNameOf file; path = base + "/${file}"; };
        search = rpath (filter (n: n != soname) needed);
      }
      ''
        mkdir -p $out/lib
        cp $source $out/lib/${soname}
        chmod u+w $out/lib/${soname}
        patchelf --set-rpath "$search" $out/lib/${soname}
      ''
  ) data.libraries;
in
{
  inherit run glibc interpreter file libraries;
  inherit (data) kernel;

  # A dynamic program of Debian's, by its place in the tree, with the store's own libraries.
  program =
    place:
    run (baseNameOf place)
      {
        source = file (baseNameOf place) place;
        search = rpath data.programs.${place};
        inherit interpreter;
      }
      ''
        mkdir -p $out/bin
        cp $source $out/bin/${baseNameOf place}
        chmod u+wx $out/bin/${baseNameOf place}
        patchelf --set-interpreter $interpreter --set-rpath "$search" $out/bin/${baseNameOf place}
      '';
}
