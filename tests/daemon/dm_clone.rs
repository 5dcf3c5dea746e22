//! Clones from and to the kernel's dm-clone, by its metadata. The images are those that a kernel made
//! (`tests/fixtures/dm-clone`); that a kernel reads ours is shown in `tests/vm`.

use super::harness::*;
use super::meta_tools::{dump, meta, meta_ok, meta_refused};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dm-clone").join(name)
}

/// Unpacks an image of the kernel into the bench as `image`.
fn unpack(bench: &Bench, name: &str) -> PathBuf {
    let path = bench.path("image");
    fs::copy(fixture(&format!("{name}.img.xz")), bench.path("image.xz")).unwrap();
    run("xz", &["-df", bench.path("image.xz").to_str().unwrap()]);
    path
}

fn facts(name: &str) -> Value {
    let bytes = fs::read(fixture(&format!("{name}.json"))).unwrap();
    serde_json::from_slice::<Value>(&bytes).unwrap()["facts"].clone()
}

/// The source, with the hydrated regions as they are in the destination.
fn merged(source: &[u8], destination: &[u8], facts: &Value) -> Vec<u8> {
    let mut expected = source.to_vec();
    let region = facts["region_size"].as_u64().unwrap() * 512;
    for run in facts["hydrated"].as_array().unwrap() {
        let (first, last) = (run[0].as_u64().unwrap(), run[1].as_u64().unwrap());
        let (from, to) = ((first * region) as usize, (((last + 1) * region) as usize).min(expected.len()));
        expected[from..to].copy_from_slice(&destination[from..to]);
    }
    expected
}

#[test]
fn images_of_the_kernel_are_dumped() {
    need!("xz");
    for name in ["fresh-r8", "full-r8", "one-region", "partial-r8", "tiny-meta-12blocks"] {
        let bench = Bench::new();
        let image = unpack(&bench, name);
        let before = checksums(bench.dir());
        let (found, facts) = (dump(&bench, "--format dm-clone @image"), facts(name));
        assert_eq!(found["region_size"], json!(facts["region_size"].as_u64().unwrap() * 512), "{name}");
        assert_eq!(found["size"], json!(facts["target_size"].as_u64().unwrap() * 512), "{name}");
        for key in ["nr_regions", "hydrated_count", "hydrated", "version"] {
            assert_eq!(found[key], facts[key], "{name}: {key}");
        }
        assert!(meta_ok(&bench, "dump --format dm-clone @image").contains("format          dm-clone"), "{name}");
        assert!(meta_ok(&bench, "check --format dm-clone @image").ends_with("\nclean\n"), "{name}");
        assert_eq!(checksums(bench.dir()), before, "{name}: only looked at");
        // The other kind is told, both ways.
        meta_refused(&bench, "dump @image", "holds dm-clone metadata, no metadata of hydrant: use --format dm-clone");
        meta_refused(&bench, "check @image", "use --format dm-clone");
        meta_ok(&bench, "format --size 1GiB @meta");
        meta_refused(&bench, "dump --format dm-clone @meta", "use --format hydrant");

        let mut bytes = fs::read(&image).unwrap();
        bytes[2 * 4096 + 1000] ^= 1;
        fs::write(&image, bytes).unwrap();
        meta_refused(&bench, "dump --format dm-clone @image", "damaged: block 2: checksum is");
        meta_refused(&bench, "import-dm @image --destination @image --metadata @new", "the same file");
        bench.hole("copy", 64 * MIB);
        meta_refused(&bench, "import-dm @image --destination @copy --metadata @new", "damaged: block 2: checksum is");
        let (status, text) = meta(&bench, "check --format dm-clone --json @image");
        let report: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(
            (status, &report["clean"], &report["findings"][0]["block"]),
            (1, &json!(false), &json!(2)),
            "{text}"
        );
    }
}

