//! The metadata tools and `create`/`remove`, killed at random moments: the clone is the old one or the new one, or there
//! is none; never a half that starts and lies.

use super::client::{Connection, Verb};
use super::content::Random;
use super::variable;
use crate::harness::*;
use crate::meta_tools::{meta, meta_ok};
use hydrant::control::api::Status;
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Kills of each kind of run, unless HYDRANT_CRASH_ROUNDS says.
const ROUNDS: u64 = 8;

fn rounds() -> u64 {
    variable("HYDRANT_CRASH_ROUNDS").unwrap_or(ROUNDS)
}

/// Runs a tool to its end and returns how long that takes.
fn timed(bench: &Bench, words: &str) -> Duration {
    let began = Instant::now();
    meta_ok(bench, words);
    began.elapsed()
}

/// Starts a tool and kills it somewhere in the time that it takes, or lets it end; false: it was faster.
fn killed(bench: &Bench, words: &str, takes: Duration, random: &mut Random) -> bool {
    let args: Vec<String> = words
        .split_ascii_whitespace()
        .map(|word| match word.strip_prefix('@') {
            Some(name) => bench.path(name).to_str().unwrap().to_owned(),
            None => word.to_owned(),
        })
        .collect();
    let mut tool = Command::new(env!("CARGO_BIN_EXE_hydrant"));
    let mut tool = tool.arg("meta").args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Its start, its first writes, all of it.
    let part = random.pick(&[20, 4, 1, 1]);
    std::thread::sleep(Duration::from_micros(random.below(takes.as_micros() as u64 / part + 1)));
    tool.kill().unwrap();
    let status = tool.wait().unwrap();
    assert!(status.code().is_none_or(|code| code == 0), "{words}: {status}");
    !status.success()
}

/// The dump of what there is; `None` when it was never formatted. Anything else fails.
fn dump(bench: &Bench) -> Option<String> {
    let (status, text) = meta(bench, "dump --json @meta");
    if status == 0 {
        assert!(meta_ok(bench, "check @meta").ends_with("clean\n") || text.contains("\"active\""), "{text}");
        return Some(text);
    }
    assert!(text.contains("never formatted"), "a half is there: {text}");
    None
}

/// Metadata of 2^26 regions are 9 MiB, so that there is something to be killed in; an old clone is there before.
#[test]
fn a_format_that_is_killed_leaves_the_old_metadata_none_or_the_new_ones() {
    let bench = Bench::new();
    let format = "format --force --size 256GiB --region-size 4KiB @meta";
    let takes = timed(&bench, format);
    meta_ok(&bench, "format --force --size 128GiB --region-size 4KiB @meta");
    let old = meta_ok(&bench, "dump --json @meta").replace("\"hydrated_count\":0", "\"hydrated_count\":3");
    let old = old.replace("\"hydrated\":[]", "\"hydrated\":[[7,8],[40000,40000]]");
    fs::write(bench.path("old.json"), &old).unwrap();
    let mut random = Random::new(crate::load::seed());
    let (mut olds, mut nones, mut news, mut kills) = (0, 0, 0, 0);
    for _ in 0..rounds() {
        meta_ok(&bench, "restore --force @old.json @meta");
        assert!(dump(&bench).unwrap() == old);
        kills += u64::from(killed(&bench, format, takes, &mut random));
        match dump(&bench) {
            None => nones += 1,
            Some(text) if text == old => olds += 1,
            Some(text) => {
                let empty = text.contains("\"hydrated\":[]") && text.contains(&format!("\"size\":{}", 256u64 << 30));
                assert!(empty, "neither old nor new: {text}");
                news += 1;
            }
        }
    }
    println!("format: {kills} kills; then {olds} old, {nones} none, {news} new");
}

/// The two dumps have the same uuid, so no checksum tells their sectors apart.
#[test]
fn a_restore_that_is_killed_leaves_one_of_the_two_or_none() {
    let bench = Bench::new();
    meta_ok(&bench, "format --size 64GiB --region-size 4KiB @meta");
    let empty = meta_ok(&bench, "dump --json @meta");
    let with = |first: u64| {
        let regions = (first..16 << 20).step_by(20_000);
        let runs: Vec<String> = regions.clone().map(|region| format!("[{region},{region}]")).collect();
        let text = empty.replace("\"hydrated_count\":0", &format!("\"hydrated_count\":{}", runs.len()));
        text.replace("\"hydrated\":[]", &format!("\"hydrated\":[{}]", runs.join(",")))
    };
    let dumps = [with(5), with(11)];
    for (name, text) in ["a.json", "b.json"].iter().zip(&dumps) {
        fs::write(bench.path(name), text).unwrap();
    }
    let takes = timed(&bench, "restore --force @a.json @meta");
    let mut random = Random::new(crate::load::seed());
    let (mut counts, mut nones, mut kills) = ([0, 0], 0, 0);
    for round in 0..rounds() {
        meta_ok(&bench, ["restore --force @b.json @meta", "restore --force @a.json @meta"][round as usize % 2]);
        let words = ["restore --force @a.json @meta", "restore --force @b.json @meta"][round as usize % 2];
        kills += u64::from(killed(&bench, words, takes, &mut random));
        match dump(&bench) {
            None => nones += 1,
            Some(text) => match dumps.iter().position(|dump| *dump == text) {
                Some(which) => counts[which] += 1,
                None => panic!("a mixture of both: {}", &text[..text.len().min(2000)]),
            },
        }
    }
    println!("restore: {kills} kills; then {counts:?} of the two, {nones} none");
}

