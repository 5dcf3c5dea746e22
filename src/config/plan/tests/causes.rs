//! What is wrong is told by its cause: nothing false beside it, nothing wrong passed over.

use super::*;

/// A word of a level that is mistyped is no name of a module, which would silence the daemon.
#[test]
fn levels_of_the_log() {
    let log = |words: &str| files(&[&format!("[daemon]\nlog = '{words}'")]).check();
    for good in [
        "off",
        "error",
        "WARN",
        "info",
        "debug",
        "trace",
        "info,hydrant::source=debug",
        " warn , glommio=Error ",
        "hydrant=off",
        "info/clone",
    ] {
        assert_eq!(log(good).unwrap().daemon.log.as_deref(), Some(good), "{good}");
    }
    let expected = "off, error, warn, info, debug or trace, or by module as in \"info,hydrant::source=debug\"";
    for (bad, said) in [
        ("inof", "'inof' is not a level, did you mean 'info'?"),
        ("loud", "'loud' is not a level"),
        ("hydrant", "'hydrant' is not a level"),
        ("info,wran", "'wran' is not a level, did you mean 'warn'?"),
        ("hydrant=inof", "'inof' is not a level, did you mean 'info'?"),
        ("hydrant=", "'' is not a level"),
        ("=", "'=' names no module"),
        ("=info", "'=info' names no module"),
        ("a=b=c", "'b=c' is not a level"),
        ("", "nothing is said"),
        (" , ", "nothing is said"),
        ("/clone", "nothing is said"),
        ("info/a/b", "'info/a/b': "),
    ] {
        let found = log(bad).unwrap_err();
        let line = format!("a.toml:2:7: daemon: log: expected {expected}: {said}");
        assert!(found.len() == 1 && found[0].starts_with(&line), "{bad}: {found:?}");
    }
}

/// What stands under a misspelt key, or in a table line that is wrong, is not missing.
#[test]
fn only_what_is_missing_is_missing() {
    let found = problems(&["[[clone]]\nname = 'vm'\ntable = '0 100 clone m d s 9'"]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(": table: ") && found[0].contains("Region size is not a power of 2: 9"), "{found:?}");
    // A key beside a wrong table is told still.
    let found = problems(&["[[clone]]\nname = 'vm'\ntable = 'x'\ncolour = 3"]);
    assert_eq!(found.len(), 2, "{found:?}");

    for key in ["name", "source", "destination", "metadata"] {
        let typo = &key[..key.len() - 1];
        let found = problems(&[&CLONE.replace(&format!("{key} ="), &format!("{typo} ="))]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].ends_with(&format!("unknown key '{typo}', did you mean '{key}'?")), "{found:?}");
    }
    let found = problems(&["[daemon.metrics_dump]\npaht = '/x'"]);
    assert_eq!(found, ["a.toml:2:1: daemon: metrics_dump: unknown key 'paht', did you mean 'path'?"]);
    // What is not there at all is.
    let found = problems(&["[[clone]]\nnam = 'vm'\nsource = 's'\ncolour = 3\nmetadata = 'm'"]);
    let missing = found.iter().filter(|line| line.contains(": missing: ")).count();
    assert_eq!((found.len(), missing), (3, 1), "{found:?}");
    assert!(found[2].contains(": missing: "), "the causes first: {found:?}");
}

