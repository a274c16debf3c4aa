//! What a configuration may say, and what is said of one that is wrong.

use std::time::Duration;

use farbus_vfio::soft_nvme::SoftNvmeConfig;
use farbus_vfio::sysfs::ClassCode;
use proptest::prelude::*;

use super::*;
use crate::sources::{Count, Selector, Source};

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("test.toml"))
}

#[test]
fn every_kind_of_export_is_understood() {
    let config = parse(
        r#"
        [server]
        listen = "10.0.0.5:7420"
        insecure = true
        admin-socket = "/run/x.sock"
        state-dir = "/run/x"
        provider = "tcp"
        rdma-device = "mlx5_0"
        gid-index = 3
        poll = "never"
        drain-seconds = 60

        [[export]]
        name = "disk0"
        soft-nvme = { path = "/srv/disk.img", size = "1GiB", block-size = 4096, serial = "S", queues = 4 }

        [[export]]
        name = "disk1"
        pci = "0000:01:00.0"
        bind = true

        [[export]]
        name = "fast"
        match = { class = "nvme", vendor-id = "1b36", device-id = "0010" }
        count = 2
        bind = true

        [[export]]
        name = "all"
        match = { serial = "X" }
        count = "all"

        [[export]]
        name = "vf"
        sriov = { pci = "0000:02:00.0", functions = 4 }

        [[export]]
        name = "other"
        vfio-user-device = "/run/other.sock"

        limits = { iops = 100 }

        [[export]]
        name = "shared"
        soft-nvme = { path = "/srv/shared.img" }
        limits = { iops = 10000, bytes-per-second = "1GiB" }
        [[export.slice]]
        name = "a"
        offset = "0"
        size = "512MiB"
        limits = { iops = 5000 }
        [[export.slice]]
        name = "b"
        namespace = 2

        [[export]]
        name = "null"
        soft-nvme = { backing = "null", size = 1048576 }
        "#,
    )
    .unwrap();
    assert_eq!(config.server.drain, Duration::from_secs(60));
    assert_eq!(config.server.listen, "10.0.0.5:7420");
    assert_eq!(config.server.poll, Polling::Never);
    assert_eq!(config.server.differences(&Server::default()).len(), 9);
    let sources: Vec<_> = config.exports.iter().map(|e| e.order.source()).collect();
    let soft = SoftNvmeConfig {
        size: Some(1 << 30),
        block_size: 4096,
        serial: Some("S".into()),
        queues: 4,
        ..SoftNvmeConfig::new("/srv/disk.img")
    };
    assert_eq!(*sources[0], Source::SoftNvme(soft));
    let selector = Selector {
        class: Some(ClassCode::NVME),
        vendor: Some(0x1b36),
        device: Some(0x0010),
        serial: None,
    };
    assert_eq!(
        *sources[2],
        Source::Match {
            selector,
            count: Count::Exactly(2),
            bind: true
        }
    );
    assert!(matches!(
        sources[3],
        Source::Match {
            count: Count::All,
            bind: false,
            ..
        }
    ));
    assert!(matches!(sources[4], Source::Sriov { count: 4, .. }));
    assert_eq!(*sources[7], Source::SoftNvme(SoftNvmeConfig::null(1 << 20)));
    let name = ExportName::new("shared").unwrap();
    let slices = ["name=a,size=512MiB,iops=5000", "name=b,namespace=2"];
    let shared = Order::new(sources[6].clone(), Some(name))
        .and_then(|order| order.with_slices(slices.map(|slice| slice.parse().unwrap()).into()))
        .unwrap()
        .with_limits("iops=10000,bytes-per-second=1GiB".parse().unwrap());
    assert_eq!(config.exports[6].order, shared);
}

#[test]
fn an_empty_file_is_a_server_without_exports() {
    let config = parse("").unwrap();
    assert_eq!(config.server, Server::default());
    assert!(config.exports.is_empty());
}

