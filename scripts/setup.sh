#!/usr/bin/env bash
# Installs what is missing on Debian and Ubuntu, and nothing that is there. Works as root and with sudo.
set -euo pipefail

missing=()
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}
need redis-server redis-server
need mariadbd mariadb-server
need etcd etcd-server
need haproxy haproxy
need java default-jre-headless
need mvn maven
need protoc protobuf-compiler
need shellcheck shellcheck
need cc build-essential
need pkg-config pkg-config
need curl curl
need git git

# Headers: a command would not show them.
needs_file() { # FILE PACKAGE
    [ -e "$1" ] || missing+=("$2")
}
needs_file /usr/include/google/protobuf/empty.proto libprotobuf-dev
needs_file /usr/include/openssl/ssl.h libssl-dev
needs_file /usr/include/zlib.h zlib1g-dev

if [ "${#missing[@]}" -gt 0 ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: please install: ${missing[*]} (no apt-get here)" >&2
        exit 1
    fi
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null 2>&1; then
            echo "setup: please install as root: apt-get install ${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    echo "setup: installing ${missing[*]}"
    # A package may want to start its service; ours are started by whoever needs them.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod +x "$policy"
        # shellcheck disable=SC2064 # the values of now are meant
        trap "${as_root[*]} rm -f '$policy'" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
    echo "setup: cargo is in $HOME/.cargo/bin, which is not in PATH: run . \"$HOME/.cargo/env\"" >&2
    exit 1
fi
if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: no Rust toolchain: install rustup from https://rustup.rs and run this again" >&2
    exit 1
fi
# rust-toolchain.toml names the release; rustup fetches it on the first call.
cargo --version >/dev/null
