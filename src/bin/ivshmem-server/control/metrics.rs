// SPDX-License-Identifier: GPL-2.0-or-later
//! The counters as OpenMetrics text, which Prometheus and others read.
//!
//! There is no sample for each peer: 65,536 of them would be too many for a monitoring system.
//! `Status` has them.

#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

use ivshmem::Server;

use super::memory;
use super::status::{Facts, descriptor_limit, open_descriptors, unix};

struct Text {
    text: String,
    /// The labels that each sample has.
    labels: String,
}

impl Text {
    /// Begins a metric family.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
        // OpenMetrics wants the unit, where the name has one.
        for unit in ["bytes", "seconds"] {
            if name.ends_with(&format!("_{unit}")) {
                let _ = writeln!(self.text, "# UNIT {name} {unit}");
            }
        }
        let _ = writeln!(self.text, "# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, more: &[(&str, &str)], value: impl Display) {
        let more: String =
            more.iter().map(|(label, value)| format!(",{label}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.text, "{name}{{{}{more}}} {value}", self.labels);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "counter", help);
        self.sample(&format!("{name}_total"), &[], value);
    }
}

/// A label's value.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The whole text.
pub(super) fn text(server: &Server, facts: &Facts) -> String {
    let stats = server.stats();
    let (kind, name) = memory::describe(server.memory());
    let labels = format!("socket=\"{}\"", escaped(&facts.socket));
    let mut out = Text { text: String::new(), labels };

    out.family("ivshmem_server", "info", "The server.");
    let version = env!("CARGO_PKG_VERSION");
    let about = [("version", version), ("memory_kind", kind), ("memory_name", &*name)];
    out.sample("ivshmem_server_info", &about, 1);
    out.gauge(
        "ivshmem_start_time_seconds",
        "When the server's process started, since 1970.",
        unix(facts.started),
    );
    out.counter(
        "ivshmem_restarts",
        "How often a server was followed by the next one while its clients stayed.",
        stats.restarts,
    );
    out.gauge("ivshmem_memory_bytes", "Size of the shared memory.", server.memory_size());
    out.gauge("ivshmem_vectors", "Interrupt vectors of each client.", server.vectors());
    out.gauge("ivshmem_peers", "Clients that are connected.", stats.peers);
    out.counter("ivshmem_joins", "Clients that were admitted.", stats.joined);
    out.counter("ivshmem_leaves", "Clients that were removed.", stats.left);
    out.family("ivshmem_refusals", "counter", "Clients that were refused, by reason.");
    for (reason, count) in stats.refusals() {
        out.sample("ivshmem_refusals_total", &[("reason", reason)], count);
    }
    out.counter("ivshmem_messages", "Messages that were sent to clients.", stats.messages);
    let (sum, most) = server
        .peers()
        .map(|peer| peer.behind())
        .fold((0_u64, 0), |(sum, most), behind| (sum + behind, behind.max(most)));
    out.gauge(
        "ivshmem_pending_messages",
        "Messages that the server has still to send, for all clients.",
        sum,
    );
    out.gauge(
        "ivshmem_pending_messages_max",
        "Messages that the server has still to send to the client that is furthest behind.",
        most,
    );
    out.gauge(
        "ivshmem_lingering_connections",
        "Connections that have ended, but whose client has not read everything.",
        stats.lingering,
    );
    out.family(
        "ivshmem_ids",
        "gauge",
        "Ids by state; remembered ids were told to a client that is still connected.",
    );
    let ids =
        [("free", stats.ids_free), ("used", stats.ids_used), ("remembered", stats.ids_remembered)];
    for (state, count) in ids {
        out.sample("ivshmem_ids", &[("state", state)], count);
    }
    out.gauge("ivshmem_open_descriptors", "Open descriptors of the server.", open_descriptors());
    out.gauge("ivshmem_max_descriptors", "Limit of open descriptors.", descriptor_limit());
    out.text + "# EOF\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_characters_of_labels_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
