//! Clones of every kind of source to every kind of destination end as a one-to-one copy.

use super::harness::*;
use super::load::{ZONE, mixed_source};
use std::fs;
use std::path::Path;

/// Clones to the end, compares, and starts once more without the source.
fn clones(bench: &Bench, command: &CloneCommand, expected: &[u8], destination: &Path) {
    let daemon = command.start();
    daemon.wait_hydrated();
    let status = daemon.status();
    assert_eq!((status.size, status.hydrated_regions), (expected.len() as u64, status.nr_regions));
    daemon.stop();
    assert_same(destination, expected);
    let again = command.clone().source(bench.path("gone")).start();
    assert!(again.status().is_complete());
    again.stop();
    assert_same(destination, expected);
}

#[test]
fn a_file_is_cloned_to_a_file() {
    need!("qemu-img");
    let bench = Bench::new();
    let source = bench.random("source", 16 * MIB);
    clones(&bench, &bench.clone_of(&source), &fs::read(&source).unwrap(), &bench.copy());
    assert_eq!(fs::metadata(bench.copy()).unwrap().len(), 16 * MIB);
    run("qemu-img", &[Path::new("compare"), &source, &bench.copy()]);
}

#[test]
fn odd_sizes_are_cloned_to_the_byte() {
    for size in [1, 511, 4095, 4097, 65537, 1_000_001, 5 * MIB + 512] {
        let bench = Bench::new();
        let source = bench.random("source", size);
        let command = bench.clone_of(&source).args("--shards 2");
        clones(&bench, &command, &fs::read(&source).unwrap(), &bench.copy());
        assert_eq!(fs::metadata(bench.copy()).unwrap().len(), size);
    }
}

#[test]
fn every_region_size_works() {
    for (region_size, regions) in [("4KiB", 2049), ("64KiB", 129), ("1MiB", 9), ("64MiB", 1), ("1GiB", 1)] {
        let bench = Bench::new();
        let source = bench.random("source", 8 * MIB + 100);
        let command = bench.clone_of(&source).args("--region-size").args(region_size);
        let daemon = command.start();
        assert_eq!(daemon.status().nr_regions, regions);
        daemon.wait_hydrated();
        daemon.stop();
        assert_same(&bench.copy(), &fs::read(&source).unwrap());
    }
}

#[test]
fn any_number_of_shards_works() {
    for shards in [1, 2, 3, 5] {
        let bench = Bench::new();
        // Several zones, so that there is something to share.
        let source = mixed_source(&bench, 3 * ZONE + 4099);
        let command = bench.clone_of(&source).args(&format!("--region-size 4KiB --shards {shards}"));
        let daemon = command.start();
        assert_eq!(daemon.status().shards, shards);
        daemon.wait_hydrated();
        daemon.stop();
        assert_same_files(&bench.copy(), &source);
    }
}

#[test]
fn a_larger_destination_keeps_what_is_behind_the_clone() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 5 * MIB + 100);
    let destination = bench.filled("copy", 8 * MIB, 0xaa);
    bench.clone_of(&source).refused(&["destination", "holds data", "--force"]);
    let daemon = bench.clone_of(&source).args("--force").start();
    let size = nbdsh(&daemon.uri(), "print(connect().get_size())");
    assert_eq!(size.trim(), (5 * MIB + 100).to_string());
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected.resize(8 * MIB as usize, 0xaa);
    assert_same(&destination, &expected);
}

#[test]
fn loop_devices_of_both_block_sizes_are_sources_and_destinations() {
    need!("loop", "losetup", "nbdsh");
    for block in [512, 4096] {
        let bench = Bench::new();
        let content = bench.random("source", 8 * MIB);
        let source = Loop::attach(&content, block);
        let destination = Loop::attach(&bench.hole("backing", 9 * MIB), block);
        let metadata = Loop::attach(&bench.hole("metadata", MIB), block);
        let command = bench.clone_of(&source.path).destination(&destination.path).metadata(&metadata.path);
        let daemon = command.start();
        // Unaligned, over the edge of regions.
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'x' * 70001, 65535); h.flush()");
        daemon.wait_hydrated();
        daemon.stop();
        let mut expected = fs::read(&content).unwrap();
        expected[65535..65535 + 70001].fill(b'x');
        assert_same(&destination.path, &expected);
        let again = command.clone().source(bench.path("gone")).start();
        assert!(again.status().is_complete());
        again.stop();
    }
}

