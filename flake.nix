{
  description = "Lair: the host side of a Nix build farm";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  # Thin on purpose: everything below nixos/ can be imported by plain path, without flakes.
  outputs =
    { self, nixpkgs }:
    let
      pkgs = nixpkgs.legacyPackages.x86_64-linux;
    in
    {
      packages.x86_64-linux = rec {
        lair = pkgs.callPackage ./nixos/package.nix { };
        default = lair;
      };
      nixosModules.host = import ./nixos/host.nix;
      formatter.x86_64-linux = pkgs.nixfmt-tree;
    };
}
