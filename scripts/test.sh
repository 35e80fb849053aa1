#!/usr/bin/env bash
# Runs every test beside the services of `make services`: those that run already, or a set that is started for this run
# and ended after it, however it ends. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
"$cargo" test --workspace --locked --no-run "$@"
parts=${CARGO_TARGET_DIR:-target}/debug/seckill-parts

if ! "$parts" status >/dev/null 2>&1; then
    # The exit code stays that of the tests; the closing lines of the output, too.
    trap '"$parts" down --purge >/dev/null' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    "$parts" up
fi
"$cargo" test --workspace --locked "$@"
