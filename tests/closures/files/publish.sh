#!/bin/sh
# publish PATH...: signs the closure of PATHs with the key that only this guest has, into the binary cache that it serves.
set -eu
exec nix copy --no-check-sigs --to "file:///srv/cache?compression=xz&secret-key=/run/credentials/lair/signing-key" "$@"
