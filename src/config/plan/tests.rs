mod causes;
mod hostile;

use super::*;
use crate::config::file::FILE_SIZE_MAX;
use crate::config::{HYDRATION_RATE_MAX, HYDRATION_RATE_MIN, IO_MEMORY_MAX, IO_MEMORY_MIN, OnHydrated};
use crate::units::ByteSize;
use std::fs;
use std::time::Duration;

/// A minimal clone `vm`.
const CLONE: &str = "[[clone]]\nname = 'vm'\nsource = 's'\ndestination = 'd'\nmetadata = 'm'\n";

/// A directory with these files.
struct Files {
    dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

fn files(texts: &[&str]) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let path = |number: usize| dir.path().join(format!("{}.toml", (b'a' + number as u8) as char));
    let paths = texts
        .iter()
        .enumerate()
        .map(|(number, text)| {
            fs::write(path(number), text).unwrap();
            path(number)
        })
        .collect();
    Files { paths, dir }
}

impl Files {
    fn check(&self) -> std::result::Result<Plan, Vec<String>> {
        let dir = format!("{}/", self.dir.path().display());
        check(&self.paths, false, &RuntimeDir::of_user())
            .map_err(|problems| problems.lines.iter().map(|line| line.replace(&dir, "")).collect())
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn problems(texts: &[&str]) -> Vec<String> {
    files(texts).check().unwrap_err()
}

#[test]
fn every_key_arrives() {
    let files = files(&[r#"
        [daemon]
        shards = 3
        cpus = "0-2,5"
        control = "run/control"
        io_memory = "64MiB"
        spin = "50us"
        hydration_rate = "100MiB"
        log = "info,hydrant::source=debug"
        [daemon.metrics_dump]
        path = "/var/m.json"
        interval = 10

        [[clone]]
        name = "vm1"
        source = "backup/vm1.img"
        destination = "/dev/vg/vm1"
        metadata = "vm1.meta"
        region_size = "1MiB"
        size = 1048576000
        no_hydration = true
        no_discard_passdown = true
        hydration_threshold = 0
        hydration_batch_size = 4294967295
        hydration_failures_max = 0
        hydration_rate = 10485760
        priority = 1000
        on_hydrated = "remove"
        source_timeout = "5min"
        force = true
        nbd = { address = "unix:vm1.sock", export = "disk" }
        ublk = { number = 5, dm_name = "vm-1" }

        [[clone]]
        name = "vm2"
        table = "0 2048 clone vm2.meta 254:16 nbd://backup/vm2 8 1 no_hydration 2 hydration_threshold 5"
        [clone.nbd]
        address = "tcp:127.0.0.1:10809"
    "#]);
    let Plan { daemon, clones, dry_run } = files.check().unwrap();
    assert!(!dry_run);
    let expected = DaemonConfig {
        one_clone: false,
        shards: Some(3),
        cpus: Some(vec![0, 1, 2, 5]),
        control: files.path("run/control"),
        io_memory: Some(64 << 20),
        spin: Duration::from_micros(50),
        hydration_rate: Some(100 << 20),
        metrics_dump: Some(crate::config::MetricsDump {
            path: "/var/m.json".into(),
            interval: Some(Duration::from_secs(10)),
        }),
        log: Some("info,hydrant::source=debug".into()),
    };
    assert_eq!(daemon, expected);
    let expected = CloneConfig {
        name: "vm1".parse().unwrap(),
        source: files.path("backup/vm1.img").to_str().unwrap().into(),
        destination: "/dev/vg/vm1".into(),
        metadata: files.path("vm1.meta"),
        region_size: Some("1MiB".parse().unwrap()),
        size: Some(1_048_576_000),
        hydration: false,
        discard_passdown: false,
        hydration_threshold: Some(0),
        hydration_batch_size: Some(u32::MAX),
        hydration_rate: Some(10 << 20),
        hydration_failures_max: 0,
        priority: 1000,
        on_hydrated: OnHydrated::Remove,
        nbd: crate::config::NbdConfig {
            address: NbdAddress::Unix(files.path("vm1.sock")),
            export: "disk".parse().unwrap(),
        },
        ublk: Some(crate::config::UblkConfig { number: Some(5), dm_name: Some("vm-1".parse().unwrap()) }),
        source_timeout: Duration::from_secs(300),
        force: true,
        table: None,
    };
    assert_eq!(clones[0], expected);
    let second = &clones[1];
    assert_eq!(second.destination, Path::new("/dev/block/254:16"));
    assert_eq!(second.metadata, files.path("vm2.meta"));
    assert_eq!((second.source.as_str(), second.size), ("nbd://backup/vm2", Some(1 << 20)));
    assert_eq!((second.hydration, second.discard_passdown), (false, true));
    assert_eq!((second.hydration_threshold, second.hydration_batch_size), (Some(5), None));
    assert_eq!(second.region_size.unwrap().bytes(), 4096);
    let line = format!(
        "0 2048 clone {} 254:16 nbd://backup/vm2 8 1 no_hydration 2 hydration_threshold 5",
        files.path("vm2.meta").display()
    );
    assert_eq!(second.table.as_ref().unwrap().to_string(), line);
}

/// The same defaults as on the command line.
#[test]
fn defaults() {
    let files = files(&[CLONE]);
    let plan = files.check().unwrap();
    let dir = RuntimeDir::of_user();
    assert_eq!(plan.daemon, DaemonConfig::new(dir.daemon_control_socket()));
    let clone = &plan.clones[0];
    assert_eq!(clone.nbd.address, NbdAddress::Unix(dir.nbd_socket(&clone.name)));
    assert_eq!((clone.nbd.export.as_str(), clone.priority), ("vm", 100));
    assert!(clone.hydration && clone.discard_passdown && !clone.force);
    assert_eq!((clone.source_timeout, clone.on_hydrated), (Duration::from_secs(60), OnHydrated::Stay));
    assert_eq!(clone.source, files.path("s").to_str().unwrap());
    // Nothing at all is a daemon that waits for clones to be created.
    assert_eq!(self::files(&[""]).check().unwrap().clones, []);
}

#[test]
fn paths_are_relative_to_the_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    let file = dir.path().join("sub/../sub/x.toml");
    fs::write(&file, CLONE).unwrap();
    let plan = plan(&[file], true, &RuntimeDir::of_user()).unwrap();
    assert!(plan.dry_run);
    let base = dir.path().join("sub/../sub");
    assert_eq!(plan.clones[0].destination, base.join("d"));
    assert_eq!(plan.clones[0].metadata, base.join("m"));
    assert_eq!(plan.clones[0].source, base.join("s").to_str().unwrap());
}

#[test]
fn wrong_values_name_place_key_and_what_was_expected() {
    let range = |min, max| format!("from {} to {}", ByteSize(min), ByteSize(max));
    let size = |range: &str| format!("expected a size {range}, in bytes or like \"64KiB\"");
    let time = |range: &str| {
        format!("expected a time {range}, in seconds or like \"50us\", \"2ms\", \"10s\", \"5min\" or \"1h\"")
    };
    let regions = "expected a number from 0 to 4294967295";
    let cpus = "expected different CPUs from 0 to 8191, like \"0-3,8\" or [0, 1]";
    let spin = time("from 0s to 1s");
    let interval = time("from 100ms to 24h");
    // The key and its value; what is said.
    let clone_cases: Vec<(&str, String)> = vec![
        ("region_size = 12288", "expected a power of two from 4KiB to 1GiB, found 12KiB".into()),
        ("region_size = '2KiB'", format!("{}, found 2KiB", size("from 4KiB to 1GiB"))),
        ("region_size = '64k'", format!("{}, found the text '64k'", size("from 4KiB to 1GiB"))),
        ("region_size = true", format!("{}, found true", size("from 4KiB to 1GiB"))),
        ("region_size = -1", format!("{}, found -1", size("from 4KiB to 1GiB"))),
        ("region_size = 1.5", format!("{}, found the fraction 1.5", size("from 4KiB to 1GiB"))),
        (
            "region_size = 99999999999999999999",
            format!("{}, found a number of too many digits", size("from 4KiB to 1GiB")),
        ),
        ("hydration_rate = 0", format!("{}, found 0 bytes", size(&range(HYDRATION_RATE_MIN, HYDRATION_RATE_MAX)))),
        ("hydration_threshold = -1", format!("{regions}, found -1")),
        ("hydration_threshold = 4294967296", format!("{regions}, found 4294967296")),
        ("hydration_batch_size = '8'", format!("{regions}, found the text '8'")),
        ("priority = 0", "expected a number from 1 to 1000, found 0".into()),
        ("priority = 1001", "expected a number from 1 to 1000, found 1001".into()),
        ("priority = []", "expected a number from 1 to 1000, found an array".into()),
        ("no_hydration = 1", "expected a boolean, found 1".into()),
        ("on_hydrated = 'leave'", "expected 'stay', 'exit', 'remove' or 'linear', found 'leave'".into()),
        ("on_hydrated = 3", "expected 'stay', 'exit', 'remove' or 'linear', found 3".into()),
        ("source_timeout = 86401", format!("{}, found 86401", time("from 0s to 24h"))),
        ("source_timeout = '1d'", format!("{}, found the text '1d'", time("from 0s to 24h"))),
        ("source_timeout = 2026-11-22", format!("{}, found the date 2026-11-22", time("from 0s to 24h"))),
        ("nbd = 'unix:x'", "expected a table, found the text 'unix:x'".into()),
        (
            "table = 'x'",
            "Invalid format on line 1 of table: a table is START LEN TYPE and the arguments of the target".into(),
        ),
    ];
    for (line, said) in clone_cases {
        let key = line.split(' ').next().unwrap();
        let column = line.find('=').unwrap() + 3;
        assert_eq!(problems(&[&format!("{CLONE}{line}")]), [format!("a.toml:6:{column}: clone 'vm': {key}: {said}")]);
    }
    let daemon_cases: Vec<(&str, String)> = vec![
        ("shards = 0", "expected a number from 1 to 256, found 0".into()),
        ("cpus = ''", format!("{cpus}, found ''")),
        ("cpus = '3-1'", format!("{cpus}, found '3-1'")),
        ("cpus = '0,0'", format!("{cpus}, found 0 twice")),
        ("cpus = '0-8192'", format!("{cpus}, found '0-8192'")),
        ("cpus = []", format!("{cpus}, found none")),
        ("cpus = 3", format!("{cpus}, found 3")),
        ("control = ''", "expected a path, found nothing".into()),
        ("io_memory = 1", format!("{}, found 1 byte", size(&range(IO_MEMORY_MIN, IO_MEMORY_MAX)))),
        ("spin = 5", format!("{spin}, found 5")),
        ("spin = 'us'", format!("{spin}, found the text 'us'")),
        ("log = 'loud=very'", "'very' is not a level".into()),
        ("log = 3", "expected off, error, warn, info, debug or trace, or by module as in \"info,hydrant::source=debug\", found 3".into()),
        ("metrics_dump.interval = 0", String::new() + &interval + ", found 0"),
        ("metrics_dump.intervall = 0", "unknown key 'intervall', did you mean 'interval'?".into()),
    ];
    for (line, said) in daemon_cases {
        let found = problems(&[&format!("[daemon]\n{line}")]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("a.toml:2:") && found[0].contains(&said), "{line}: {found:?}");
    }
    let found = problems(&["[daemon]\n\n[daemon.metrics_dump]\ninterval = 3"]);
    assert_eq!(found, ["a.toml:3:1: daemon: metrics_dump.path: missing: the file that gets the metrics"]);
}

#[test]
fn inside_a_sub_table() {
    let found = problems(&[&format!("{CLONE}[clone.nbd]\naddress = 'tcp:localhost:1'\nexport = 'disk'")]);
    let said = "'tcp:localhost:1' is not an NBD address: write tcp:ADDR:PORT with a numeric ADDR (tcp:127.0.0.1:10809, tcp:[::1]:10809)";
    assert_eq!(found, [format!("a.toml:7:11: clone 'vm': nbd.address: {said}")]);
    let found = problems(&[&format!("{CLONE}[clone.nbd]\nadress = 'x'")]);
    assert_eq!(found, ["a.toml:7:1: clone 'vm': nbd: unknown key 'adress', did you mean 'address'?"]);
    let found = problems(&[&format!("{CLONE}nbd.export = 'a/b'")]);
    assert!(found[0].starts_with("a.toml:6:14: clone 'vm': nbd.export: '/' can't be in a name"), "{found:?}");
}

#[test]
fn every_error_is_found() {
    let text = "[daemon]\nshards = 0\ncontroll = 'x'\n\n[[clone]]\nname = 'vm1'\nregionsize = 4\nsource = 5\n\n\
                [[clone]]\nsource = 's'\nname = 'a/b'\ncolour = 'red'\n";
    assert_eq!(
        problems(&[text]),
        [
            "a.toml:2:10: daemon: shards: expected a number from 1 to 256, found 0",
            "a.toml:3:1: daemon: unknown key 'controll', did you mean 'control'?",
            "a.toml:7:1: clone 'vm1': unknown key 'regionsize', did you mean 'region_size'?",
            "a.toml:8:10: clone 'vm1': source: expected a path, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, found 5",
            "a.toml:5:1: clone 'vm1': destination: missing: the path that the copy goes to",
            "a.toml:5:1: clone 'vm1': metadata: missing: the path that says what is copied already",
            "a.toml:12:8: clone 'a/b': name: '/' can't be in a name: use letters, digits, '.', '_' and '-'",
            "a.toml:13:1: clone 'a/b': unknown key 'colour', known are name, source, destination, metadata, region_size, size, no_hydration, no_discard_passdown, hydration_threshold, hydration_batch_size, hydration_rate, hydration_failures_max, priority, on_hydrated, source_timeout, force, table, nbd, ublk",
            "a.toml:10:1: clone 'a/b': destination: missing: the path that the copy goes to",
            "a.toml:10:1: clone 'a/b': metadata: missing: the path that says what is copied already",
        ]
    );
    let error = plan(&files(&[text]).paths, false, &RuntimeDir::of_user()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().ends_with("found 0 (and 9 more: see 'hydrant config check')"), "{error}");
}

#[test]
fn top_level() {
    for (text, said) in [
        ("shards = 1", "1:1: unknown key 'shards', it belongs under [daemon]"),
        ("\n  region_size = 1", "2:3: unknown key 'region_size', it belongs under [[clone]]"),
        ("[clones]", "1:2: unknown key 'clones', did you mean 'clone'?"),
        ("[x]", "1:2: unknown key 'x', known are [daemon] and [[clone]]"),
        ("[clone]\nname = 'x'", "1:2: clone: expected an array of tables, [[clone]]"),
        ("clone = 3", "1:1: clone: expected an array of tables, [[clone]]"),
        ("clone = [3]", "1:10: expected [[clone]], a table"),
        ("[[daemon]]", "1:3: daemon: expected one table, [daemon]"),
    ] {
        assert_eq!(problems(&[text]), [format!("a.toml:{said}")], "{text}");
    }
}

#[test]
fn not_toml() {
    for text in ["a", "[clone", "name = ", "= 3", "x = 'a\n", "[[clone]]\nname = 1\nname = 2", "a = 1 b = 2", "\u{0}"] {
        let found = problems(&[text]);
        assert!(found[0].starts_with("a.toml:") && found[0].contains(": not TOML: "), "{text}: {found:?}");
        assert!(found.iter().all(|line| !line.contains('\n')), "{found:?}");
    }
    let deep = format!("a = {}", "[".repeat(100_000));
    assert!(problems(&[&deep])[0].contains("not TOML"));
}

#[test]
fn files_that_cannot_be_read() {
    let files = files(&[CLONE]);
    let dir = RuntimeDir::of_user();
    let error = |path: &Path| plan(&[files.paths[0].clone(), path.into()], false, &dir).unwrap_err();
    let missing = error(&files.path("missing.toml"));
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("missing.toml: No such file"), "{missing}");
    assert_eq!(error(files.dir.path()).kind(), ErrorKind::WrongType);
    fs::write(files.path("bin"), b"# caf\xe9\n").unwrap();
    assert!(error(&files.path("bin")).to_string().ends_with("bin:1:6: expected UTF-8, found another byte"));
    fs::write(files.path("big"), vec![b'\n'; FILE_SIZE_MAX as usize + 1]).unwrap();
    assert_eq!(error(&files.path("big")).kind(), ErrorKind::Limit);
}

#[test]
fn what_two_clones_cannot_share() {
    let clone = |name: &str, more: &str| {
        format!("[[clone]]\nname='{name}'\nsource='s'\ndestination='d-{name}'\nmetadata='m-{name}'\n{more}\n")
    };
    let tcp = "nbd.address='tcp:127.0.0.1:1'";
    // One listener for many is fine.
    let fine = clone("a", tcp) + &clone("b", tcp);
    assert_eq!(files(&[&fine, &clone("c", "")]).check().unwrap().clones.len(), 3);

    // Nor do block devices without NBD have anything in common.
    let none = "nbd.address='none'\nublk={}";
    assert_eq!(
        files(&[&(clone("a", &format!("{none}\nnbd.export='x'")) + &clone("b", &format!("{none}\nnbd.export='x'")))])
            .check()
            .unwrap()
            .clones
            .len(),
        2
    );
    let found = problems(&[&clone("a", "nbd.address='none'")]);
    let said = "clone 'a': nbd.address: a clone without NBD is for a block device alone: [clone.ublk] is missing";
    assert!(found.len() == 1 && found[0].ends_with(said), "{found:?}");

    let found = problems(&[&clone("a", ""), &clone("a", "")]);
    let name = found[0].replace(char::is_whitespace, " ");
    assert!(name.starts_with("b.toml:2:6: clone 'a': name: there is a clone of this name at "), "{name}");
    assert!(name.ends_with("a.toml:2:6 already") && found.len() == 1, "{found:?}");

    let found = problems(&[&(clone("a", tcp) + &clone("b", &format!("{tcp}\nnbd.export='a'")))]);
    assert!(
        found[0]
            .starts_with("a.toml:13:12: clone 'b': nbd.export: 'a' at tcp:127.0.0.1:1 is the export of clone 'a' ("),
        "{found:?}"
    );

    let same = "[[clone]]\nname='b'\nsource='s'\ndestination='d-a'\nmetadata='m-a'\n";
    let found = problems(&[&(clone("a", "") + same)]);
    assert_eq!(found.len(), 2);
    assert!(found[0].starts_with("a.toml:10:13: clone 'b': destination: ") && found[0].contains("in use by clone 'a'"));
    assert!(found[1].starts_with("a.toml:11:10: clone 'b': metadata: "), "{found:?}");

    let table = "[[clone]]\nname='t'\ntable='0 8 clone m-a dest s 8'\n";
    let found = problems(&[&(clone("a", "") + table)]);
    assert!(found[0].starts_with("a.toml:9:7: clone 't': table: ") && found[0].contains("in use"), "{found:?}");

    let control = "[daemon]\ncontrol = 'x'\n".to_owned() + &clone("a", "nbd.address = 'unix:x'");
    let found = problems(&[&control]);
    assert!(found[0].contains("nbd.address") && found[0].ends_with("is the control socket of the daemon"), "{found:?}");

    let found = problems(&["[daemon]\n", "\n[daemon]\n", CLONE]);
    assert!(found[0].starts_with("b.toml:2:1: daemon: there is a [daemon] at ") && found.len() == 1, "{found:?}");
}

#[test]
fn a_table_line_says_the_rest_itself() {
    let text = "[[clone]]\nname = 'vm'\ntable = '0 8 clone m d s 8'\n";
    for key in ["source = 's'", "region_size = 4096", "size = 4096", "no_hydration = false", "hydration_threshold = 1"]
    {
        let name = key.split(' ').next().unwrap();
        let found = problems(&[&format!("{text}{key}")]);
        let column = key.find('=').unwrap() + 3;
        assert_eq!(found, [format!("a.toml:4:{column}: clone 'vm': {name}: not beside 'table', which says it")]);
    }
    let fine = "priority = 3\nhydration_rate = '1MiB'\nforce = true\non_hydrated = 'exit'\nsource_timeout = 0";
    assert_eq!(files(&[&format!("{text}{fine}")]).check().unwrap().clones[0].priority, 3);
}

#[test]
fn clones_to_create() {
    let files = files(&[CLONE, "[daemon]\n"]);
    let dir = RuntimeDir::of_user();
    let specs = clones(&files.paths[0], &dir).unwrap();
    let json = serde_json::to_string(&specs[0]).unwrap();
    let again = CloneSpec::from_json(json.as_bytes()).unwrap();
    assert_eq!(again, specs[0]);
    assert_eq!(again.into_config(&dir).unwrap(), files_of(&files.paths[0]).clones[0]);
    let error = clones(&files.paths[1], &dir).unwrap_err().to_string();
    assert!(error.ends_with("b.toml:1:1: daemon: the daemon runs already: only [[clone]] can be created"), "{error}");
}

fn files_of(path: &Path) -> Plan {
    plan(&[path.into()], false, &RuntimeDir::of_user()).unwrap()
}

#[test]
fn the_body_of_a_create_call() {
    let good = r#"{"name": "vm", "source": "nbd://h/x", "destination": "/d", "metadata": "/m", "size": null,
                   "region_size": "64KiB", "nbd": {"address": "tcp:[::1]:7"}}"#;
    let config = CloneSpec::from_json(good.as_bytes()).unwrap().into_config(&RuntimeDir::of_user()).unwrap();
    assert_eq!((config.size, config.region_size.unwrap().bytes()), (None, 65536));
    for (body, said) in [
        ("", "not JSON: EOF"),
        ("[]", "a clone is a JSON object"),
        (r#"{"name": 3}"#, "name: expected a name, found 3"),
        (r#"{"nam": "vm"}"#, "unknown key 'nam', did you mean 'name'?"),
        (r#"{"destination": "d", "priority": 0}"#, "priority: expected a number from 1 to 1000, found 0 (and 1 more)"),
        (r#"{"destination": "d"}"#, "destination: expected an absolute path, found 'd'"),
        (r#"{"nbd": {"address": "unix:x"}}"#, "nbd.address: expected an absolute path, found 'x'"),
        (r#"{"table": "0 8 clone /m d /s 8"}"#, "table: expected an absolute path, found 'd'"),
        (r#"{"region_size": 5e3}"#, "found the fraction 5000"),
    ] {
        let error = CloneSpec::from_json(body.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains(said), "{body}: {error}");
    }
    let missing = CloneSpec::from_json(b"{}").unwrap().into_config(&RuntimeDir::of_user()).unwrap_err();
    assert_eq!(missing.0.len(), 4);
}

/// What a spec writes, it reads: with every key.
#[test]
fn specs_survive_json() {
    let json = serde_json::json!({
        "name": "vm", "source": "/s", "destination": "/d", "metadata": "/m", "region_size": 65536, "size": 77,
        "no_hydration": true, "no_discard_passdown": false, "hydration_threshold": 1, "hydration_batch_size": 2,
        "hydration_rate": 500000, "hydration_failures_max": 3, "priority": 7, "on_hydrated": "exit", "source_timeout": "90s", "force": true,
        "table": "0 8 clone /m /d /s 8", "nbd": {"address": "unix:/x", "export": "y"}, "ublk": {"number": 3, "dm_name": "vm1"}
    });
    let spec = CloneSpec::from_json(json.to_string().as_bytes()).unwrap();
    assert_eq!(serde_json::to_value(&spec).unwrap(), json);
    let names: Vec<&String> = json.as_object().unwrap().keys().collect();
    let mut fields = crate::config::keys::fields_of::<CloneSpec>().to_vec();
    fields.sort();
    assert_eq!(names, fields);
    let json = serde_json::json!({
        "shards": 2, "cpus": [1, 0], "control": "/c", "io_memory": 8 << 20, "spin": "50us", "hydration_rate": 500000,
        "log": "warn", "metrics_dump": {"path": "/p", "interval": "500ms"}
    });
    let spec: DaemonSpec = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(serde_json::to_value(&spec).unwrap(), json);
}
