//! The commands on a made-up host: what they print, what they refuse, and with which exit code.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use clap::Parser;
use farbus_device_server::cli::{Cli, Failure};
use farbus_vfio::sysfs::fake::{FakeFunction, FakeHost};

const NVME: &str = "0000:01:00.0";

fn host_with_nvme() -> FakeHost {
    let host = FakeHost::new();
    let nvme = FakeFunction {
        group: Some(12),
        ..FakeFunction::default()
    };
    host.function(NVME, &nvme);
    host
}

/// Runs a command line; its exit code and what it printed.
fn run(host: &FakeHost, arguments: &[&str]) -> Result<(u8, String), Failure> {
    let program = ["farbus-device-server"].iter();
    let cli = Cli::try_parse_from(program.chain(arguments)).unwrap();
    let mut out = Vec::new();
    let code = cli.run_on(&host.host(), &mut out)?;
    Ok((code, String::from_utf8(out).unwrap()))
}

/// Runs `export` with a port of its own, and returns its exit code and message: each of these
/// is refused.
fn refused(host: &FakeHost, arguments: &[&str]) -> (u8, String) {
    let state_dir = host.state_dir();
    let common = [
        "export",
        "--listen",
        "127.0.0.1:0",
        "--state-dir",
        state_dir.to_str().unwrap(),
    ];
    let failure = run(host, &[&common[..], arguments].concat()).unwrap_err();
    (failure.exit_code(), failure.message())
}

fn mount(host: &FakeHost) {
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.file(
        "proc/1/mountinfo",
        "22 1 259:0 / /var rw - ext4 /dev/nvme0n1 rw\n",
    );
}

#[test]
fn list_shows_each_function_and_whether_it_can_be_exported() {
    let host = host_with_nvme();
    let bridge = FakeFunction {
        class: 0x06_04_00,
        driver: Some("pcieport"),
        ..FakeFunction::default()
    };
    host.function("0000:00:01.0", &bridge);
    let (code, text) = run(&host, &["list"]).unwrap();
    assert_eq!(code, 0);
    assert_eq!(
        text,
        "ADDRESS       CLASS                   ID         DRIVER    GROUP  NUMA  RESET    VFS  ENGINE  EXPORTABLE\n\
         0000:00:01.0  060400 PCI bridge       1b36:0010  pcieport  -      -     flr,bus  -    -       no: bridge\n\
         0000:01:00.0  010802 NVMe controller  1b36:0010  nvme      12     -     flr,bus  -    nvme    yes\n"
    );
}

#[test]
fn list_says_below_the_table_what_is_in_the_way_and_what_helps() {
    let host = host_with_nvme();
    mount(&host);
    let (_, text) = run(&host, &["list"]).unwrap();
    let below = "\n\nin-use: 0000:01:00.0\n  it is in use: /dev/nvme0n1 is mounted on /var\n  \
                 -> unmount it (umount /var)\n";
    assert!(text.ends_with(below), "{text}");
}

#[test]
fn list_as_json_has_everything() {
    let host = host_with_nvme();
    mount(&host);
    let (_, text) = run(&host, &["list", "--json"]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let nvme = &json[0];
    assert_eq!(nvme["address"], NVME);
    assert_eq!(nvme["class_name"], "NVMe controller");
    assert_eq!(nvme["exportable"], false);
    assert_eq!(nvme["engine"], "nvme");
    assert_eq!(nvme["iommu_group"], 12);
    assert_eq!(nvme["obstacles"][0]["kind"], "in-use");
    assert_eq!(nvme["obstacles"][0]["remedy"], "unmount it (umount /var)");
    assert_eq!(nvme["users"][0]["at"], "/var");
}

#[test]
fn doctor_without_iommu_ends_with_5_and_the_remedy() {
    let host = FakeHost::new();
    host.function(NVME, &FakeFunction::default());
    let (code, text) = run(&host, &["doctor"]).unwrap();
    assert_eq!(code, 5);
    assert!(
        text.starts_with("problem  iommu: there is no IOMMU"),
        "{text}"
    );
    assert!(text.contains("         -> switch the IOMMU on"), "{text}");
    assert!(
        text.ends_with("cannot work; see the problems above.\n"),
        "{text}"
    );
}

#[test]
fn doctor_on_a_good_host_ends_with_0() {
    let host = host_with_nvme();
    host.file("dev/vfio/vfio", "");
    host.file(
        "proc/interrupts",
        " 24: 1 IR-PCI-MSIX-0000:01:00.0 0-edge nvme0q0\n",
    );
    host.file("proc/self/status", "CapEff:\t000001ffffffffff\n");
    let (code, text) = run(&host, &["doctor", "--pci", NVME]).unwrap();
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("ok       functions: 0000:01:00.0 can be exported"),
        "{text}"
    );
}