#[test]
fn nbd_exports_are_cloned() {
    need!("nbdkit");
    let size = 8 * MIB + 512;
    let servers = [
        "pattern 8389120",
        "--filter=delay pattern 8389120 rdelay=2ms",
        // One connection for all shards.
        "--filter=multi-conn pattern 8389120 multi-conn-mode=disable",
        "--filter=nozero --filter=noextents --no-sr pattern 8389120",
        "--filter=blocksize-policy pattern 8389120 blocksize-minimum=512 blocksize-preferred=4096 blocksize-maximum=65536 blocksize-error-policy=error",
    ];
    for args in servers {
        let bench = Bench::new();
        let server = Nbdkit::start(&bench, args);
        let command = bench.clone_of(server.uri()).args("--shards 3");
        clones(&bench, &command, &pattern(size), &bench.copy());
    }
}

#[test]
fn an_nbd_export_over_tcp_is_cloned() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start_tcp(&bench, "pattern 4M");
    clones(&bench, &bench.clone_of(server.uri()), &pattern(4 * MIB), &bench.copy());
}

#[test]
fn a_qcow2_behind_qemu_nbd_is_cloned() {
    need!("qemu-img", "qemu-nbd", "qemu-io");
    let bench = Bench::new();
    let image = bench.path("source.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "16M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 1M 3M", "-c", "write -z 9M 64k", image.to_str().unwrap()]);
    let server = QemuNbd::start(&bench, &["-f", "qcow2", "--shared=8", image.to_str().unwrap()]);
    let daemon = bench.clone_of(server.uri()).start();
    daemon.wait_hydrated();
    daemon.stop();
    drop(server); // It has the image locked.
    let copy = bench.copy();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image.to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(allocated(&bench.copy()) <= 4 * MIB, "{} bytes are allocated", allocated(&bench.copy()));
}

#[test]
fn holes_and_zeros_of_the_source_take_no_space_in_the_copy() {
    need!("nbdkit");
    let bench = Bench::new();
    let source = bench.path("source");
    let mut content = random_bytes(1, 32 * MIB);
    content[4 << 20..20 << 20].fill(0);
    content[25 << 20..28 << 20].fill(0);
    fs::write(&source, &content).unwrap();
    // The first stretch is a hole in the source, the second one zeros that are written out.
    run("fallocate", &["-p", "-o", "4MiB", "-l", "16MiB", source.to_str().unwrap()]);
    let server = Nbdkit::start(&bench, &format!("file {}", source.display()));
    for (name, spec) in [("a", source.to_str().unwrap().to_owned()), ("b", server.uri())] {
        let (copy, meta) = (bench.path(&format!("copy-{name}")), bench.path(&format!("meta-{name}")));
        let daemon = bench.clone_of(&spec).destination(&copy).metadata(&meta).start();
        daemon.wait_hydrated();
        let io = daemon.status().io;
        assert!(io.source_read_bytes <= 17 * MIB, "holes are not read: {} bytes were", io.source_read_bytes);
        daemon.stop();
        assert_same(&copy, &content);
        assert!(allocated(&copy) <= 13 * MIB + 64 * KIB, "{} bytes are allocated", allocated(&copy));
    }
}

#[test]
fn only_a_device_mapper_device_is_handed_over() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    let said = daemon.refused(&["finish", "vm", "--wait"]);
    assert!(
        said.contains("clone 'vm' has no device-mapper device to hand over: start it with --ublk --dm-name"),
        "{said}"
    );
    let said = daemon.refused(&["finish", "other"]);
    assert!(said.contains("no daemon is listening") || said.contains("no clone 'other' here, only 'vm'"), "{said}");
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&source).unwrap());
}
