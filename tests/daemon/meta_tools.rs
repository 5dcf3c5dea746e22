//! `hydrant meta format`, `restore` and `repair`, with real clones before and after.

use super::harness::*;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const REGION: u64 = 64 * KIB;

/// Runs `hydrant meta`; exit status and what was said. A word that begins with `@` is a path of the bench.
pub fn meta(bench: &Bench, words: &str) -> (i32, String) {
    let args: Vec<String> = std::iter::once("meta".to_owned())
        .chain(words.split_ascii_whitespace().map(|word| match word.strip_prefix('@') {
            Some(name) => bench.path(name).to_str().unwrap().to_owned(),
            None => word.to_owned(),
        }))
        .collect();
    run_for_status(env!("CARGO_BIN_EXE_hydrant"), &args)
}

#[track_caller]
pub fn meta_ok(bench: &Bench, words: &str) -> String {
    let (status, text) = meta(bench, words);
    assert_eq!(status, 0, "{words}: {text}");
    text
}

/// It must fail with one line on standard error, which has these words; nothing in the bench is changed.
#[track_caller]
pub fn meta_refused(bench: &Bench, words: &str, expected: &str) -> String {
    let before = checksums(bench.dir());
    let (status, text) = meta(bench, words);
    assert!(status == 1 || status == 2, "{words}: {status}: {text}");
    let line = text.lines().last().unwrap_or_default();
    assert!(line.starts_with("hydrant: ") && line.contains(expected), "'{expected}' is not in: {text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("hydrant: ")).count(), 1, "{text}");
    assert_eq!(checksums(bench.dir()), before, "{words}: something was changed");
    text
}

pub fn dump(bench: &Bench, path: &str) -> Value {
    serde_json::from_str(&meta_ok(bench, &format!("dump --json {path}"))).unwrap()
}

/// Writes `x` to regions 1, 2 and 639 of the clone.
const WRITE: &str = "h = connect(); h.pwrite(b'x' * 131072, 65536); h.pwrite(b'x' * 65536, 639 * 65536); h.flush()";

/// A source of 40 MiB in 640 regions, and the clone stopped with some of them hydrated, by [`WRITE`].
fn half_hydrated(bench: &Bench) -> std::path::PathBuf {
    let source = bench.random("source", 40 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), WRITE);
    daemon.stop();
    source
}

/// What the clone has to be: the source, with what was written.
fn expected(source: &Path) -> Vec<u8> {
    let mut bytes = fs::read(source).unwrap();
    for region in [1, 2, 639] {
        bytes[region * REGION as usize..][..REGION as usize].fill(b'x');
    }
    bytes
}

#[test]
fn a_dump_is_restored_to_the_same_metadata() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = half_hydrated(&bench);
    let text = meta_ok(&bench, "dump --json @meta");
    fs::write(bench.path("dump.json"), &text).unwrap();
    let inputs = checksums(bench.dir());
    assert!(meta_ok(&bench, "restore @dump.json @again").contains("3 of 640 regions"));
    let mut after = checksums(bench.dir());
    after.remove(&bench.path("again")).expect("it was made");
    assert_eq!(after, inputs, "nothing else is changed");
    assert_eq!(meta_ok(&bench, "dump --json @again"), text, "byte for byte");
    assert!(meta_ok(&bench, "check @again").ends_with("clean\n"));
    // Something is there now: only with --force.
    meta_refused(&bench, "restore @dump.json @again", "holds hydrant metadata; use another one, or --force");
    meta_ok(&bench, "restore --force @dump.json @again");

    // The clone goes on with it.
    let daemon = bench.clone_of(&source).metadata(bench.path("again")).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected(&source));
    let complete = meta_ok(&bench, "dump --json @again");
    fs::write(bench.path("complete.json"), &complete).unwrap();
    meta_ok(&bench, "restore @complete.json @third");
    assert_eq!(meta_ok(&bench, "dump --json @third"), complete);
}

#[test]
fn an_edited_dump_is_refused_by_the_name_of_its_key() {
    need!("nbdsh");
    let bench = Bench::new();
    half_hydrated(&bench);
    let good = dump(&bench, "@meta");
    let refused = |key: &str, value: Value, words: &str| {
        let mut edited = good.clone();
        edited[key] = value;
        fs::write(bench.path("edited.json"), edited.to_string()).unwrap();
        meta_refused(&bench, "restore @edited.json @new", words);
        assert!(!bench.path("new").exists());
    };
    refused("hydrated", json!([[1, 2], [2, 3]]), "hydrated[1], [2,3]: it overlaps");
    refused("hydrated", json!([[100, 640]]), "key 'hydrated': [0], [100,640]: past the last region, 639");
    refused("version", json!(2), "key 'version': 2, this hydrant knows 1");
    refused("state", json!("complete"), "key 'state'");
    refused("bogus", json!(1), "unknown field `bogus`");
    meta_refused(&bench, "restore @missing @new", "dump");
    meta_refused(&bench, "restore @source @new", "not a dump");
    let directory = bench.dir().to_str().unwrap();
    meta_refused(&bench, &format!("restore {directory} @new"), "not a regular file");
}

