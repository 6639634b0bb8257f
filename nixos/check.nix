# Evaluates the host module with the example fleet. `lib` is nixpkgs' library, or null for the stub.
{ lib }:
let
  evaluate =
    example:
    if lib == null then
      (import ./stub-lib.nix).evalModule (import ./host.nix) example
    else
      (lib.evalModules {
        specialArgs.pkgs.callPackage = _: _: {
          type = "derivation";
          outPath = "/lair";
          name = "lair";
        };
        modules = [
          ./host.nix
          example
          # The options of NixOS that the module sets.
          {
            options = lib.genAttrs [ "assertions" "environment" "users" "systemd" ] (
              name:
              lib.mkOption {
                type = if name == "assertions" then lib.types.listOf lib.types.raw else lib.types.attrsOf lib.types.anything;
                default = if name == "assertions" then [ ] else { };
              }
            );
          }
        ];
      }).config;
  example = import ./example.nix;
  good = evaluate example;
  # The same with other links.
  withLinks =
    links:
    evaluate {
      services.lair = example.services.lair // {
        settings = example.services.lair.settings // {
          links = example.services.lair.settings.links // links;
        };
      };
    };
  misspelt = withLinks {
    build = {
      from = [ "hydar" ];
      to = {
        vm = "bulider";
        port = 1022;
      };
    };
  };
  twice = withLinks {
    again = {
      from = [ "hydra" ];
      to = {
        vm = "builder";
        port = 1022;
      };
    };
  };
  # laird refuses these; the module must not fail on them in its own way.
  incomplete = withLinks {
    one = { };
    two.to = { };
    three.to.vm = "builder";
  };
  failed = config: map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
  fleet = builtins.fromJSON good.environment.etc."lair/fleet.json".text;
  unit = good.systemd.services.lair.serviceConfig;
  expect = what: condition: seen: if condition then true else throw "${what}: ${builtins.toJSON seen}";
in
assert expect "the example's assertions" (failed good == [ ]) (failed good);
assert expect "example.json is not what the example renders to" (
  fleet == builtins.fromJSON (builtins.readFile ./example.json)
) fleet;
assert expect "links to unknown VMs" (
  map (builtins.match ".*(hydar|bulider).*") (failed misspelt) == [
    [ "hydar" ]
    [ "bulider" ]
  ]
) (failed misspelt);
assert expect "two links to one port" (
  map (builtins.match ".*(same port).*") (failed twice) == [ [ "same port" ] ]
) (failed twice);
assert expect "incomplete links" (failed incomplete == [ ]) (failed incomplete);
# Without these a restart of the service would end every guest.
assert expect "the unit" (unit.KillMode == "process" && unit.RuntimeDirectoryPreserve) unit;
assert expect "no filter against the setgid directories of VMs" (!(unit ? RestrictSUIDSGID)) unit;
"ok"