/// Damaged sectors are there still, or mended as was said, and a second repair does the rest.
#[test]
fn a_repair_that_is_killed_is_finished_by_the_next_one() {
    let bench = Bench::new();
    meta_ok(&bench, "format --size 64GiB --region-size 4KiB @meta");
    let fresh = meta_ok(&bench, "dump --json @meta");
    let runs: Vec<String> = (0..16 << 20).step_by(60_000).map(|region| format!("[{region},{region}]")).collect();
    let text = fresh.replace("\"hydrated_count\":0", &format!("\"hydrated_count\":{}", runs.len()));
    fs::write(bench.path("dump.json"), text.replace("\"hydrated\":[]", &format!("\"hydrated\":[{}]", runs.join(","))))
        .unwrap();
    meta_ok(&bench, "restore --force @dump.json @meta");
    let mut damaged = fs::read(bench.meta()).unwrap();
    for sector in (0..damaged.len() / 512).filter(|sector| *sector == 8 || *sector >= 16 && sector % 5 == 1) {
        damaged[sector * 512 + 40] ^= 1;
    }
    let repair = "repair --assume unhydrated @meta";
    fs::write(bench.meta(), &damaged).unwrap();
    let takes = timed(&bench, repair);
    // However often it was begun.
    let dump = |text: &str| {
        let mut dump: Value = serde_json::from_str(text).unwrap();
        dump["generation"].take();
        dump
    };
    let expected = dump(&meta_ok(&bench, "dump --json @meta"));
    assert!(expected["hydrated_count"].as_u64().is_some_and(|count| 0 < count && count < runs.len() as u64));
    let mut random = Random::new(crate::load::seed());
    let (mut done, mut kills) = (0, 0);
    for _ in 0..rounds() {
        fs::write(bench.meta(), &damaged).unwrap();
        kills += u64::from(killed(&bench, repair, takes, &mut random));
        let (status, text) = meta(&bench, "dump --json @meta");
        if status == 0 {
            assert!(dump(&text) == expected, "it says that it is whole, but is not what was asked for");
            done += 1;
        } else {
            assert!(text.contains("damaged"), "{text}");
        }
        meta_ok(&bench, repair);
        assert!(dump(&meta_ok(&bench, "dump --json @meta")) == expected);
    }
    println!("repair: {kills} kills; {done} were done before");
}

/// `create` and `remove` while the daemon, or whoever asked for it, is killed: the clone can always be created again, and
/// is right.
#[test]
fn create_and_remove_that_are_killed_leave_a_clone_that_goes_on() {
    let bench = Bench::new();
    let source = bench.random("source", 3 * MIB + 123);
    let mut expected = fs::read(&source).unwrap();
    fs::write(bench.path("empty.toml"), "[daemon]\nshards = 2\n").unwrap();
    let text = format!(
        "[[clone]]\nname = \"vm\"\nsource = {source:?}\ndestination = {:?}\nmetadata = {:?}\nno_hydration = true\n",
        bench.copy(),
        bench.meta()
    );
    let clone = bench.path("vm.toml");
    fs::write(&clone, text).unwrap();
    let clone = clone.to_str().unwrap();
    let mut random = Random::new(crate::load::seed());
    let mut daemon = None::<Daemon>;
    for round in 0..2 * rounds() {
        let mut running =
            daemon.take().unwrap_or_else(|| Daemon::serve_files(&bench, &[&bench.path("empty.toml")], &[]));
        let is_there = running.client().status(&"vm".parse().unwrap()).is_ok();
        let args: &[&str] = if is_there { &["remove", "--force", "vm"] } else { &["create", clone] };
        let mut asked = running.hydrant(args).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        let kill_daemon = random.chance(60);
        match kill_daemon {
            true => running.kill_now(),
            false => asked.kill().unwrap(),
        }
        asked.wait().unwrap();
        if kill_daemon {
            running.kill9();
            running = Daemon::serve_files(&bench, &[&bench.path("empty.toml")], &[]);
        }
        // Whatever it was in the middle of ends by itself; then it can be created, or is there.
        wait_for("the clone", Duration::from_secs(20), || {
            let created = running.hydrant(&["create", clone]).output().unwrap();
            let said = String::from_utf8_lossy(&created.stderr).into_owned();
            let is_known = ["already", "exists", "in use", "is starting", "is being", "stopping"];
            assert!(created.status.success() || is_known.iter().any(|words| said.contains(words)), "{said}");
            running.client().status(&"vm".parse().unwrap()).is_ok_and(|status| status.state.to_string() == "running")
        });
        check_and_write(&running, &mut expected, round);
        daemon = Some(running);
    }
    let daemon = daemon.unwrap();
    daemon.done(&["message", "vm", "enable_hydration"]);
    daemon.wait_status_of("vm", "hydrated", Status::is_complete);
    daemon.stop();
    assert_same(&bench.copy(), &expected);
}

/// What was flushed in the rounds before is there; some more is written and flushed.
fn check_and_write(daemon: &Daemon, expected: &mut [u8], round: u64) {
    let began = Instant::now();
    let mut client = loop {
        match Connection::open(&daemon.socket_of("vm"), "vm") {
            Ok(client) => break client,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}\n{}", daemon.log()),
        }
    };
    let at = round as usize * 65_000 % (expected.len() - 200_000);
    let mut bytes = vec![0; 200_000];
    client.ask(Verb::READ, at as u64, &mut bytes).unwrap();
    assert!(bytes == expected[at..at + bytes.len()], "around {at}, in round {round}");
    let mut new = [round as u8 + 1; 100];
    client.ask(Verb::WRITE, at as u64, &mut new).unwrap();
    client.ask(Verb::FLUSH, 0, &mut []).unwrap();
    expected[at..at + 100].copy_from_slice(&new);
}
