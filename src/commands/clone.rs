//! `hydrant clone`: from words to a [`CloneConfig`]; the daemon does the rest.

use crate::bail;
use crate::cli::CloneArgs;
use crate::config::CloneConfig;
use crate::error::Result;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::runtime_dir::RuntimeDir;
use std::time::Duration;

/// Runs one clone by `start`, until it ends.
pub fn run(args: CloneArgs, start: impl FnOnce(CloneConfig) -> Result<()>) -> Result<()> {
    let dir = RuntimeDir::of_user();
    let config = config_of(args, &dir)?;
    let in_runtime_dir = |socket| dir.holds(socket);
    let needs_dir =
        in_runtime_dir(&config.control) || matches!(&config.nbd, NbdAddress::Unix(path) if in_runtime_dir(path));
    if needs_dir && !config.dry_run {
        dir.create()?;
    }
    start(config)
}

/// Fills in the defaults that depend on the name and the user.
fn config_of(args: CloneArgs, dir: &RuntimeDir) -> Result<CloneConfig> {
    let nbd = args.nbd.unwrap_or_else(|| NbdAddress::Unix(dir.nbd_socket(&args.name)));
    let control = args.control.unwrap_or_else(|| dir.control_socket(&args.name));
    if matches!(&nbd, NbdAddress::Unix(path) if *path == control) {
        bail!(Usage, "--nbd and --control are the same socket: {}", control.display());
    }
    Ok(CloneConfig {
        name: args.name,
        source: args.source,
        destination: args.destination,
        metadata: args.metadata,
        region_size: args.region_size,
        hydration: !args.no_hydration,
        discard_passdown: !args.no_discard_passdown,
        hydration_threshold: args.hydration_threshold,
        hydration_batch_size: args.hydration_batch_size,
        on_hydrated: args.on_hydrated,
        nbd,
        control,
        shards: args.shards,
        source_timeout: Duration::from_secs(args.source_timeout.into()),
        force: args.force,
        dry_run: args.dry_run,
    })
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

    /// The configuration for `hydrant clone --source s --destination d --metadata m` and what is in `more`.
    fn parse(more: &str) -> Result<CloneConfig> {
        let words =
            "hydrant clone --source s --destination d --metadata m".split(' ').chain(more.split_ascii_whitespace());
        let cli = Cli::try_parse_from(words)
            .map_err(|error| crate::error::Error::new(ErrorKind::Usage, error.to_string()))?;
        let Verb::Clone(args) = cli.verb else { panic!("not clone") };
        config_of(args, &RuntimeDir::of_user())
    }

    #[test]
    fn defaults() {
        let config = parse("").unwrap();
        let dir = RuntimeDir::of_user();
        let expected = CloneConfig {
            name: "clone".parse().unwrap(),
            source: "s".into(),
            destination: "d".into(),
            metadata: "m".into(),
            region_size: None,
            hydration: true,
            discard_passdown: true,
            hydration_threshold: None,
            hydration_batch_size: None,
            on_hydrated: OnHydrated::Stay,
            nbd: NbdAddress::Unix(dir.path().join("clone.sock")),
            control: dir.path().join("clone.control"),
            shards: None,
            source_timeout: Duration::from_secs(60),
            force: false,
            dry_run: false,
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn every_option_arrives() {
        let config = parse(
            "--name vm.1 --region-size 1MiB --no-hydration --no-discard-passdown --hydration-threshold 7 \
             --hydration-batch-size 8 --on-hydrated exit --nbd tcp:127.0.0.1:10809 --control c --shards 3 \
             --source-timeout 9 --force --dry-run",
        )
        .unwrap();
        let expected = CloneConfig {
            name: "vm.1".parse().unwrap(),
            source: "s".into(),
            destination: "d".into(),
            metadata: "m".into(),
            region_size: RegionSize::new(1 << 20).ok(),
            hydration: false,
            discard_passdown: false,
            hydration_threshold: Some(7),
            hydration_batch_size: Some(8),
            on_hydrated: OnHydrated::Exit,
            nbd: "tcp:127.0.0.1:10809".parse().unwrap(),
            control: "c".into(),
            shards: Some(3),
            source_timeout: Duration::from_secs(9),
            force: true,
            dry_run: true,
        };
        assert_eq!(config, expected);
        assert_eq!(parse("--name vm1").unwrap().control.file_name(), Path::new("vm1.control").file_name());
        assert_eq!(parse("--region-size 4096").unwrap().region_size.unwrap().bytes(), 4096);
        assert_eq!(parse("--region-size 1GiB").unwrap().region_size.unwrap().bytes(), 1 << 30);
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
            ("--on-hydrated leave", "stay, exit"),
            ("--nbd /run/x.sock", "unix:PATH"),
            ("--nbd tcp:localhost:10809", "127.0.0.1:10809"),
            ("--control x --nbd unix:x", "same socket"),
            ("--control=", "a value is required"),
            ("--bogus", "--bogus"),
            ("extra", "extra"),
        ];
        for (words, part) in cases {
            let error = parse(words).unwrap_err().to_string();
            assert!(error.contains(part), "{words}: {error}");
        }
    }
}