/// A wrong file, the line that is named, and what is said of it.
const WRONG: &[(&str, usize, &str)] = &[
    ("x", 1, ""),
    ("[servre]", 1, "unknown field `servre`"),
    ("[server]\nlisten = 7", 2, "expected a string"),
    ("[server]\nlisten = \"host\"", 2, "write HOST:PORT"),
    ("[server]\ncolour = 1", 2, "unknown field `colour`"),
    ("[server]\nadmin-socket = \"x\"", 2, "begin it with /"),
    ("[server]\nprovider = \"smoke\"", 2, "smoke"),
    ("[server]\npoll = \"often\"", 2, "often"),
    ("[server]\ndrain-seconds = 3601", 2, "write 0 to 3600"),
    ("[server]\ndrain-seconds = \"5s\"", 2, "without quotes"),
    ("[server]\ngid-index = 256", 2, "256"),
    (
        "[[export]]\npci = \"0000:01:00.0\"",
        1,
        "missing field `name`",
    ),
    (
        "[[export]]\nname = \"a b\"\npci = \"0000:01:00.0\"",
        2,
        "not allowed in an export name",
    ),
    ("[[export]]\nname = \"a\"", 2, "has no source; add pci"),
    (
        "[[export]]\nname = \"a\"\npci = \"nonsense\"",
        3,
        "nonsense",
    ),
    (
        "[[export]]\nname = \"a\"\npci = \"0000:01:00.0\"\nvfio-user-device = \"/x\"",
        4,
        "both pci and vfio-user-device",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"x\"",
        3,
        "begin it with /",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\nbind = true",
        4,
        "goes with pci or match",
    ),
    (
        "[[export]]\nname = \"a\"\npci = \"0000:01:00.0\"\ncount = 2",
        4,
        "goes with match",
    ),
    (
        "[[export]]\nname = \"a\"\nmatch = {}",
        3,
        "matches every function",
    ),
    (
        "[[export]]\nname = \"a\"\nmatch = { class = \"disk\" }",
        3,
        "write \"nvme\"",
    ),
    (
        "[[export]]\nname = \"a\"\nmatch = { vendor-id = \"0x1b36\" }",
        3,
        "four hexadecimal digits",
    ),
    (
        "[[export]]\nname = \"a\"\nmatch = { class = \"nvme\" }\ncount = 0",
        4,
        "1 to 65535",
    ),
    (
        "[[export]]\nname = \"a\"\nmatch = { class = \"nvme\" }\ncount = \"some\"",
        4,
        "\"all\"",
    ),
    (
        "[[export]]\nname = \"a\"\nsriov = { pci = \"0000:01:00.0\", functions = 0 }",
        3,
        "1 to 65535",
    ),
    (
        "[[export]]\nname = \"a\"\nsriov = { pci = \"0000:01:00.0\" }",
        3,
        "missing field `functions`",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { size = \"1GiB\" }",
        3,
        "add path=FILE",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { path = \"x\" }",
        3,
        "begin it with /",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { path = \"/x\", size = \"1GB\" }",
        3,
        "\"1GB\" is not a size",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { path = \"/x\", size = -1 }",
        3,
        "negative",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { path = \"/x\", block-size = 513 }",
        3,
        "use 512 or 4096",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { backing = \"memory\" }",
        3,
        "add size=",
    ),
    (
        "[[export]]\nname = \"a\"\nsoft-nvme = { backing = \"memory\", size = 512, path = \"/x\" }",
        3,
        "leave path out",
    ),
    (
        "[[export]]\nname = \"a/b\"\nvfio-user-device = \"/x\"",
        2,
        "only names of slices",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\nlimits = { iops = 0 }",
        4,
        "",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\nlimits = { iops-burst = 5 }",
        4,
        "without iops",
    ),
    (
        "[[export]]\nname = \"a\"\nsriov = { pci = \"01:00.0\", functions = 2 }\n[[export.slice]]\nname = \"s\"",
        2,
        "several functions",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\n[[export.slice]]\nname = \"s/t\"",
        5,
        "slash",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\n[[export.slice]]\nname = \"s\"\n[[export.slice]]\nname = \"s\"",
        2,
        "two exports are named s",
    ),
    (
        "[[export]]\nname = \"a\"\nvfio-user-device = \"/x\"\n\n[[export]]\nname = \"a\"\nvfio-user-device = \"/y\"",
        6,
        "two exports are named a",
    ),
    (
        "[[export]]\nname = \"a\"\npci = \"01:00.0\"\n\n[[export]]\nname = \"b\"\npci = \"0000:01:00.0\"",
        6,
        "given twice",
    ),
];

#[test]
fn what_is_wrong_is_told_with_its_line_and_what_helps() {
    for (text, line, said) in WRONG {
        let error = parse(text).unwrap_err();
        let ConfigError::Wrong { line: at, what, .. } = &error else {
            panic!("{text:?} gave {error}");
        };
        assert!(at == line && what.contains(said), "{text:?} gave {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

#[test]
fn the_message_names_the_file_and_the_text_of_the_line() {
    let error = parse("[server]\n  listen = \"host\"").unwrap_err();
    assert_eq!(
        error.to_string(),
        "test.toml:2: `listen = \"host\"`: \"host\" is not an address and port; write HOST:PORT"
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/x.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/x.toml"), "{error}");
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,80}", cut in 0..400_usize) {
        let _ = parse(&text);
        let all: String = WRONG.iter().map(|(text, ..)| *text).collect();
        // All of it is ASCII.
        let beginning = &all[..cut.min(all.len())];
        let _ = parse(&format!("{beginning}{text}"));
    }
}
