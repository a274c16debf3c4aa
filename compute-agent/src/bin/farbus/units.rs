//! Amounts with units, as people write and read them.

/// Reads an amount: a number, alone or with k, M, G (thousands) or KiB, MiB, GiB, TiB (powers of
/// 1024).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("k", 1000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
    ];
    let split = |(unit, factor)| Some((text.strip_suffix(unit)?, factor));
    let (number, factor) = UNITS.into_iter().find_map(split).unwrap_or((text, 1));
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|amount| *amount > 0)
        .ok_or_else(|| {
            format!(
                "`{text}` is no amount above 0; write a number, or one with k, M, G, KiB, MiB, GiB or TiB"
            )
        })
}

/// Bytes for people: `1 GiB`, `1.5 MiB`.
pub(crate) fn bytes(amount: f64) -> String {
    scaled(amount, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A count for people: `950`, `12.3 k`.
pub(crate) fn count(amount: f64) -> String {
    scaled(amount, 1000.0, &["", "k", "M", "G"])
}

/// Microseconds for people: `81 µs`, `2.5 ms`.
pub(crate) fn microseconds(amount: f64) -> String {
    scaled(amount, 1000.0, &["µs", "ms", "s"])
}

fn scaled(mut amount: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // What would be shown as a whole step belongs to the next unit.
    while amount >= step - 0.5 && unit + 1 < units.len() {
        amount /= step;
        unit += 1;
    }
    let rounded = (amount * 10.0).round() / 10.0;
    let digits = usize::from(rounded < 100.0 && rounded.fract() != 0.0);
    format!("{rounded:.digits$} {}", units[unit])
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    #[test]
    fn amounts_are_read_with_their_units() {
        let read = |text| parse(text).unwrap();

        assert_eq!(read("5000"), 5000);
        assert_eq!(read("10k"), 10_000);
        assert_eq!(read("1GiB"), 1 << 30);
        assert_eq!(read("2TiB"), 2 << 40);
    }

    #[test]
    fn what_is_no_amount_is_refused_by_name() {
        for text in ["", "k", "-1", "1.5GiB", "1 GiB", "0", "99999999TiB", "1GB"] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(&format!("`{text}`")), "{said}");
        }
    }

    #[test]
    fn amounts_are_shown_with_three_digits_at_most() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1023.8), "1 KiB");
        assert_eq!(bytes(1_610_612_736.0), "1.5 GiB");
        assert_eq!(count(12_340.0), "12.3 k");
        assert_eq!(count(7.0), "7");
        assert_eq!(microseconds(81.2), "81.2 µs");
        assert_eq!(microseconds(250.4), "250 µs");
        assert_eq!(microseconds(2500.0), "2.5 ms");
    }
}
