# SPDX-License-Identifier: GPL-2.0-or-later
# `make run` starts a server, `make check` runs all tests. `make help` lists the other targets.

CARGO ?= cargo

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
UNITS = ivshmem-server@.service ivshmem-server@.socket ivshmem-metrics.socket ivshmem-metrics@.service
PROGRAMS = ivshmem-server ivshmem-client ivshmem-ctl ivshmem-bench
MANDIR ?= $(DATADIR)/man
DOCDIR ?= $(DATADIR)/doc/ivshmem-server
BASHCOMPDIR ?= $(DATADIR)/bash-completion/completions
ZSHCOMPDIR ?= $(DATADIR)/zsh/site-functions
FISHCOMPDIR ?= $(DATADIR)/fish/vendor_completions.d
TARGET = $(or $(CARGO_TARGET_DIR),target)/release
PACKAGES = $(or $(CARGO_TARGET_DIR),target)/packages
# With their directories below DOCDIR.
DOCUMENTS = README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE $(wildcard docs/*.md examples/*.c examples/fleet/*)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

.PHONY: all help run deps check check-full deny advisories mutants msrv bench soak fuzz deb rpm dist install install-units install-papers uninstall header papers clean

all: ## Build the programs and both libraries
	$(CARGO) build --release --bins
	$(CARGO) build --release --lib --no-default-features
	ln -sf libivshmem_server.so $(TARGET)/libivshmem_server.so.1

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

run: ## Start a server in the foreground and print how to attach a QEMU, look and ring: ARGS=
	@scripts/rust && scripts/need cc:gcc
	@$(CARGO) build --release --quiet --bin ivshmem-server --bin ivshmem-client
	@exec $(TARGET)/ivshmem-server -F --hint $(ARGS)

deps: ## Install what the tests need (Debian packages)
	@scripts/deps

check: ## Install what the tests need, then run all checks and tests
	@[ -d tests ] || { echo "make check: the tests are in the repository, not in this package" >&2; exit 1; }
	@scripts/check

check-full: ## Run the tests of the largest sizes, in a virtual machine
	@scripts/check-full $(ARGS)

deny: ## Check the licences, versions and sources of all dependencies
	@scripts/cargo-tool cargo-deny
	$(CARGO) deny --locked --all-features check bans licenses sources

advisories: ## Check all dependencies for known vulnerabilities (downloads the database)
	@scripts/cargo-tool cargo-deny
	$(CARGO) deny --locked --all-features check advisories

mutants: ## Check that the tests notice changes of the code: AREAS="roster client send admission"
	@scripts/mutants $(AREAS)

msrv: ## Build both packages with the oldest Rust that is supported
	@scripts/msrv

bench: ## Run the benchmarks: OTHER=/path/to/another/ivshmem-server to compare with
	@scripts/rust && scripts/need cc:gcc
	$(CARGO) bench --bench scale -- $(if $(OTHER),--other $(OTHER))
	$(CARGO) bench --bench hostile
	$(CARGO) bench --bench restart

soak: ## Connect, stall and kill random clients for some minutes: SOAK_SECONDS=180 SOAK_SEED=
	@scripts/rust && scripts/need cc:gcc
	SOAK_SECONDS=$(or $(SOAK_SECONDS),180) $(CARGO) test --release --test soak -- --nocapture
	SOAK_SECONDS=$(or $(SOAK_SECONDS),180) $(CARGO) test --release --test restart clients -- --nocapture

fuzz: ## Fuzz the parsers, the server and the client: FUZZ_SECONDS=60 for each target
	@scripts/rust && scripts/need cc:gcc c++:g++
	@scripts/cargo-tool cargo-fuzz
	set -e; for target in number command_line interleave client; do \
		mkdir -p fuzz/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target \
			-- -max_total_time=$(or $(FUZZ_SECONDS),60) -max_len=400 -timeout=60; \
	done

# It builds nothing, because root may have no Rust. Run `make` first.
install: install-units install-papers ## Install what `make` built: PREFIX=/usr/local UNITDIR= SYSCONFDIR=/etc DOCDIR= MANDIR= DESTDIR=
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR)
	install -m 755 $(addprefix $(TARGET)/,$(PROGRAMS)) $(DESTDIR)$(BINDIR)
	install -m 644 $(TARGET)/libivshmem_server.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(TARGET)/libivshmem_server.so $(DESTDIR)$(LIBDIR)/libivshmem_server.so.1
	ln -sf libivshmem_server.so.1 $(DESTDIR)$(LIBDIR)/libivshmem_server.so
	install -m 644 include/ivshmem-server.h $(DESTDIR)$(INCLUDEDIR)
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCLUDEDIR@|$(INCLUDEDIR)|' \
		-e 's|@VERSION@|$(VERSION)|' ivshmem-server.pc.in \
		> $(DESTDIR)$(LIBDIR)/pkgconfig/ivshmem-server.pc
	@# A package does this by itself.
	@if [ -n "$(DESTDIR)" ] || [ "$$(id -u)" != 0 ]; then :; else \
		! command -v systemd-sysusers >/dev/null || systemd-sysusers $(SYSUSERSDIR)/ivshmem-server.conf; \
		[ ! -d /run/systemd/system ] || systemctl daemon-reload; \
	fi
	@# The loader finds a new library only after ldconfig, which needs root. A package runs it by itself.
	@if [ -n "$(DESTDIR)" ]; then :; elif [ "$$(id -u)" = 0 ]; then ldconfig; else \
		echo "not root: ldconfig was not run; programs need LD_LIBRARY_PATH=$(LIBDIR) to find the library"; \
	fi

# The units, and what they need but the program.
install-units:
	install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(DATADIR)/ivshmem-server \
		$(DESTDIR)$(SYSCONFDIR)/ivshmem-server
	for unit in $(UNITS); do \
		sed -e 's|/usr/bin/|$(BINDIR)/|g; s|/usr/share/|$(DATADIR)/|g; s|/etc/|$(SYSCONFDIR)/|g' \
			packaging/systemd/$$unit > $(DESTDIR)$(UNITDIR)/$$unit || exit; \
	done
	install -m 644 packaging/systemd/unit.conf $(DESTDIR)$(DATADIR)/ivshmem-server
	install -m 644 packaging/sysusers.d/ivshmem-server.conf $(DESTDIR)$(SYSUSERSDIR)

deb: ## Build the Debian packages, in target/packages: DEB_REVISION=1 DEBFULLNAME= DEBEMAIL=
	@scripts/release $(PACKAGES)/build
	@scripts/deb $(PACKAGES)/build/release $(PACKAGES) $(DEB_REVISION)

rpm: ## Build the rpm packages, in target/packages
	@scripts/release $(PACKAGES)/build
	@scripts/rpm $(PACKAGES)/build/release $(PACKAGES)

dist: ## Make the source tarball of the last commit, in target/packages
	@scripts/need git:git gzip:gzip
	@mkdir -p $(PACKAGES)
	@git archive --format=tar --prefix=ivshmem-server-$(VERSION)/ HEAD | gzip -9n > $(PACKAGES)/ivshmem-server-$(VERSION).tar.gz
	@echo $(PACKAGES)/ivshmem-server-$(VERSION).tar.gz

# Man pages, completions, documents with the licence and the examples. They need no build.
install-papers:
	install -d $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(BASHCOMPDIR) $(DESTDIR)$(ZSHCOMPDIR) $(DESTDIR)$(FISHCOMPDIR) \
		$(sort $(dir $(addprefix $(DESTDIR)$(DOCDIR)/,$(DOCUMENTS))))
	for program in $(PROGRAMS); do \
		install -m 644 packaging/man/$$program.1 $(DESTDIR)$(MANDIR)/man1 && \
		install -m 644 packaging/completions/$$program.bash $(DESTDIR)$(BASHCOMPDIR)/$$program && \
		install -m 644 packaging/completions/_$$program $(DESTDIR)$(ZSHCOMPDIR) && \
		install -m 644 packaging/completions/$$program.fish $(DESTDIR)$(FISHCOMPDIR) || exit; \
	done
	for document in $(DOCUMENTS); do \
		install -m 644 $$document $(DESTDIR)$(DOCDIR)/$$document || exit; \
	done

# Directories of other packages stay. Its own ones stay if they have files that are not ours.
uninstall: ## Remove what `make install` put there, with the same variables
	rm -f $(addprefix $(DESTDIR)$(BINDIR)/,$(PROGRAMS))
	rm -f $(addprefix $(DESTDIR)$(LIBDIR)/libivshmem_server,.a .so .so.1)
	rm -f $(DESTDIR)$(LIBDIR)/pkgconfig/ivshmem-server.pc $(DESTDIR)$(INCLUDEDIR)/ivshmem-server.h
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(UNITS)) $(DESTDIR)$(SYSUSERSDIR)/ivshmem-server.conf
	rm -f $(DESTDIR)$(DATADIR)/ivshmem-server/unit.conf
	rm -f $(patsubst %,$(DESTDIR)$(MANDIR)/man1/%.1,$(PROGRAMS)) $(addprefix $(DESTDIR)$(BASHCOMPDIR)/,$(PROGRAMS))
	rm -f $(addprefix $(DESTDIR)$(ZSHCOMPDIR)/_,$(PROGRAMS)) $(patsubst %,$(DESTDIR)$(FISHCOMPDIR)/%.fish,$(PROGRAMS))
	rm -f $(addprefix $(DESTDIR)$(DOCDIR)/,$(DOCUMENTS))
	for directory in $(DOCDIR)/docs $(DOCDIR)/examples/fleet $(DOCDIR)/examples $(DOCDIR) $(DATADIR)/ivshmem-server $(SYSCONFDIR)/ivshmem-server; do \
		! [ -d $(DESTDIR)$$directory ] || rmdir --ignore-fail-on-non-empty $(DESTDIR)$$directory || exit; \
	done

header: ## Generate include/ivshmem-server.h from src
	IVSHMEM_WRITE_HEADER=1 $(CARGO) test --quiet --test header committed

papers: ## Generate the man pages and the shell completions in packaging/
	$(CARGO) run --quiet --example papers -- packaging

clean: ## Remove what was built
	$(CARGO) clean