/// One file is one file, however its path is written.
#[test]
fn one_path_twice() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let clone = |name: &str, source: &str, destination: &str, metadata: &str| {
        let (source, destination) = (format!("source='{source}'"), format!("destination='{destination}'"));
        format!("[[clone]]\nname='{name}'\n{source}\n{destination}\nmetadata='{metadata}'\n")
    };
    let check = |text: &str| {
        let file = dir.path().join("a.toml");
        fs::write(&file, text).unwrap();
        check(&[file], false, &RuntimeDir::of_user()).map_err(|problems| problems.lines)
    };
    for (source, destination, metadata, said) in [
        ("s", "s", "m", "destination: it is the source of the clone"),
        ("s", "./x/../s", "m", "destination: it is the source of the clone"),
        ("s", "d", "s", "metadata: it is the source of the clone"),
        ("s", "d", "./d", "metadata: it is the destination of the clone"),
        ("real/s", "link/s", "m", "destination: it is the source of the clone"),
        ("s", "link/d", "real/d", "metadata: it is the destination of the clone"),
    ] {
        let found = check(&clone("a", source, destination, metadata)).unwrap_err();
        assert!(found.len() == 1 && found[0].contains(said), "{destination}: {found:?}");
    }
    let found = check("[[clone]]\nname='t'\ntable='0 8 clone m s ./s 8'\n").unwrap_err();
    assert!(found.len() == 1 && found[0].contains("table: its destination is its source"), "{found:?}");

    for other in ["d", "./x/../d", "x/.././real/../d"] {
        let found = check(&(clone("a", "s", "d", "m") + &clone("b", "s", other, "n"))).unwrap_err();
        assert!(found.len() == 1 && found[0].contains("is in use by clone 'a'"), "{other}: {found:?}");
    }
    let found = check(&(clone("a", "s", "real/d", "m") + &clone("b", "s", "e", "link/d"))).unwrap_err();
    assert!(found.len() == 1 && found[0].contains("metadata: ") && found[0].contains("in use by"), "{found:?}");
    // What only looks alike is fine: a source may be that of many.
    check(&(clone("a", "s", "real/d", "m") + &clone("b", "s", "d", "n"))).unwrap();
    // The URI of an export is no path.
    check(&clone("a", "nbd://h/d", "nbd:/h/d", "m")).unwrap();
}

/// The body of a create call as well.
#[test]
fn one_path_twice_in_a_create_call() {
    let dir = RuntimeDir::of_user();
    let body = |source: &str, destination: &str, metadata: &str| {
        let body = serde_json::json!({
            "name": "vm", "source": source, "destination": destination, "metadata": metadata
        });
        CloneSpec::from_json(body.to_string().as_bytes()).unwrap().into_config(&dir)
    };
    assert!(body("/s", "/d", "/m").is_ok());
    for (destination, metadata) in [("/s", "/m"), ("/x/../s", "/m"), ("/d", "/s"), ("/d", "/./d")] {
        assert_eq!(body("/s", destination, metadata).unwrap_err().0.len(), 1, "{destination} {metadata}");
    }
}

/// Only a regular file is read: a pipe would block, a device never end.
#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
        let (path, runtime) = (path.to_owned(), RuntimeDir::of_user());
        let (tell, told) = std::sync::mpsc::channel();
        let name = path.display().to_string();
        std::thread::spawn(move || drop(tell.send(plan(&[path], false, &runtime))));
        let error = told.recv_timeout(Duration::from_secs(20)).expect("it blocks").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongType, "{error}");
        assert!(error.to_string().contains(&format!("configuration {name} is ")), "{error}");
    }
}

#[test]
fn errors_in_plain_words() {
    for (text, said) in [
        ("[daemon]\ncpus = ['a']", "daemon: cpus: expected the number of a CPU, 0 to 8191, found the text 'a'"),
        ("[daemon]\ncpus = [-1]", "daemon: cpus: expected the number of a CPU, 0 to 8191, found -1"),
        ("[[clone]]\nname = 'a/b'", "name: '/' can't be in a name: use letters, digits, '.', '_' and '-'"),
        ("[[clone]]\nname = ''", "name: a name has 1 to 64 characters"),
        ("[[clone]]\nname = 3", "name: expected a name, found 3"),
        ("[[clone]]\nsource = 'nbds://h/x'", "source: source 'nbds://h/x': TLS"),
        ("[[clone]]\ndestination = ''", "destination: expected a path, found nothing"),
        (
            "[[clone]]\nsize = 0",
            "size: expected a size from 1 byte to 8388607TiB, in bytes or like \"64KiB\", found 0 bytes",
        ),
        ("[[clone]]\nsize = 1\nsize_ = 2", "did you mean 'size'?"),
    ] {
        let found = problems(&[text]);
        assert!(found.iter().any(|line| line.contains(said)), "{text}: {found:?}");
    }
    let table = "[[clone]]\nname = 'vm'\ntable = '''\n0 8 clone m d s 8\n8 8 clone m d s 8\n'''";
    let found = problems(&[table]);
    let said = "table: Invalid format on line 2 of table: a table is one line, that of the whole clone";
    assert!(found.len() == 1 && found[0].ends_with(said), "{found:?}");
}
