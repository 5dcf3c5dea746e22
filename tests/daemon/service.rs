//! As a service of systemd: what it is told, and the unit file in configs/.

use super::harness::*;
use clap::Parser;
use hydrant::cli::{Cli, Verb};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn unit() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/hydrant.service")).unwrap()
}

fn ublk_unit() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/hydrant-ublk.service")).unwrap()
}

fn setting(unit: &str, key: &str) -> String {
    let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {key}")).to_owned()
}

fn receive(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let len = socket.recv(&mut buffer).expect("it is told");
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}

#[test]
fn the_manager_is_told_when_it_is_ready_and_when_it_stops() {
    let bench = Bench::new();
    let path = bench.socket("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let notify = format!("NOTIFY_SOCKET={}", path.display());
    let clone = bench.clone_of(bench.random("source", 8 * MIB)).wrapped(&["env", &notify]);
    let daemon = clone.spawn();
    assert_eq!(receive(&socket), "READY=1\nSTATUS=serving 1 clones of 1\n");
    // It is true: clients are served.
    assert_eq!(daemon.status().name.to_string(), "vm");
    daemon.stop();
    assert!(receive(&socket).starts_with("STOPPING=1\n"));

    // One that can't start is never ready.
    clone.source(bench.path("missing")).metadata(bench.path("new")).output();
    assert!(receive(&socket).starts_with("STOPPING=1\n"));
    // A manager that is gone is no obstacle.
    drop(socket);
    let daemon = bench.clone_of(bench.path("source")).wrapped(&["env", &notify]).start();
    daemon.wait_log("can't be told 'READY=1'");
    daemon.stop();
}

#[test]
fn the_unit_says_what_the_program_does() {
    let unit = unit();
    let exec = setting(&unit, "ExecStart");
    let cli = Cli::try_parse_from(exec.split_ascii_whitespace()).unwrap_or_else(|error| panic!("{exec}: {error}"));
    let Verb::Serve(args) = cli.verb else { panic!("{exec}") };
    assert_eq!(args.files, [PathBuf::from("/etc/hydrant/hydrant.toml")]);
    // Where the program looks without XDG_RUNTIME_DIR, and with the mode that it accepts.
    assert_eq!(
        (setting(&unit, "RuntimeDirectory"), setting(&unit, "RuntimeDirectoryMode")),
        ("hydrant".into(), "0700".into())
    );
    // Every command in its comments exists.
    let said = unit.lines().filter_map(|line| line.strip_prefix("#   hydrant ")).map(|line| format!("hydrant {line}"));
    let said: Vec<_> = said.collect();
    assert!(!said.is_empty());
    for command in said {
        Cli::try_parse_from(command.split_ascii_whitespace()).unwrap_or_else(|error| panic!("{command}: {error}"));
    }
}

#[test]
fn systemd_accepts_the_unit_and_finds_it_hardened() {
    need!("systemd-analyze");
    let bench = Bench::new();
    let path = bench.path("hydrant.service");
    // The program must be there for systemd to be content.
    fs::write(&path, unit().replace("/usr/bin/hydrant", env!("CARGO_BIN_EXE_hydrant"))).unwrap();
    let path = path.to_str().unwrap();
    let (status, said) = run_for_status("systemd-analyze", &["verify", "--man=no", path]);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("hydrant.service")).collect();
    assert!(status == 0 && ours.is_empty(), "{status}: {said}");
    // 0 is the best, 100 the worst; in tenths of what it prints.
    let (status, said) = run_for_status("systemd-analyze", &["security", "--offline=true", "--threshold=20", path]);
    assert_eq!(status, 0, "{said}");

    // It bites: a word that systemd does not know, and a unit that is not hardened.
    fs::write(path, unit().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes")).unwrap();
    let (_, said) = run_for_status("systemd-analyze", &["verify", "--man=no", path]);
    assert!(said.contains("NoNewPrivilege"), "{said}");
    let bare: String =
        unit().lines().filter(|line| !line.starts_with("SystemCall")).map(|line| format!("{line}\n")).collect();
    fs::write(path, bare).unwrap();
    let (status, _) = run_for_status("systemd-analyze", &["security", "--offline=true", "--threshold=20", path]);
    assert_ne!(status, 0);
}

/// io_uring must be among what the unit allows.
#[test]
fn the_system_calls_of_the_unit_are_enough() {
    need!("systemd-analyze");
    let allowed = run("systemd-analyze", &["syscall-filter", "@system-service"]);
    let has = |call: &str| allowed.lines().any(|line| line.trim() == call);
    let of_group = |group: &str| run("systemd-analyze", &["syscall-filter", group]);
    for call in ["io_uring_setup", "io_uring_enter", "io_uring_register"] {
        let in_group = allowed.lines().filter_map(|line| line.trim().strip_prefix('@'));
        let found =
            has(call) || in_group.into_iter().any(|g| of_group(&format!("@{g}")).lines().any(|l| l.trim() == call));
        assert!(found, "{call} is not in @system-service");
    }
}

/// As root, where everybody else is: in no mount namespace of its own, with the capabilities that docs/deployment.md names.
#[test]
fn the_unit_for_block_devices_has_what_they_need_and_no_namespace() {
    need!("systemd-analyze");
    let unit = ublk_unit();
    let exec = setting(&unit, "ExecStart");
    let cli = Cli::try_parse_from(exec.split_ascii_whitespace()).unwrap_or_else(|error| panic!("{exec}: {error}"));
    assert!(matches!(cli.verb, Verb::Serve(_)), "{exec}");
    for command in unit.lines().filter_map(|line| line.strip_prefix("#   hydrant ")) {
        let command = format!("hydrant {command}");
        Cli::try_parse_from(command.split_ascii_whitespace()).unwrap_or_else(|error| panic!("{command}: {error}"));
    }
    let capabilities = setting(&unit, "CapabilityBoundingSet");
    let documented = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/deployment.md")).unwrap();
    for capability in ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_SYS_RESOURCE", "CAP_IPC_LOCK"] {
        assert!(capabilities.split(' ').any(|has| has == capability), "{capability}");
        assert!(documented.contains(capability), "{capability}");
    }
    assert_eq!(setting(&unit, "OOMScoreAdjust"), "-1000");
    assert_eq!(setting(&unit, "LimitMEMLOCK"), "infinity");
    // What makes a mount namespace, by systemd.exec(5).
    let namespaces = [
        "Protect",
        "Private",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "TemporaryFileSystem",
        "BindPaths",
        "BindReadOnlyPaths",
        "RootDirectory",
        "RootImage",
        "MountFlags",
        "MountImages",
        "DynamicUser",
        "User",
    ];
    for line in unit.lines().filter(|line| !line.starts_with('#')) {
        assert!(!namespaces.iter().any(|word| line.starts_with(word)), "{line}");
    }
    // The bits of block devices are for the next daemon: systemd must not remove them.
    assert!(!setting(&unit, "RuntimeDirectory").split(' ').any(|directory| directory == "hydrant-ublk"));

    let bench = Bench::new();
    let path = bench.path("hydrant-ublk.service");
    fs::write(&path, unit.replace("/usr/bin/hydrant", env!("CARGO_BIN_EXE_hydrant"))).unwrap();
    let path = path.to_str().unwrap();
    let (status, said) = run_for_status("systemd-analyze", &["verify", "--man=no", path]);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("hydrant-ublk.service")).collect();
    assert!(status == 0 && ours.is_empty(), "{status}: {said}");
}