#[test]
fn formatted_ahead_the_first_use_takes_its_devices() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 40 * MIB);
    meta_ok(&bench, "format --size 40MiB --region-size 1MiB @meta");
    let fresh = dump(&bench, "@meta");
    assert_eq!(
        (&fresh["hydrated"], &fresh["region_size"], &fresh["nr_regions"]),
        (&json!([]), &json!(1 << 20), &json!(40))
    );
    assert!(meta_ok(&bench, "dump @meta").contains("source          not known yet\ndestination id  none yet\n"));
    meta_refused(&bench, "format --size 40MiB @meta", "holds hydrant metadata");
    meta_ok(&bench, "format --force --size 40MiB @meta");

    // A destination with something in it is refused as for any new clone, and a source that is too small.
    let busy = bench.random("busy", 40 * MIB);
    bench.clone_of(&source).destination(&busy).refused(&["destination", "holds data"]);
    bench.clone_of(bench.random("small", 4 * MIB)).refused(&["40MiB", "4MiB"]);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), WRITE);
    daemon.kill9();

    // From then on they belong to these.
    let used = dump(&bench, "@meta");
    assert_ne!(used["uuid"], fresh["uuid"]);
    assert_eq!(used["source"]["samples"], json!(64));
    bench.clone_of(bench.filled("other", 40 * MIB, 7)).refused(&["source's content"]);
    bench.clone_of(&source).destination(&busy).refused(&["another destination"]);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected(&source));
}

#[test]
fn formatted_for_these_devices_others_are_refused() {
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB + 512);
    bench.hole("copy", 8 * MIB + 512);
    bench.hole("short", 8 * MIB);
    bench.random("busy", 9 * MIB);
    meta_refused(&bench, "format --source @source --destination @missing @meta", "does not exist");
    meta_refused(&bench, "format --source @source --destination @short @meta", "too small");
    meta_refused(&bench, "format --source @source --destination @busy @meta", "holds data at offset");
    meta_refused(&bench, "format --source @source --destination @source @meta", "the same file");
    meta_refused(&bench, "format --source @source @source", "the same file");
    meta_refused(&bench, "format --size 0 @meta", "can't be cloned");
    meta_refused(&bench, "format --size 8000000TiB @meta", "use larger regions");
    bench.hole("small-meta", 8192);
    meta_refused(&bench, "format --size 8MiB @small-meta", "too small");
    meta_ok(&bench, "format --source @source --destination @copy @meta");
    bench.clone_of(bench.filled("other", 8 * MIB + 512, 7)).refused(&["source's content"]);
    bench.clone_of(&source).destination(bench.path("busy")).refused(&["another destination"]);
    let daemon = bench.clone_of(&source).start();
    // In use: the tools keep away.
    for words in
        ["format --force --size 1GiB @meta", "repair @meta", "repair --dry-run @meta", "export-dm @meta @image"]
    {
        let (status, text) = meta(&bench, words);
        assert!(status == 1 && text.contains("in use"), "{words}: {text}");
    }
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&source).unwrap());
}

#[test]
fn metadata_that_have_no_room_are_refused_before_the_first_write() {
    need!("loop", "losetup", "mkfs.ext4");
    // The kernel writes to the image when it likes: it is not where changes are looked for.
    let (bench, image) = (Bench::new(), Bench::new());
    let fs = FileSystem::ext4(&image.path("fs.img"), 16 * MIB, &bench.path("mnt"));
    let refused = |words: &str| {
        let text = meta_refused(&bench, words, "are free in its file system");
        assert!(text.contains("metadata") && text.contains("mnt/new needs 34.1 MiB (35803136 bytes)"), "{text}");
    };
    // 2^28 regions.
    refused("format --size 1TiB --region-size 4KiB @mnt/new");
    assert!(!bench.path("mnt/new").exists());
    meta_ok(&bench, "format --size 1TiB --region-size 4KiB @meta");
    fs::write(bench.path("dump.json"), meta_ok(&bench, "dump --json @meta")).unwrap();
    fs::write(bench.path("mnt/new"), "").unwrap();
    refused("restore @dump.json @mnt/new");
    assert_eq!(fs::metadata(bench.path("mnt/new")).unwrap().len(), 0);
    refused("format --force --size 1TiB --region-size 4KiB @mnt/new");

    // The daemon looks too, before it makes the destination.
    let source = bench.hole("source", 1 << 40);
    let clone = bench.clone_of(&source).metadata(fs.mount.join("new2")).args("--region-size 4KiB");
    clone.refused(&["metadata", "needs 34.1 MiB", "are free in its file system"]);
    assert!(!bench.copy().exists() && !fs.mount.join("new2").exists());
}

