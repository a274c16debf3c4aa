//! Configurations that are refused before anything is done.

use farbus_integration::daemon::{Daemon, Ended};
use farbus_integration::deadline::Deadline;
use farbus_integration::scratch::Scratch;

fn serve(scratch: &Scratch, config: &str, arguments: &[&str]) -> Ended {
    let path = scratch.join("config.toml");
    std::fs::write(&path, config).unwrap();
    let path = path.display().to_string();
    let common = ["serve", "--config", &path];
    let all = [&common[..], arguments].concat();
    Daemon::run("farbus-device-server", &all, Deadline::secs(30)).unwrap()
}

#[test]
fn a_wrong_configuration_is_refused_with_line_and_remedy() {
    let scratch = Scratch::new("wrong").unwrap();
    let config = "[[export]]\nname = \"a\"\nsoft-nvme = { path = \"disk.img\" }\n";
    for arguments in [&[][..], &["--check"]] {
        let ended = serve(&scratch, config, arguments);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        for word in ["config.toml:3:", "disk.img", "begin it with /"] {
            assert!(ended.stderr.contains(word), "{}", ended.stderr);
        }
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn a_check_says_what_would_be_exported_and_does_nothing() {
    let scratch = Scratch::new("check").unwrap();
    let disk = scratch.join("disk.img");
    let config = format!(
        "[[export]]\nname = \"a\"\nsoft-nvme = {{ path = \"{}\", size = \"1MiB\" }}\n",
        disk.display()
    );
    let ended = serve(&scratch, &config, &["--check"]);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("a: soft-nvme"), "{}", ended.stdout);
    assert!(!disk.exists());
}

#[test]
fn an_open_address_needs_a_word_and_a_socket_that_is_in_use_is_refused() {
    let scratch = Scratch::new("refused").unwrap();
    let ended = serve(&scratch, "[server]\nlisten = \"0.0.0.0:0\"\n", &[]);
    assert_eq!(ended.status.code(), Some(4), "{ended:?}");
    assert!(ended.stderr.contains("insecure = true"), "{}", ended.stderr);

    let socket = scratch.join("admin.sock");
    let _taken = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let config = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nadmin-socket = \"{}\"\n",
        socket.display()
    );
    let ended = serve(&scratch, &config, &[]);
    assert_eq!(ended.status.code(), Some(4), "{ended:?}");
    assert!(ended.stderr.contains("admin.sock"), "{}", ended.stderr);
}
