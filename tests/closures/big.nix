# A closure of several thousand files, for tests that read every one of them through a view.
{ run, deb }:

let
  files =
    name: package:
    run {
      inherit name;
      script = ./build/files.sh;
      deb = deb package;
    };
in
run {
  name = "big";
  script = ./build/big.sh;
  perl = files "perl-modules" "perl-modules-5.40";
  zoneinfo = files "zoneinfo" "tzdata";
  odd = run {
    name = "odd";
    script = ./build/odd.sh;
  };
}
