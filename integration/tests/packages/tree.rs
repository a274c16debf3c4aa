//! The Debian packages in a fresh tree of this machine's Debian: what they install, that it runs there
//! and verifies, and that a purge leaves nothing. `ci/package` makes the packages.

use farbus_integration::report::TestResult;
use farbus_integration::skip;
use farbus_integration::tools::debian::DebianTree;

use crate::{AGENT, SERVER, obstacle, packages};

/// `systemd-analyze security` shows a tenth of this.
const MOST_EXPOSURE: u32 = 29;

#[track_caller]
fn assert_has(tree: &DebianTree, files: &[&str]) {
    for file in files {
        let path = tree.path().join(file.trim_start_matches('/'));
        // Links are absolute, and lead elsewhere from out here.
        let found = path.symlink_metadata();
        assert!(found.is_ok(), "{file} is not installed");
    }
}

#[test]
fn packages_install_run_verify_and_leave_nothing() -> TestResult {
    if let Some(obstacle) = obstacle() {
        skip!("{obstacle}");
    }
    let tree = DebianTree::make_for(&packages()?)?;
    let before = tree.files()?;

    tree.run("dpkg -i /tmp/*.deb >&2")?;

    files_are_in_their_places(&tree)?;
    programs_run(&tree)?;
    units_are_sound(&tree)?;
    upgrade_keeps_what_the_operator_wrote(&tree)?;
    removal_keeps_the_configuration_and_purge_nothing(&tree, &before)
}

fn files_are_in_their_places(tree: &DebianTree) -> TestResult {
    assert_has(
        tree,
        &[
            "/usr/bin/farbus",
            "/usr/bin/farbus-compute-agent",
            "/usr/bin/farbus-device-server",
            "/usr/share/qemu/vhost-user/50-farbus-vhost-user-blk.json",
            "/usr/share/man/man1/farbus.1.gz",
            "/usr/share/man/man1/farbus-attach.1.gz",
            "/usr/share/man/man1/farbus-compute-agent.1.gz",
            "/usr/share/man/man1/farbus-device-server.1.gz",
            "/usr/share/man/man1/farbus-device-server-export.1.gz",
            "/usr/share/bash-completion/completions/farbus",
            "/usr/share/zsh/vendor-completions/_farbus",
            "/usr/share/fish/vendor_completions.d/farbus.fish",
            "/usr/share/doc/farbus-compute-agent/copyright",
            "/usr/share/doc/farbus-compute-agent/monitoring/alerts.yml",
            "/usr/share/doc/farbus-compute-agent/runbooks/agent-down.md",
            "/usr/share/doc/farbus-device-server/copyright",
            "/usr/lib/tmpfiles.d/farbus-compute-agent.conf",
            "/usr/lib/sysusers.d/farbus-device-server.conf",
        ],
    );
    tree.run("bash -n /usr/share/bash-completion/completions/farbus; gzip -t /usr/share/man/man1/farbus*")?;
    let conffiles =
        tree.run("dpkg-query -W -f '${Conffiles}\\n' farbus-compute-agent farbus-device-server")?;
    for file in ["/etc/farbus/agent.toml", "/etc/farbus/device-server.toml"] {
        assert!(
            conffiles.contains(file),
            "{file} is no conffile:\n{conffiles}"
        );
    }
    for account in ["farbus", "farbus-worker"] {
        let found = tree.run(&format!(
            "getent passwd {account} && getent group {account}"
        ))?;
        assert!(found.contains(":/nonexistent:/usr/sbin/nologin"), "{found}");
    }
    let configuration = tree.run("grep ^worker-user /etc/farbus/agent.toml")?;
    assert_eq!(configuration.trim(), "worker-user = \"farbus-worker\"");
    // What the description for management software names is there.
    let description = tree.run("cat /usr/share/qemu/vhost-user/50-farbus-vhost-user-blk.json")?;
    let description: serde_json::Value = serde_json::from_str(&description)?;
    assert_eq!(description["binary"], "/usr/bin/farbus-compute-agent");
    let changed = tree.run("dpkg --verify farbus-compute-agent farbus-device-server")?;
    assert_eq!(changed, "");
    Ok(())
}

/// That they start at all means that their libraries are among the packages' dependencies.
fn programs_run(tree: &DebianTree) -> TestResult {
    let version = env!("CARGO_PKG_VERSION");
    for program in ["farbus", AGENT, SERVER] {
        let said = tree.run(&format!("{program} --version"))?;
        assert_eq!(said, format!("{program} {version}\n"));
    }
    let said = tree.run("farbus-device-server serve --check")?;
    assert_eq!(said, "/etc/farbus/device-server.toml: ok\n");
    let said = tree.run("farbus-compute-agent --print-capabilities")?;
    assert!(said.contains("\"type\""), "{said}");
    Ok(())
}

fn units_are_sound(tree: &DebianTree) -> TestResult {
    for name in [AGENT, SERVER] {
        // Findings of units that are not ours are none of ours.
        let said = tree.run(&format!(
            "systemd-analyze --man=no verify {name}.service 2>&1 | grep {name} || true"
        ))?;
        assert_eq!(said, "");
        tree.run(&format!("systemd-analyze --man=no verify {name}.service"))?;
        let exposure = tree.run(&format!(
            "systemd-analyze security --offline=true --threshold={MOST_EXPOSURE} --no-pager {name}.service"
        ))?;
        println!("{}", exposure.lines().last().unwrap_or_default());
        assert_has(
            tree,
            &[&format!(
                "/etc/systemd/system/multi-user.target.wants/{name}.service"
            )],
        );
    }
    Ok(())
}

fn upgrade_keeps_what_the_operator_wrote(tree: &DebianTree) -> TestResult {
    tree.run("echo '# mine' >>/etc/farbus/agent.toml; dpkg -i /tmp/*.deb >&2")?;
    let kept = tree.run("tail -n 1 /etc/farbus/agent.toml")?;
    assert_eq!(kept, "# mine\n");
    Ok(())
}

fn removal_keeps_the_configuration_and_purge_nothing(
    tree: &DebianTree,
    before: &[String],
) -> TestResult {
    // What a daemon leaves behind.
    tree.run("mkdir -p /var/lib/farbus /run/farbus/attachments; touch /var/lib/farbus/state")?;
    tree.run("dpkg -r farbus-compute-agent farbus-device-server >&2")?;
    assert_has(tree, &["/etc/farbus/agent.toml", "/var/lib/farbus/state"]);
    assert!(!tree.path().join("usr/bin/farbus").exists());

    tree.run("dpkg -P farbus-compute-agent farbus-device-server >&2")?;

    let after = tree.files()?;
    let left: Vec<&String> = after.iter().filter(|path| !before.contains(path)).collect();
    let gone: Vec<&String> = before.iter().filter(|path| !after.contains(path)).collect();
    assert!(
        left.is_empty() && gone.is_empty(),
        "left: {left:?}, gone: {gone:?}"
    );
    Ok(())
}
