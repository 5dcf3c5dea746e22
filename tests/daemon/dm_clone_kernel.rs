//! The kernel's own dm-clone, in a virtual machine (`tests/vm`): it opens what hydrant exports, goes on with it, and
//! hydrant takes over what the kernel left.

use super::harness::*;
use super::meta_tools::{dump, meta_ok};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const REGION: u64 = 4 * KIB;
const SMALL: u64 = 64 * MIB;
/// 8912896 regions: 274 array blocks, two leaves and a root.
const LARGE: u64 = 34 << 30;

/// Metadata of hydrant with these runs, by way of a dump, and their export, of `metadata` bytes (130 MiB: three bitmaps).
fn export(bench: &Bench, name: &str, size: u64, metadata: u64, hydrated: &Value) {
    meta_ok(bench, &format!("format --size {size} --region-size {REGION} @{name}.meta"));
    let mut edited = dump(bench, &format!("@{name}.meta"));
    let runs = hydrated.as_array().unwrap().iter();
    edited["hydrated_count"] =
        json!(runs.map(|run| run[1].as_u64().unwrap() - run[0].as_u64().unwrap() + 1).sum::<u64>());
    edited["hydrated"] = hydrated.clone();
    fs::write(bench.path("edited.json"), edited.to_string()).unwrap();
    meta_ok(bench, &format!("restore --force @edited.json @{name}.meta"));
    meta_ok(bench, &format!("export-dm --size {metadata} @{name}.meta @{name}.image"));
}

/// A sparse file with one region of `byte` at each of these.
fn sparse(bench: &Bench, name: &str, size: u64, byte: u8, regions: &[u64]) {
    let file = File::create(bench.hole(name, size)).unwrap();
    file.set_len(size).unwrap();
    regions.iter().for_each(|region| file.write_all_at(&[byte; REGION as usize], region * REGION).unwrap());
}

