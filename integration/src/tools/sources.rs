//! Where this machine gets its Debian packages from.
//!
//! The test bed fetches other suites than the installed one, from the same archive: it reads the
//! system's own package sources, in the one-line format (`sources.list(5)`) and in deb822
//! (`*.sources`), and takes the entry that serves the installed suite.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Environment variable that names an archive (`http://…/debian`) instead of the system's.
pub const MIRROR_ENV: &str = "FARBUS_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An archive of Debian packages, and what apt must know to trust it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    uri: String,
    signed_by: Option<PathBuf>,
    trusted: bool,
}

impl Archive {
    /// The archive that serves this system's own suite.
    ///
    /// # Errors
    /// [`Error::NoPackageSource`] when no entry of the package sources does.
    pub fn of_system() -> Result<Self> {
        if let Ok(uri) = std::env::var(MIRROR_ENV) {
            return Ok(Self {
                uri,
                signed_by: Some(PathBuf::from(KEYRING)),
                trusted: false,
            });
        }
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = release
            .lines()
            .find_map(|l| l.strip_prefix("VERSION_CODENAME="))
            .unwrap_or_default();
        pick(&read_sources(Path::new("/etc/apt")), codename).ok_or_else(|| Error::NoPackageSource {
            reason: format!("/etc/apt lists no archive with suite '{codename}' of Debian"),
        })
    }

    /// The line for `sources.list` that adds one suite of this archive.
    #[must_use]
    pub fn source_line(&self, suite: &str) -> String {
        let mut options = Vec::new();
        if let Some(keyring) = &self.signed_by {
            options.push(format!("signed-by={}", keyring.display()));
        }
        if self.trusted {
            options.push("trusted=yes".to_owned());
        }
        let options = if options.is_empty() {
            String::new()
        } else {
            format!("[{}] ", options.join(" "))
        };
        format!("deb {options}{} {suite} main", self.uri)
    }
}

/// One entry of the package sources: an archive and the suites it is used for.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    archive: Archive,
    suites: Vec<String>,
}

fn read_sources(etc: &Path) -> Vec<Entry> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(dir) = fs::read_dir(etc.join("sources.list.d")) {
        let mut more: Vec<PathBuf> = dir.flatten().map(|e| e.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut entries = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => entries.extend(text.lines().filter_map(one_line)),
            Some("sources") => entries.extend(deb822(&text)),
            _ => {}
        }
    }
    entries
}

/// Parses `deb [option=value …] uri suite component…`.
fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    let suite = words.next()?.to_owned();
    words.find(|w| *w == "main")?;
    let option = |name: &str| {
        options
            .split_whitespace()
            .find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
    };
    Some(Entry {
        archive: Archive {
            uri,
            signed_by: usable_keyring(option("signed-by")),
            trusted: option("trusted") == Some("yes"),
        },
        suites: vec![suite],
    })
}

/// Parses the stanzas of a `.sources` file.
fn deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let has_word = |name: &str, word: &str| {
            field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word))
        };
        let enabled = !field("Enabled").is_some_and(|v| v.eq_ignore_ascii_case("no"));
        if !enabled || !has_word("Types", "deb") || !has_word("Components", "main") {
            continue;
        }
        let (Some(uris), Some(suites)) = (field("URIs"), field("Suites")) else {
            continue;
        };
        entries.extend(uris.split_whitespace().map(|uri| Entry {
            archive: Archive {
                uri: uri.to_owned(),
                signed_by: usable_keyring(field("Signed-By")),
                trusted: field("Trusted").is_some_and(|v| v.eq_ignore_ascii_case("yes")),
            },
            suites: suites.split_whitespace().map(str::to_owned).collect(),
        }));
    }
    entries
}

/// The keyring to check the archive with.
///
/// A key that is embedded in the entry, or a keyring of one suite, need not cover the other suites;
/// Debian's own keyring covers them all, so it goes first whenever the entry is a Debian one.
fn usable_keyring(signed_by: Option<&str>) -> Option<PathBuf> {
    let debian = Path::new(KEYRING);
    if debian.exists() {
        return Some(debian.to_owned());
    }
    signed_by
        .filter(|s| s.starts_with('/'))
        .map(PathBuf::from)
        .filter(|p| p.exists())
}

fn pick(entries: &[Entry], codename: &str) -> Option<Archive> {
    let serves = |e: &&Entry| e.suites.iter().any(|s| s == codename || s == "stable");
    let looks_debian = |e: &&Entry| e.archive.uri.trim_end_matches('/').ends_with("/debian");
    let candidates = || entries.iter().filter(serves);
    candidates()
        .find(looks_debian)
        .or_else(|| candidates().next())
        .map(|e| e.archive.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\n\
        Suites: bookworm bookworm-updates\nComponents: main\n\n\
        Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\n\
        Components: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.example/debian\n\
        Suites: bookworm\nComponents: main\n";

    #[test]
    fn deb822_stanza_of_the_installed_suite_is_picked() {
        let entries = deb822(SOURCES);
        let archive = pick(&entries, "bookworm").unwrap();
        assert_eq!(archive.uri, "http://mirror.example/debian");
        assert_eq!(entries.len(), 2);
    }

    #[test]
    fn one_line_entry_keeps_its_options() {
        let entry =
            one_line("deb [arch=amd64 trusted=yes] http://m.example/d bookworm main").unwrap();
        assert!(entry.archive.trusted);
        assert_eq!(entry.suites, ["bookworm"]);
        let line = entry.archive.source_line("trixie");
        assert!(line.ends_with("http://m.example/d trixie main"), "{line}");
        assert!(line.contains("trusted=yes"), "{line}");
    }

    #[test]
    fn foreign_and_commented_lines_are_ignored() {
        let lines = [
            "# deb http://m.example/debian bookworm main",
            "deb-src http://m.example/debian bookworm main",
            "deb https://m.example/apt cloud contrib",
            "",
            "deb",
        ];
        assert!(lines.iter().all(|l| one_line(l).is_none()));
    }
}
