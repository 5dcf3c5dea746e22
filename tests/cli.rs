//! The command line as a user meets it: the real program, its help texts, its exit statuses.
//!
//! The help texts are in `tests/golden/help/`; after a wanted change run
//! `HYDRANT_GOLDEN=write cargo test --test cli` and look at the difference.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the program with its own, empty runtime directory.
fn hydrant(runtime: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hydrant"))
        .args(words)
        .env("XDG_RUNTIME_DIR", runtime)
        .env_remove("HYDRANT_LOG")
        .env_remove("COLUMNS")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The exit status and what was said, which must be one line on standard error that begins with the program's name.
fn failure(output: &Output) -> (i32, String) {
    let said = text(&output.stderr);
    assert_eq!(text(&output.stdout), "");
    let line = said.strip_prefix("hydrant: ").and_then(|said| said.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("not one line of the program: {said:?}"));
    assert!(!line.contains('\n') && !line.is_empty(), "{said:?}");
    (output.status.code().unwrap(), line.to_owned())
}

#[test]
fn help_is_as_pinned() {
    let temp = tempfile::tempdir().unwrap();
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/help");
    let write = std::env::var_os("HYDRANT_GOLDEN").is_some_and(|value| value == "write");
    let verbs: &[&[&str]] = &[
        &[],
        &["clone"],
        &["serve"],
        &["config"],
        &["config", "check"],
        &["status"],
        &["create"],
        &["list"],
        &["remove"],
        &["finish"],
        &["message"],
        &["suspend"],
        &["resume"],
        &["resize"],
        &["stop"],
        &["meta"],
        &["meta", "check"],
        &["meta", "dump"],
        &["meta", "format"],
        &["meta", "restore"],
        &["meta", "repair"],
        &["meta", "import-dm"],
        &["meta", "export-dm"],
        &["table"],
        &["version"],
        &["demo"],
    ];
    let mut expected_files: Vec<String> = Vec::new();
    let mut wrong = Vec::new();
    for verb in verbs {
        for (flag, kind) in [("-h", "short"), ("--help", "long")] {
            let output = hydrant(temp.path(), &[verb, &[flag][..]].concat());
            assert!(output.status.success(), "{verb:?} {flag}");
            assert_eq!(text(&output.stderr), "");
            let name = [&["hydrant"], *verb, &[kind]].concat().join("-") + ".txt";
            let (file, help) = (golden.join(&name), text(&output.stdout));
            for line in help.lines() {
                assert!(line.chars().count() <= 120, "{name}: a long line: {line}");
            }
            if write {
                fs::write(&file, &help).unwrap();
            } else if fs::read_to_string(&file).unwrap_or_default() != help {
                wrong.push(name.clone());
            }
            expected_files.push(name);
        }
    }
    assert!(wrong.is_empty(), "help texts changed (HYDRANT_GOLDEN=write takes them over): {wrong:?}");
    for entry in fs::read_dir(&golden).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(expected_files.contains(&name), "{name} is of no verb");
    }
}

