//! Programs of this host in a guest: an archive that is joined to the initramfs.
//!
//! A program comes with this host's own loader and libraries, in a directory of their own, so
//! that it runs whatever libraries the guest has.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Cpio;
use crate::daemon::program;
use crate::error::{Error, IoContext, Result};
use crate::process::run_tool;
use crate::scratch::Scratch;

const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// The library that loads parts of its own by absolute paths, and the directory of those.
const VERBS: &str = "libibverbs.so.1";
const VERBS_PROVIDERS: &str = "/usr/lib/x86_64-linux-gnu/libibverbs";
/// Where the guest has them. `usr/bin` gets a script for each.
const DIR: &str = "opt/farbus";

/// An initramfs that also has some of the workspace's programs; itself when there are none.
///
/// # Errors
/// When a program has not been built, or a file cannot be read or written.
pub fn join(initramfs: PathBuf, names: &[String], scratch: &Scratch) -> Result<PathBuf> {
    if names.is_empty() {
        return Ok(initramfs);
    }
    let programs: Vec<PathBuf> = names
        .iter()
        .map(|name| program(name))
        .collect::<Result<_>>()?;
    let joined = scratch.join("initramfs.cpio");
    fs::copy(&initramfs, &joined).context(|| format!("copying {}", initramfs.display()))?;
    let archive = archive(&programs)?;
    let file = fs::File::options().append(true).open(&joined);
    file.and_then(|mut file| file.write_all(&archive))
        .context(|| format!("appending to {}", joined.display()))?;
    Ok(joined)
}

/// The size of these programs of the workspace together, rounded up.
///
/// # Errors
/// When one of them is not built.
pub fn size_mib(names: &[String]) -> Result<u32> {
    let mut bytes = 0;
    for name in names {
        let path = program(name)?;
        let metadata = fs::metadata(&path).context(|| format!("reading {}", path.display()))?;
        bytes += metadata.len();
    }
    Ok(bytes.div_ceil(1 << 20) as u32)
}

/// Packs dynamic programs of this host with all that they need.
///
/// # Errors
/// When a program or one of its libraries cannot be read.
pub fn archive(programs: &[PathBuf]) -> Result<Vec<u8>> {
    let mut libraries = BTreeMap::from([("ld.so".to_owned(), PathBuf::from(LOADER))]);
    let mut cpio = Cpio::new();
    for program in programs {
        let listed = run_tool(Command::new(LOADER).arg("--list").arg(program))?;
        libraries.extend(libraries_in(&String::from_utf8_lossy(&listed)));
        let name = file_name(program)?;
        cpio.file(&format!("{DIR}/{name}"), 0o755, &read(program)?);
        let script = format!(
            "#!/bin/sh\nexec /{DIR}/run/{name} --inhibit-cache --library-path /{DIR}/lib \
             --argv0 {name} /{DIR}/{name} \"$@\"\n"
        );
        cpio.file(&format!("usr/bin/{name}"), 0o755, script.as_bytes());
        // A process is named by what was executed.
        cpio.link(&format!("{DIR}/run/{name}"), "../lib/ld.so");
    }
    if libraries.contains_key(VERBS) {
        add_rdma_provider(&mut cpio)?;
    }
    for (name, path) in &libraries {
        cpio.file(&format!("{DIR}/lib/{name}"), 0o755, &read(path)?);
    }
    Ok(cpio.finish())
}

/// Adds libibverbs' part for soft RoCE, where that library looks for it. A host without it has programs
/// that see no RDMA device in a guest.
fn add_rdma_provider(cpio: &mut Cpio) -> Result<()> {
    let Ok(listing) = fs::read_dir(VERBS_PROVIDERS) else {
        return Ok(());
    };
    for entry in listing.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("librxe-") {
            let target = format!("{VERBS_PROVIDERS}/{name}");
            cpio.file(target.trim_start_matches('/'), 0o755, &read(&entry.path())?);
            cpio.file("etc/libibverbs.d/rxe.driver", 0o644, b"driver rxe\n");
        }
    }
    Ok(())
}

/// The lines "libfoo.so.1 => /path/libfoo.so.1 (0x…)" of the loader's list. The loader itself and the
/// vDSO have no such arrow, or none with a path behind it.
fn libraries_in(list: &str) -> Vec<(String, PathBuf)> {
    let lines = list.lines().filter_map(|line| {
        let (name, target) = line.trim().split_once(" => ")?;
        let path = target.split(" (").next()?.trim();
        (path.starts_with('/') && !name.contains("ld-linux"))
            .then(|| (name.to_owned(), PathBuf::from(path)))
    });
    lines.collect()
}

fn file_name(program: &Path) -> Result<String> {
    let name = program.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| Error::Missing {
        what: "a file name".into(),
        place: program.to_owned(),
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let list = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f32)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f33)\n\
                    \tlibgone.so => not found\n";
        let path = PathBuf::from("/lib/x86_64-linux-gnu/libgcc_s.so.1");
        assert_eq!(libraries_in(list), [("libgcc_s.so.1".to_owned(), path)]);
    }

    #[test]
    fn running_program_is_packed_with_its_libraries() {
        let own = std::env::current_exe().unwrap();
        let bytes = archive(&[own]).unwrap();
        let holds = |what: &str| bytes.windows(what.len()).any(|w| w == what.as_bytes());
        assert!(holds("opt/farbus/lib/libc.so.6\0") && holds("opt/farbus/lib/ld.so\0"));
    }
}
