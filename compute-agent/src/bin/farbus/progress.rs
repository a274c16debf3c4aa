//! Shows on a terminal that something takes its time.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A line on standard error that counts seconds; nothing where that is no terminal. It is gone when
/// this is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Shows what is waited for.
    pub(crate) fn new(what: String) -> Self {
        let bar = ProgressBar::new_spinner().with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
