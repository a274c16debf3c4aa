#![no_main]
#![allow(missing_docs, unsafe_code, reason = "all of it is libFuzzer's macro")]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_fuzz::device::run(bytes));
