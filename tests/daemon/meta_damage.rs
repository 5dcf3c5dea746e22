//! Damaged metadata with the real program: check, the daemon and repair agree; a repair or restore that is cut off is
//! repeated. All sectors of all shapes are judged by the unit tests of `meta::repair`.

use super::harness::*;
use super::meta_tools::{dump, meta, meta_ok, meta_refused};
use serde_json::{Value, json};
use std::fs;
use std::process::Command;

const REGION: usize = 64 << 10;
/// Writes `x` to regions 1, 2 and 639 of the clone.
const WRITE: &str = "h = connect(); h.pwrite(b'x' * 131072, 65536); h.pwrite(b'x' * 65536, 639 * 65536); h.flush()";

/// A change of the sector that begins at an offset.
type Damage = fn(&mut [u8], usize);

/// Sectors 16 and 17 hold all bits of this clone, 18 to 23 none.
#[test]
fn check_daemon_and_repair_agree() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 40 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), WRITE);
    daemon.stop();
    let (good, copy) = (fs::read(bench.meta()).unwrap(), fs::read(bench.copy()).unwrap());
    let (bits, same) = (json!([[1, 2], [639, 639]]), |bytes: &[u8]| fs::read(bench.meta()).unwrap() == bytes);
    let ways: [(&str, Damage); 5] = [
        ("a bit of the magic", |image, at| image[at + 5] ^= 4),
        ("a bit of the content", |image, at| image[at + 33] ^= 4),
        ("all zero", |image, at| image[at..at + 512].fill(0)),
        ("all ones", |image, at| image[at..at + 512].fill(0xff)),
        ("swapped with the next", |image, at| image[at..at + 1024].rotate_left(512)),
    ];
    for sector in [0, 8, 16, 17, 18, 23] {
        for (way, change) in &ways {
            let name = format!("sector {sector}: {way}");
            let mut image = good.clone();
            // The last one has no next.
            if *way == "swapped with the next" && sector == 23 {
                continue;
            }
            change(&mut image, sector * 512);
            fs::write(bench.meta(), &image).unwrap();
            let damaged: Vec<usize> =
                (16..24).filter(|s| image[s * 512..(s + 1) * 512] != good[s * 512..(s + 1) * 512]).collect();

            let (status, said) = meta(&bench, "check --json @meta");
            assert_eq!(status, 1, "{name}: {said}");
            let report: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
            let found: Vec<_> = report["findings"].as_array().unwrap().iter().map(|f| f["sector"].clone()).collect();
            match damaged.is_empty() {
                true => assert_eq!(report["findings"][0]["block"], json!(sector / 8), "{name}: {said}"),
                false => assert_eq!(json!(found), json!(damaged), "{name}: {said}"),
            }
            assert!(same(&image), "{name}: check writes nothing");

            // One lost superblock copy is survived, and written again; anything else is refused by the same words.
            if damaged.is_empty() {
                let daemon = bench.clone_of(&source).args("--no-hydration").start();
                daemon.wait_log("is written again from the other one");
                daemon.stop();
                assert!(same(&good), "{name}");
                fs::write(bench.meta(), &image).unwrap();
            } else {
                let what = report["findings"][0]["what"].as_str().unwrap();
                bench.clone_of(&source).refused(&["damaged", &format!("sector {} ", damaged[0]), what]);
                assert!(same(&image), "{name}: a refusal changes nothing");
            }

            // What is proven is restored; what is not is listed, and left to be said.
            let is_proven = !damaged.contains(&16) && !damaged.contains(&17) || *way == "a bit of the magic";
            if !is_proven {
                let said = meta_refused(&bench, "repair @meta", "choose with --assume (see --help), or --force");
                assert!(said.contains(" of the clone\n"), "{said}");
                assert!(same(&image), "{name}: nothing is changed");
            }
            meta_ok(&bench, if is_proven { "repair @meta" } else { "repair --force @meta" });
            assert!(meta_ok(&bench, "check @meta").ends_with("\nclean\n"));
            let lost = |of: usize| !is_proven && damaged.contains(&of);
            let left: Vec<[u64; 2]> =
                [([1, 2], 16), ([639, 639], 17)].into_iter().filter(|(_, of)| !lost(*of)).map(|(run, _)| run).collect();
            assert_eq!(dump(&bench, "@meta")["hydrated"], json!(left), "{name}");
        }
    }

    // The regions whose bits were lost come from the source again, the others stay.
    let mut image = good.clone();
    image[16 * 512 + 33] ^= 4;
    fs::write(bench.meta(), &image).unwrap();
    fs::write(bench.copy(), &copy).unwrap();
    meta_ok(&bench, "repair --force @meta");
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[639 * REGION..].fill(b'x');
    assert_same(&bench.copy(), &expected);
    assert_ne!(dump(&bench, "@meta")["hydrated"], bits);
}

