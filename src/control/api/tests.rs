use super::*;
use crate::error::ErrorKind;

/// A status like the first line of the kernel's documented flow: 256 MiB, regions of 8 sectors.
fn fresh() -> Status {
    Status {
        size: 256 << 20,
        region_size: 4096,
        nr_regions: 65536,
        hydration: HydrationStatus { threshold_effective: 1, batch_size_effective: 1, ..Default::default() },
        features: Features { no_hydration: true, ..Default::default() },
        metadata: MetadataStatus { block_size: 4096, used_blocks: 8, total_blocks: 1024, ..Default::default() },
        ..Default::default()
    }
}

#[test]
fn dm_line_is_the_kernels() {
    let mut status = fresh();
    // As printed by Linux 6.18 for this device.
    let kernel = "0 524288 clone 8 8/1024 8 0/65536 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw";
    assert_eq!(status.dm_line(), kernel);

    status.features = Features { no_hydration: false, no_discard_passdown: true };
    (status.hydrated_regions, status.hydrating_regions) = (47654, 16);
    status.hydration.threshold_effective = 16;
    status.hydration.batch_size_effective = 4;
    status.metadata.mode = MetadataMode::ReadOnly;
    let line = "0 524288 clone 8 8/1024 8 47654/65536 16 1 no_discard_passdown 4 hydration_threshold 16 \
                hydration_batch_size 4 ro";
    assert_eq!(status.dm_line(), line);

    status.features = Features { no_hydration: true, no_discard_passdown: true };
    assert!(status.dm_line().contains(" 2 no_hydration no_discard_passdown 4 "));
    status.features = Features::default();
    assert!(status.dm_line().contains("/65536 16 0 4 hydration_threshold"));

    status.metadata.mode = MetadataMode::Fail;
    assert_eq!(status.dm_line(), "0 524288 clone Fail");
    status.size = 513;
    assert_eq!(status.dm_line(), "0 2 clone Fail");
}

#[test]
fn json_names_are_pinned() {
    let json = serde_json::to_value(Status { last_event: Some("x".into()), ..fresh() }).unwrap();
    let mut names = Vec::new();
    collect_names("", &json, &mut names);
    let pinned = "name state error retry_in_seconds warnings ublk suspended suspending resizing size region_size nr_regions hydrated_regions hydrating_regions hydration.enabled \
         hydration.threshold hydration.batch_size hydration.threshold_effective hydration.batch_size_effective \
         hydration.state hydration.failures_max hydration.failures_in_a_row hydration.failed_regions \
         hydration.failed_ranges hydration.failed_regions_more hydration.last_failure hydration.rate hydration.total_rate hydration.priority \
         hydration.bytes_per_second hydration.eta_seconds \
         features.no_hydration features.no_discard_passdown metadata.path metadata.mode metadata.error metadata.block_size \
         metadata.used_blocks metadata.total_blocks metadata.generation event_nr events last_event source.spec \
         source.state source.losses source.reconnects source.silent_seconds destination nbd.address nbd.export nbd.connections io.reads \
         io.writes io.trims io.write_zeroes io.flushes io.read_bytes io.write_bytes io.trim_bytes \
         io.write_zeroes_bytes io.errors io.source_read_bytes io.hydrated_bytes io.commits shards uptime_seconds \
         version pid";
    let mut pinned: Vec<_> = pinned.split_ascii_whitespace().collect();
    names.sort();
    pinned.sort();
    assert_eq!(names, pinned);
    assert_eq!(json["metadata"]["mode"], "rw");
    assert_eq!(json["hydration"]["state"], "idle");
    assert_eq!(json["source"]["state"], "connected");
    assert_eq!(serde_json::to_value(MetadataMode::Fail).unwrap(), "Fail");
    assert_eq!(serde_json::to_value(MetadataMode::ReadOnly).unwrap(), "ro");
    assert_eq!(serde_json::to_value(HydrationState::SourceLost).unwrap(), "source_lost");
}

