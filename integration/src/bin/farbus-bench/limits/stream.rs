//! Throughput of one TCP connection.

use std::io::Read;
use std::time::Instant;

use anyhow::{Result, bail};

use super::How;
use super::wire::{Place, write_all};
use crate::helpers::{Pinned, Role};
use crate::interrupt;
use crate::results::{Figures, figure};
use crate::session::Plan;

/// Sends messages of `size` bytes to a process that reads them.
pub(crate) fn send(place: &Place<'_>, size: usize, plan: &Plan) -> Result<Figures> {
    let (_process, mut stream) = place.connect(Role::Sink, (size, size), How::Blocking)?;
    let _pinned = Pinned::to(Pinned::NEAR)?;
    let message = vec![0; size];
    rate(plan, || {
        write_all(&mut stream, &message)?;
        Ok(size)
    })
}

/// Reads messages of `size` bytes that a process writes.
pub(crate) fn receive(place: &Place<'_>, size: usize, plan: &Plan) -> Result<Figures> {
    let (_process, mut stream) = place.connect(Role::Source, (size, size), How::Blocking)?;
    let _pinned = Pinned::to(Pinned::NEAR)?;
    let mut message = vec![0; size];
    rate(plan, || match stream.read(&mut message)? {
        0 => bail!("the sender has ended"),
        got => Ok(got),
    })
}

/// Bytes per second of `step`, which says how many it moved.
pub(crate) fn rate(plan: &Plan, mut step: impl FnMut() -> Result<usize>) -> Result<Figures> {
    let warm = Instant::now() + plan.warmup;
    while Instant::now() < warm {
        step()?;
    }
    interrupt::check()?;
    let begun = Instant::now();
    let mut bytes = 0;
    while begun.elapsed() < plan.time {
        bytes += step()?;
    }
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    Ok(Figures::from([(figure::MB_PER_S.into(), rate / 1e6)]))
}
