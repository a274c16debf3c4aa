//! Slices of an export and limits of its claims, as an operator writes them: as options of the
//! command line (`name=a,offset=0,size=512MiB,iops=5000`), and as tables of a configuration file with the
//! same keys:
//!
//! ```toml
//! [[export.slice]]
//! name = "a"                      # claimed as EXPORT/a
//! offset = "0"
//! size = "512MiB"
//! limits = { iops = 5000, bytes-per-second = "100MiB" }
//! ```

use std::str::FromStr;

use farbus_fabric::wire::ExportName;
pub use farbus_shadow_mem::limits::LimitSpec;
use farbus_shadow_mem::limits::{Number, not_a_size, options, size};
use farbus_vfio::shared::SliceSpec;
use farbus_vfio::soft_nvme::parse_size;
use serde::{Deserialize, Deserializer, de};

/// A part of an export that is claimed by itself, as `EXPORT/NAME`.
///
/// ```
/// use farbus_device_server::slices::SliceConfig;
///
/// let slice: SliceConfig = "name=a,offset=1GiB,size=512MiB,iops=5000".parse()?;
/// assert_eq!((slice.offset, slice.limits.and_then(|limits| limits.iops)), (1 << 30, Some(5000)));
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SliceConfig {
    /// Its name: of what export names are made of, without a slash. On the command line it may be
    /// left out; then it is the slice's number there, from 0 ([`numbered`]).
    #[serde(deserialize_with = "name")]
    pub name: String,
    /// Where it begins, in bytes; a whole number of blocks.
    #[serde(default, deserialize_with = "offset")]
    pub offset: u64,
    /// Its size in bytes; to the end of the namespace, unless given.
    #[serde(default, deserialize_with = "size")]
    pub size: Option<u64>,
    /// The namespace that it is of; the first, unless given.
    #[serde(default)]
    pub namespace: Option<u32>,
    /// Whether it may have blocks in common with other slices that may, too.
    #[serde(default)]
    pub overlap: bool,
    /// Limits of its claims, in place of those of the export.
    #[serde(default)]
    pub limits: Option<LimitSpec>,
}

impl FromStr for SliceConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut slice = Self {
            name: String::new(),
            offset: 0,
            size: None,
            namespace: None,
            overlap: false,
            limits: None,
        };
        let mut limits = LimitSpec::default();
        for (key, value) in options(text)? {
            match key {
                "name" => slice.name = checked_name(value)?,
                "offset" => {
                    slice.offset = offset_of(value).ok_or_else(|| not_a_size(key, value))?;
                }
                "size" => {
                    slice.size = Some(parse_size(value).ok_or_else(|| not_a_size(key, value))?);
                }
                "namespace" => {
                    let id = value.parse().ok().filter(|id| *id > 0);
                    slice.namespace = Some(id.ok_or_else(|| {
                        format!("namespace=`{value}` is not an id; write 1 or more")
                    })?);
                }
                "overlap" => {
                    slice.overlap = match value {
                        "yes" => true,
                        "no" => false,
                        _ => return Err(format!("overlap=`{value}` is neither yes nor no")),
                    };
                }
                _ if limits.take(key, value)? => slice.limits = Some(limits),
                _ => {
                    return Err(format!(
                        "unknown option `{key}`; there are name, offset, size, namespace, overlap, iops, \
                         iops-burst, bytes-per-second and bytes-burst"
                    ));
                }
            }
        }
        limits.check()?;
        Ok(slice)
    }
}

impl SliceConfig {
    /// As whoever divides the drive has it.
    pub fn spec(&self) -> SliceSpec {
        SliceSpec {
            name: self.name.clone(),
            namespace: self.namespace,
            offset: self.offset,
            size: self.size,
            overlap: self.overlap,
        }
    }
}

/// Names the slices that have no name by their places.
#[must_use]
pub fn numbered(mut slices: Vec<SliceConfig>) -> Vec<SliceConfig> {
    for (number, slice) in slices.iter_mut().enumerate() {
        if slice.name.is_empty() {
            slice.name = number.to_string();
        }
    }
    slices
}

fn checked_name(name: &str) -> Result<String, String> {
    let checked = ExportName::new(name).map_err(|error| error.to_string())?;
    if checked.is_slice() {
        return Err(format!(
            "the name `{name}` of a slice has a slash; give its own name only, without the export's"
        ));
    }
    Ok(name.to_owned())
}

fn offset_of(text: &str) -> Option<u64> {
    match text {
        "0" => Some(0),
        text => parse_size(text),
    }
}

fn offset<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let bytes = match Number::deserialize(deserializer)? {
        Number::Plain(bytes) => Some(bytes),
        Number::Text(text) => offset_of(&text),
    };
    let wrong = "an offset is bytes, or a number with KiB, MiB, GiB or TiB";
    bytes.ok_or_else(|| de::Error::custom(wrong))
}

fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_name(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_the_same_in_a_file_and_on_the_command_line() {
        let line =
            "name=a,offset=1MiB,size=512KiB,namespace=2,overlap=yes,iops=10,bytes-per-second=1MiB";
        let file = r#"{"name": "a", "offset": "1MiB", "size": 524288, "namespace": 2, "overlap": true,
            "limits": {"iops": 10, "bytes-per-second": "1MiB"}}"#;
        let slice: SliceConfig = line.parse().unwrap();
        assert_eq!(slice, serde_json::from_str(file).unwrap());
        assert_eq!((slice.offset, slice.size), (1 << 20, Some(1 << 19)));
        let limits = slice.limits.unwrap().rates();
        assert_eq!(
            (limits.iops, limits.bytes_per_second, limits.iops_burst),
            (10, 1 << 20, 0)
        );
    }

    #[test]
    fn what_is_left_out_is_the_whole_first_namespace_without_limits() {
        let slice: SliceConfig = "name=a".parse().unwrap();
        assert_eq!(slice, serde_json::from_str(r#"{"name": "a"}"#).unwrap());
        assert_eq!(slice.spec().size, None);
        assert!(slice.limits.is_none());
    }

    #[test]
    fn slices_without_a_name_are_numbered_by_their_places() {
        let slices = [
            "size=1MiB",
            "name=b,offset=1MiB,size=1MiB",
            "offset=2MiB,size=1MiB",
        ];
        let slices = numbered(slices.map(|slice| slice.parse().unwrap()).into());
        let names: Vec<_> = slices.iter().map(|slice| slice.name.as_str()).collect();
        assert_eq!(names, ["0", "b", "2"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("name=a/b", "slash"),
            ("name=a,size=0", "size=`0`"),
            ("name=a,size=x", "size=`x`"),
            ("name=a,name=b", "twice"),
            ("name=a,iops=0", "iops=`0`"),
            ("name=a,iops-burst=5", "without iops"),
            ("name=a,overlap=perhaps", "neither"),
            ("name=a,colour=red", "unknown option `colour`"),
            ("a", "key=value"),
        ] {
            let refused = text.parse::<SliceConfig>().unwrap_err();
            assert!(refused.contains(part), "{text}: {refused}");
        }
        for text in [
            r#"{"name": "a/b"}"#,
            r#"{"name": "a", "size": 0}"#,
            r#"{"name": "a", "sise": 5}"#,
            r#"{"name": "a", "limits": {"iops": 0}}"#,
        ] {
            assert!(serde_json::from_str::<SliceConfig>(text).is_err(), "{text}");
        }
    }
}
