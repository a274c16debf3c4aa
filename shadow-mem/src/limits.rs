//! Limits of a claim as people write them: `iops=5000,bytes-per-second=100MiB` on a command line, and as
//! a table with the same keys in a file. Device servers have them for their exports, and claimants
//! for themselves.

use std::str::FromStr;

use farbus_fabric::wire::RateLimits;
use farbus_vfio::soft_nvme::parse_size;
use serde::{Deserialize, Deserializer, de};

/// Limits of each claim of an export or a slice. Commands beyond them wait; a claimant may ask for
/// lower ones for itself.
///
/// ```
/// use farbus_shadow_mem::limits::LimitSpec;
///
/// let limits: LimitSpec = "iops=5000,bytes-per-second=100MiB".parse()?;
/// assert_eq!(limits.iops, Some(5000));
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitSpec {
    /// I/O commands in a second.
    #[serde(deserialize_with = "count")]
    pub iops: Option<u64>,
    /// Commands that may come at once after a while without; a tenth of a second's, unless given.
    #[serde(deserialize_with = "count")]
    pub iops_burst: Option<u64>,
    /// Bytes read and written in a second: a number, or text such as `100MiB`.
    #[serde(deserialize_with = "size")]
    pub bytes_per_second: Option<u64>,
    /// Bytes that may come at once after a while without; a tenth of a second's, unless given.
    #[serde(deserialize_with = "size")]
    pub bytes_burst: Option<u64>,
}

impl LimitSpec {
    /// As the fabric has them.
    pub fn rates(&self) -> RateLimits {
        RateLimits {
            iops: self.iops.unwrap_or(0),
            iops_burst: self.iops_burst.unwrap_or(0),
            bytes_per_second: self.bytes_per_second.unwrap_or(0),
            bytes_burst: self.bytes_burst.unwrap_or(0),
        }
    }

    /// Takes an option; whether it is one of these.
    pub fn take(&mut self, key: &str, value: &str) -> Result<bool, String> {
        let place = match key {
            "iops" => &mut self.iops,
            "iops-burst" => &mut self.iops_burst,
            "bytes-per-second" => &mut self.bytes_per_second,
            "bytes-burst" => &mut self.bytes_burst,
            _ => return Ok(false),
        };
        let number = if key.starts_with("iops") {
            value.parse().ok().filter(|number| *number > 0)
        } else {
            parse_size(value)
        };
        *place = Some(number.ok_or_else(|| match key.starts_with("iops") {
            true => format!("{key}=`{value}` is not a number of commands; write 1 or more"),
            false => not_a_size(key, value),
        })?);
        Ok(true)
    }

    /// Limits without what they limit make no sense.
    pub fn check(self) -> Result<Self, String> {
        match (
            self.iops,
            self.iops_burst,
            self.bytes_per_second,
            self.bytes_burst,
        ) {
            (None, Some(_), ..) => Err("iops-burst is given without iops; give both".into()),
            (_, _, None, Some(_)) => {
                Err("bytes-burst is given without bytes-per-second; give both".into())
            }
            _ => Ok(self),
        }
    }
}

/// The complaint about a size.
pub fn not_a_size(key: &str, value: &str) -> String {
    format!("{key}=`{value}` is not a size; write bytes, or a number with KiB, MiB, GiB or TiB")
}

/// The options of a text, each of which may be there once.
pub fn options(text: &str) -> Result<Vec<(&str, &str)>, String> {
    let mut found: Vec<(&str, &str)> = Vec::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            format!("`{part}` is not of the form key=value; separate options with commas")
        })?;
        if found.iter().any(|(other, _)| *other == key) {
            return Err(format!("option `{key}` is given twice; give it once"));
        }
        found.push((key, value));
    }
    Ok(found)
}

impl FromStr for LimitSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut limits = Self::default();
        for (key, value) in options(text)? {
            if !limits.take(key, value)? {
                return Err(format!(
                    "unknown limit `{key}`; there are iops, iops-burst, bytes-per-second and bytes-burst"
                ));
            }
        }
        limits.check()
    }
}

/// A number, or text such as `512MiB`.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Number {
    /// Bytes.
    Plain(u64),
    /// As for [`parse_size`].
    Text(String),
}

/// For `serde`: a size that may be left out.
pub fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let bytes = match Number::deserialize(deserializer)? {
        Number::Plain(bytes) => Some(bytes).filter(|bytes| *bytes > 0),
        Number::Text(text) => parse_size(&text),
    };
    let wrong = "a size is bytes, or a number with KiB, MiB, GiB or TiB, and more than 0";
    bytes.map(Some).ok_or_else(|| de::Error::custom(wrong))
}

fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match u64::deserialize(deserializer)? {
        0 => Err(de::Error::custom(
            "a limit of 0 commands lets nothing through; leave it out for none",
        )),
        count => Ok(Some(count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_same_in_a_file_and_on_the_command_line() {
        let line = "iops=10,iops-burst=20,bytes-per-second=1MiB,bytes-burst=4096";
        let file =
            r#"{"iops": 10, "iops-burst": 20, "bytes-per-second": "1MiB", "bytes-burst": 4096}"#;
        let limits: LimitSpec = line.parse().unwrap();
        assert_eq!(limits, serde_json::from_str(file).unwrap());
        let rates = limits.rates();
        assert_eq!((rates.iops, rates.iops_burst), (10, 20));
        assert_eq!((rates.bytes_per_second, rates.bytes_burst), (1 << 20, 4096));
        assert!(LimitSpec::default().rates().is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("iops=0", "iops=`0`"),
            ("iops=many", "iops=`many`"),
            ("bytes-per-second=fast", "bytes-per-second=`fast`"),
            ("iops-burst=5", "without iops"),
            ("bytes-burst=5", "without bytes-per-second"),
            ("iops=1,iops=2", "twice"),
            ("colour=red", "unknown limit `colour`"),
            ("", "key=value"),
        ] {
            let refused = text.parse::<LimitSpec>().unwrap_err();
            assert!(refused.contains(part), "{text}: {refused}");
        }
    }
}
