use super::check::check;
use super::dump::dump;
use super::repair::mend;
use super::*;
use crate::meta::check::check as check_image;
use crate::meta::check::tests::{image, reader, sample};
use crate::meta::repair::{Assumptions, survey};
use crate::meta::store::Store;
use crate::meta::store::sim::{Plan, SimDisk};
use futures_lite::future::block_on;
use std::path::PathBuf;
use std::rc::Rc;

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn fixture(content: &[u8]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.meta");
    std::fs::write(&path, content).unwrap();
    Fixture { _dir: dir, path }
}

fn text(run: impl FnOnce(&mut dyn Write) -> Result<()>) -> String {
    let mut out = Vec::new();
    run(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn hydrated(region: u64) -> bool {
    region < 10 || (990..=2000).contains(&region) || region == 16383
}

#[test]
fn dump_as_json_and_text() {
    let file = fixture(&image(&sample(), hydrated));
    let line = text(|out| dump(&file.path, true, out));
    assert_eq!(line.matches('\n').count(), 1);
    let value: Value = serde_json::from_str(&line).unwrap();
    let expected = json!({
        "format": "hydrant", "version": 1, "uuid": "30313233-3435-3637-3839-616263646566", "state": "active", "generation": 9,
        "created_unix_s": 1_700_000_000, "size": (1 << 30) - 100, "region_size": 65536, "nr_regions": 16384,
        "regions_per_zone": 1000, "nr_zones": 17, "hydrated_count": 1022,
        "source": { "size": (1 << 30) - 100, "samples": 64, "digest": "5a".repeat(16) },
        "destination_id": "d1".repeat(16),
        "hydrated": [[0, 9], [990, 2000], [16383, 16383]],
    });
    assert_eq!(value, expected);
    assert_eq!(
        text(|out| dump(&file.path, false, out)),
        "uuid            30313233-3435-3637-3839-616263646566
state           active
generation      9
size            1073741724 bytes
region size     64KiB
regions         16384, 1000 in a zone, 17 zones
hydrated        1022 regions (6.2 %)
source          1073741724 bytes, digest 5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a of 64 samples
destination id  d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1
hydrated 0..=9
hydrated 990..=2000
hydrated 16383..=16383
"
    );
}

#[test]
fn check_says_clean_or_what_is_not() {
    let mut content = image(&sample(), hydrated);
    let file = fixture(&content);
    let mut out = Vec::new();
    assert!(check(&file.path, false, &mut out).unwrap());
    assert!(String::from_utf8(out).unwrap().ends_with("\nclean\n"));

    content[2 * 4096..2 * 4096 + 512].fill(0);
    content[100] ^= 1;
    let file = fixture(&content);
    let mut out = Vec::new();
    assert!(!check(&file.path, true, &mut out).unwrap());
    let value: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(
        (&value["clean"], &value["nr_findings"], &value["hydrated_count"]),
        (&json!(false), &json!(2), &json!(1012))
    );
    assert_eq!(
        value["findings"][1],
        json!({"block": 2, "sector": 16, "offset": 8192, "regions": [0, 127], "what": "all zero, what was written is lost"})
    );
    let mut out = Vec::new();
    let error = dump(&file.path, false, &mut out).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "metadata {}: damaged: sector 16 (byte offset 8192): all zero, what was written is lost; it covers regions 0 \
             to 127; see all with `hydrant meta check`",
            file.path.display()
        )
    );
    assert!(out.is_empty());
    assert_eq!(std::fs::read(&file.path).unwrap(), content, "never written");
}

#[test]
fn dump_survives_a_lost_superblock_copy() {
    let mut content = image(&sample(), hydrated);
    content[4096 + 50] ^= 1;
    let file = fixture(&content);
    assert!(text(|out| dump(&file.path, false, out)).ends_with("hydrated 16383..=16383\n"));
}

#[test]
fn what_is_not_ours_is_named() {
    let error = |path: &Path| {
        let error = check(path, false, &mut Vec::new()).unwrap_err();
        assert_eq!(dump(path, true, &mut Vec::new()).unwrap_err().to_string(), error.to_string());
        let prefix = format!("metadata {}: ", path.display());
        error.to_string().strip_prefix(&prefix).expect("names the path").to_string()
    };
    let of = |content: &[u8]| error(&fixture(content).path);
    assert_eq!(of(b""), "all zero where metadata begin: never formatted");
    assert_eq!(of(&[0; 1 << 20]), "all zero where metadata begin: never formatted");
    assert_eq!(of(&[1; 1 << 20]), "holds unknown data, no metadata of hydrant");
    let mut btrfs = vec![0; 1 << 20];
    btrfs[65600..65608].copy_from_slice(b"_BHRfS_M");
    assert_eq!(of(&btrfs), "holds a btrfs file system, no metadata of hydrant");
    let mut dm_clone = vec![0; 1 << 20];
    dm_clone[32..40].copy_from_slice(&0x8af2_7f64_u64.to_le_bytes());
    assert_eq!(of(&dm_clone), "holds dm-clone metadata, no metadata of hydrant: use --format dm-clone");

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(error(dir.path()), "is a directory, not a file or block device");
    assert_eq!(error(&dir.path().join("none")), "can't be opened: No such file or directory");
    let socket = dir.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(error(&socket), "is a socket, not a file or block device");
    assert_eq!(error(Path::new("/dev/null")), "is a character device, not a file or block device");
}

