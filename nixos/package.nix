# Lair's programs: laird, vmctl, lair-shim and lair-virtiofs, and the guest's half, which is static.
{
  lib,
  rustPlatform,
  pkgsStatic,
  makeWrapper,
  installShellFiles,
  e2fsprogs,
  qemu_kvm,
  vhost-device-vsock,
}:
let
  common = {
    version = (lib.importTOML ../Cargo.toml).workspace.package.version;
    src = lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.unions [
        ../Cargo.lock
        ../Cargo.toml
        ../clippy.toml
        ../guest
        ../tests/harness
        ../virtiofs
        ../vmm
      ];
    };
    cargoLock.lockFile = ../Cargo.lock;
    # Cargo's profile: see Cargo.toml.
    buildType = "lto";
    meta = {
      description = "The host side of a Nix build farm: microVMs with shared stores and audited links";
      license = lib.licenses.mit;
      platforms = [ "x86_64-linux" ];
      mainProgram = "vmctl";
    };
  };
  guest = pkgsStatic.rustPlatform.buildRustPackage (
    common
    // {
      pname = "lair-guest";
      cargoBuildFlags = [ "--package=lair-guest" ];
      cargoTestFlags = [ "--package=lair-guest" ];
    }
  );
in
rustPlatform.buildRustPackage (
  common
  // {
    pname = "lair";
    nativeBuildInputs = [
      installShellFiles
      makeWrapper
    ];
    cargoBuildFlags = [
      "--package=lair-virtiofs"
      "--package=lair-vmm"
    ];
    cargoTestFlags = [
      "--package=lair-virtiofs"
      "--package=lair-vmm"
    ];
    # laird looks for its helpers beside itself, then in PATH.
    postInstall = ''
      ln -s ${guest}/bin/lair-guest $out/bin/lair-guest
      installShellCompletion --cmd vmctl \
        --bash <($out/bin/vmctl completions bash) \
        --fish <($out/bin/vmctl completions fish) \
        --zsh <($out/bin/vmctl completions zsh)
      $out/bin/vmctl man man
      installManPage man/*.1
      wrapProgram $out/bin/laird --prefix PATH : $out/bin:${
        lib.makeBinPath [
          e2fsprogs
          qemu_kvm
          vhost-device-vsock
        ]
      }
    '';
    passthru = { inherit guest; };
  }
)