#[test]
fn version_and_usage() {
    let temp = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| hydrant(temp.path(), words);
    let version = run(&["--version"]);
    assert_eq!(text(&version.stdout), format!("hydrant {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(version.status.code(), Some(0));
    for wrong in [
        &[][..],
        &["bogus"],
        &["clone"],
        &["clone", "--source", "a", "--destination", "b"],
        &["clone", "--source", "a", "--destination", "b", "--metadata", "c", "--region-size", "5"],
        &["status", "a/b"],
        &["status", "--json", "--dm"],
        &["message", "vm"],
        &["message"],
        &["meta"],
        &["meta", "format", "m"],
        &["meta", "format", "--size", "1GiB", "--source", "s", "m"],
        &["meta", "format", "--size", "1G", "m"],
        &["meta", "format", "--size", "1GiB", "--region-size", "5KiB", "m"],
        &["meta", "dump", "--format", "qcow2", "m"],
        &["meta", "repair", "--assume", "perhaps", "m"],
        &["meta", "repair", "--assume", "x=hydrated", "m"],
        &["meta", "import-dm", "image", "--destination", "d"],
        &["meta", "export-dm", "m"],
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert_eq!(text(&output.stdout), "", "{wrong:?}");
        assert!(!output.stderr.is_empty(), "{wrong:?}");
    }
}

#[test]
fn bad_messages_are_usage_errors() {
    let temp = tempfile::tempdir().unwrap();
    let cases = [
        (&["message", "vm", "bogus"][..], "unknown message 'bogus'"),
        (&["message", "vm", "hydration_threshold"], "needs a number"),
        (&["message", "vm", "hydration_threshold", "-1"], "'-1' is not a number"),
        (&["message", "vm", "hydration_threshold 1 2"], "'2' is too much"),
    ];
    for (words, part) in cases {
        let (status, line) = failure(&hydrant(temp.path(), words));
        assert_eq!(status, 2, "{line}");
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn nobody_listens() {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("hydrant/vm.control");
    let named =
        [&["status", "vm"][..], &["status", "vm", "--watch"], &["message", "vm", "enable_hydration"], &["stop", "vm"]];
    for words in named {
        let (status, line) = failure(&hydrant(temp.path(), words));
        assert_eq!(status, 1);
        assert_eq!(line, format!("no daemon is listening at {}; is it running?", socket.display()), "{words:?}");
    }
    for words in [&["status"][..], &["stop"]] {
        let (status, line) = failure(&hydrant(temp.path(), words));
        assert_eq!(status, 1);
        assert!(line.starts_with("no daemon is listening in "), "{line}");
    }
    // A daemon that crashed leaves its socket.
    fs::create_dir(temp.path().join("hydrant")).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    let (status, line) = failure(&hydrant(temp.path(), &["status", "vm"]));
    assert_eq!(status, 1);
    assert!(line.contains("ended without removing its socket"), "{line}");
    // --control goes before the name.
    let other = temp.path().join("other");
    let control = other.to_str().unwrap();
    let (_, line) =
        failure(&hydrant(temp.path(), &["message", "vm", "hydration_threshold", "1", "--control", control]));
    assert!(line.contains(control), "{line}");
}

#[test]
fn configurations_are_checked() {
    let temp = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = temp.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let clone = "[[clone]]\nname = 'vm'\nsource = '/s'\ndestination = '/d'\nmetadata = '/m'\n";
    let (good, daemon) = (write("good.toml", clone), write("daemon.toml", "daemon.control = '/c'\n"));
    let output = hydrant(temp.path(), &["config", "check", &good, &daemon]);
    assert_eq!(text(&output.stderr), "");
    let socket = temp.path().join("hydrant/vm.sock");
    let expected = format!(
        "daemon: 1 clone, control at /c\nclone 'vm': /s to /d, metadata /m, export 'vm' at unix:{}\n",
        socket.display()
    );
    assert_eq!(text(&output.stdout), expected);
    let bad = write("bad.toml", "[[clone]]\nnaem = 'vm'\nsource = 5\n");
    for verb in [&["config", "check"][..], &["serve"], &["serve", "--dry-run"]] {
        let output = hydrant(temp.path(), &[verb, &[&good, &bad]].concat());
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        let (out, said) = (text(&output.stdout), text(&output.stderr));
        if verb[0] == "config" {
            assert!(out.starts_with(&format!("{bad}:2:1: clone 1: unknown key 'naem', did you mean")), "{out}");
            assert_eq!(out.lines().count(), 4, "{out}");
            assert_eq!(said, "hydrant: 4 errors in the configuration\n");
        } else {
            assert_eq!(out, "");
            assert!(said.starts_with(&format!("hydrant: {bad}:2:1: ")) && said.lines().count() == 1, "{said}");
        }
    }
    let (_, line) = failure(&hydrant(temp.path(), &["serve", "/no/such.toml"]));
    assert_eq!(line, "configuration /no/such.toml: No such file or directory");
    assert!(!temp.path().join("hydrant").exists(), "nothing is made for what can't be started");
}

#[test]
fn version_of_every_part() {
    let temp = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| text(&hydrant(temp.path(), words).stdout);
    assert_eq!(run(&["version"]), format!("hydrant {}\n", env!("CARGO_PKG_VERSION")));
    let lines = run(&["version", "--targets"]);
    for line in [
        "engine    clone            v1.0.0\n",
        "metadata  hydrant          v1.0.0\n",
        "metadata  dm-clone         v1.0.0\n",
        "source    nbd ",
    ] {
        assert!(lines.contains(line), "{line}: {lines}");
    }
    let json: serde_json::Value = serde_json::from_str(&run(&["version", "--targets", "--json"])).unwrap();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(json["targets"].as_array().unwrap().len(), lines.lines().count());
    assert_eq!(json["targets"][0], serde_json::json!({"kind": "engine", "name": "clone", "version": "1.0.0"}));
    let json: serde_json::Value = serde_json::from_str(&run(&["version", "--json"])).unwrap();
    assert_eq!(json, serde_json::json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[test]
fn demo_says_where_it_cannot_work() {
    let temp = tempfile::tempdir().unwrap();
    let missing = temp.path().join("missing");
    let (status, line) = failure(&hydrant(temp.path(), &["demo", "--dir", missing.to_str().unwrap()]));
    assert_eq!(status, 1);
    assert!(line.contains("missing"), "{line}");
}
