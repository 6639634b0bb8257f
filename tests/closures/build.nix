# How everything here is built: one shell script under busybox, with nothing else in reach.
{ bootstrap }:

let
  system = "x86_64-linux";

  # Busybox with a link per command. The only derivation that is not built by it.
  busybox = derivation {
    name = "busybox";
    inherit system bootstrap;
    builder = "${bootstrap}/busybox";
    args = [ "sh" "-eu" ./build/busybox.sh ];
  };
in
{
  inherit busybox;

  # run { name, script, ... }: all further attributes are the script's environment, as is `busybox`.
  run =
    arguments@{ name, script, ... }:
    derivation (
      removeAttrs arguments [ "script" ]
      // {
        inherit system;
        builder = "${busybox}/bin/busybox";
        args = [ "sh" "-eu" script ];
        inherit busybox;
        PATH = "${busybox}/bin";
      }
    );
}