#[test]
fn a_tool_that_is_ended_leaves_nothing_behind() {
    let bench = Bench::new();
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        for was_there in [false, true] {
            let path = bench.path("new");
            if was_there {
                fs::write(&path, "").unwrap();
            }
            // 2^35 regions: 4.3 GiB of metadata.
            let mut tool = Command::new(env!("CARGO_BIN_EXE_hydrant"));
            tool.args(["meta", "format", "--size", "128TiB", "--region-size", "4KiB"]).arg(&path);
            let mut tool = tool.stderr(Stdio::piped()).spawn().unwrap();
            let is_written = || fs::metadata(&path).is_ok_and(|stat| stat.blocks() > 8);
            wait_for("the first blocks", Duration::from_secs(60), is_written);
            run("kill", &[&format!("-{signal}"), &tool.id().to_string()]);
            let status = tool.wait().unwrap();
            let mut said = String::new();
            tool.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            assert_eq!(status.signal(), Some(number), "{said}");
            assert!(said.starts_with("writing 4.3 GiB to metadata ") && said.lines().count() == 1, "{said}");
            match was_there {
                false => assert!(!path.exists(), "SIG{signal}"),
                true => assert_eq!(fs::metadata(&path).unwrap().len(), 0, "SIG{signal}"),
            }
            let _ = fs::remove_file(&path);
        }
    }
}

#[test]
fn an_nbd_source_is_looked_at_too() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 8M");
    meta_ok(&bench, &format!("format --source {} @meta", server.uri()));
    assert_eq!(dump(&bench, "@meta")["source"]["samples"], json!(64));
    let daemon = bench.clone_of(server.uri()).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &pattern(8 * MIB));
}

/// Damages a sector of the metadata: the bits are unknown from then on.
fn damage(bench: &Bench, sector: usize) {
    let mut bytes = fs::read(bench.meta()).unwrap();
    bytes[sector * 512 + 40] ^= 1;
    fs::write(bench.meta(), bytes).unwrap();
}

#[test]
fn damage_is_mended_by_choice_only() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = half_hydrated(&bench);
    assert!(meta_ok(&bench, "repair @meta").contains("nothing to repair"));
    damage(&bench, 16);
    bench.clone_of(&source).refused(&["damaged", "sector 16"]);
    let text = meta_refused(
        &bench,
        "repair @meta",
        "nobody knows which of the 512 regions of 1 damaged sector (16) were hydrated",
    );
    assert!(
        text.contains("sector 16: checksum") && text.contains("; regions 0 to 511, bytes 0 to 33554431 of the clone\n"),
        "{text}"
    );
    meta_refused(&bench, "repair --assume 17=hydrated @meta", "sector 17 is not damaged");
    meta_refused(&bench, "repair --assume hydrated --assume unhydrated @meta", "twice");
    let before = checksums(bench.dir());
    let text = meta_refused(
        &bench,
        "repair --assume unhydrated --backup @source @meta",
        "can't be written; the metadata were not changed",
    );
    assert!(!text.contains("taken for"), "what is not done is not said: {text}");
    assert_eq!(checksums(bench.dir()), before);
    let text = meta_ok(&bench, "repair --dry-run --assume unhydrated @meta");
    assert!(text.contains("taken for unhydrated") && text.contains("dry run: nothing was changed"), "{text}");
    assert_eq!(checksums(bench.dir()), before);

    let damaged = fs::read(bench.meta()).unwrap();
    assert!(meta_ok(&bench, "repair --assume unhydrated --backup @bad @meta").contains("repaired: clean"));
    assert_eq!(fs::read(bench.path("bad")).unwrap(), damaged, "the backup is what was there");
    assert_eq!(dump(&bench, "@meta")["hydrated"], json!([[639, 639]]));
    assert!(meta_ok(&bench, "check @meta").ends_with("\nclean\n"));

    // The regions that are known stay as they were; those that were not are read from the source, as was said.
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[639 * REGION as usize..].fill(b'x');
    assert_same(&bench.copy(), &expected);

    // Complete: there is nothing to choose.
    damage(&bench, 16);
    meta_refused(&bench, "repair --assume unhydrated @meta", "marked complete");
    meta_ok(&bench, "repair @meta");
    assert_eq!(dump(&bench, "@meta")["hydrated"], json!([[0, 639]]));
}

#[test]
fn a_superblock_copy_is_made_from_the_other() {
    need!("nbdsh");
    let bench = Bench::new();
    half_hydrated(&bench);
    let good = fs::read(bench.meta()).unwrap();
    for sector in [0, 8] {
        damage(&bench, sector);
        assert_eq!(meta(&bench, "check @meta").0, 1);
        let text = meta_ok(&bench, "repair @meta");
        assert!(text.contains("written again from copy"), "{text}");
        assert!(fs::read(bench.meta()).unwrap() == good, "as it was");
    }
    damage(&bench, 0);
    damage(&bench, 8);
    meta_refused(&bench, "repair --assume hydrated @meta", "can't be repaired");
    meta_refused(&bench, "repair @source", "holds unknown data");
    meta_refused(&bench, "repair @missing", "does not exist");
}
