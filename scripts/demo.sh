#!/usr/bin/env bash
# The demo: 10,000 units, 100,000 buyers, one machine. The data lies in a temporary folder and is gone after; the
# report (HTML and JSON) stays in target/demo.
# RATE and BUYERS change the load: RATE=2000 BUYERS=20000 make demo
set -euo pipefail
cd "$(dirname "$0")/.."

units=${UNITS:-10000}
buyers=${BUYERS:-100000}
rate=${RATE:-5000}
seconds=$(((buyers + rate - 1) / rate))

echo "building (the first time takes some minutes)"
cargo build --release --locked --quiet -p seckill -p seckill-loadtest
target=${CARGO_TARGET_DIR:-target}/release

port=${BASE_PORT:-18080}
data=$(mktemp -d)
service=
finish() {
    if [ -n "$service" ]; then
        kill "$service" 2>/dev/null || true
        wait "$service" 2>/dev/null || true
    fi
    rm -rf "$data"
}
trap finish EXIT
trap 'exit 130' INT TERM

"$target/seckill" up --data-dir "$data" --base-port "$port" >"$data/out" 2>"$data/err" &
service=$!
for _ in $(seq 300); do
    grep -qx ready "$data/out" && break
    if ! kill -0 "$service" 2>/dev/null; then
        break
    fi
    sleep 0.1
done
if ! grep -qx ready "$data/out"; then
    echo "the service did not become ready:" >&2
    cat "$data/err" >&2
    exit 1
fi
export SECKILL_ADMIN_URL="http://127.0.0.1:$((port + 1))"
export SECKILL_ADMIN_TOKEN_FILE="$data/admin-token"

echo "putting $units units on sale"
"$target/seckill" sale create demo --quantity "$units" --price 199900 --currency CNY --title "Demo phone"

echo "sending $buyers buyers, $rate a second; some click twice"
report=${CARGO_TARGET_DIR:-target}/demo
mkdir -p "$report"
code=0
"$target/seckill-loadtest" run --target "http://127.0.0.1:$port" --admin "$SECKILL_ADMIN_URL" \
    --token-secret-file "$data/dev-token-secret" --token-file "$SECKILL_ADMIN_TOKEN_FILE" \
    --sale demo --rate "$rate" --duration "$seconds" --buyers "$buyers" --duplicates 0.05 \
    --html "$report/report.html" --json "$report/report.json" || code=$?

echo "the books:"
"$target/seckill" audit
if [ -f "$report/report.html" ]; then
    echo "the report: file://$(realpath "$report/report.html")"
fi
exit "$code"
