//! What a 4 KiB I/O at depth 1 takes, from what the machine takes: time = RTT + hops + copies + drive.
//!
//! - RTT: the raw round trip of the same sizes, blocking or polled as the subject is, times a factor;
//! - hops: wake-ups between the load and the agent (a doorbell there, an interrupt back), times a factor;
//! - copies: the payload at the rate of memory that is not cached, once at each end; not fitted;
//! - drive: one constant for the software on the way and the drive's answer.
//!
//! The two factors and the constant are fitted over Farbus' own rows, so that the squares of the relative errors are
//! least: what takes 10 us counts as much as what takes 70. The factors say how
//! far the fabric and the endpoint are from bare sockets, and the residue says what the model does not know.

use std::fmt;

use serde::Serialize;

use crate::awake::Awake;
use crate::farbus::{ENDPOINT, IN_PROCESS, IN_PROCESS_POLLED};
use crate::limits::{self, EVENTFD, How, MEMORY, TCP, UNIX, round_trip};
use crate::results::{Results, figure};
use crate::workload::{READ_1, WRITE_1};

/// The model for one run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Fit {
    pub(crate) rtt_factor: f64,
    pub(crate) hop_factor: f64,
    pub(crate) drive_us: f64,
    pub(crate) points: Vec<Point>,
}

/// One measured row, and what the model says of it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Point {
    pub(crate) subject: &'static str,
    pub(crate) awake: Awake,
    pub(crate) workload: String,
    pub(crate) rtt_us: f64,
    pub(crate) hops_us: f64,
    pub(crate) copies_us: f64,
    pub(crate) measured_us: f64,
    pub(crate) predicted_us: f64,
}

/// Fits the model; none when there are too few rows.
pub(crate) fn fit(results: &Results) -> Vec<Fit> {
    let mut points: Vec<Point> = Vec::new();
    for subject in [IN_PROCESS, IN_PROCESS_POLLED, ENDPOINT] {
        for awake in Awake::BOTH {
            for workload in [READ_1, WRITE_1] {
                points.extend(point(results, subject, awake, &workload.to_string()));
            }
        }
    }
    // Both sides divided by what was measured, which makes the errors relative.
    let inputs: Vec<[f64; 3]> = points
        .iter()
        .map(|point| [point.rtt_us, point.hops_us, 1.0].map(|cost| cost / point.measured_us))
        .collect();
    let outputs: Vec<f64> = points
        .iter()
        .map(|point| 1.0 - point.copies_us / point.measured_us)
        .collect();
    let Some([rtt_factor, hop_factor, drive_us]) = fit_costs(inputs, &outputs) else {
        return Vec::new();
    };
    for point in &mut points {
        point.predicted_us =
            rtt_factor * point.rtt_us + hop_factor * point.hops_us + point.copies_us + drive_us;
    }
    vec![Fit {
        rtt_factor,
        hop_factor,
        drive_us,
        points,
    }]
}

fn point(results: &Results, subject: &'static str, awake: Awake, workload: &str) -> Option<Point> {
    let p50 = |subject: &str, workload: &str| results.median(subject, awake, workload, figure::P50);
    let how = if subject == IN_PROCESS_POLLED {
        How::Polled
    } else {
        How::Blocking
    };
    let hops_us = if subject == ENDPOINT {
        // Half a round trip each: a message in, an event out.
        let message = p50(UNIX, &round_trip(limits::SMALL, How::Blocking))? / 2.0;
        message + p50(EVENTFD, &round_trip((8, 8), How::Blocking))? / 2.0
    } else {
        0.0
    };
    let memory = results.median(MEMORY, awake, limits::NOT_CACHED, figure::MB_PER_S)?;
    Some(Point {
        subject,
        awake,
        workload: workload.to_owned(),
        rtt_us: p50(TCP, &round_trip(limits::READ, how))?,
        hops_us,
        copies_us: 2.0 * f64::from(READ_1.block) / memory,
        measured_us: p50(subject, workload)?,
        predicted_us: f64::NAN,
    })
}

