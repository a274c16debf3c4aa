//! Ctrl-C: what was started is ended, what was made is removed, and then the program ends.
//!
//! The first SIGINT or SIGTERM only raises a flag. Whatever measures looks at it and returns an error, so
//! that everything is dropped on the way out. The second one ends the program where it is; its children die
//! with it, for they asked the kernel for that.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::bail;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Lets SIGINT and SIGTERM raise the flag.
pub(crate) fn watch() -> io::Result<()> {
    let raised = Arc::clone(REQUESTED.get_or_init(Arc::default));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the second signal finds the flag raised by the first.
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&raised))?;
        flag::register(signal, Arc::clone(&raised))?;
    }
    Ok(())
}

/// Whether the end was asked for.
pub(crate) fn requested() -> bool {
    REQUESTED
        .get()
        .is_some_and(|raised| raised.load(Ordering::Relaxed))
}

/// An error once the end was asked for.
pub(crate) fn check() -> anyhow::Result<()> {
    if requested() {
        bail!("a signal asked for the end");
    }
    Ok(())
}
