# SPDX-License-Identifier: GPL-2.0-or-later
# The two commands: `make run` and `make check`. `make help` lists the rest.

CARGO ?= cargo

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
PROGRAMS = ivshmem-server ivshmem-client ivshmem-bench
TARGET = $(or $(CARGO_TARGET_DIR),target)/release
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

.PHONY: all help run check check-full bench soak fuzz install uninstall header clean

all: ## Build the programs and both libraries
	$(CARGO) build --release --bins
	$(CARGO) build --release --lib --no-default-features
	ln -sf libivshmem_server.so $(TARGET)/libivshmem_server.so.1

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

run: ## Start a server in the foreground and say how to attach a QEMU: ARGS=
	@scripts/rust && scripts/need cc:gcc
	@$(CARGO) build --release --quiet --bin ivshmem-server
	@exec $(TARGET)/ivshmem-server -F --hint $(ARGS)

check: ## Install what the tests need, and run them all
	@scripts/check

check-full: ## The largest sizes, in a guest
	@scripts/check-full $(ARGS)

bench: ## Measure: OTHER=/path/to/another/ivshmem-server for a comparison
	@scripts/rust && scripts/need cc:gcc
	$(CARGO) bench --bench scale -- $(if $(OTHER),--other $(OTHER))
	$(CARGO) bench --bench hostile

soak: ## Churn, stalls and kills for some minutes: SOAK_SECONDS=180 SOAK_SEED=
	@scripts/rust && scripts/need cc:gcc
	SOAK_SECONDS=$(or $(SOAK_SECONDS),180) $(CARGO) test --release --test soak -- --nocapture

fuzz: ## Fuzz what is parsed, and the server: FUZZ_SECONDS=60 for each target
	@scripts/rust && scripts/need cc:gcc c++:g++
	@command -v cargo-fuzz >/dev/null || $(CARGO) install cargo-fuzz --locked
	set -e; for target in number command_line interleave client; do \
		mkdir -p fuzz/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target \
			-- -max_total_time=$(or $(FUZZ_SECONDS),60) -max_len=400 -timeout=60; \
	done

# `make` first, as whoever is allowed to install need not be able to build.
install: ## Install what `make` built: PREFIX=/usr/local DESTDIR=
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR)
	install -m 755 $(addprefix $(TARGET)/,$(PROGRAMS)) $(DESTDIR)$(BINDIR)
	install -m 644 $(TARGET)/libivshmem_server.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(TARGET)/libivshmem_server.so $(DESTDIR)$(LIBDIR)/libivshmem_server.so.1
	ln -sf libivshmem_server.so.1 $(DESTDIR)$(LIBDIR)/libivshmem_server.so
	install -m 644 include/ivshmem-server.h $(DESTDIR)$(INCLUDEDIR)
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCLUDEDIR@|$(INCLUDEDIR)|' \
		-e 's|@VERSION@|$(VERSION)|' ivshmem-server.pc.in \
		> $(DESTDIR)$(LIBDIR)/pkgconfig/ivshmem-server.pc
	@# The loader finds a library in a new place only after this; a package does it by itself.
	@# Only root can say so to the loader of the whole system.
	@if [ -n "$(DESTDIR)" ]; then :; elif [ "$$(id -u)" = 0 ]; then ldconfig; else \
		echo "not root, so programs find the library by LD_LIBRARY_PATH=$(LIBDIR) only"; \
	fi

uninstall: ## Remove what `make install` put there
	rm -f $(addprefix $(DESTDIR)$(BINDIR)/,$(PROGRAMS))
	rm -f $(addprefix $(DESTDIR)$(LIBDIR)/libivshmem_server,.a .so .so.1)
	rm -f $(DESTDIR)$(LIBDIR)/pkgconfig/ivshmem-server.pc $(DESTDIR)$(INCLUDEDIR)/ivshmem-server.h

header: ## Make include/ivshmem-server.h anew from src
	IVSHMEM_WRITE_HEADER=1 $(CARGO) test --quiet --test header committed

clean: ## Remove what was built
	$(CARGO) clean