/// Least squares with factors that are costs: a factor that came out below zero is none, and the others are
/// fitted without it.
fn fit_costs<const N: usize>(mut inputs: Vec<[f64; N]>, outputs: &[f64]) -> Option<[f64; N]> {
    let mut without = [false; N];
    loop {
        let mut solution = least_squares(&inputs, outputs, without)?;
        let negative = (0..N).find(|at| !without[*at] && solution[*at] < 0.0);
        let Some(at) = negative else {
            for (factor, _) in solution.iter_mut().zip(without).filter(|(_, out)| *out) {
                *factor = 0.0;
            }
            return Some(solution);
        };
        without[at] = true;
        inputs.iter_mut().for_each(|input| input[at] = 0.0);
    }
}

/// Solves the normal equations, for all unknowns but those that are left out; none when they have no single solution.
fn least_squares<const N: usize>(
    inputs: &[[f64; N]],
    outputs: &[f64],
    without: [bool; N],
) -> Option<[f64; N]> {
    if inputs.len() <= N {
        return None;
    }
    let mut matrix = [[0.0; N]; N];
    let mut right = [0.0; N];
    for (input, output) in inputs.iter().zip(outputs) {
        for row in 0..N {
            for column in 0..N {
                matrix[row][column] += input[row] * input[column];
            }
            right[row] += input[row] * output;
        }
    }
    for at in (0..N).filter(|at| without[*at]) {
        matrix[at][at] = 1.0;
    }
    // Gauss and Jordan, with the largest pivot of each column.
    for column in 0..N {
        let pivot = (column..N).max_by(|a, b| {
            let size = |row: &usize| matrix[*row][column].abs();
            size(a).total_cmp(&size(b))
        })?;
        if matrix[pivot][column].abs() < 1e-9 {
            return None;
        }
        matrix.swap(column, pivot);
        right.swap(column, pivot);
        for row in 0..N {
            if row != column {
                let factor = matrix[row][column] / matrix[column][column];
                let pivot = matrix[column];
                for (cell, pivot) in matrix[row].iter_mut().zip(pivot) {
                    *cell -= factor * pivot;
                }
                right[row] -= factor * right[column];
            }
        }
    }
    let mut solution = [0.0; N];
    for row in 0..N {
        solution[row] = right[row] / matrix[row][row];
    }
    Some(solution)
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "time = {:.2} x RTT + {:.2} x hops + copies + {:.1} us",
            self.rtt_factor, self.hop_factor, self.drive_us
        )?;
        for point in &self.points {
            let Point {
                subject,
                awake,
                workload,
                measured_us,
                predicted_us,
                ..
            } = point;
            let off = (predicted_us / measured_us - 1.0) * 100.0;
            writeln!(
                f,
                "{subject:<26} {awake} {workload:<16} measured {measured_us:>6.1}  \
                 predicted {predicted_us:>6.1}  ({off:+.0} %)"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_law_is_found_again() {
        let inputs = [
            [1.0, 0.0, 1.0],
            [2.0, 5.0, 1.0],
            [3.0, 1.0, 1.0],
            [7.0, 2.0, 1.0],
        ];
        let outputs = inputs.map(|[a, b, _]| 1.5 * a + 0.25 * b + 4.0);
        let found = least_squares(&inputs, &outputs, [false; 3]).unwrap();
        for (found, real) in found.iter().zip([1.5, 0.25, 4.0]) {
            assert!((found - real).abs() < 1e-9, "{found} {real}");
        }
    }

    #[test]
    fn negative_factor_is_left_out() {
        let inputs = vec![
            [1.0, 0.0, 1.0],
            [2.0, 5.0, 1.0],
            [3.0, 1.0, 1.0],
            [7.0, 2.0, 1.0],
        ];
        let outputs: Vec<f64> = inputs.iter().map(|[a, b, _]| -0.5 * a + b + 9.0).collect();
        let [rtt, hop, rest] = fit_costs(inputs, &outputs).unwrap();
        assert_eq!(rtt, 0.0);
        assert!(hop > 0.0 && rest > 0.0, "{hop} {rest}");
    }

    #[test]
    fn too_few_or_dependent_rows_give_no_fit() {
        let same = [[1.0, 2.0, 1.0]; 6];
        assert!(least_squares(&same, &[1.0; 6], [false; 3]).is_none());
        assert!(least_squares(&same[..2], &[1.0; 2], [false; 3]).is_none());
        assert!(fit(&Results::default()).is_empty());
    }
}
