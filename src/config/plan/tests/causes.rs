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