#[test]
fn doctor_as_json_says_the_same() {
    let host = FakeHost::new();
    let (code, text) = run(&host, &["doctor", "--json"]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code, 5);
    assert_eq!(json["can_export"], false);
    assert_eq!(json["findings"][0]["check"], "iommu");
    assert_eq!(json["findings"][0]["level"], "problem");
}

#[test]
fn a_mounted_disk_is_refused_with_3_and_where_it_is_mounted() {
    let host = host_with_nvme();
    mount(&host);
    let (code, message) = refused(&host, &["--bind", "--pci", NVME]);
    assert_eq!(code, 3);
    assert!(
        message.contains("/dev/nvme0n1 is mounted on /var"),
        "{message}"
    );
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
}

#[test]
fn without_bind_the_driver_is_named_and_the_option() {
    let (code, message) = refused(&host_with_nvme(), &["--pci", NVME]);
    assert_eq!(code, 3);
    assert!(message.contains("bound to nvme"), "{message}");
    assert!(message.contains("--bind"), "{message}");
}

#[test]
fn a_function_that_is_not_there_is_refused_with_3() {
    let (code, message) = refused(&host_with_nvme(), &["--pci", "0000:09:00.0"]);
    assert_eq!(code, 3);
    assert!(
        message.contains("no PCI function 0000:09:00.0"),
        "{message}"
    );
}

#[test]
fn a_function_that_cannot_be_opened_goes_back_to_its_driver() {
    let host = host_with_nvme();
    // It is bound on the made-up host only, so that opening it fails.
    let (code, message) = refused(&host, &["--bind", "--pci", NVME]);
    assert_eq!(code, 3, "{message}");
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
    let record = std::fs::read_to_string(host.state_dir().join("bindings.json")).unwrap();
    assert!(!record.contains(NVME), "{record}");
}

#[test]
fn two_functions_of_one_group_are_not_exported_together() {
    let host = FakeHost::new();
    for address in [NVME, "0000:01:00.1"] {
        let bound = FakeFunction {
            group: Some(12),
            driver: Some("vfio-pci"),
            ..FakeFunction::default()
        };
        host.function(address, &bound);
    }
    let (code, message) = refused(&host, &["--pci", NVME, "--pci", "0000:01:00.1"]);
    assert_eq!(code, 3);
    assert!(
        message.starts_with("0000:01:00.0 and 0000:01:00.1 are both in IOMMU group 12"),
        "{message}"
    );
}

#[test]
fn more_virtual_functions_than_there_can_be_are_refused_with_the_limit() {
    let host = host_with_nvme();
    let directory = format!("sys/bus/pci/devices/{NVME}");
    host.file(&format!("{directory}/sriov_totalvfs"), "4\n");
    host.file(&format!("{directory}/sriov_numvfs"), "0\n");
    let (code, message) = refused(&host, &["--sriov", "0000:01:00.0,vfs=5"]);
    assert_eq!(code, 3);
    assert!(message.contains("it offers 1 to 4"), "{message}");
}

#[test]
fn orders_that_do_not_go_together_are_refused_with_2() {
    let host = host_with_nvme();
    for (arguments, text) in [
        (&["--bind"][..], "nothing to export"),
        (&["--bind", "--soft-nvme", "path=x,name=a"], "no --pci"),
        (
            &["--soft-nvme", "path=x"],
            "the software drive x has no name",
        ),
        (
            &["--vfio-user-device", "path=x"],
            "the vfio-user device x has no name",
        ),
        (
            &[
                "--soft-nvme",
                "path=x,name=a",
                "--soft-nvme",
                "path=y,name=a",
            ],
            "two exports are named a",
        ),
        (
            &["--pci", NVME, "--pci", "01:00.0,name=b"],
            "0000:01:00.0 is given twice",
        ),
        (
            &["--pci", NVME, "--soft-nvme", "path=x,name=a", "--name", "b"],
            "there are 2",
        ),
        (
            &["--soft-nvme", "path=x,name=a", "--name", "b"],
            "name the same export",
        ),
    ] {
        let (code, message) = refused(&host, arguments);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(text), "{message}");
    }
}
