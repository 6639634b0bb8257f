# All store paths of the test bed, and the file that lists them. `debs` is the folder that `prepare` downloaded.
{ debs }:

let
  folder = /. + debs;

  inherit
    (import ./build.nix {
      bootstrap = builtins.path {
        name = "bootstrap";
        path = folder + "/bootstrap";
      };
    })
    busybox
    run
    ;

  debian = import ./debian.nix {
    inherit run;
    debs = folder;
  };
  inherit (debian) deb glibc package;

  nix = package "nix" [ "nix-bin" ];
  openssh = run {
    name = "openssh";
    script = ./build/openssh.sh;
    wrapper = ./bin/sshd;
    openssh = package "openssh-unwrapped" [ "openssh-server" "openssh-client" ];
  };
  xz = package "xz" [ "xz-utils" ];

  tcc = run {
    name = "tcc";
    script = ./build/tcc.sh;
    wrapper = ./bin/tcc;
    inherit glibc;
    tcc = package "tcc-unwrapped" [ "tcc" ];
    dev = run {
      name = "libc-dev";
      script = ./build/libc-dev.sh;
      unpack = ./build/unpack.sh;
      inherit glibc;
      debs = map deb [ "libc6-dev" "linux-libc-dev" ];
    };
  };

  kernel = debian.only "linux-image-[0-9].*";
  version = builtins.substring (builtins.stringLength "linux-image-") (-1) kernel;
  linux = run {
    name = "linux";
    script = ./build/linux.sh;
    inherit version;
    deb = deb kernel;
    kmod = package "kmod" [ "kmod" ];
    liblzma = package "liblzma" [ "liblzma5" ];
  };

  profile =
    name:
    {
      tools,
      etc ? [ ],
      scripts ? [ ],
      library ? null,
    }:
    run {
      name = "profile-${name}";
      script = ./build/profile.sh;
      inherit scripts library nix openssh tcc;
      tools = [ busybox ] ++ tools;
      etc = [ ./etc/common ] ++ etc;
    };

  paths = {
    inherit busybox glibc linux nix openssh tcc xz;

    profile-builder = profile "builder" {
      tools = [ nix openssh tcc xz ];
      etc = [ ./etc/nix ./etc/sshd ];
    };
    profile-cache = profile "cache" {
      tools = [ nix openssh xz ];
      etc = [ ./etc/nix ./etc/sshd ];
      scripts = [ ./bin/publish ];
    };
    profile-hydra = profile "hydra" {
      tools = [ nix openssh tcc xz ];
      etc = [ ./etc/nix ];
      library = ./lib.nix;
    };
    profile-plain = profile "plain" { tools = [ ]; };

    debian-system = import ./system.nix {
      inherit run deb;
      inherit (debian) closure;
    };

    big = import ./big.nix { inherit run deb; };

    # In no guest's closure.
    secret = run {
      name = "secret";
      script = builtins.toFile "secret" "echo 'No view includes this.' >$out";
    };
  };
in
run {
  name = "testbed.json";
  script = builtins.toFile "write" ''printf '%s\n' "$text" >$out'';
  text = builtins.toJSON {
    inherit paths;
    debian = debian.versions;
    kernel = "${linux}/vmlinuz";
    modules = "${linux}/lib/modules/${version}";
  };
}
