//! One `[[export]]` of the configuration.

use farbus_fabric::wire::ExportName;
use farbus_vfio::PciAddress;
use farbus_vfio::soft_nvme::{Medium, SoftNvmeConfig};
use serde::Deserialize;
use toml::Spanned;

use super::values::{AbsolutePath, Class, Parsed, PciId, Size};
use super::{Entry, Wrong};
use crate::slices::{LimitSpec, SliceConfig};
use crate::sources::{Count, Order, Selector, Source};

const SOURCES: &str = "pci, match, sriov, soft-nvme or vfio-user-device";

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ExportTable {
    pub(super) name: Spanned<Parsed<ExportName>>,
    pci: Option<Spanned<Parsed<PciAddress>>>,
    bind: Option<Spanned<bool>>,
    r#match: Option<Spanned<MatchTable>>,
    count: Option<Spanned<Count>>,
    sriov: Option<Spanned<SriovTable>>,
    soft_nvme: Option<Spanned<SoftNvmeTable>>,
    vfio_user_device: Option<Spanned<Parsed<AbsolutePath>>>,
    limits: Option<Spanned<LimitSpec>>,
    #[serde(default)]
    slice: Vec<Spanned<SliceConfig>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MatchTable {
    class: Option<Parsed<Class>>,
    vendor_id: Option<Parsed<PciId>>,
    device_id: Option<Parsed<PciId>>,
    serial: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct SriovTable {
    pci: Parsed<PciAddress>,
    functions: Spanned<u16>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct SoftNvmeTable {
    path: Option<Parsed<AbsolutePath>>,
    backing: Option<Backing>,
    size: Option<Size>,
    block_size: Option<u32>,
    serial: Option<String>,
    queues: Option<u16>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Backing {
    File,
    Memory,
    Null,
}

impl ExportTable {
    pub(super) fn check(self) -> Result<Entry, Wrong> {
        let span = self.name.span();
        let name = self.name.into_inner().0;
        if name.is_slice() {
            let what = format!(
                "{name} has a slash, which only names of slices have; add [[export.slice]]"
            );
            return Err(Wrong { span, what });
        }
        let mut slices = Vec::new();
        for slice in self.slice {
            let span = slice.span();
            let slice = slice.into_inner();
            // Checked where the file is still known: keys of one slice go together.
            if let Err(what) = slice.limits.unwrap_or_default().check() {
                return Err(Wrong { span, what });
            }
            slices.push(slice);
        }
        let limits = match self.limits {
            Some(limits) => {
                let span = limits.span();
                let limits = limits.into_inner().check();
                limits.map_err(|what| Wrong { span, what })?
            }
            None => LimitSpec::default(),
        };
        let may_bind = self.pci.is_some() || self.r#match.is_some();
        if let Some(bind) = self.bind.as_ref().filter(|_| !may_bind) {
            return Err(Wrong {
                span: bind.span(),
                what: format!("export {name} has nothing to bind; `bind` goes with pci or match"),
            });
        }
        if let Some(count) = self.count.as_ref().filter(|_| self.r#match.is_none()) {
            return Err(Wrong {
                span: count.span(),
                what: format!("export {name} has nothing to count; `count` goes with match"),
            });
        }
        let bind = self.bind.is_some_and(Spanned::into_inner);
        let count = self.count.map_or(Count::Exactly(1), Spanned::into_inner);
        let mut sources = Vec::new();
        if let Some(pci) = self.pci {
            let (span, address) = (pci.span(), pci.into_inner().0);
            sources.push((span, "pci", Source::Pci { address, bind }));
        }
        if let Some(table) = self.r#match {
            let span = table.span();
            let selector = table.into_inner().check(span.clone())?;
            let source = Source::Match {
                selector,
                count,
                bind,
            };
            sources.push((span, "match", source));
        }
        if let Some(table) = self.sriov {
            let span = table.span();
            sources.push((span, "sriov", table.into_inner().check()?));
        }
        if let Some(table) = self.soft_nvme {
            let span = table.span();
            let config = table.into_inner().check(span.clone())?;
            sources.push((span, "soft-nvme", Source::SoftNvme(config)));
        }
        if let Some(path) = self.vfio_user_device {
            let (span, path) = (path.span(), path.into_inner().0.0);
            sources.push((span, "vfio-user-device", Source::VfioUser(path)));
        }
        let mut sources = sources.into_iter();
        let Some((_, first, source)) = sources.next() else {
            let what = format!("export {name} has no source; add {SOURCES}");
            return Err(Wrong { span, what });
        };
        if let Some((span, second, _)) = sources.next() {
            let what = format!(
                "export {name} has both {first} and {second}; one export has one source, so make two of it"
            );
            return Err(Wrong { span, what });
        }
        let order = Order::new(source, Some(name.clone()))
            .and_then(|order| order.with_slices(slices))
            .map_err(|error| Wrong {
                span,
                what: error.to_string(),
            })?;
        let order = order.with_limits(limits);
        Ok(Entry { name, order })
    }
}

impl MatchTable {
    fn check(self, span: std::ops::Range<usize>) -> Result<Selector, Wrong> {
        let selector = Selector {
            class: self.class.map(|class| class.0.0),
            vendor: self.vendor_id.map(|id| id.0.0),
            device: self.device_id.map(|id| id.0.0),
            serial: self.serial,
        };
        if selector == Selector::default() {
            let what = "this matches every function; name class, vendor-id, device-id or serial";
            return Err(Wrong {
                span,
                what: what.into(),
            });
        }
        Ok(selector)
    }
}

impl SriovTable {
    fn check(self) -> Result<Source, Wrong> {
        let span = self.functions.span();
        let count = self.functions.into_inner();
        if count == 0 {
            let what = "functions = 0 makes none; write 1 to 65535".into();
            return Err(Wrong { span, what });
        }
        Ok(Source::Sriov {
            physical: self.pci.0,
            count,
        })
    }
}

impl SoftNvmeTable {
    fn check(self, span: std::ops::Range<usize>) -> Result<SoftNvmeConfig, Wrong> {
        let wrong = |what: String| Wrong {
            span: span.clone(),
            what,
        };
        let has_path = self.path.is_some();
        let path = self.path.map(|path| path.0.0).unwrap_or_default();
        let mut config = SoftNvmeConfig::new(path);
        match self.backing.unwrap_or(Backing::File) {
            Backing::File => {}
            Backing::Memory => config.medium = Medium::Memory,
            Backing::Null => config.medium = Medium::Null,
        }
        if has_path && !matches!(config.medium, Medium::File(_)) {
            let medium = &config.medium;
            return Err(wrong(format!(
                "backing = \"{medium}\" has no path; leave path out"
            )));
        }
        config.size = self.size.map(|size| size.0);
        if let Some(block_size) = self.block_size {
            config.block_size = block_size;
        }
        config.serial = self.serial;
        if let Some(queues) = self.queues {
            config.queues = queues;
        }
        config.check().map_err(|error| wrong(error.to_string()))?;
        Ok(config)
    }
}
