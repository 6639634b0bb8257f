# The host module: laird as a service, with the fleet file rendered from options.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib)
    mkEnableOption
    mkIf
    mkOption
    types
    ;
  cfg = config.services.lair;
  fleet = import ./fleet.nix { inherit lib; } cfg.settings;
in
{
  options.services.lair = {
    enable = mkEnableOption "Lair, which runs this host's microVMs";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = "pkgs.callPackage ./package.nix { }";
      description = "The package with Lair's programs.";
    };

    settings = mkOption {
      # Any value of JSON: laird checks keys and values, and so does `vmctl check` on the rendered file.
      type = types.submodule {
        freeformType = types.attrsOf types.anything;
        options = {
          schema = mkOption {
            type = types.enum [ 1 ];
            default = 1;
            description = "The version of the fleet file's format.";
          };
          store.sources = mkOption {
            type = types.listOf (types.attrsOf types.str);
            default = [
              {
                store = "/nix/store";
                database = "/nix/var/nix/db";
              }
            ];
            description = "Where store paths come from.";
          };
          vms = mkOption {
            type = types.attrsOf (types.attrsOf types.anything);
            default = { };
            description = "The VMs, by name; `vmctl schema` prints what each may have.";
          };
          links = mkOption {
            type = types.attrsOf (types.attrsOf types.anything);
            default = { };
            description = "The links, by name: which VM may connect to what.";
          };
        };
      };
      default = { };
      description = "The fleet: what becomes /etc/lair/fleet.json.";
    };
  };

  config = mkIf cfg.enable {
    assertions = fleet.assertions;

    environment.systemPackages = [ cfg.package ];
    environment.etc."lair/fleet.json".text = fleet.json;

    # Who may use laird's socket.
    users.groups.lair = { };

    systemd.services.lair = {
      description = "Lair supervisor";
      wantedBy = [ "multi-user.target" ];
      after = [ "local-fs.target" ];
      # VMs keep what they were started with; links follow at once.
      reloadTriggers = [ fleet.json ];
      # Replaced while VMs run: the next laird finds them again.
      stopIfChanged = false;
      serviceConfig = {
        Type = "notify";
        ExecStart = "${cfg.package}/bin/laird";
        ExecReload = "${cfg.package}/bin/vmctl apply";
        Restart = "always";
        RestartSec = 1;
        # With the host all VMs end, within 75 s and what killing the rest takes; the default of 90 s could cut that short.
        TimeoutStopSec = 120;
        # A stop or a crash ends laird alone, never a guest.
        KillMode = "process";
        # VMs get cgroups below this one, beside that of laird itself.
        Delegate = "cpu io memory pids";
        DelegateSubgroup = "supervisor";
        OOMScoreAdjust = -900;
        RuntimeDirectory = "lair";
        RuntimeDirectoryPreserve = true;
        StateDirectory = "lair";
        # Users of VMs go through to their volumes; what is in it is not for others to read.
        StateDirectoryMode = "0751";
        LimitNOFILE = 65536;
        LockPersonality = true;
        NoNewPrivileges = true;
        ProtectClock = true;
        ProtectHome = "read-only";
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectSystem = "full";
        RestrictRealtime = true;
        # Not RestrictSUIDSGID: the directory of a VM's vsock sockets is setgid, so that they belong to the VM's group.
        SystemCallArchitectures = "native";
      };
    };
  };
}