#[test]
fn a_closed_output_is_an_error() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(libc::EPIPE))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let file = fixture(&image(&sample(), hydrated));
    for result in [check(&file.path, true, &mut Closed).map(|_| ()), dump(&file.path, true, &mut Closed)] {
        assert_eq!(result.unwrap_err().to_string(), "can't write the output: Broken pipe");
    }
}

/// The bits of an image, in words; an error when a daemon would not start from it.
fn opened(image: &[u8]) -> Result<Vec<(u64, Vec<u64>)>> {
    let disk = Rc::new(SimDisk::new(image.to_vec(), Plan::default(), 1));
    let opened = block_on(Store::open(disk))?.expect("metadata are there");
    Ok(opened.zones.iter().map(|(zone, bits)| (zone.0, bits.to_vec())).collect())
}

/// Power fails, or a write, before each step of a repair, and any subset of what was written survives. No start ever sees
/// anything but the mended clone, and the same repair goes on from there.
#[test]
fn a_repair_that_is_cut_off_is_repeated() {
    let damage = |image: &mut Vec<u8>, places: &[usize]| places.iter().for_each(|at| image[*at] ^= 1);
    let active = || image(&sample(), hydrated);
    let complete = || image(&Superblock { state: CloneState::Complete, ..sample() }, |_| true);
    let contradicts = || image(&Superblock { state: CloneState::Complete, ..sample() }, |region| region != 5);
    let assume = |others, force| Assumptions { others, force, ..Assumptions::default() };
    let cases: [(Vec<u8>, &[usize], Assumptions); 6] = [
        (active(), &[2 * 4096 + 40, 2 * 4096 + 1024 + 40, 9 * 4096 + 7, 100], assume(None, true)),
        (active(), &[5000, 18 * 4096 + 100], assume(Some(true), false)),
        (active(), &[4096], assume(None, false)),
        (complete(), &[0, 5 * 4096 + 50], assume(None, false)),
        (contradicts(), &[], assume(None, true)),
        (contradicts(), &[4100], assume(Some(true), false)),
    ];
    let mut crashes = 0;
    for (case, (mut broken, places, assume)) in cases.into_iter().enumerate() {
        damage(&mut broken, places);
        let run = |image: &[u8], plan: Plan, seed: u64| -> (Result<()>, Vec<u8>) {
            let disk = SimDisk::new(image.to_vec(), plan, seed);
            let found = survey(&mut reader(image), image.len() as u64, assume.force).unwrap();
            let done = found.decide(&assume).and_then(|decided| mend(&disk, &decided, &mut reader(image)));
            (done, disk.crash())
        };
        let (done, mended) = run(&broken, Plan::default(), 1);
        done.unwrap();
        let wanted = opened(&mended).unwrap();
        assert!(check_image(&mut reader(&mended), mended.len() as u64).unwrap().is_clean(), "case {case}");
        for step in 0.. {
            let mut finished = true;
            for seed in 0..12 {
                let stop = Plan { stop_at: Some(step), ..Plan::default() };
                let fail = Plan { fail_at: Some(step), ..Plan::default() };
                let (done, left) = run(&broken, if seed % 2 == 0 { stop } else { fail }, seed);
                finished &= done.is_ok();
                crashes += 1;
                if let Ok(found) = opened(&left) {
                    assert!(found == wanted, "case {case}, step {step}, seed {seed}: a start sees something else");
                }
                let (done, again) = run(&left, Plan::default(), seed);
                done.unwrap_or_else(|error| panic!("case {case}, step {step}, seed {seed}: {error}"));
                assert!(opened(&again).unwrap() == wanted, "case {case}, step {step}, seed {seed}");
                let report = check_image(&mut reader(&again), again.len() as u64).unwrap();
                assert!(report.is_clean(), "case {case}, step {step}, seed {seed}: {:?}", report.findings);
            }
            if finished {
                break;
            }
        }
    }
    assert!(crashes > 300, "{crashes} crashes");
}
