# A small farm: Hydra, a cache and a builder on one host. `hydraSystem` and so on stand for NixOS systems of yours.
{
  services.lair = {
    enable = true;
    settings = {
      vms = {
        hydra = {
          role = "hydra";
          vcpus = 4;
          memory = "8GiB";
          kernel = "/nix/store/00000000000000000000000000000000-linux/bzImage";
          modules = "/nix/store/00000000000000000000000000000000-linux/lib/modules/6.12";
          init = "/nix/store/00000000000000000000000000000001-nixos-system-hydra/init";
          roots = [ "/nix/store/00000000000000000000000000000001-nixos-system-hydra" ];
          volumes = [
            {
              name = "state";
              size = "40GiB";
              mount = "/var";
            }
          ];
        };
        builder = {
          role = "builder";
          vcpus = 8;
          memory = "16GiB";
          kernel = "/nix/store/00000000000000000000000000000000-linux/bzImage";
          modules = "/nix/store/00000000000000000000000000000000-linux/lib/modules/6.12";
          init = "/nix/store/00000000000000000000000000000002-nixos-system-builder/init";
          roots = [ "/nix/store/00000000000000000000000000000002-nixos-system-builder" ];
          overlay.tmpfs = "8GiB";
        };
      };
      links = {
        # Hydra's machines file names ssh://builder, with `lair-guest connect build` as ProxyCommand.
        build = {
          from = [ "hydra" ];
          to = {
            vm = "builder";
            port = 1022;
            connect = "127.0.0.1:22";
          };
        };
        # For a reverse proxy on the host.
        web = {
          from = [ "host" ];
          listen = "127.0.0.1:3000";
          to = {
            vm = "hydra";
            port = 3000;
            connect = "127.0.0.1:3000";
          };
        };
      };
    };
  };
}
