# The whole workflow. CI calls these targets; nothing happens outside them.

CARGO ?= cargo
.DEFAULT_GOAL := help
.PHONY: help setup demo test services services-down cluster compose-check bench rules lint deny fmt clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: ## Install what is missing: servers, compilers, headers (apt); check the Rust toolchain
	@scripts/setup.sh

demo: setup ## 10,000 units, 100,000 buyers, latencies and the audit, on this machine
	@scripts/demo.sh

test: setup ## Run every test, beside the services: those that run, or a set for this run
	@exec env CARGO="$(CARGO)" scripts/test.sh

services: setup ## Start Kafka, MariaDB, Redis (for two centers) and etcd on free ports, print where they are
	@$(CARGO) run --quiet --locked --bin seckill-parts -- up

services-down: ## End exactly the servers that make services started; their data stays
	@$(CARGO) run --quiet --locked --bin seckill-parts -- down

cluster: setup ## The production shape on one machine: services, and seckill serve for each center of deploy/
	@exec env CARGO="$(CARGO)" scripts/cluster.sh

compose-check: ## Check docker-compose.yml, where docker compose is installed
	@if docker compose version >/dev/null 2>&1; then docker compose --file docker-compose.yml config --quiet && \
		echo "docker-compose.yml is sound"; else echo "docker compose is not installed: not checked"; fi

bench: setup ## Measure the budgets of docs/: a table, and target/bench.json
	$(CARGO) run --release --locked -p seckill-bench -- --output target/bench.json

rules: setup ## Take each rule of docs/two-centers.md out that has a patch: its tests must fail
	@exec env CARGO="$(CARGO)" scripts/without-rule.sh --all

lint: setup ## rustfmt, clippy (warnings are errors), shell scripts, and licences where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@scripts/without-rule.sh --check
	@if command -v shellcheck >/dev/null; then shellcheck --severity=warning scripts/*.sh .ci/run; \
		else echo "shellcheck is not installed: shell scripts not checked"; fi
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --locked check bans licenses sources; \
		else echo "cargo-deny is not installed: run make deny once"; fi

deny: setup ## Install cargo-deny if need be (some minutes), check licences, sources, bans and advisories
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --locked check bans licenses sources
	@$(CARGO) deny --locked check advisories || { \
		[ -n "$$REQUIRE_ADVISORIES" ] && exit 1; \
		echo "advisories: see above; ignored unless REQUIRE_ADVISORIES is set (the database may be out of reach)"; }

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Remove what was built
	$(CARGO) clean
