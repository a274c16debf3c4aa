//! Plots (SVG) of what the table says: latency at depth 1, I/Os per second at depth 32, throughput of large
//! blocks; one bar for each state of the CPUs, whiskers from the lowest to the highest repeat.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::awake::Awake;
use crate::limits::{self, How, RECEIVED, SENT, TCP, round_trip};
use crate::ratios::is_in_guest;
use crate::results::{Results, Spread, figure};
use crate::table::caption;
use crate::workload::{BIG_READ, BIG_WRITE, READ_1, READ_32, WRITE_32};

const WIDTH: u32 = 900;
/// Height of one subject's two bars.
const BAND: u32 = 46;
const MARGINS: u32 = 110;

/// One plot: a workload's figure over all subjects, and the limit to see them beside.
struct Plot {
    file: &'static str,
    title: String,
    workload: String,
    figure: &'static str,
    unit: f64,
    limits: Vec<(&'static str, String)>,
}

fn plots() -> Vec<Plot> {
    let plot = |file, title: &str, workload: String, figure, unit| Plot {
        file,
        title: title.to_owned(),
        workload,
        figure,
        unit,
        limits: Vec::new(),
    };
    let raw = |how| (TCP, round_trip(limits::READ, how));
    vec![
        Plot {
            limits: vec![raw(How::Blocking), raw(How::Polled)],
            ..plot(
                "latency-4k-read.svg",
                "4 KiB random read, depth 1: p50 in µs (less is better)",
                READ_1.to_string(),
                figure::P50,
                1.0,
            )
        },
        plot(
            "iops-4k-read.svg",
            "4 KiB random read, depth 32: thousands of I/Os per second",
            READ_32.to_string(),
            figure::IOPS,
            1e3,
        ),
        plot(
            "iops-4k-write.svg",
            "4 KiB random write, depth 32: thousands of I/Os per second",
            WRITE_32.to_string(),
            figure::IOPS,
            1e3,
        ),
        Plot {
            limits: vec![(TCP, RECEIVED.to_owned())],
            ..plot(
                "throughput-128k-read.svg",
                "128 KiB sequential read, depth 8: MB/s",
                BIG_READ.to_string(),
                figure::MB_PER_S,
                1.0,
            )
        },
        Plot {
            limits: vec![(TCP, SENT.to_owned())],
            ..plot(
                "throughput-128k-write.svg",
                "128 KiB sequential write, depth 8: MB/s",
                BIG_WRITE.to_string(),
                figure::MB_PER_S,
                1.0,
            )
        },
    ]
}

/// Draws all plots that have something to show into `dir`.
pub(crate) fn draw(dir: &Path, results: &Results) -> Result<()> {
    for plot in plots() {
        let bands = bands(&plot, results);
        if !bands.is_empty() {
            let path = dir.join(plot.file);
            chart(&path, &plot, &bands).map_err(|e| anyhow!("drawing {}: {e}", path.display()))?;
        }
    }
    Ok(())
}

/// A subject's bars, by state of the CPUs.
struct Band<'a> {
    label: String,
    bars: Vec<(Awake, &'a Spread)>,
}

fn bands<'a>(plot: &Plot, results: &'a Results) -> Vec<Band<'a>> {
    let mut wanted: Vec<(String, String, String)> = plot
        .limits
        .iter()
        .map(|(subject, workload)| {
            let label = format!("{subject}, {workload}");
            (label, (*subject).to_owned(), workload.clone())
        })
        .collect();
    for row in results.rows() {
        let known = wanted.iter().any(|(_, subject, _)| *subject == row.subject);
        if row.part != "limits" && row.workload == plot.workload && !known && !is_in_guest(row) {
            let subject = row.subject.clone();
            wanted.push((subject.clone(), subject, plot.workload.clone()));
        }
    }
    let band = |(label, subject, workload): (String, String, String)| {
        let bars: Vec<_> = Awake::BOTH
            .into_iter()
            .filter_map(|awake| {
                let row = results.row(&subject, awake, &workload)?;
                Some((awake, row.spread(plot.figure)?))
            })
            .collect();
        (!bars.is_empty()).then_some(Band { label, bars })
    };
    wanted.into_iter().filter_map(band).collect()
}

fn color(awake: Awake) -> RGBColor {
    match awake {
        Awake::Halting => RGBColor(0x4c, 0x78, 0xa8),
        Awake::Spinning => RGBColor(0xf5, 0x85, 0x18),
    }
}

fn chart(
    path: &Path,
    plot: &Plot,
    bands: &[Band<'_>],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let count = bands.len();
    let highest = bands
        .iter()
        .flat_map(|band| &band.bars)
        .map(|(_, spread)| spread.max() / plot.unit)
        .fold(0.0, f64::max);
    let height = MARGINS + BAND * count as u32;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(&plot.title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(250)
        // The first subject on top.
        .build_cartesian_2d(0.0..highest * 1.15, count as f64..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(8)
        .light_line_style(WHITE)
        .label_style(("sans-serif", 13))
        .draw()?;

    for (index, band) in bands.iter().enumerate() {
        let top = index as f64;
        let middle = chart.backend_coord(&(0.0, top + 0.5));
        let style = ("sans-serif", 13).into_font().color(&BLACK);
        let style = style.pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Center,
        ));
        root.draw(&Text::new(
            band.label.clone(),
            (middle.0 - 8, middle.1),
            style,
        ))?;
        for (bar, (awake, spread)) in band.bars.iter().enumerate() {
            let from = top + 0.12 + 0.38 * bar as f64;
            let value = spread.median() / plot.unit;
            let shape = [(0.0, from), (value, from + 0.36)];
            chart.draw_series([Rectangle::new(shape, color(*awake).filled())])?;
            let (low, high) = (spread.min() / plot.unit, spread.max() / plot.unit);
            let center = from + 0.18;
            chart.draw_series([PathElement::new(
                vec![(low, center), (high, center)],
                BLACK.stroke_width(1),
            )])?;
            let end = chart.backend_coord(&(value.max(high), center));
            root.draw(&Text::new(
                crate::table::number(value),
                (end.0 + 5, end.1 - 6),
                ("sans-serif", 12).into_font(),
            ))?;
        }
    }
    for (index, awake) in Awake::BOTH.into_iter().enumerate() {
        // Below the names, where no bar can be.
        let (x, y) = (20, height as i32 - 38 + 16 * index as i32);
        let square = [(x, y), (x + 10, y + 10)];
        root.draw(&Rectangle::new(square, color(awake).filled()))?;
        let text = ("sans-serif", 12).into_font();
        root.draw(&Text::new(caption(awake), (x + 15, y), text))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::NBD;
    use crate::results::Figures;
    use farbus_integration::scratch::Scratch;

    #[test]
    fn plot_shows_subjects_and_limit() {
        let scratch = Scratch::new("plots").unwrap();
        let mut results = Results::default();
        let read = READ_1.to_string();
        let limit = round_trip(limits::READ, How::Blocking);
        for (part, subject, workload) in [("peers", NBD, &read), ("limits", TCP, &limit)] {
            let figures = Figures::from([(figure::P50.to_owned(), 40.0)]);
            results.add(part, subject, Awake::Halting, workload, figures);
        }
        draw(scratch.path(), &results).unwrap();
        let drawn = std::fs::read_to_string(scratch.join("latency-4k-read.svg")).unwrap();
        assert!(drawn.contains("NBD") && drawn.contains(&limit), "{drawn}");
        assert!(!scratch.join("iops-4k-read.svg").exists());
    }
}