fn collect_names(prefix: &str, value: &serde_json::Value, names: &mut Vec<String>) {
    for (name, value) in value.as_object().unwrap() {
        match value {
            serde_json::Value::Object(_) => collect_names(&format!("{prefix}{name}."), value, names),
            _ => names.push(format!("{prefix}{name}")),
        }
    }
}

#[test]
fn status_of_another_version_is_read() {
    let status: Status = serde_json::from_str(r#"{"name": "vm", "size": 7, "new_field": {"x": 1}}"#).unwrap();
    assert_eq!((status.name.as_str(), status.size, status.shards), ("vm", 7, 0));
    let whole = Status { event_nr: 3, last_event: Some("done".into()), ..fresh() };
    assert_eq!(serde_json::from_str::<Status>(&serde_json::to_string(&whole).unwrap()).unwrap(), whole);
}

#[test]
fn messages() {
    let good = [
        ("enable_hydration", Message::EnableHydration),
        (" DISABLE_hydration\n", Message::DisableHydration),
        ("Hydration_Threshold 0", Message::HydrationThreshold(0)),
        ("hydration_batch_size  4294967295", Message::HydrationBatchSize(u32::MAX)),
        ("hydration_rate 1048576", Message::HydrationRate(Some(HydrationRate::new(1 << 20).unwrap()))),
        ("Hydration_Rate 1MiB", Message::HydrationRate(Some(HydrationRate::new(1 << 20).unwrap()))),
        ("hydration_rate 0", Message::HydrationRate(None)),
        ("Hydration_Failures_Max 0", Message::HydrationFailuresMax(0)),
        ("hydration_failures_max 4294967295", Message::HydrationFailuresMax(u32::MAX)),
        ("priority 1000", Message::Priority(Priority::new(1000).unwrap())),
    ];
    for (text, message) in good {
        assert_eq!(text.parse::<Message>().unwrap(), message, "{text}");
        assert_eq!(message.to_string().parse::<Message>().unwrap(), message);
    }
    let bad = [
        ("", "empty message"),
        ("start", "'start'"),
        ("enable_hydration now", "'now'"),
        ("hydration_threshold", "needs a number, from 0 to 4294967295"),
        ("hydration_threshold 4294967296", "'4294967296'"),
        ("hydration_threshold -1", "'-1'"),
        ("hydration_threshold +1", "'+1'"),
        ("hydration_threshold 0x10", "'0x10'"),
        ("hydration_threshold 1 2", "'2'"),
        ("hydration_batch_size x\u{7}", r"'x\u{7}'"),
        ("hydration_rate", "needs a size in bytes per second, from 4KiB on, or 0 for no bound"),
        ("hydration_rate 1MiB 2", "takes one size in bytes per second: '2' is too much"),
        ("hydration_rate 1000", "disable_hydration"),
        ("hydration_rate 1MB", "'1MB' is not a size"),
        ("hydration_rate 99999999999999999999", "too large"),
        ("hydration_failures_max", "needs a number, from 0 to 4294967295"),
        ("hydration_failures_max -1", "'-1' is not a number from 0 to 4294967295"),
        ("priority", "needs a number, from 1 to 1000"),
        ("priority high", "'high' is not a number from 1 to 1000"),
        ("priority 99999999999", "'99999999999' is not a number from 1 to 1000"),
        ("priority 0", "1 to 1000"),
        ("priority 1001", "message priority"),
    ];
    for (text, part) in bad {
        let error = text.parse::<Message>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
}

#[test]
fn fraction_is_one_only_when_all_is_hydrated() {
    let mut status = Status { nr_regions: 1 << 40, hydrated_regions: (1 << 40) - 1, ..Default::default() };
    assert!(status.hydrated_fraction() < 1.0);
    status.hydrated_regions += 1;
    assert_eq!(status.hydrated_fraction(), 1.0);
    assert_eq!(Status::default().hydrated_fraction(), 0.0);
}