/// The kernel ends the tool in the middle of its writes, or makes them fail.
#[test]
fn a_repair_or_restore_that_is_cut_off_is_repeated() {
    need!("prlimit");
    let bench = Bench::new();
    // 171 zones: 700 KB of metadata.
    meta_ok(&bench, "format --size 20GiB --region-size 4KiB @meta");
    let good = fs::read(bench.meta()).unwrap();
    let line = meta_ok(&bench, "dump --json @meta");
    fs::write(bench.path("dump.json"), &line).unwrap();
    // RLIMIT_FSIZE stops writes behind an offset: by SIGXFSZ, which kills, or where that is ignored by EFBIG.
    let limited = |bytes: usize, ignore: bool, words: &str| {
        let program = format!(
            "{} exec prlimit --fsize={bytes} {} meta {}",
            if ignore { "trap '' XFSZ;" } else { "" },
            env!("CARGO_BIN_EXE_hydrant"),
            words.replace('@', &format!("{}/", bench.dir().display()))
        );
        let output = Command::new("bash").args(["-c", &program]).output().unwrap();
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for ignore in [false, true] {
        for bytes in [0, 4096, 8192, 12288, 256 << 10, good.len() - 4096] {
            let name = format!("{bytes} bytes, {ignore}");
            // Over the metadata that are there: afterwards they are whole, or none.
            fs::write(bench.meta(), &good).unwrap();
            let (status, said) = limited(bytes, ignore, "restore --force @dump.json @meta");
            assert!(!status.success() && said.lines().count() <= 1, "{name}: {said}");
            assert!(!ignore || said.contains("File too large"), "{name}: {said}");
            let (status, said) = meta(&bench, "check @meta");
            // Only the first write may have been torn, of zeros over both superblock copies: the bitmap is the old one.
            let torn =
                bytes == 4096 && said.contains("superblock copy A is all zero; the other copy is used\nnot clean");
            assert!(status == 0 || torn || said.contains("never formatted"), "{name}: {said}");
            meta_ok(&bench, "restore --force @dump.json @meta");
            assert_eq!(meta_ok(&bench, "dump --json @meta"), line, "{name}");

            // What is damaged is mended in order; the rest stays damaged, and is mended by the next try.
            let mut broken = good.clone();
            for at in [100, 8192 + 40, 100 * 4096 + 40, good.len() - 4096 + 40] {
                broken[at] ^= 1;
            }
            fs::write(bench.meta(), &broken).unwrap();
            let (status, _) = limited(bytes, ignore, "repair --force @meta");
            assert!(!status.success(), "{name}");
            let (status, said) = meta(&bench, "check @meta");
            assert!(status == 1 && said.contains("superblock copy A is damaged"), "{name}: {said}");
            assert!(meta_ok(&bench, "repair --force @meta").ends_with("repaired: clean\n"));
            assert_eq!(dump(&bench, "@meta")["hydrated"], json!([]), "{name}");
            assert_eq!(fs::metadata(bench.meta()).unwrap().len(), good.len() as u64);
        }
    }
}
