#!/usr/bin/env bash
# Takes the rules of two centers out of the code, one after the other, and runs the tests that are about them.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
scripts/without-rule.sh RULE…     take these rules out, one after the other (S4 means every patch S4 and S4-…)
scripts/without-rule.sh --all     every patch: some 20 s for one of the scripts on two busy cores, longer for one of the service
scripts/without-rule.sh --check   only look whether each patch still applies and each test it names is there
scripts/without-rule.sh --list    the patches, and what each takes out

For each patch in service/without/ a copy of the tree (with what is not committed) gets it, the tests that it names run,
and each of them has to fail with the words that the patch expects. The copy is a git worktree in
target/without-rules; what is built there stays for the next time, the tree that you work in is never touched, and
CARGO_TARGET_DIR and CARGO are used as by cargo and make. `make clean` takes everything away again.

  fails without F1: yes                        what it should say
  F1: the test PASSES without the rule: NAME   the test does not look at the rule
  F1: …                                        the patch does not apply, the code does not compile, the test is not
                                               there, or it fails for another reason: see the log that is named

Exit code 0: every test failed as it should. 1: one did not. 2: wrong use.

A patch is what `git diff` prints, with a head that `git apply` skips. Each line of it that begins like these counts, the
others are for people:

  must fail: ledger NAME        a test of the scripts (lua/tests/it)
  must fail: lib NAME           a test beside the code (cargo test --workspace --lib)
  must fail: it NAME            a test of the whole service (service/tests/it)
  because: TEXT                 a part of what the failing tests print; each such line has to be there
END
}

cargo=${CARGO:-cargo}
patches=service/without
# A test has deadlines of its own; one that hangs without its rule all the same ends here and counts as not seen.
test_seconds=300

names() { sed -n "/^diff --git/q; s/^$2: //p" "$1"; }

# The rules that the arguments mean, as patches.
select_patches() {
    local rule found patch
    for rule in "$@"; do
        found=
        for patch in "$patches/$rule.patch" "$patches/$rule"-*.patch; do
            if [ -e "$patch" ]; then
                echo "$patch"
                found=yes
            fi
        done
        if [ -z "$found" ]; then
            echo "there is no patch for $rule in $patches" >&2
            return 2
        fi
    done
}

