//! Suspending: what is held, what is durable, what a suspend that fails leaves behind.

use super::super::clone::{Devices, Setup, SimClone};
use super::super::executor::Sim;
use super::super::seeds;
use super::{Seed, content, result, scenario, start};
use crate::clone_state::Mode;
use crate::error::ErrorKind;
use crate::io_frontend::request::{Request, RequestFlags};
use crate::meta::growth::Wanted;
use bytes::Bytes;
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;

fn setup() -> Setup {
    Setup { size: 64 * REGION, shards: 3, regions_per_zone: 4, hydration: true, ..Setup::default() }
}

fn operations(clone: &SimClone) -> usize {
    clone.devices.destination.log().len() + clone.devices.metadata.log().len()
}

#[test]
fn requests_are_held_and_go_on_after_resume() {
    let setup = Setup { threshold: 4, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.latency_us.set((5_000, 20_000));
        clone.write(0, &[1; 5000]).await.unwrap();
        clone.suspend().await.unwrap();
        clone.suspend().await.unwrap();
        let (before, source_reads) = (operations(&clone), clone.devices.source.reads().len());
        let hydrated = clone.state.hydrated();
        assert!(hydrated < 60, "{hydrated}");
        assert!(!clone.state.is_dirty() && clone.state.hydrating() == 0);
        let (reader, writer, flusher) = (clone.clone(), clone.clone(), clone.clone());
        let read = start(&clone, async move { reader.read(0, 8192).await.unwrap() });
        let write = start(&clone, async move { writer.write(40 * REGION, &[2; 100]).await.unwrap() });
        let flush = start(&clone, async move { flusher.flush().await.unwrap() });
        clone.sim.sleep(Duration::from_secs(5)).await;
        assert_eq!(clone.waiting(), 3);
        assert_eq!((operations(&clone), clone.devices.source.reads().len()), (before, source_reads));
        assert_eq!(clone.state.hydrated(), hydrated);
        clone.resume().await.unwrap();
        clone.resume().await.unwrap();
        let found = result(&clone, &read).await;
        assert_eq!((&found[..5000], &found[5000..]), (&[1; 5000][..], &content(64 * REGION)[5000..8192]));
        result(&clone, &write).await;
        result(&clone, &flush).await;
        assert_eq!(clone.read(40 * REGION, 100).await.unwrap(), [2; 100]);
        clone.completed().await;
        let kinds: Vec<_> = clone.log.after(0, None).events.iter().map(|event| event.kind.name()).collect();
        let told = |name| kinds.iter().filter(|kind| **kind == name).count();
        assert_eq!((told("suspended"), told("resumed"), told("hydration_completed")), (1, 1, 1), "{kinds:?}");
    });
}

/// While a request is on its way from one shard to another nobody but the first one's gate knows of it.
#[test]
fn a_request_between_shards_is_waited_for() {
    scenario(&setup(), |clone| async move {
        let writer = clone.clone();
        clone.net.latency_us_max.set(50_000);
        let write = start(&clone, async move {
            let (offset, data) = (2 * 4 * REGION, Bytes::from(vec![5; 4096]));
            let write = Request::Write { offset, data, flags: RequestFlags::empty() };
            writer.submit(1, write).await.unwrap();
        });
        clone.sim.sleep(Duration::from_micros(10)).await;
        clone.net.latency_us_max.set(30);
        clone.suspend().await.unwrap();
        let before = operations(&clone);
        clone.sim.sleep(Duration::from_secs(1)).await;
        assert_eq!(operations(&clone), before);
        clone.resume().await.unwrap();
        result(&clone, &write).await;
        assert_eq!(clone.read(8 * REGION, REGION).await.unwrap(), [5; 4096]);
    });
}

/// Nothing was flushed by the client, and yet nothing is lost.
#[test]
fn what_was_acknowledged_before_is_durable() {
    for seed in seeds(0..40) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let setup = setup();
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        let acknowledged: Rc<std::cell::RefCell<Vec<u64>>> = Rc::default();
        for i in 0..20 {
            let (other, acknowledged, sim) = (clone.clone(), acknowledged.clone(), sim.clone());
            clone.sim.spawn(async move {
                sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(3000)))).await;
                other.write(i * 3 * REGION + 100, &[7; 1000]).await.unwrap();
                acknowledged.borrow_mut().push(i);
            });
        }
        sim.block_on(async {
            sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(3000)))).await;
            clone.suspend().await.unwrap();
            sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(3000)))).await;
        });
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        for i in acknowledged.borrow().iter() {
            assert_eq!(sim.block_on(clone.read(i * 3 * REGION + 100, 1000)).unwrap(), [7; 1000], "write {i}");
        }
        sim.kill_all();
    }
}

/// The last region is hydrated by what is in flight: completing the clone is part of suspending it.
#[test]
fn a_clone_that_completes_is_quiet_afterwards() {
    for seed in seeds(0..300) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let setup = Setup { size: REGION, ..Setup::default() };
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            let other = clone.clone();
            let write = start(&clone, async move { other.write(0, &[7; 4096]).await.unwrap() });
            sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(500)))).await;
            clone.suspend().await.unwrap();
            let seen = || (operations(&clone), clone.state.events().count().all, clone.coordinator.stats());
            let before = seen();
            sim.sleep(Duration::from_secs(2)).await;
            assert_eq!(seen(), before);
            clone.resume().await.unwrap();
            result(&clone, &write).await;
            clone.completed().await;
        });
        sim.kill_all();
    }
}

