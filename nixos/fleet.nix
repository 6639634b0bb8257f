# The fleet file from the module's settings, and what can be said of it before anything is built. Pure.
{ lib }:
settings:
let
  inherit (lib)
    attrNames
    concatLists
    elem
    filterAttrs
    mapAttrsToList
    unique
    ;
  inherit (builtins) toJSON;
  vms = attrNames settings.vms;

  linkAssertions = mapAttrsToList (
    name: link:
    let
      unknown = builtins.filter (vm: vm != "host" && !elem vm vms) (link.from or [ ]);
      target = link.to.vm or null;
    in
    [
      {
        assertion = unknown == [ ];
        message = "services.lair.settings.links.${name}.from: there is no VM ${toJSON unknown}; the VMs are ${toJSON vms}";
      }
      {
        assertion = target == null || elem target vms;
        message = "services.lair.settings.links.${name}.to.vm: there is no VM ${toJSON target}; the VMs are ${toJSON vms}";
      }
    ]
  ) settings.links;

  # Two links to one port of one VM would be one link with two rules.
  ends = mapAttrsToList (_: link: "${link.to.vm}:${toString link.to.port}") (
    # A link without these is laird's to refuse, with a better message than Nix has.
    filterAttrs (_: link: link ? to.vm && link ? to.port) settings.links
  );
  portAssertion = {
    assertion = unique ends == ends;
    message = "services.lair.settings.links: two links end at the same port of a VM; the ends are ${toJSON ends}";
  };
in
{
  assertions = concatLists linkAssertions ++ [ portAssertion ];
  json = toJSON settings;
}
