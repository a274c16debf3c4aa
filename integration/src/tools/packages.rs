//! Debian packages, unpacked without being installed.
//!
//! A [`Suite`] is a private apt root: it reads only the package sources that it is given, believes
//! that nothing is installed, and so resolves a package to all that it needs. The packages are
//! unpacked into a plain directory (a *tree*): no chroot, no maintainer scripts, no root rights.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::sources::Archive;
use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::process::run_tool;

/// A set of suites that packages are taken from.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// Name of the private apt root in the cache.
    pub name: &'static str,
    /// The suites, as in `sources.list`.
    pub suites: &'static [&'static str],
    /// The suite that wins over the others.
    pub target: &'static str,
}

/// Debian 12.
pub const BOOKWORM: Suite = Suite {
    name: "bookworm",
    suites: &["bookworm"],
    target: "bookworm",
};

/// Debian 13.
pub const TRIXIE: Suite = Suite {
    name: "trixie",
    suites: &["trixie"],
    target: "trixie",
};

/// Debian 13 with newer versions of some packages.
pub const TRIXIE_BACKPORTS: Suite = Suite {
    name: "trixie-backports",
    suites: &["trixie", "trixie-backports"],
    target: "trixie-backports",
};

/// An apt root with fresh package lists.
#[derive(Debug)]
pub struct AptRoot {
    root: PathBuf,
    target: &'static str,
}

impl AptRoot {
    /// Makes (or refreshes) the apt root of `suite`. Needs the network.
    ///
    /// The caller holds the lock that belongs to it: see [`with_apt`].
    fn refresh(root: PathBuf, suite: &Suite) -> Result<Self> {
        let archive = Archive::of_system()?;
        for dir in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(dir))
                .context(|| format!("making {dir} of an apt root"))?;
        }
        let lines: Vec<String> = suite
            .suites
            .iter()
            .map(|s| archive.source_line(s))
            .collect();
        fs::write(root.join("sources.list"), lines.join("\n") + "\n")
            .context(|| "writing sources.list of an apt root".into())?;
        fs::write(root.join("status"), "").context(|| "writing status of an apt root".into())?;
        fs::write(root.join("apt.conf"), configuration(&root))
            .context(|| "writing apt.conf of an apt root".into())?;
        let apt = Self {
            root,
            target: suite.target,
        };
        run_tool(apt.command("apt-get").args(["-q", "update"]))?;
        Ok(apt)
    }

    /// Downloads `packages`, with all they depend on, and unpacks them into `tree`.
    ///
    /// # Errors
    /// When apt cannot resolve or fetch them, or unpacking fails.
    pub fn unpack_with_dependencies(&self, packages: &[&str], tree: &Path) -> Result<()> {
        let archives = fresh_dir(&self.root.join("cache/archives"))?;
        fresh_dir(&archives.join("partial"))?;
        run_tool(
            self.command("apt-get")
                .args(["-q", "-y", "--download-only", "--no-install-recommends"])
                .args(["-t", self.target, "install"])
                .args(packages),
        )?;
        unpack_all(&archives, tree)
    }

    /// Downloads `packages`, without what they depend on, and unpacks them into `tree`.
    ///
    /// # Errors
    /// When apt does not know or cannot fetch them, or unpacking fails.
    pub fn unpack_alone(&self, packages: &[String], tree: &Path) -> Result<()> {
        let archives = fresh_dir(&self.root.join("download"))?;
        run_tool(
            self.command("apt-get")
                .args(["-q", "-t", self.target, "download"])
                .args(packages)
                .current_dir(&archives),
        )?;
        unpack_all(&archives, tree)
    }

    /// Names of the packages that `package` depends on; of alternatives, the first.
    ///
    /// # Errors
    /// When apt does not know the package.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let spec = format!("{package}/{}", self.target);
        let shown = run_tool(
            self.command("apt-cache")
                .args(["show", "--no-all-versions", &spec]),
        )?;
        let names = String::from_utf8_lossy(&shown)
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .unwrap_or_default()
            .split(',')
            .filter_map(|one| one.split_whitespace().next().map(str::to_owned))
            .collect();
        Ok(names)
    }

    /// An apt program that sees this root only.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.root.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8");
        command
    }
}

/// The configuration of an apt root. As it is named on the command line it is read last, so that the
/// system's proxies and certificates stay in force.
fn configuration(root: &Path) -> String {
    let path = |name: &str| root.join(name).display().to_string();
    let options = [
        ("Dir::Etc::sourcelist", path("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::Etc::preferences", "/dev/null".into()),
        ("Dir::Etc::preferencesparts", "/dev/null".into()),
        ("Dir::State", path("state")),
        ("Dir::State::status", path("status")),
        ("Dir::Cache", path("cache")),
        ("Dir::Cache::archives", path("cache/archives")),
        ("APT::Architecture", "amd64".into()),
        ("APT::Architectures", "amd64".into()),
        ("APT::Sandbox::User", "root".into()),
        ("APT::Update::Error-Mode", "any".into()),
        ("Acquire::Languages", "none".into()),
        ("Acquire::GzipIndexes", "true".into()),
        ("Acquire::Retries", "3".into()),
        (
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
            "false".into(),
        ),
    ];
    options
        .iter()
        .map(|(name, value)| format!("{name} \"{value}\";\n"))
        .collect()
}

/// Runs `work` with the apt root of `suite`, which no other process uses meanwhile.
///
/// # Errors
/// Those of `work`, and of refreshing the package lists.
pub fn with_apt<T>(
    cache: &Cache,
    suite: &Suite,
    work: impl FnOnce(&AptRoot) -> Result<T>,
) -> Result<T> {
    let name = format!("apt-{}", suite.name);
    let _lock = cache.lock(&name)?;
    let root = AptRoot::refresh(cache.root().join(name), suite)?;
    let done = work(&root)?;
    // What is cached is the outcome; packages and lists are only in the way of the disk.
    fs::remove_dir_all(&root.root).context(|| format!("removing {}", root.root.display()))?;
    Ok(done)
}

fn fresh_dir(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(path).context(|| format!("emptying {}", path.display()))?;
    }
    fs::create_dir_all(path).context(|| format!("making {}", path.display()))?;
    Ok(path.to_owned())
}

fn unpack_all(archives: &Path, tree: &Path) -> Result<()> {
    let listing = fs::read_dir(archives).context(|| format!("reading {}", archives.display()))?;
    let mut packages: Vec<PathBuf> = listing
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "deb"))
        .collect();
    packages.sort();
    if packages.is_empty() {
        return Err(Error::Missing {
            what: "any package".into(),
            place: archives.to_owned(),
        });
    }
    for package in &packages {
        run_tool(Command::new("dpkg-deb").arg("-x").arg(package).arg(tree))?;
    }
    Ok(())
}
