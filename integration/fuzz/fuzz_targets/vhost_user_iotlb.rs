#![no_main]
#![allow(missing_docs, reason = "libFuzzer's macro has none")]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_compute_agent::vhost_user::fuzz_iotlb(bytes));
