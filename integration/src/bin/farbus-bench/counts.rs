//! System calls per I/O.
