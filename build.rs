// SPDX-License-Identifier: GPL-2.0-or-later
//! Gives the shared library its soname, and names the `cfg`s that only cbindgen reads.

/// The number of the C ABI. It changes when a program that was built before would break.
const ABI: u32 = 1;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libivshmem_server.so.{ABI}");
    for name in ["event_notifier_is_qemus", "tail_queue_is_qemus", "protocol_version_is_qemus"] {
        println!("cargo:rustc-check-cfg=cfg({name})");
    }
}
