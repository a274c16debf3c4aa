//! What the options of `export` say, each as a type.

use std::path::PathBuf;
use std::str::FromStr;

use farbus_fabric::wire::ExportName;
use farbus_vfio::PciAddress;
use farbus_vfio::soft_nvme::SoftNvmeConfig;

/// A source of functions, and the name that its export is to have, if one is given.
#[derive(Clone, Debug)]
pub(super) struct Named<T> {
    pub(super) source: T,
    pub(super) name: Option<ExportName>,
}

/// `path=SOCKET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UserSocket {
    pub(super) path: PathBuf,
}

/// `ADDRESS,vfs=COUNT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SriovSpec {
    pub(super) physical: PciAddress,
    pub(super) count: u16,
}

/// A name for an export, with what may be in one.
pub(super) fn parse_name(name: &str) -> Result<ExportName, String> {
    let checked = ExportName::new(name).map_err(|error| error.to_string())?;
    if checked.is_slice() {
        return Err(format!(
            "the name `{name}` has a slash, which only names of slices have; --slice makes these"
        ));
    }
    Ok(checked)
}

impl<T: FromStr<Err: ToString>> FromStr for Named<T> {
    type Err = String;

    /// Takes `name=…` out of the parts between commas, and leaves the others to `T`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut name = None;
        let mut rest = Vec::new();
        for part in text.split(',') {
            match part.strip_prefix("name=") {
                Some(_) if name.is_some() => {
                    return Err("option `name` is given twice; give it once".into());
                }
                Some(value) => name = Some(parse_name(value)?),
                None => rest.push(part),
            }
        }
        let source = rest.join(",").parse::<T>();
        Ok(Self {
            source: source.map_err(|error| error.to_string())?,
            name,
        })
    }
}

impl FromStr for UserSocket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("path=") {
            Some(path) if !path.is_empty() && !path.contains(',') => Ok(Self { path: path.into() }),
            _ => Err(format!("`{text}` is not path=SOCKET[,name=NAME]")),
        }
    }
}

impl FromStr for SriovSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, count) = text
            .split_once(",vfs=")
            .ok_or_else(|| format!("`{text}` does not say how many; write ADDRESS,vfs=COUNT"))?;
        let physical = address
            .parse::<PciAddress>()
            .map_err(|error| error.to_string())?;
        let count = count
            .parse()
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| format!("vfs=`{count}` is out of range; use 1 to 65535"))?;
        Ok(Self { physical, count })
    }
}

/// A soft NVMe drive's own options are its crate's.
pub(super) type SoftNvmeSpec = Named<SoftNvmeConfig>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_stand_anywhere() {
        for text in ["0000:01:00.0,name=a", "name=a,01:00.0"] {
            let spec: Named<PciAddress> = text.parse().unwrap();
            assert_eq!(spec.source.to_string(), "0000:01:00.0");
            assert_eq!(spec.name.unwrap().as_str(), "a");
        }
        let plain: SoftNvmeSpec = "path=x,size=1MiB".parse().unwrap();
        assert_eq!(plain.source.size, Some(1 << 20));
        assert!(plain.name.is_none());
    }

    #[test]
    fn virtual_functions_need_a_count() {
        let spec: SriovSpec = "0000:01:00.0,vfs=4".parse().unwrap();
        assert_eq!(
            (spec.physical.to_string(), spec.count),
            ("0000:01:00.0".into(), 4)
        );
        for text in [
            "0000:01:00.0",
            "x,vfs=1",
            "0000:01:00.0,vfs=0",
            "0000:01:00.0,vfs=70000",
        ] {
            assert!(text.parse::<SriovSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |text: &str| text.parse::<Named<UserSocket>>().map(|_| ()).unwrap_err();
        assert!(refused("path=a,name=b,name=c").contains("twice"));
        assert!(refused("socket=a").contains("`socket=a`"));
        assert!(refused("path=").contains("path=SOCKET"));
        assert!(refused("path=a,name=b/c").contains("name"));
    }
}
