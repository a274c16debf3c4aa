//! What operators have in hand, against the real daemons without a machine: the command `farbus`, and that
//! alert rules, dashboard and runbooks speak of metrics and pages that there are.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod command;
mod monitoring;
mod site;