#[test]
fn the_kernel_and_hydrant_take_over_from_each_other() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup");
    if !vm::has_kernel() {
        return;
    }
    let bench = Bench::new();
    let small_runs = json!([[0, 0], [5, 5], [63, 65], [1000, 1099], [16383, 16383]]);
    export(&bench, "small", SMALL, 4 * MIB, &small_runs);
    bench.filled("small.copy", SMALL, b'D');
    bench.filled("small.source", SMALL, b'S');
    // The first and the last of array blocks (32576 regions each) and of the first leaf (252 of these).
    let large_runs =
        json!([[0, 0], [32_575, 32_576], [65_152, 4_455_000], [8_209_151, 8_209_152], [8_912_895, 8_912_895]]);
    let looked_at = [
        0, 1, 2, 32_575, 32_576, 32_577, 32_578, 65_151, 65_152, 4_455_000, 8_209_151, 8_209_152, 8_209_153, 8_912_895,
    ];
    export(&bench, "large", LARGE, 130 * MIB, &large_runs);
    sparse(&bench, "large.copy", LARGE, b'D', &looked_at);
    sparse(&bench, "large.source", LARGE, b'S', &looked_at);
    bench.hole("made.image", 4 * MIB);
    bench.filled("made.copy", SMALL, b'D');
    bench.hole("wide.image", 8 * MIB);

    let disks = [
        "small.image",
        "small.copy",
        "small.source",
        "large.image",
        "large.copy",
        "large.source",
        "made.image",
        "made.copy",
        "wide.image",
    ];
    let options = ["-t", "90", "-m", "dm-clone", "-p", "dmsetup"];
    let said = vm::boot(&bench, &["dm-clone.guest"], &options, &disks);
    let has = |line: &str| said.has(line);
    let side = |runs: &Value, region: u64| {
        let within = |run: &Value| (run[0].as_u64().unwrap()..=run[1].as_u64().unwrap()).contains(&region);
        if runs.as_array().unwrap().iter().any(within) { 'D' } else { 'S' }
    };

    // It opens what was exported, and reads every region from the right side.
    has("small hydrated 106/16384 mode rw");
    for region in [0, 1, 5, 6, 62, 63, 64, 65, 66, 999, 1000, 1099, 1100, 16382, 16383] {
        has(&format!("small region {region} is {}", side(&small_runs, region)));
    }
    has("large hydrated 4389855/8912896 mode rw");
    for region in [0, 1, 32_575, 32_576, 32_577, 65_151, 65_152, 4_455_000, 8_209_151, 8_209_152, 8_912_895] {
        has(&format!("large region {region} is {}", side(&large_runs, region)));
    }
    // It goes on: new regions are allocated from our space map, committed, and there again after it was opened anew.
    has("small-written hydrated 108/16384 mode rw");
    has("small-again hydrated 108/16384 mode rw");
    has("large-written hydrated 4389858/8912896 mode rw");
    has("large-again hydrated 4389858/8912896 mode rw");
    for line in [
        "small-again region 6 is W",
        "small-again region 12000 is W",
        "small-again region 7 is S",
        "small-again region 5 is D",
    ] {
        has(line);
    }
    for (region, byte) in
        [(0, 'D'), (1, 'S'), (2, 'W'), (32_576, 'D'), (32_577, 'W'), (32_578, 'S'), (8_209_152, 'D'), (8_209_153, 'W')]
    {
        has(&format!("large-again region {region} is {byte}"));
    }
    // What it left is read again: nothing is damaged, nothing leaked.
    let runs = |name: &str| {
        let found = dump(&bench, &format!("--format dm-clone @{name}.image"));
        assert_eq!(found["metadata_blocks_leaked"], json!(0), "{name}");
        found["hydrated"].clone()
    };
    assert_eq!(runs("small"), json!([[0, 0], [5, 6], [63, 65], [1000, 1099], [12000, 12000], [16383, 16383]]));
    let expected =
        json!([[0, 0], [2, 2], [32_575, 32_577], [65_152, 4_455_000], [8_209_151, 8_209_153], [8_912_895, 8_912_895]]);
    assert_eq!(runs("large"), expected);
    assert_eq!(runs("made"), json!([[0, 0], [63, 64], [1000, 1001], [16383, 16383]]));

    // The kernel's own tree of two levels, which it splits in its own way.
    let written = [[3, 3], [32_575, 32_576], [65_151, 65_152], [8_209_151, 8_209_152], [8_912_894, 8_912_894]];
    assert_eq!(runs("wide"), json!(written));
    let short = dump(&bench, "--format dm-clone @wide.image");
    assert_eq!((&short["size"], &short["nr_regions"]), (&json!(LARGE - 3 * 512), &json!(8_912_896)));
    meta_ok(&bench, "import-dm @wide.image --destination @large.copy --metadata @wide.new --source @large.source");
    assert_eq!(dump(&bench, "@wide.new")["hydrated"], json!(written));

    // hydrant takes over, from a clone that it gave and from one that the kernel made.
    for name in ["small", "made"] {
        let hydrated = runs(name);
        let copy = bench.path(&format!("{name}.copy"));
        let mut expected = fs::read(bench.path("small.source")).unwrap();
        let found = fs::read(&copy).unwrap();
        for run in hydrated.as_array().unwrap() {
            let (from, to) = (run[0].as_u64().unwrap() * REGION, (run[1].as_u64().unwrap() + 1) * REGION);
            expected[from as usize..to as usize].copy_from_slice(&found[from as usize..to as usize]);
        }
        assert_eq!(expected[63 * REGION as usize], if name == "made" { b'W' } else { b'D' });
        meta_ok(&bench, &format!("import-dm @{name}.image --destination @{name}.copy --metadata @{name}.new"));
        let daemon =
            bench.clone_of(bench.path("small.source")).destination(&copy).metadata(bench.path(&format!("{name}.new")));
        let daemon = daemon.start();
        daemon.wait_hydrated();
        daemon.stop();
        assert_same(&copy, &expected);
    }
}