#[test]
fn a_half_hydrated_clone_of_the_kernel_is_gone_on_with() {
    need!("xz");
    for (name, with_source) in
        [("partial-r8", false), ("tiny-meta-12blocks", true), ("one-region", false), ("full-r8", true)]
    {
        let bench = Bench::new();
        unpack(&bench, name);
        let facts = facts(name);
        let size = facts["target_size"].as_u64().unwrap() * 512;
        let source = bench.random("source", size);
        let destination = bench.path("copy");
        fs::write(&destination, random_bytes(77, size)).unwrap();
        let expected = merged(&fs::read(&source).unwrap(), &fs::read(&destination).unwrap(), &facts);
        let inputs = checksums(bench.dir());
        let more = if with_source { " --source @source" } else { "" };
        meta_ok(&bench, &format!("import-dm @image --destination @copy --metadata @meta{more}"));
        let mut after = checksums(bench.dir());
        after.remove(&bench.meta()).expect("it was made");
        assert_eq!(after, inputs, "{name}: image, source and destination are untouched");
        let found = dump(&bench, "@meta");
        for key in ["nr_regions", "hydrated_count", "hydrated"] {
            assert_eq!(found[key], facts[key], "{name}: {key}");
        }
        assert_eq!(found["source"]["samples"] != json!(0), with_source, "{name}");

        let daemon = bench.clone_of(&source).start();
        daemon.wait_hydrated();
        let log = daemon.stop();
        assert!(!log.contains("its source has"), "{name}: nothing of it is left out: {log}");
        assert_same(&destination, &expected);
        assert_eq!(dump(&bench, "@meta")["state"], json!("complete"), "{name}");
    }
}

/// dm-clone takes a source, and a destination, that are larger than the target.
#[test]
fn a_larger_source_is_cloned_as_far_as_the_target_goes() {
    need!("xz");
    let bench = Bench::new();
    unpack(&bench, "partial-r8");
    let facts = facts("partial-r8");
    let source = bench.random("source", 65 * MIB);
    let destination = bench.random("copy", 66 * MIB);
    let before = fs::read(&destination).unwrap();
    let mut expected = merged(&fs::read(&source).unwrap()[..64 << 20], &before, &facts);
    expected.extend_from_slice(&before[64 << 20..]);
    meta_ok(&bench, "import-dm @image --destination @copy --metadata @meta --source @source");
    bench.clone_of(bench.filled("other", 64 * MIB, 3)).refused(&["65MiB"]);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&destination, &expected);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_changed() {
    need!("xz");
    let bench = Bench::new();
    unpack(&bench, "partial-r8");
    let import = |destination: &str, more: &str, words: &str| {
        meta_refused(&bench, &format!("import-dm @image --destination {destination} --metadata @meta {more}"), words);
        assert!(!bench.meta().exists());
    };
    import("@missing", "", "destination");
    bench.hole("short", 64 * MIB - 512);
    import("@short", "", "too small");
    bench.hole("copy", 64 * MIB);
    bench.hole("small-source", 64 * MIB - 512);
    import("@copy", "--source @small-source", "it is not its source");
    import("@copy", "--source @copy", "the same file");
    import("@copy", "--source @missing", "No such file");
    import("@copy", "--source http://x/", "not known");
    meta_refused(&bench, "import-dm @image --destination @copy --metadata @image", "the same file");
    meta_refused(&bench, "import-dm @missing --destination @copy --metadata @meta", "No such file");
    bench.random("other-meta", MIB);
    meta_refused(&bench, "import-dm @image --destination @copy --metadata @other-meta", "holds data at offset 0");
    bench.hole("small-meta", 8192);
    meta_refused(&bench, "import-dm @image --destination @copy --metadata @small-meta", "too small");
    // Locked by somebody: flock(1) holds an exclusive lock while it runs the import.
    let args = [
        "-x",
        "image",
        env!("CARGO_BIN_EXE_hydrant"),
        "meta",
        "import-dm",
        "image",
        "--destination",
        "copy",
        "--metadata",
        "meta",
    ];
    let args = args.map(|arg| match arg {
        "image" | "copy" | "meta" if arg != "meta" => bench.path(arg).to_str().unwrap().to_owned(),
        _ => arg.to_owned(),
    });
    let (status, text) = run_for_status("flock", &args);
    assert!(status == 1 && text.contains("in use"), "{text}");
    meta_ok(&bench, "import-dm --force @image --destination @copy --metadata @other-meta");
    // A destination that was cut off after the import.
    let source = bench.hole("source", 64 * MIB);
    fs::File::options().write(true).open(bench.path("copy")).unwrap().set_len(64 * MIB - 512).unwrap();
    bench.clone_of(&source).metadata(bench.path("other-meta")).refused(&["destination", "too small"]);
}

