# SPDX-License-Identifier: GPL-2.0-or-later
# The two commands: `make run` and `make check`. `make help` lists the rest.

CARGO ?= cargo

.PHONY: help run check

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

run: ## Start a server in the foreground and say how to attach a QEMU
	@scripts/rust && scripts/need cc:gcc
	@$(CARGO) build --release --quiet --bin ivshmem-server
	@exec target/release/ivshmem-server -F --hint $(ARGS)

check: ## Install what the tests need, and run them all
	@scripts/check
