//! The examples in configs/: each is right, and each is started, with its devices replaced by files of the test.

use super::harness::*;
use std::fs;
use std::path::{Path, PathBuf};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

/// An example with each first text replaced by the second one; both must be of use.
fn example(name: &str, replace: &[(&str, String)]) -> String {
    let mut text = fs::read_to_string(configs().join(name)).unwrap();
    for (from, to) in replace {
        assert!(text.contains(from), "{name}: there is no '{from}'");
        text = text.replace(from, to);
    }
    let keys = text.lines().filter(|line| !line.starts_with('#'));
    for line in keys {
        for word in ["/dev/sd", "/dev/nv", "/dev/vg", "/var/lib", "/run/hydrant", "backup.example", ":10809"] {
            assert!(!line.contains(word), "{name}: not replaced: {line}");
        }
    }
    text
}

/// The text of a path, as it is put into a file.
fn of(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().into()
}

/// Every file there is right, has a test here, and is commented.
#[test]
fn each_is_right() {
    let bench = Bench::new();
    let mut names = Vec::new();
    for entry in fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "service") {
            // They have their tests in service.rs.
            continue;
        }
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_hydrant"))
            .args(["config", "check"])
            .arg(&path)
            .env("XDG_RUNTIME_DIR", bench.runtime())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with('#') && text.lines().filter(|line| line.starts_with('#')).count() >= 5);
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    let tested = ["appliance.toml", "local-to-nvme.toml", "metadata-on-another-disk.toml", "nbd-to-nvme.toml"];
    assert_eq!(names, tested);
}

#[test]
fn local_to_nvme() {
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let config = example(
        "local-to-nvme.toml",
        &[
            ("/dev/sdb", of(&source)),
            ("/dev/nvme0n1", of(bench.copy())),
            ("/var/lib/hydrant/disk.meta", of(bench.meta())),
        ],
    );
    let mut daemon = Daemon::serve(&bench, &config);
    // It ends by itself.
    let (status, log) = daemon.end_within(std::time::Duration::from_secs(60));
    assert!(status.success(), "{log}");
    assert_same_files(&bench.copy(), &source);
}

#[test]
fn nbd_to_nvme() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 8M");
    let config = example(
        "nbd-to-nvme.toml",
        &[
            ("nbd://backup.example:10809/vm1", server.uri()),
            ("/dev/vg/vm1", of(bench.copy())),
            ("/var/lib/hydrant/vm1.meta", of(bench.meta())),
            ("/run/hydrant/vm1.sock", of(bench.socket("x.sock"))),
        ],
    );
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving NBD");
    let uri = format!("nbd+unix:///vm1?socket={}", bench.socket("x.sock").display());
    nbdsh(&uri, "h = connect(); assert h.pread(8, 4096) == (4096).to_bytes(8, 'big')");
    daemon.wait_status_of("vm1", "hydrated", |status| status.is_complete());
    daemon.stop();
    assert_same(&bench.copy(), &pattern(8 * MIB));
}

#[test]
fn appliance() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 8M");
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut replace = vec![
        ("tcp:127.0.0.1:10809", format!("tcp:127.0.0.1:{port}")),
        ("/run/hydrant/metrics.json", of(bench.path("metrics.json"))),
        ("/var/lib/hydrant", of(bench.dir())),
        ("/dev/vg", of(bench.dir())),
    ];
    let (uris, files) = (["vm1", "vm2", "vm3"].map(|name| format!("nbd://backup.example/{name}")), server.uri());
    replace.extend(uris.iter().map(|uri| (uri.as_str(), files.clone())));
    let daemon = Daemon::serve(&bench, &example("appliance.toml", &replace));
    daemon.wait_log("serving 3 clones of 3");
    for name in ["vm1", "vm2"] {
        daemon.wait_status_of(name, "hydrated", |status| status.is_complete());
        assert_same(&bench.path(name), &pattern(8 * MIB));
    }
    nbdsh(&format!("nbd://127.0.0.1:{port}/archive"), "h = connect(); h.pwrite(b'x' * 65536, 0); h.flush()");
    assert_eq!(daemon.status_of("vm3").hydrated_regions, 1, "hydration is off");
    nbdsh(&format!("nbd://127.0.0.1:{port}/vm2"), "h = connect(); assert h.get_size() == 8 << 20");
    daemon.stop();
}

