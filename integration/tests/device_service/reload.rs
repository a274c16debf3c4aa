//! The configuration changes while claims go on.

use farbus_fabric::wire::ListedState;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::process::Kill;

use super::bed::*;

#[test]
fn exports_come_and_go_while_another_is_in_use() {
    let service = Service::start("reload", "", &[memory("keep"), memory("go")].concat());
    let tenant = Tenant::start(&service, "keep");

    service.configure(&[memory("keep"), memory("new")].concat());
    let (status, told) = service.ask("POST", "/v1/reload");

    assert_eq!(status, 200, "{told}");
    assert_eq!(
        (&told["added"][0], &told["removed"][0]),
        (&"new".into(), &"go".into())
    );
    assert_eq!(told["waiting"].as_array().unwrap().len(), 0, "{told}");
    let names: Vec<String> = service.list().iter().map(|e| e.name.to_string()).collect();
    assert_eq!(names, ["keep", "new"]);
    assert!(service.claim("new", "first").is_ok());
    assert!(service.claim("go", "late").is_err());
    tenant.go_on();
    tenant.end();
    service.server.terminate().unwrap();
}

#[test]
fn a_removed_export_that_is_claimed_goes_with_its_claim() {
    let service = Service::start("remove", "", &[memory("a"), memory("b")].concat());
    let tenant = Tenant::start(&service, "a");

    service.configure(&memory("b"));
    service.server.signal(Kill::HangUp).unwrap();
    let retired = service.await_export("a", |export| export["state"] == "draining");
    assert!(
        retired["why"].as_str().unwrap().contains("taken out"),
        "{retired}"
    );
    tenant.go_on();
    let refused = service.claim("a", "late").err().unwrap();
    assert!(refused.to_string().contains("taken out"), "{refused}");

    tenant.end();
    service.await_export("a", |answer| answer["status"] == 404);
    service.server.terminate().unwrap();
}

#[test]
fn a_changed_export_is_opened_anew_once_nobody_has_it() {
    let service = Service::start("change", "", &memory("a"));
    let tenant = Tenant::start(&service, "a");

    service.configure(&memory("a").replace("8MiB", "16MiB"));
    let (_, told) = service.ask("POST", "/v1/reload");
    assert_eq!(
        (&told["changed"][0], &told["waiting"][0]),
        (&"a".into(), &"a".into())
    );
    tenant.go_on();
    assert_eq!(service.export("a")["capacity_bytes"], 8 << 20);

    tenant.end();
    service.await_export("a", |export| export["capacity_bytes"] == 16 << 20);
    assert!(service.claim("a", "next").is_ok());
    service.server.terminate().unwrap();
}

#[test]
fn a_change_that_is_taken_back_in_time_changes_nothing() {
    let service = Service::start("undo", "", &memory("a"));
    let claimed = service.claim("a", "tenant").unwrap();
    service.configure("");
    service.ask("POST", "/v1/reload");
    assert_eq!(service.export("a")["state"], "draining");
    service.configure(&memory("a"));
    service.ask("POST", "/v1/reload");
    assert_eq!(service.export("a")["state"], "claimed");
    drop(claimed);
    assert!(service.claim("a", "next").is_ok());
    service.server.terminate().unwrap();
}

#[test]
fn a_broken_file_changes_nothing_and_says_why() {
    let mut service = Service::start("broken", "", &memory("a"));
    service.configure("[[export]]\nname = \"b\"\nsoft-nvme = { size = \"1GB\" }\n");

    let (status, problem) = service.ask("POST", "/v1/reload");

    assert_eq!(
        (status, &problem["type"]),
        (422, &"/problems/invalid-configuration".into())
    );
    let detail = problem["detail"].as_str().unwrap();
    for word in ["config.toml:7:", "1GB", "such as \"1GiB\""] {
        assert!(detail.contains(word), "{detail}");
    }
    service.server.check_running().unwrap();
    assert!(service.claim("a", "still there").is_ok());
    service.server.terminate().unwrap();
}

#[test]
fn the_reload_command_ends_when_it_is_done_and_tells_what_came_of_it() {
    let service = Service::start("command", "", &memory("a"));
    let config = service.scratch.join("config.toml").display().to_string();
    let reload = |more: &[&str]| {
        let arguments = [&["reload", "--config", &config], more].concat();
        let ended = Daemon::run("farbus-device-server", &arguments, Deadline::secs(30)).unwrap();
        (ended.status.code(), ended.stdout, ended.stderr)
    };

    service.configure(&memory("b"));
    let done = reload(&[]);
    assert_eq!(
        (done.0, done.1.as_str()),
        (Some(0), "added: b\nremoved: a"),
        "{done:?}"
    );
    // At once: nobody has to wait for it.
    let names: Vec<String> = service.list().iter().map(|e| e.name.to_string()).collect();
    assert_eq!(names, ["b"]);
    assert_eq!(reload(&[]).1, "nothing has changed");

    service.configure("[[export]]\nname = \"c\"\nsoft-nvme = { size = \"1GB\" }\n");
    let socket = service.socket().display().to_string();
    // Whoever finds that the file is wrong, this or the service.
    for more in [&[][..], &["--admin-socket", &socket]] {
        let (code, _, stderr) = reload(more);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("config.toml:7:"), "{stderr}");
    }

    service.configure(&memory("b"));
    service.server.terminate().unwrap();
    let (code, _, stderr) = reload(&[]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("admin.sock"), "{stderr}");
}

#[test]
fn what_needs_a_restart_is_named() {
    let service = Service::start("restart", "poll = \"never\"", &memory("a"));
    service.configure(&memory("a"));
    let (status, told) = service.ask("POST", "/v1/reload");
    assert_eq!((status, &told["restart_needed"][0]), (200, &"poll".into()));
    service.server.terminate().unwrap();
}

/// A file that is not there yet, as a disk that comes later.
#[test]
fn one_bad_export_stops_no_other_and_comes_when_it_can() {
    let scratch = farbus_integration::scratch::Scratch::new("late").unwrap();
    let path = scratch.join("late.img");
    let late = format!(
        "[[export]]\nname = \"late\"\nsoft-nvme = {{ path = \"{}\" }}\n",
        path.display()
    );
    let service = Service::start("bad", "", &[late, memory("good")].concat());
    let listed = service.list();
    assert_eq!(listed[1].name.as_str(), "late");
    assert_eq!(listed[1].state, ListedState::Failed);
    assert!(
        listed[1].why.as_str().contains("late.img"),
        "{}",
        listed[1].why
    );
    assert!(service.claim("good", "tenant").is_ok());
    let refused = service.claim("late", "tenant").err().unwrap();
    assert!(refused.should_reconnect(), "{refused}");

    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    service.await_export("late", |export| export["state"] == "free");
    assert!(service.claim("late", "tenant").is_ok());
    service.server.terminate().unwrap();
}
