#!/usr/bin/env bash
# The production shape on one machine: the services of `make services`, and `seckill serve` with the example
# configuration of each center in deploy/. Ends everything it started on Ctrl-C and SIGTERM; data stays in
# target/services and target/cluster.
#
#   BASE_PORT=8080   center number n listens on BASE_PORT+10(n-1), +1 admin, +2 internal
#   PROFILE=release  or dev
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
base=${BASE_PORT:-8080}
target=${CARGO_TARGET_DIR:-target}
data=$target/cluster
# The centers that there are configurations for, and how long each may take to serve.
centers=(a b)
ready_wait_s=60

echo "building (the first time takes some minutes)" >&2
"${CARGO:-cargo}" build --quiet --locked --profile "$profile" --bin seckill --bin seckill-parts
bin=$target/$([ "$profile" = dev ] && echo debug || echo "$profile")
seckill=$bin/seckill
parts=$bin/seckill-parts

pids=()
started_services=
# shellcheck disable=SC2317 # called by the trap
finish() {
    trap '' INT TERM
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do
        wait "$pid" 2>/dev/null || true
    done
    if [ -n "$started_services" ]; then
        "$parts" down >&2
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! "$parts" status >/dev/null 2>&1; then
    started_services=yes
    "$parts" up >&2
fi
# shellcheck disable=SC1091 # written by the line above
. "$target/services/env"

# Secrets and tokens as `seckill up` makes them, readable by their owner alone.
umask 077
mkdir -p "$data"
for ring in dev-token admin payments; do
    file=$data/$ring-secret
    [ -s "$file" ] || od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$file"
done
for role in admin payments; do
    "$seckill" token issue --role "$role" --ttl 3650d --data-dir "$data" >"$data/$role-token.half"
    mv "$data/$role-token.half" "$data/$role-token"
done

# One database in both centers: what is made in a's server is replicated to b's, and back. Its account may do nothing else,
# except to see how replication goes.
[ -s "$data/mariadb-password" ] || od -An -tx1 -N16 /dev/urandom | tr -d ' \n' >"$data/mariadb-password"
mariadb_at() { # URL
    local server=${1#mysql://root@}
    mariadb --no-defaults --protocol=tcp --host="${server%:*}" --port="${server#*:}" --user=root
}
mariadb_at "$SECKILL_TEST_MARIADB" <<SQL
CREATE DATABASE IF NOT EXISTS seckill;
CREATE USER IF NOT EXISTS 'seckill'@'127.0.0.1';
ALTER USER 'seckill'@'127.0.0.1' IDENTIFIED BY '$(cat "$data/mariadb-password")';
GRANT ALL ON seckill.* TO 'seckill'@'127.0.0.1';
GRANT BINLOG MONITOR, REPLICA MONITOR ON *.* TO 'seckill'@'127.0.0.1';
SQL
until mariadb_at "$SECKILL_TEST_MARIADB_B" <<<"SHOW GRANTS FOR 'seckill'@'127.0.0.1'" 2>/dev/null | grep -q MONITOR; do
    sleep 0.2
done
declare -A database
database[a]="mysql://seckill@${SECKILL_TEST_MARIADB#mysql://root@}/seckill"
database[b]="mysql://seckill@${SECKILL_TEST_MARIADB_B#mysql://root@}/seckill"

for center in "${centers[@]}"; do
    [ -s "$data/cross-$center" ] || od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$data/cross-$center"
done
keys() { # CENTER OTHER: this center signs with the first
    for center in "$@"; do
        echo "{ id = \"$center-dev\", center = \"$center\", secret_file = \"$data/cross-$center\" },"
    done
}
center_at() { # CENTER NUMBER REDIS
    local port=$((base + 10 * ($2 - 1)))
    echo "{ id = \"$1\", number = $2, public_url = \"http://127.0.0.1:$port\","
    echo "  admin_url = \"http://127.0.0.1:$((port + 1))\", internal_url = \"http://127.0.0.1:$((port + 2))\","
    echo "  ledger = [\"${3#redis://}\"] },"
}
cluster="[$(center_at a 1 "$SECKILL_TEST_REDIS_A") $(center_at b 2 "$SECKILL_TEST_REDIS_B")]"

serve() { # CENTER NUMBER
    local center=$1 port=$((base + 10 * ($2 - 1))) redis="SECKILL_TEST_REDIS_${1^^}"
    local kafka=KAFKA_BOOTSTRAP other=b other_kafka=KAFKA_BOOTSTRAP_B
    [ "$center" = a ] || { kafka=KAFKA_BOOTSTRAP_B other=a other_kafka=KAFKA_BOOTSTRAP; }
    mkdir -p "$data/$center"
    env \
        SECKILL__LISTEN__PUBLIC="127.0.0.1:$port" \
        SECKILL__LISTEN__ADMIN="127.0.0.1:$((port + 1))" \
        SECKILL__LISTEN__INTERNAL="127.0.0.1:$((port + 2))" \
        SECKILL__LISTEN__PUBLIC_URL="http://127.0.0.1:$port" \
        SECKILL__LISTEN__ADMIN_URL="http://127.0.0.1:$((port + 1))" \
        SECKILL__LISTEN__INTERNAL_URL="http://127.0.0.1:$((port + 2))" \
        SECKILL__LEDGER__PARTITIONS="${!redis}" \
        SECKILL__LEDGER__MAX_MEMORY_BYTES=1073741824 \
        SECKILL__ORDERS__DATABASE_URL="${database[$center]}" \
        SECKILL__ORDERS__DATABASE_PASSWORD_FILE="$data/mariadb-password" \
        SECKILL__KAFKA__BOOTSTRAP="${!kafka}" \
        "SECKILL__KAFKA__CENTERS__${other^^}__BOOTSTRAP=${!other_kafka}" \
        SECKILL__CROSS_CENTER__KEYS="[$(keys "$center" "$other")]" \
        SECKILL__CLUSTER__CENTERS="$cluster" \
        SECKILL__KAFKA__REPLICATION_FACTOR=1 \
        SECKILL__TOPOLOGY__ETCD__ENDPOINTS="$SECKILL_TEST_ETCD" \
        SECKILL__AUTH__USERS__KEYS="[{ alg = \"HS256\", secret_file = \"$data/dev-token-secret\" }]" \
        SECKILL__AUTH__PAYMENTS__KEYS="[{ alg = \"HS256\", secret_file = \"$data/payments-secret\" }]" \
        SECKILL__AUTH__ADMIN__KEYS="[{ alg = \"HS256\", secret_file = \"$data/admin-secret\" }]" \
        SECKILL__TELEMETRY__FORMAT=text \
        "$seckill" serve --config "deploy/seckill-$center.toml" >>"$data/$center/seckill.log" 2>&1 &
    pids+=($!)
    echo "center $center"
    echo "  public   http://127.0.0.1:$port"
    echo "  admin    http://127.0.0.1:$((port + 1))"
    echo "  redis    ${!redis}"
    echo "  kafka    ${!kafka}"
    echo "  orders   ${database[$center]}"
    echo "  log      $data/$center/seckill.log"
}

# `readyz` says yes once the service serves.
await() { # CENTER NUMBER
    local admin=http://127.0.0.1:$((base + 10 * ($2 - 1) + 1))
    for _ in $(seq $((ready_wait_s * 10))); do
        curl --silent --fail --max-time 2 --output /dev/null "$admin/readyz" && return
        kill -0 "${pids[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    echo "center $1 did not become ready:" >&2
    tail -n 20 "$data/$1/seckill.log" >&2
    exit 1
}

number=0
for center in "${centers[@]}"; do
    number=$((number + 1))
    serve "$center" "$number"
    await "$center" "$number"
    if [ "$number" = 1 ]; then
        # The first start begins the ledger; on one that is there already it is refused, with exit code 2.
        code=0
        "$seckill" ledger init --admin "http://127.0.0.1:$((base + 1))" --token-file "$data/admin-token" \
            >"$data/ledger-init.log" 2>&1 || code=$?
        if [ "$code" != 0 ] && [ "$code" != 2 ]; then
            cat "$data/ledger-init.log" >&2
            exit 1
        fi
    fi
done
echo "secret for user tokens  $data/dev-token-secret"
echo "admin token             $data/admin-token"
echo "payments token          $data/payments-token"
echo "for the commands        export SECKILL_ADMIN_URL=http://127.0.0.1:$((base + 1)) SECKILL_ADMIN_TOKEN_FILE=$data/admin-token"
echo "ready"

# One that ends by itself ends the cluster.
wait -n "${pids[@]}" || true
echo "a center's service ended; see its log" >&2
exit 1
