//! Completions and manual pages.

use vmm_sys_util::tempdir::TempDir;

use crate::standin::{Ended, farbus};

#[test]
fn completions_know_the_commands_without_an_agent() {
    for shell in ["bash", "zsh", "fish"] {
        let ended = Ended::of(farbus(&["completions", shell]));
        assert_eq!(ended.code, 0, "{ended:?}");
        for word in ["attach", "min-capacity", "doctor"] {
            assert!(ended.stdout.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn manual_pages_are_made_of_all_commands_that_are_for_people() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path();

    let ended = Ended::of(farbus(&["man", path.to_str().unwrap()]));

    assert_eq!(ended.code, 0, "{ended:?}");
    for page in [
        "farbus.1",
        "farbus-attach.1",
        "farbus-top.1",
        "farbus-compute-agent.1",
        "farbus-compute-agent-attach.1",
    ] {
        let text = std::fs::read_to_string(path.join(page)).unwrap();
        assert!(text.contains(".SH NAME"), "{page}");
    }
    assert!(!path.join("farbus-man.1").exists());
}
