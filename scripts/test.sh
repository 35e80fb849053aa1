#!/usr/bin/env bash
# Runs every test beside the services of `make services`: those that run already, or a set that is started for this run
# and ended after it, however it ends. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
"$cargo" test --workspace --locked --no-run "$@"
parts=${CARGO_TARGET_DIR:-target}/debug/seckill-parts

if ! "$parts" status >/dev/null 2>&1; then
    # In memory where there is room: a test cannot cut the power, so it sees nothing of a sync but its wait, and
    # MariaDB syncs each of the thousand tables of a new database.
    folder=${CARGO_TARGET_DIR:-target}/services-of-tests
    if [ -w /dev/shm ] && [ "$(df --output=avail -k /dev/shm | tail -n 1)" -gt $((4 * 1024 * 1024)) ]; then
        folder=/dev/shm/seckill-services-$$
    fi
    # The exit code stays that of the tests; the closing lines of the output, too.
    trap '"$parts" --dir "$folder" down --purge >/dev/null; rm -rf "$folder"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    "$parts" --dir "$folder" up
    # shellcheck disable=SC1091 # written by the line above
    . "$folder/env"
fi
"$cargo" test --workspace --locked --no-fail-fast "$@"