#[test]
fn what_is_exported_says_the_same() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration --region-size 4096").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'x' * 131072, 65536); h.pwrite(b'x' * 4096, 8384512); h.flush()");
    daemon.stop();
    let before = checksums(bench.dir());
    let table = meta_ok(&bench, "export-dm @meta @image");
    assert_eq!(table, format!("0 16384 clone {} DESTINATION SOURCE 8\n", bench.path("image").display()));
    let mut after = checksums(bench.dir());
    assert_eq!(after.remove(&bench.path("image")).expect("it was made").0, 4 << 20);
    assert_eq!(after, before, "nothing else is changed");
    let (ours, theirs) = (dump(&bench, "@meta"), dump(&bench, "--format dm-clone @image"));
    for key in ["size", "region_size", "nr_regions", "hydrated_count", "hydrated"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    meta_refused(&bench, "export-dm @meta @image", "holds dm-clone metadata");
    meta_refused(&bench, "export-dm --force --size 8MiB @meta @image", "--size is for a file that is to be created");
    meta_ok(&bench, "export-dm --force @meta @image");
    meta_refused(
        &bench,
        "export-dm --size 32KiB @meta @tiny",
        "too small: 32768 bytes are too few, dm-clone needs 40960",
    );
    meta_ok(&bench, "export-dm --size 40960 @meta @tiny");
    assert_eq!(dump(&bench, "--format dm-clone @tiny")["hydrated"], ours["hydrated"]);

    // And back again: the clone goes on with what was imported from the export.
    meta_ok(&bench, "import-dm @image --destination @copy --metadata @again");
    assert_eq!(dump(&bench, "@again")["hydrated"], ours["hydrated"]);
    let daemon = bench.clone_of(&source).metadata(bench.path("again")).start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..196_608].fill(b'x');
    expected[8_384_512..].fill(b'x');
    assert_same(&bench.copy(), &expected);
}

#[test]
fn what_dm_clone_can_not_have_is_refused() {
    let bench = Bench::new();
    meta_ok(&bench, "format --size 1000001 @odd");
    meta_refused(
        &bench,
        "export-dm @odd @image",
        "a size of 1000001 bytes is not a multiple of 512, as dm-clone needs",
    );
    meta_ok(&bench, "format --size 16TiB --region-size 4KiB @many");
    meta_refused(&bench, "export-dm @many @image", "4294967296 regions of 4KiB, dm-clone takes at most 2147483648");
    bench.hole("meta", 8192);
    meta_refused(&bench, "export-dm @meta @image", "never formatted");
    let said = meta_refused(&bench, "export-dm @meta @meta", "are the same file: each must be a device of its own");
    assert!(!said.contains("source"), "{said}");
    meta_refused(&bench, "export-dm @missing @image", "No such file");
}

/// All of it on block devices, which are read and written directly and claimed.
#[test]
fn block_devices_are_taken_as_files_are() {
    need!("xz", "loop");
    for block in [512, 4096] {
        let bench = Bench::new();
        let attach = |name: &str| Loop::attach(&bench.path(name), block);
        unpack(&bench, "partial-r8");
        let facts = facts("partial-r8");
        let source = bench.random("source", 64 * MIB);
        let before = fs::read(bench.random("copy", 64 * MIB)).unwrap();
        let expected = merged(&fs::read(&source).unwrap(), &before, &facts);
        for name in ["meta", "export", "restored"] {
            bench.hole(name, 4 * MIB);
        }
        let image_bytes = fs::read(bench.path("image")).unwrap();
        let (image, copy, metadata) = (attach("image"), attach("copy"), attach("meta"));
        let (export, restored) = (attach("export"), attach("restored"));
        let [i, c, m, e, r] = [&image, &copy, &metadata, &export, &restored].map(|device| device.path.display());
        // The file under a loop device is in use.
        let (status, text) = meta(&bench, &format!("import-dm @image --destination {c} --metadata {m}"));
        assert!(status == 1 && text.contains("loop"), "{text}");
        meta_ok(&bench, &format!("import-dm {i} --destination {c} --metadata {m}"));
        meta_ok(&bench, &format!("export-dm {m} {e}"));
        assert_eq!(dump(&bench, &format!("--format dm-clone {e}"))["hydrated"], facts["hydrated"]);
        let text = meta_ok(&bench, &format!("dump --json {m}"));
        fs::write(bench.path("dump.json"), &text).unwrap();
        meta_ok(&bench, &format!("restore @dump.json {r}"));
        assert_eq!(meta_ok(&bench, &format!("dump --json {r}")), text);

        let daemon = bench.clone_of(&source).destination(&copy.path).metadata(&metadata.path).start();
        let (status, text) = meta(&bench, &format!("export-dm --force {m} {e}"));
        assert!(status == 1 && text.contains("in use"), "{text}");
        daemon.wait_hydrated();
        daemon.stop();
        assert_same(&copy.path, &expected);
        assert!(fs::read(&image.path).unwrap() == image_bytes, "the image is only read");
    }
}
