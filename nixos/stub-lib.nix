# As much of a module system as host.nix uses, for checks where the real library is not at hand: options have their defaults or
# what is defined, types are not checked, nothing is merged.
let
  inherit (builtins)
    attrNames
    attrValues
    concatLists
    elem
    isAttrs
    listToAttrs
    mapAttrs
    ;
  type = { };
in
rec {
  inherit attrNames concatLists elem;
  types = {
    package = type;
    str = type;
    anything = type;
    enum = _: type;
    attrsOf = _: type;
    listOf = _: type;
    submodule = module: { inherit module; };
  };
  mkOption = option: option // { _option = true; };
  mkEnableOption = _: mkOption { default = false; };
  mkIf = condition: value: if condition then value else { };
  filterAttrs =
    keep: set:
    listToAttrs (
      concatLists (
        map (
          name:
          if keep name set.${name} then
            [
              {
                inherit name;
                value = set.${name};
              }
            ]
          else
            [ ]
        ) (attrNames set)
      )
    );
  mapAttrsToList = f: set: attrValues (mapAttrs f set);
  unique = builtins.foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];

  # The value of a tree of options where `defined` is what the configuration says.
  value =
    option: defined:
    if option ? _option then
      let
        given = if defined == null then option.default or { } else defined;
        sub = (option.type or { }).module or null;
      in
      if sub == null then given else given // values sub.options given
    else
      values option (if defined == null then { } else defined);
  values = options: defined: mapAttrs (name: option: value option (defined.${name} or null)) options;

  evalModule =
    module: definition:
    let
      evaluated = module {
        lib = import ./stub-lib.nix;
        pkgs.callPackage = _: _: "/lair";
        config = values evaluated.options definition;
      };
    in
    assert isAttrs evaluated.options;
    evaluated.config;
}
