//! Measures Farbus, the physical limits and what people use instead, side by side in one run.
//!
//! Absolute times differ from machine to machine and from minute to minute; ratios between rows of one
//! run say something. So every subject is measured in turns with the others, several times, with CPUs that
//! may halt and with CPUs that may not, and the budgets that Farbus keeps are ratios.
//!
//! - [`options`] is the command line, [`session`] runs the subjects in turns, [`results`] keeps figures.
//! - [`limits`], [`peers`], [`farbus`] and [`rdma`] hold the subjects; [`workload`] is what most of them are given.
//! - [`awake`], [`usage`], [`blk_client`] and [`helpers`] are what subjects measure with.
//! - [`ratios`] compares, [`budgets`] judges, [`model`] explains, [`table`], [`plots`] and [`document`] show.

#![deny(unsafe_code)]

mod awake;
mod blk_client;
mod budgets;
mod document;
mod farbus;
mod helpers;
mod host;
mod interrupt;
mod limits;
mod model;
mod options;
mod peers;
mod plots;
mod ratios;
mod rdma;
mod results;
mod run;
mod session;
mod sides;
mod stolen;
mod table;
mod usage;
mod workload;

use std::process::ExitCode;

use clap::Parser;

use self::options::Options;

fn main() -> ExitCode {
    match run::run(&Options::parse()) {
        Ok(code) => code,
        Err(error) if interrupt::requested() => {
            eprintln!("farbus-bench: interrupted ({error})");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("farbus-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