check() {
    local patch rule kind name bad=0
    for patch in "$patches"/*.patch; do
        rule=$(basename "$patch" .patch)
        if ! git apply --check "$patch"; then
            echo "$rule: the patch does not apply any more: take the rule out by hand and write it anew" >&2
            bad=1
        fi
        if [ -z "$(names "$patch" 'must fail')" ] || [ -z "$(names "$patch" because)" ]; then
            echo "$rule: the head of the patch does not say which tests must fail, and with what words" >&2
            bad=1
        fi
        while read -r kind name; do
            case $kind in
            lib) set -- service lua/src loadtest ;;
            ledger) set -- lua/tests ;;
            it) set -- service/tests/it ;;
            *) echo "$rule: tests of the kind $kind are not known" >&2; bad=1; continue ;;
            esac
            if ! grep -rqE --include='*.rs' "fn ${name##*::}\(" "$@"; then
                echo "$rule: there is no test $name" >&2
                bad=1
            fi
        done < <(names "$patch" 'must fail')
        if ! grep -q "^| ${rule%%-*} |" docs/two-centers.md; then
            echo "$rule: docs/two-centers.md does not list the rule" >&2
            bad=1
        fi
    done
    return "$bad"
}

case ${1:-} in
'') usage >&2; exit 2 ;;
-h | --help) usage; exit 0 ;;
--check) check; exit ;;
--list)
    for patch in "$patches"/*.patch; do
        echo "$(basename "$patch" .patch): $(sed -n '1s/^[^:]*: //p' "$patch")"
    done
    exit 0
    ;;
--all) chosen=$(ls "$patches"/*.patch) ;;
-*) usage >&2; exit 2 ;;
*) chosen=$(select_patches "$@") || exit 2 ;;
esac

target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/without-rules"
target=$(cd "$target" && pwd)
copy=$target/without-rules/tree
log=$target/without-rules/log
here=$PWD
export CARGO_TARGET_DIR=$target CARGO_TERM_COLOR=never
mkdir -p "$log"

# One at a time: there is one copy.
exec 9>"$target/without-rules/lock"
flock 9

# The tree as it is now, also what is not committed, as an object of git's; the index that is in use is left alone.
index=$(mktemp "$target/without-rules/index.XXXXXX")
trap 'rm -f "$index"' EXIT
cp "$(git rev-parse --git-path index)" "$index"
GIT_INDEX_FILE=$index git add --all .
state=$(GIT_INDEX_FILE=$index git write-tree)
rm -f "$index"

if ! git -C "$copy" rev-parse --git-dir >/dev/null 2>&1 || [ ! -e "$copy/.git" ]; then
    rm -rf "$copy"
    git worktree prune
    git worktree add --quiet --force --detach --no-checkout "$copy" HEAD
fi
# Only files that differ are written, so cargo builds anew what a patch has changed, and nothing else.
restore() {
    git -C "$copy" read-tree --reset -u "$state"
    git -C "$copy" clean --quiet --force -dx
}
restore
trap 'rm -f "$index"; cd "$here"; restore' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs the tests of one kind; what they print goes to the file.
run_tests() {
    local output=$1 kind=$2
    shift 2
    local scope
    case $kind in
    lib) scope=(--workspace --lib) ;;
    ledger) scope=(-p seckill-ledger --test it) ;;
    it) scope=(-p seckill --test it) ;;
    *) echo "tests of the kind $kind are not known" >>"$output"; return 2 ;;
    esac
    if ! (cd "$copy" && "$cargo" test --locked "${scope[@]}" --no-run) >>"$output" 2>&1; then
        return 2
    fi
    # Its own failure is what is wanted; the caller reads what was printed.
    (cd "$copy" && timeout --kill-after=10 "$test_seconds" "$cargo" test --locked --no-fail-fast "${scope[@]}" \
        -- "$@") >>"$output" 2>&1 9>&- || true
}

# Whether every test fails without this rule.
without() {
    local patch=$1 rule output kind name text bad=0
    rule=$(basename "$patch" .patch)
    output=$log/$rule.log
    : >"$output"
    restore
    if ! git -C "$copy" apply "$here/$patch" >>"$output" 2>&1; then
        echo "$rule: the patch does not apply"
        return 1
    fi
    for kind in $(names "$patch" 'must fail' | cut -d' ' -f1 | sort -u); do
        local tests=()
        while read -r name; do
            tests+=("$name")
        done < <(names "$patch" 'must fail' | sed -n "s/^$kind //p")
        if ! run_tests "$output" "$kind" "${tests[@]}"; then
            echo "$rule: it does not compile without the rule, see $output"
            return 1
        fi
        for name in "${tests[@]}"; do
            if grep -qE "^test .*$name.* FAILED$" "$output"; then
                continue
            elif grep -qE "^test .*$name.* ok$" "$output"; then
                echo "$rule: the test PASSES without the rule: $name"
            else
                echo "$rule: the test $name was not seen to end, see $output"
            fi
            bad=1
        done
    done
    while read -r text; do
        if [ "$bad" = 0 ] && ! grep -qF -- "$text" "$output"; then
            echo "$rule: the test fails, but not because of: $text (see $output)"
            bad=1
        fi
    done < <(names "$patch" because)
    if [ "$bad" = 0 ]; then
        echo "fails without $rule: yes"
    fi
    return "$bad"
}

seen=0 failed=0
for patch in $chosen; do
    without "$patch" || failed=$((failed + 1))
    seen=$((seen + 1))
done
echo "$seen rules and parts of rules taken out, $((seen - failed)) of them missed by their tests, in $((SECONDS / 60)) min $((SECONDS % 60)) s"
[ "$failed" = 0 ]