#[test]
fn a_suspend_that_takes_too_long_is_undone() {
    scenario(&setup(), |clone| async move {
        clone.devices.source.held.set(true);
        clone.sim.sleep(Duration::from_millis(10)).await;
        let reader = clone.clone();
        let stuck = start(&clone, async move { reader.read(60 * REGION, 100).await.unwrap() });
        clone.sim.sleep(Duration::from_millis(1)).await;
        let asked = clone.sim.now();
        let suspending = clone.clone();
        let suspend = start(&clone, async move { suspending.coordinator.suspend(Duration::from_millis(300)).await });
        clone.sim.sleep(Duration::from_millis(5)).await;
        // Held for as long as that takes.
        let writer = clone.clone();
        let write = start(&clone, async move { writer.write(0, &[9; 4096]).await.unwrap() });
        let error = result(&clone, &suspend).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
        assert!(error.to_string().contains("goes on") && error.to_string().contains("within 0.3 seconds"), "{error}");
        assert!(clone.sim.now() - asked < Duration::from_millis(310) && !clone.state.is_suspended());
        clone.devices.source.held.set(false);
        result(&clone, &stuck).await;
        result(&clone, &write).await;
        clone.suspend().await.unwrap();
        clone.resume().await.unwrap();
        clone.completed().await;
    });
}

/// Who asked for the suspend may be gone for long: resuming helps at once, and nothing queues behind it.
#[test]
fn resuming_gives_up_a_suspend_that_waits() {
    let setup = Setup { threshold: 4, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.held.set(true);
        clone.sim.sleep(Duration::from_millis(10)).await;
        let suspending = clone.clone();
        let suspend = start(&clone, async move { suspending.coordinator.suspend(Duration::from_secs(3600)).await });
        clone.sim.sleep(Duration::from_millis(5)).await;
        assert!(clone.coordinator.is_suspending() && clone.state.is_held() && !clone.state.is_suspended());
        let writer = clone.clone();
        // Of no region that is being copied.
        let write = start(&clone, async move { writer.write(60 * REGION, &[9; 4096]).await.unwrap() });
        let asked = clone.sim.now();
        clone.devices.source.append(&[1; 5000]);
        let wanted = Wanted { size: None, zeros: false };
        for refused in [clone.suspend().await, clone.grow(wanted, 0).await.map(drop)] {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
            assert!(
                error.to_string().contains("is being suspended") && error.to_string().contains("resume"),
                "{error}"
            );
        }
        clone.resume().await.unwrap();
        result(&clone, &write).await;
        assert!(clone.sim.now() - asked < Duration::from_millis(100));
        let error = result(&clone, &suspend).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("was not suspended: given up: it was resumed"), "{error}");
        assert!(!clone.coordinator.is_suspending() && !clone.state.is_held());
        clone.devices.source.held.set(false);
        // The next one is not given up.
        clone.suspend().await.unwrap();
        assert!(!clone.coordinator.is_suspending() && clone.state.is_suspended());
        clone.resume().await.unwrap();
        assert!(clone.grow(wanted, 0).await.unwrap());
        clone.completed().await;
    });
}

#[test]
fn a_suspend_whose_commit_fails_is_undone_and_the_next_one_needs_none() {
    let setup = Setup { hydration: false, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.metadata.set_fault(|op| op.is_change().then_some(libc::EIO));
        clone.write(0, &[1; 4096]).await.unwrap();
        let error = clone.suspend().await.unwrap_err();
        assert_eq!((error.kind(), clone.state.mode()), (ErrorKind::Io, Mode::ReadOnly), "{error}");
        assert!(!clone.state.is_suspended());
        assert_eq!(clone.read(0, 4096).await.unwrap(), [1; 4096]);
        clone.suspend().await.unwrap();
        let before = operations(&clone);
        clone.sim.sleep(Duration::from_secs(3)).await;
        assert_eq!(operations(&clone), before);
        clone.resume().await.unwrap();
        assert_eq!(clone.read(0, 4096).await.unwrap(), [1; 4096]);
    });
}

#[test]
fn stopping_fails_what_is_held() {
    scenario(&setup(), |clone| async move {
        clone.suspend().await.unwrap();
        let (reader, late) = (clone.clone(), clone.clone());
        let held = start(&clone, async move { reader.read(0, 100).await });
        clone.sim.sleep(Duration::from_millis(10)).await;
        clone.stop().await.unwrap();
        assert_eq!(result(&clone, &held).await.unwrap_err().kind(), ErrorKind::Shutdown);
        assert_eq!(late.read(0, 100).await.unwrap_err().kind(), ErrorKind::Shutdown);
        for refused in [clone.suspend().await, clone.resume().await] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Shutdown);
        }
    });
}

/// The end comes while something is in flight that holds a suspend up.
#[test]
fn stopping_ends_a_suspend_that_waits() {
    let setup = Setup { hydration: false, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.held.set(true);
        let (reader, suspending) = (clone.clone(), clone.clone());
        let read = start(&clone, async move { reader.read(0, 100).await });
        clone.sim.sleep(Duration::from_millis(1)).await;
        let suspend = start(&clone, async move { suspending.suspend().await });
        clone.sim.sleep(Duration::from_millis(10)).await;
        let asked = clone.sim.now();
        clone.coordinator.begin_stop().await;
        assert!(clone.sim.now() - asked < Duration::from_secs(1));
        assert_eq!(result(&clone, &suspend).await.unwrap_err().kind(), ErrorKind::Shutdown);
        clone.devices.source.held.set(false);
        result(&clone, &read).await.unwrap();
        clone.stop().await.unwrap();
    });
}
