#!/usr/bin/env bash
# Requests per second of one core: this generator and oha (cargo install oha) in turns, each pinned to core 1, against
# the same target, pinned to core 0. CPU per request beside it, because rates suffer from whatever else runs.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v oha >/dev/null || { echo "oha is not on the PATH" >&2; exit 1; }
rounds=${ROUNDS:-3} connections=${CONNECTIONS:-64} seconds=${SECONDS_EACH:-5}
[ -n "${NO_BUILD:-}" ] || cargo build --release --quiet -p seckill-loadtest --bins --examples
built=${CARGO_TARGET_DIR:-target}/release
work=$(mktemp -d)
taskset -c 0 "$built/examples/static_target" >"$work/url" &
target=$!
trap 'kill $target 2>/dev/null; rm -rf "$work"' EXIT
until [ -s "$work/url" ]; do sleep 0.05; done
url=$(cat "$work/url")
echo "a secret of the comparison, long enough" >"$work/secret"
TIMEFORMAT='%U %S'
token=$(printf 'x%.0s' $(seq 150))
for round in $(seq "$rounds"); do
    { time taskset -c 1 oha --no-tui --output-format json -c "$connections" -z "${seconds}s" -m POST \
        -H "authorization: Bearer $token" -H "idempotency-key: 4311682e-ae30-4b0a-82fa-b32f990d3399" \
        -H "content-type: application/json" -d '{"quantity":1}' "$url/v1/sales/s/purchases" >"$work/oha.json"; } 2>"$work/oha.time"
    { time taskset -c 1 "$built/seckill-loadtest" run -q -o json --no-books --target "$url" --token-secret-file "$work/secret" \
        --sale s --rate 500000 --duration "${seconds}s" --timeout-ms 1000 --buyers 10000 --connections "$connections" \
        --workers 1 --warm-connections >"$work/ours.json" || true; } 2>"$work/ours.time"
    python3 - "$work" "$round" "$seconds" <<'PY'
import json, sys
work, number, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
cpu = lambda name: sum(float(part) for part in open(f"{work}/{name}.time").read().split()[-2:])
oha, ours = json.load(open(f"{work}/oha.json")), json.load(open(f"{work}/ours.json"))
oha_requests = sum(oha["statusCodeDistribution"].values())
ours_requests = ours["offered"]["requests"]
a, b = oha_requests / seconds, ours["offered"]["rate_achieved"]
ca, cb = cpu("oha") * 1e6 / oha_requests, cpu("ours") * 1e6 / ours_requests
print(f"round {number}: oha {a:.0f}/s, {ca:.1f} µs; seckill-loadtest {b:.0f}/s, {cb:.1f} µs; {b / a:.2f} times the rate, {ca / cb:.2f} times less CPU")
PY
done
