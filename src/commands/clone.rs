//! `hydrant clone`: from words to a [`Plan`] of one clone; the daemon does the rest.

use crate::bail;
use crate::cli::CloneArgs;
use crate::config::{CloneConfig, DaemonConfig, NbdConfig, Plan, UblkConfig};
use crate::error::Result;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::runtime_dir::RuntimeDir;
use std::time::Duration;

/// Runs one clone by `start`, until it ends.
pub fn run(args: CloneArgs, start: impl FnOnce(Plan) -> Result<()>) -> Result<()> {
    let dir = RuntimeDir::of_user();
    let plan = plan_of(args, &dir)?;
    if !plan.dry_run {
        dir.create_for(&plan)?;
    }
    start(plan)
}

/// Fills in the defaults that depend on the name and the user.
fn plan_of(args: CloneArgs, dir: &RuntimeDir) -> Result<Plan> {
    let address = args.nbd.unwrap_or_else(|| NbdAddress::Unix(dir.nbd_socket(&args.name)));
    let control = args.control.unwrap_or_else(|| dir.control_socket(&args.name));
    if matches!(&address, NbdAddress::Unix(path) if *path == control) {
        bail!(Usage, "--nbd and --control are the same socket: {}", control.display());
    }
    let mut clone = CloneConfig {
        nbd: NbdConfig { address, export: args.name.clone() },
        ublk: args.ublk.map(|number| UblkConfig { number, dm_name: args.dm_name }),
        name: args.name,
        // Without a table line they are required.
        source: args.source.unwrap_or_default(),
        destination: args.destination.unwrap_or_default(),
        metadata: args.metadata.unwrap_or_default(),
        region_size: args.region_size,
        size: args.size,
        hydration: !args.no_hydration,
        discard_passdown: !args.no_discard_passdown,
        hydration_threshold: args.hydration_threshold,
        hydration_batch_size: args.hydration_batch_size,
        hydration_rate: args.hydration_rate,
        hydration_failures_max: args.hydration_failures_max,
        priority: args.priority,
        on_hydrated: args.on_hydrated,
        source_timeout: Duration::from_secs(args.source_timeout.into()),
        force: args.force,
        table: None,
    };
    if let Some(table) = args.table {
        clone.set_table(table);
    }
    if clone.shown_nowhere().is_some() {
        bail!(Usage, "--nbd none is for a block device alone: --ublk is missing");
    }
    if clone.linear_lacks_a_name().is_some() {
        bail!(Usage, "--on-hydrated linear hands a device-mapper device over: say which one by --dm-name");
    }
    let daemon = DaemonConfig { shards: args.shards, one_clone: true, ..DaemonConfig::new(control) };
    Ok(Plan { daemon, clones: vec![clone], dry_run: args.dry_run })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Verb};
    use crate::config::OnHydrated;
    use crate::error::ErrorKind;
    use crate::units::RegionSize;
    use clap::Parser;
    use std::path::Path;

    /// The plan for `hydrant clone --source s --destination d --metadata m` and what is in `more`.
    fn parse(more: &str) -> Result<Plan> {
        let words =
            "hydrant clone --source s --destination d --metadata m".split(' ').chain(more.split_ascii_whitespace());
        let cli = Cli::try_parse_from(words)
            .map_err(|error| crate::error::Error::new(ErrorKind::Usage, error.to_string()))?;
        let Verb::Clone(args) = cli.verb else { panic!("not clone") };
        plan_of(*args, &RuntimeDir::of_user())
    }

    #[test]
    fn defaults() {
        let plan = parse("").unwrap();
        let dir = RuntimeDir::of_user();
        let expected = CloneConfig {
            name: "clone".parse().unwrap(),
            source: "s".into(),
            destination: "d".into(),
            metadata: "m".into(),
            region_size: None,
            size: None,
            hydration: true,
            discard_passdown: true,
            hydration_threshold: None,
            hydration_batch_size: None,
            hydration_rate: None,
            hydration_failures_max: 100,
            priority: 100,
            on_hydrated: OnHydrated::Stay,
            nbd: NbdConfig {
                address: NbdAddress::Unix(dir.path().join("clone.sock")),
                export: "clone".parse().unwrap(),
            },
            ublk: None,
            source_timeout: Duration::from_secs(60),
            force: false,
            table: None,
        };
        let daemon = DaemonConfig { one_clone: true, ..DaemonConfig::new(dir.path().join("clone.control")) };
        assert_eq!(plan, Plan { daemon, clones: vec![expected], dry_run: false });
    }

    #[test]
    fn every_option_arrives() {
        let plan = parse(
            "--name vm.1 --region-size 1MiB --no-hydration --no-discard-passdown --hydration-threshold 7 \
             --hydration-batch-size 8 --on-hydrated exit --nbd tcp:127.0.0.1:10809 --control c --shards 3 \
             --source-timeout 9 --force --dry-run --size 5MiB --hydration-rate 1GiB --priority 7 \
             --hydration-failures-max 0 --ublk=7 --dm-name vm1",
        )
        .unwrap();
        let expected = CloneConfig {
            name: "vm.1".parse().unwrap(),
            source: "s".into(),
            destination: "d".into(),
            metadata: "m".into(),
            region_size: RegionSize::new(1 << 20).ok(),
            size: Some(5 << 20),
            hydration: false,
            discard_passdown: false,
            hydration_threshold: Some(7),
            hydration_batch_size: Some(8),
            hydration_rate: Some(1 << 30),
            hydration_failures_max: 0,
            priority: 7,
            on_hydrated: OnHydrated::Exit,
            nbd: NbdConfig { address: "tcp:127.0.0.1:10809".parse().unwrap(), export: "vm.1".parse().unwrap() },
            ublk: Some(UblkConfig { number: Some(7), dm_name: Some("vm1".parse().unwrap()) }),
            source_timeout: Duration::from_secs(9),
            force: true,
            table: None,
        };
        let daemon = DaemonConfig { shards: Some(3), one_clone: true, ..DaemonConfig::new("c".into()) };
        assert_eq!(plan, Plan { daemon, clones: vec![expected], dry_run: true });
        assert_eq!(parse("--ublk").unwrap().clones[0].ublk, Some(UblkConfig { number: None, dm_name: None }));
        assert_eq!(parse("--name vm1").unwrap().daemon.control.file_name(), Path::new("vm1.control").file_name());
        assert_eq!(parse("--region-size 4096").unwrap().clones[0].region_size.unwrap().bytes(), 4096);
        assert_eq!(parse("--region-size 1GiB").unwrap().clones[0].region_size.unwrap().bytes(), 1 << 30);
    }

    #[test]
    fn a_table_line_instead() {
        let parse = |line: &str, more: &[&str]| {
            let words = [&["hydrant", "clone", "--table", line], more].concat();
            let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
            let Verb::Clone(args) = cli.verb else { panic!("not clone") };
            plan_of(*args, &RuntimeDir::of_user()).map_err(|error| error.to_string())
        };
        let line = "0 2048 clone m /dev/d nbd://h/x 8 1 no_hydration 2 hydration_batch_size 3";
        let clone = parse(line, &["--priority", "5"]).unwrap().clones.remove(0);
        assert_eq!((clone.source.as_str(), clone.destination.to_str()), ("nbd://h/x", Some("/dev/d")));
        assert_eq!((clone.metadata.to_str(), clone.size, clone.priority), (Some("m"), Some(1 << 20), 5));
        assert_eq!((clone.hydration, clone.discard_passdown), (false, true));
        assert_eq!((clone.hydration_threshold, clone.hydration_batch_size), (None, Some(3)));
        assert_eq!(clone.table.unwrap().to_string(), line);
        let error = parse("0 2048 clone m d s 9", &[]).unwrap_err();
        assert!(error.contains("Region size is not a power of 2: 9 sectors"), "{error}");
        for more in ["--source=s", "--destination=d", "--region-size=4KiB", "--size=1", "--no-hydration"] {
            let error = parse(line, &[more]).unwrap_err();
            assert!(error.contains("cannot be used with"), "{more}: {error}");
        }
    }

    #[test]
    fn bad_values_are_named() {
        let cases = [
            ("--region-size 2KiB", "outside 4KiB to 1GiB"),
            ("--region-size 2GiB", "outside 4KiB to 1GiB"),
            ("--region-size 12KiB", "not a power of two"),
            ("--region-size 64k", "'64k' is not a size"),
            ("--region-size 99999999999999999999", "too large"),
            ("--name a/b", "'/' can't be in a name"),
            ("--name=-a", "can't start with"),
            ("--hydration-threshold 4294967296", "4294967295"),
            ("--hydration-batch-size=-1", "invalid value '-1'"),
            ("--shards 0", "not in 1..=256"),
            ("--shards 257", "not in 1..=256"),
            ("--source-timeout 86401", "86400"),
            ("--source-timeout x", "invalid"),
            ("--on-hydrated leave", "stay, exit, remove, linear"),
            ("--on-hydrated linear --ublk", "say which one by --dm-name"),
            ("--dm-name vm1", "--ublk"),
            ("--ublk --dm-name a/b", "'/' can't be in"),
            ("--nbd /run/x.sock", "unix:PATH"),
            ("--nbd tcp:localhost:10809", "127.0.0.1:10809"),
            ("--control x --nbd unix:x", "same socket"),
            ("--nbd none", "--ublk is missing"),
            ("--control=", "a value is required"),
            ("--hydration-rate 1", "not from 4KiB to 1TiB"),
            ("--hydration-failures-max=-1", "invalid value '-1'"),
            ("--hydration-failures-max 4294967296", "4294967295"),
            ("--priority 0", "1..=1000"),
            ("--ublk=1048576", "1048575"),
            ("--ublk=x", "invalid"),
            ("--size 0", "not from 1 byte to 8388607TiB"),
            ("--bogus", "--bogus"),
            ("extra", "extra"),
        ];
        for (words, part) in cases {
            let error = parse(words).unwrap_err().to_string();
            assert!(error.contains(part), "{words}: {error}");
        }
    }
}
