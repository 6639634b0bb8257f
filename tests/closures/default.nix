# The guests' contents. tests/prepare gives Debian's unpacked trees and what it found out about their programs.
{
  base,
  system,
  bootstrap,
  generated,
}:
let
  lib = import ./lib.nix { inherit base bootstrap generated; };
  inherit (lib)
    run
    program
    glibc
    interpreter
    ;
  directory = name: place: builtins.path { inherit name; path = base + "/${place}"; };
  files = ./files;

  busybox = run "busybox" { source = lib.file "busybox" "usr/bin/busybox"; } ''
    mkdir -p $out/bin
    cp $source $out/bin/busybox
    chmod +x $out/bin/busybox
    for applet in $($out/bin/busybox --list); do
      [ "$applet" = busybox ] || ln -s busybox "$out/bin/$applet"
    done
  '';

  nix =
    let
      nix = program "usr/bin/nix";
    in
    run "nix" { inherit nix; } ''
      mkdir -p $out/bin
      for name in nix nix-build nix-channel nix-collect-garbage nix-copy-closure nix-daemon nix-env nix-hash \
        nix-instantiate nix-prefetch-url nix-shell nix-store; do
        ln -s $nix/bin/nix $out/bin/$name
      done
    '';

  # OpenSSH 10 runs a program of its own for each session and for authentication; sshd_config names them.
  openssh =
    let
      part = place: "ln -s ${program place}/bin/${baseNameOf place} $out/bin/";
    in
    run "openssh" { } ''
      mkdir -p $out/bin
      ${part "usr/bin/ssh"}
      ${part "usr/bin/ssh-keygen"}
      ${part "usr/sbin/sshd"}
      ${part "usr/lib/openssh/sshd-session"}
      ${part "usr/lib/openssh/sshd-auth"}
    '';

  xz = program "usr/bin/xz";

  # The compiler with the C library's headers and start files. What it links has the store's interpreter and search path.
  tcc = run "tcc"
    {
      compiler = program "usr/bin/tcc";
      runtime = directory "tcc-runtime" "usr/lib/x86_64-linux-gnu/tcc";
      headers = directory "c-headers" "usr/include";
      crt1 = lib.file "crt1.o" "usr/lib/x86_64-linux-gnu/crt1.o";
      crti = lib.file "crti.o" "usr/lib/x86_64-linux-gnu/crti.o";
      crtn = lib.file "crtn.o" "usr/lib/x86_64-linux-gnu/crtn.o";
      nonshared = lib.file "libc_nonshared.a" "usr/lib/x86_64-linux-gnu/libc_nonshared.a";
      wrapper = files + "/tcc.sh";
      inherit glibc interpreter busybox;
    }
    ''
      mkdir -p $out/bin $out/lib/tcc
      cp -r $runtime/. $out/lib/tcc/
      cp -r $headers $out/include
      cp $crt1 $out/lib/crt1.o
      cp $crti $out/lib/crti.o
      cp $crtn $out/lib/crtn.o
      cp $nonshared $out/lib/libc_nonshared.a
      sed -e "s|@out@|$out|g" -e "s|@glibc@|$glibc|g" -e "s|@interpreter@|$interpreter|g" \
        -e "s|@busybox@|$busybox|g" -e "s|@compiler@|$compiler|g" $wrapper >$out/bin/tcc
      chmod +x $out/bin/tcc
      ln -s tcc $out/bin/cc
    '';

  linux = run "linux-${lib.kernel}"
    {
      image = lib.file "vmlinuz" "boot/vmlinuz-${lib.kernel}";
      kmod = program "usr/bin/kmod";
      modules = directory "modules" "usr/lib/modules/${lib.kernel}";
      lzma = lib.libraries."liblzma.so.5";
    }
    ''
      mkdir -p $out/lib/modules
      cp $image $out/vmlinuz
      cp -r $modules $out/lib/modules/${lib.kernel}
      chmod -R u+w $out/lib/modules
      # Debian makes modules.dep when the package is configured.
      ln -s $kmod/bin/kmod depmod
      # It loads the library for compressed modules by itself, where its search path does not count.
      LD_LIBRARY_PATH=$lzma/lib ./depmod -b $out ${lib.kernel}
      grep -q '^kernel/fs/ext4/ext4.ko.xz: .*jbd2' $out/lib/modules/${lib.kernel}/modules.dep
    '';

  # A guest's profile: its bin is the guest's PATH, its etc becomes /etc.
  profile =
    name: packages:
    run "profile-${name}"
      {
        inherit packages openssh nix;
        etc = files + "/etc";
        publish = files + "/publish.sh";
      }
      ''
        mkdir -p $out/bin
        for package in $packages; do
          for file in $package/bin/*; do
            [ -e $out/bin/''${file##*/} ] || ln -s $file $out/bin/
          done
        done
        cp -r $etc $out/etc
        chmod -R u+w $out/etc
        sed -i -e "s|@openssh@|$openssh|g" -e "s|@nix@|$nix|g" -e "s|@profile@|$out|g" $out/etc/ssh/sshd_config
        if [ ${name} = cache ]; then
          cp $publish $out/bin/publish
          chmod +x $out/bin/publish
        fi
      '';

  # Debian's own systemd with the tree that it expects, and the script that makes a root of it.
  debian-system = run "debian-system"
    {
      usr = builtins.path {
        name = "debian-usr";
        path = system + "/usr";
        filter = name: _: builtins.match ".*/usr/share/(doc|man|locale|info|lintian|bug|i18n|zoneinfo|perl5)" name == null;
      };
      etc = builtins.path {
        name = "debian-etc";
        path = system + "/etc";
      };
      init = files + "/init.sh";
      inherit busybox;
    }
    ''
      mkdir -p $out
      cp -r $usr $out/usr
      cp -r $etc $out/etc
      sed -e "s|@out@|$out|g" -e "s|@busybox@|$busybox|g" $init >$out/init
      chmod +x $out/init
    '';

  # Many files, and odd ones.
  big = run "big"
    {
      zones = directory "zoneinfo" "usr/share/zoneinfo";
      headers = directory "c-headers" "usr/include";
      inherit busybox;
    }
    (builtins.readFile ./files/big.sh);

  # Valid in the store and in nobody's view.
  secret = run "secret" { } ''
    mkdir $out
    echo 'no guest should read this' >$out/secret
  '';

  paths = {
    inherit
      busybox
      nix
      openssh
      tcc
      xz
      glibc
      debian-system
      big
      secret
      ;
    profile-hydra = profile "hydra" [ nix openssh tcc xz busybox ];
    profile-builder = profile "builder" [ nix openssh tcc xz busybox ];
    profile-cache = profile "cache" [ nix openssh xz busybox ];
    profile-plain = profile "plain" [ nix busybox ];
  };
in
run "testbed"
  {
    text = builtins.toJSON {
      kernel = "${linux}/vmlinuz";
      modules = "${linux}/lib/modules/${lib.kernel}";
      inherit paths;
    };
    passAsFile = [ "text" ];
  }
  ''
    mkdir $out
    # On a line of its own, so that more can be put before it.
    sed 's/^{/{\n/' $textPath >$out/testbed.json
  ''
