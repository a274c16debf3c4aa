//! One run: measure, show, judge.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use farbus_integration::cache::Cache;
use farbus_integration::tools::peers::Peers;

use crate::host::Host;
use crate::options::{Helper, Options, Part};
use crate::session::{Plan, Subject};
use crate::{
    blk_client, budgets, document, farbus, helpers, interrupt, limits, model, peers, plots, rdma,
    session, table,
};

/// Does what the command line says.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    match &options.helper {
        Some(Helper::Spin(args)) => helpers::spin(args)?,
        Some(Helper::Echo(args)) => helpers::echo(args)?,
        Some(Helper::BlkClient(args)) => blk_client::client(args)?,
        None => return bench(options),
    }
    Ok(ExitCode::SUCCESS)
}

fn bench(options: &Options) -> Result<ExitCode> {
    interrupt::watch()?;
    let seconds = options.seconds();
    let plan = Plan {
        warmup: Duration::from_secs_f64((seconds / 4.0).clamp(0.05, 1.0)),
        time: Duration::from_secs_f64(seconds),
        repeats: options.repeats(),
        quick: options.quick,
    };

    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    let mut versions = Vec::new();
    if options.wants(Part::Limits) {
        subjects.extend(limits::subjects());
    }
    if options.wants(Part::Peers) {
        let peers = Peers::obtain(&Cache::open()?).context("getting the peers' packages")?;
        versions = peers.versions()?;
        subjects.extend(peers::subjects(&peers));
    }
    if options.wants(Part::Farbus) {
        subjects.extend(farbus::subjects()?);
    }
    if options.wants(Part::Rdma) {
        subjects.push(Box::new(rdma::Rdma));
    }

    let host = Host::look(versions);
    let results = session::measure(&subjects, &plan)?;
    let verdicts = budgets::judge(&results);
    let fits = model::fit(&results);

    let shown = table::render(&host, &plan, &results, &fits, &verdicts);
    print!("{shown}");
    if let Some(dir) = &options.out {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        fs::write(dir.join("table.txt"), &shown).context("writing table.txt")?;
        let document = document::compose(&host, &plan, &results, &fits, &verdicts);
        let text = serde_json::to_string_pretty(&document)?;
        fs::write(dir.join("results.json"), text + "\n").context("writing results.json")?;
        plots::draw(dir, &results)?;
        eprintln!("farbus-bench: written to {}", dir.display());
    }

    let failed = results.gaps().iter().any(|gap| gap.failed);
    let broken = options.check && verdicts.iter().any(budgets::Verdict::is_broken);
    Ok(if failed || broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
