# What derivations in a guest are made with. Imported from the guest's own profile-hydra, where the names are filled in:
# it needs no more than the store paths that the guest was shown. README.md has an example.
rec {
  busybox = builtins.storePath "@busybox@";
  tcc = builtins.storePath "@tcc@";

  # run { name, script, ... }: a derivation whose shell script makes $out with busybox and tcc; the further attributes
  # are its environment.
  run =
    arguments@{ name, script, ... }:
    derivation (
      removeAttrs arguments [ "script" ]
      // {
        system = "x86_64-linux";
        builder = "${busybox}/bin/busybox";
        args = [ "sh" "-euc" script ];
        PATH = "${tcc}/bin:${busybox}/bin";
      }
    );
}