#[test]
fn metadata_on_another_disk() {
    need!("loop", "losetup");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let metadata = Loop::attach(&bench.hole("metadata.img", MIB), 512);
    let config = example(
        "metadata-on-another-disk.toml",
        &[
            ("/dev/sdb", of(&source)),
            ("/dev/nvme0n1", of(bench.copy())),
            ("/dev/nvme1n1p1", of(&metadata.path)),
            ("\"20GiB\"", "\"3MiB\"".into()),
            // In the comment: 3 MiB in sectors.
            ("41943040", "6144".into()),
        ],
    );
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("data", "hydrated", |status| status.is_complete());
    assert_eq!(daemon.status_of("data").size, 3 * MIB);
    // The line in the comment says the same.
    let comment: String = config.lines().skip_while(|line| !line.contains("table = ")).take(2).collect();
    let line: Vec<&str> =
        comment.split('"').nth(1).unwrap().split(['\\', '#', ' ']).filter(|w| !w.is_empty()).collect();
    assert_eq!(daemon.done(&["table", "data"]).trim_end(), line.join(" "));
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&source).unwrap()[..3 * MIB as usize]);
}

/// What is under [daemon] is in force.
#[test]
fn settings_of_the_daemon() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let clone = format!(
        "[[clone]]\nname = 'vm'\nsource = '{}'\ndestination = 'copy'\nmetadata = 'meta'\nnbd.address = 'unix:vm.sock'\n",
        source.display()
    );
    let daemon_file = bench.path("daemon.toml");
    let settings = "cpus = [0]\nio_memory = '8MiB'\nspin = '20us'\nlog = 'warn'\nhydration_rate = '1GiB'\n";
    let control = bench.socket("own.control");
    fs::write(&daemon_file, format!("[daemon]\ncontrol = '{}'\n{settings}", control.display())).unwrap();
    let clones_file = bench.path("clones.toml");
    fs::write(&clones_file, clone).unwrap();
    let mut daemon = Daemon::serve_files(&bench, &[&daemon_file, &clones_file], &[]);
    daemon.control = control;
    wait_for("a daemon at its own socket", std::time::Duration::from_secs(30), || daemon.client().is_there());
    let status = daemon.wait_status_of("vm", "hydrated", |status| status.is_complete());
    assert_eq!((status.shards, status.nbd.address), (1, format!("unix:{}", bench.path("vm.sock").display())));
    let log = daemon.stop();
    assert!(!log.contains("INFO"), "{log}");
    assert_same_files(&bench.copy(), &source);
}

/// Clones need no more open files than docs/config.md says.
#[test]
fn open_files() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let (shards, clones) = (2, 5);
    let mut config = format!("[daemon]\nshards = {shards}\n");
    for n in 0..clones {
        let source = source.display();
        config += &format!("[[clone]]\nname = 'c{n}'\nsource = '{source}'\ndestination = 'd{n}'\nmetadata = 'm{n}'\n");
        config += "no_hydration = true\n";
    }
    let daemon = Daemon::serve(&bench, &config);
    for n in 0..clones {
        daemon.wait_log(&format!("clone 'c{n}': serving NBD"));
    }
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.status_of("c0").pid)).unwrap().count();
    let told = 10 + 7 * shards + clones * (11 + 4 * shards);
    assert!((told / 2..=told).contains(&open), "{open}, at most {told} are told");
    daemon.stop();
}

/// Everything is looked at, nothing is changed; the exit status says whether all could be started.
#[test]
fn dry_run_of_many() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let clone = |name: &str, source: &Path| {
        let source = source.display();
        format!(
            "[[clone]]\nname = '{name}'\nsource = '{source}'\ndestination = '{name}.img'\nmetadata = '{name}.meta'\n"
        )
    };
    let run = |config: String| {
        fs::write(bench.path("config.toml"), config).unwrap();
        let before = checksums(bench.dir());
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_hydrant"))
            .args(["serve", "--dry-run"])
            .arg(bench.path("config.toml"))
            .env("XDG_RUNTIME_DIR", bench.runtime())
            .output()
            .unwrap();
        assert_eq!(checksums(bench.dir()), before);
        assert!(!bench.runtime().join("hydrant").exists());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (status, out, _) = run(clone("a", &source) + &clone("b", &source));
    assert_eq!(status, Some(0), "{out}");
    assert!(out.contains("'a': 1MiB in 16 regions") && out.contains("'b': 1MiB in 16 regions"), "{out}");
    let (status, out, said) = run(clone("bad", &bench.path("missing")) + &clone("b", &source));
    assert_eq!(status, Some(1), "{out}");
    assert!(out.contains("'bad': can't be started: ") && out.contains("'b': 1MiB in 16 regions"), "{out}");
    assert!(said.starts_with("hydrant: clone 'bad' could not be started: ") && said.lines().count() == 1, "{said}");
}
