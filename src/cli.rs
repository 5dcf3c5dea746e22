//! The command line: what can be said, and what it means. One struct per verb; `commands/` does what they say.
//!
//! The help texts are pinned by `tests/golden/help/`. Exit status: 0 done, 1 failed, 2 wrong usage.

// The comments here are help texts: plain words, where [ and ] mean "optional".
#![allow(rustdoc::broken_intra_doc_links)]

mod meta;

use crate::config::{
    CloneName, DmName, FAILURES_MAX_DEFAULT, HYDRATION_RATE_MAX, HYDRATION_RATE_MIN, NAME_LEN_MAX, OnHydrated,
    PRIORITY_DEFAULT, PRIORITY_MAX, SHARDS_MAX, SIZE_MAX, SOURCE_TIMEOUT_SECONDS_DEFAULT, SOURCE_TIMEOUT_SECONDS_MAX,
    UBLK_NUMBER_MAX,
};
use crate::dm_table::DmTable;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::units::{ByteSize, RegionSize};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};
pub use meta::{
    AssumeArg, CheckArgs, DumpArgs, ExportDmArgs, FormatArgs, ImportDmArgs, MetaArgs, MetaFormat, MetaVerb, RepairArgs,
    RestoreArgs,
};
use std::ops::RangeInclusive;
use std::path::PathBuf;

const _: () = assert!(NAME_LEN_MAX == 64 && SHARDS_MAX == 256 && SOURCE_TIMEOUT_SECONDS_MAX == 86_400, "in the help");
const _: () =
    assert!(HYDRATION_RATE_MIN == 4 << 10 && HYDRATION_RATE_MAX == 1 << 40 && PRIORITY_MAX == 1000, "in the help");

/// dm-clone in user space: a slow, read-only source becomes a fast, writable disk at once
#[derive(Parser, Debug)]
#[command(name = "hydrant", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(long_about = "\
dm-clone in user space. A read-only source (a file, a block device, an NBD export; perhaps remote and slow) becomes a \
writable disk at once. It is served over NBD while hydrant copies (\"hydrates\") it to a local destination in the \
background. When everything is copied, the destination is a plain copy that needs neither hydrant nor its metadata.")]
#[command(after_help = "Run 'hydrant demo' to see it work, 'hydrant VERB --help' for examples and every option.")]
#[command(after_long_help = "\
Examples:
  See it work, in a temporary directory:
      hydrant demo
  Restore a backup that a server exports over NBD, and use it at once:
      hydrant clone --name vm1 --source nbd://backup/vm1 --destination vm1.img --metadata vm1.meta
      hydrant status vm1 --watch

Environment:
  HYDRANT_LOG      what to log to standard error: error, warn (default), info (default of 'clone'),
                   debug or trace; or by module, as in hydrant::source=debug
  XDG_RUNTIME_DIR  sockets are in its directory 'hydrant'; without it in /run/hydrant

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage.")]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand, Debug)]
pub enum Verb {
    Clone(Box<CloneArgs>),
    Serve(ServeArgs),
    Config(ConfigArgs),
    Status(StatusArgs),
    Table(TableArgs),
    Create(CreateArgs),
    Metrics(MetricsArgs),
    List(ListArgs),
    Remove(RemoveArgs),
    Finish(FinishArgs),
    Message(MessageArgs),
    Suspend(SuspendArgs),
    Resume(ResumeArgs),
    Resize(ResizeArgs),
    Events(EventsArgs),
    Wait(WaitArgs),
    Stop(StopArgs),
    Meta(MetaArgs),
    Version(VersionArgs),
    Demo(DemoArgs),
}

/// Serve a clone of a source and copy it to a destination, in the foreground
#[derive(Args, Debug)]
#[command(long_about = "\
Serves a clone of a source over NBD, readable and writable at once, and copies the source to the destination in the \
background. Runs in the foreground until SIGTERM or SIGINT: it then drains, commits and exits with status 0 (a second \
signal exits at once). Started again with the same source, destination and metadata it goes on where it stopped.

Sizes are numbers of bytes, or take KiB, MiB, GiB or TiB: 65536 and 64KiB are the same.")]
#[command(after_long_help = "\
Examples:
  A file to a file:
      hydrant clone --source old.img --destination new.img --metadata new.meta
  An NBD export (say of 'nbdkit -e vm1 file vm1.img') to a logical volume:
      hydrant clone --name vm1 --source nbd://backup/vm1 --destination /dev/vg/vm1 \\
          --metadata /var/lib/vm1.meta
  Use it (the export has the clone's name):
      nbdinfo --map=hydrant:hydrated 'nbd+unix:///vm1?socket=/run/hydrant/vm1.sock'
      nbd-client -unix /run/hydrant/vm1.sock -N vm1 /dev/nbd0
  Trim before copying, so that unused space is not copied:
      hydrant clone --no-hydration --name vm1 ...
      mount /dev/nbd0 /mnt && fstrim /mnt
      hydrant message vm1 enable_hydration
  Check everything, change nothing:
      hydrant clone --dry-run ...")]
pub struct CloneArgs {
    /// What to clone: a file, a block device or an NBD URI; never written
    ///
    /// NBD URIs are nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH (port 10809 when none is given). A server
    /// that goes away is connected to again.
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new(), required_unless_present = "table")]
    pub source: Option<String>,

    /// Where the copy goes: a file (created when missing) or a block device
    ///
    /// At least as large as the source. One that holds something which the metadata does not know is refused without
    /// --force. It is locked while in use.
    #[arg(long, value_name = "PATH", required_unless_present = "table")]
    pub destination: Option<PathBuf>,

    /// What is copied already: a file (created when missing) or a block device
    ///
    /// About 1 MiB for 64 GiB of the source, twice that with 4KiB regions. It is locked while in use. No longer needed
    /// when all is hydrated.
    #[arg(long, value_name = "PATH", required_unless_present = "table")]
    pub metadata: Option<PathBuf>,

    /// A line of dm-clone's table, instead of these and what else it says
    ///
    /// 0 LEN clone METADATA DESTINATION SOURCE REGION_SIZE [#FEATURES FEATURE...] [#CORE KEY VALUE...] with LEN and
    /// REGION_SIZE in sectors of 512 bytes. Features are no_hydration and no_discard_passdown, core keys
    /// hydration_threshold and hydration_batch_size. A device is a path, MAJOR:MINOR or (the source) an NBD URI. LEN holds
    /// exactly, as in dm-clone: of a clone that was resized it is the size that it has grown to.
    #[arg(long, value_name = "LINE", conflicts_with_all = ["source", "destination", "metadata", "region_size", "size",
          "no_hydration", "no_discard_passdown", "hydration_threshold", "hydration_batch_size"])]
    pub table: Option<DmTable>,

    /// Name of the clone, and of its NBD export
    ///
    /// 1 to 64 of A-Z a-z 0-9 . _ - and the first not . or -
    #[arg(long, value_name = "NAME", default_value_t)]
    pub name: CloneName,

    /// Unit of the copy: a power of two, 4KiB to 1GiB [default: that of the metadata; 64KiB for a new clone]
    ///
    /// A partial write to a region that is not hydrated yet waits for the copy of the region. Fixed once the metadata is
    /// made.
    #[arg(long, value_name = "SIZE")]
    pub region_size: Option<RegionSize>,

    /// Clone only this much, from the start of the source [default: that of the metadata; all for a new clone]
    ///
    /// Fixed once the metadata is made.
    #[arg(long, value_name = "SIZE", value_parser = parse_clone_size)]
    pub size: Option<u64>,

    /// Start with the background copy switched off
    ///
    /// Regions are hydrated by use only, until 'hydrant message NAME enable_hydration'.
    #[arg(long)]
    pub no_hydration: bool,

    /// Do not pass discards down to the destination
    #[arg(long)]
    pub no_discard_passdown: bool,

    /// The most regions being copied at a time [default: automatic]
    ///
    /// From 0 to 4294967295; 0 stops the background copy, as in dm-clone.
    #[arg(long, value_name = "REGIONS")]
    pub hydration_threshold: Option<u32>,

    /// How many adjacent regions are copied together, at most [default: automatic]
    ///
    /// From 0 to 4294967295; 0 means 1, as in dm-clone.
    #[arg(long, value_name = "REGIONS")]
    pub hydration_batch_size: Option<u32>,

    /// The most bytes per second that the background copy reads [default: no limit]
    ///
    /// A size, 4KiB to 1TiB. Reads and writes of clients are not limited.
    #[arg(long, value_name = "SIZE", value_parser = parse_hydration_rate)]
    pub hydration_rate: Option<u64>,

    /// So many copies that fail in a row stop the background copy; 0: it never stops
    ///
    /// From 0 to 4294967295; in a row means that none has succeeded in between. It backs off before that. Clients are served
    /// all the same; 'hydrant message NAME enable_hydration' goes on. A source that is gone and a destination that is full
    /// are waited for and do not count.
    #[arg(long, value_name = "COUNT", default_value_t = FAILURES_MAX_DEFAULT)]
    pub hydration_failures_max: u32,

    /// Weight of this clone's background copy among others of the daemon, 1 to 1000
    #[arg(long, value_name = "WEIGHT", default_value_t = PRIORITY_DEFAULT,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(PRIORITY_MAX)))]
    pub priority: u32,

    /// When all is hydrated: go on serving (stay), end when the last client is gone (exit, remove), or hand over (linear)
    ///
    /// With linear as 'hydrant finish' does, as soon as no NBD client is connected; needs --dm-name.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub on_hydrated: OnHydrated,

    /// Where NBD clients connect: unix:PATH, tcp:ADDR:PORT, or none [default: a unix socket NAME.sock]
    ///
    /// By default the socket NAME.sock in $XDG_RUNTIME_DIR/hydrant or /run/hydrant. Unix sockets are for their owner only
    /// (mode 0600). With tcp everybody who can reach the port can read and write: there is no authentication. With none
    /// the clone is a block device only (--ublk).
    #[arg(long, value_name = "ADDRESS")]
    pub nbd: Option<NbdAddress>,

    /// Also be a block device, /dev/ublkbN [default number: any that is free]
    ///
    /// With NBD as before. Needs Linux 6.12 or later with ublk (modprobe ublk_drv), and root. The device outlives a daemon
    /// that is killed, or that is stopped while the device is in use: started again it takes the device over, and who uses
    /// it has only waited.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true,
          value_parser = clap::value_parser!(u32).range(..=i64::from(UBLK_NUMBER_MAX)))]
    pub ublk: Option<Option<u32>>,

    /// Also be /dev/mapper/NAME, above the block device, so that 'hydrant finish' can hand it over
    ///
    /// Use it in place of /dev/ublkbN: when all is hydrated the destination, a block device, takes the clone's place under
    /// whoever uses it. 1 to 127 of A-Z a-z 0-9 # + - . : = @ _ and the first not -. Needs device-mapper (modprobe dm_mod).
    #[arg(long, value_name = "NAME", requires = "ublk")]
    pub dm_name: Option<DmName>,

    /// Path of the control socket [default: NAME.control beside the NBD default]
    ///
    /// By default NAME.control in $XDG_RUNTIME_DIR/hydrant or /run/hydrant, where 'hydrant status NAME' looks for it.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// How many threads share the work, 1 to 256 [default: one per CPU it may run on]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=i64::from(SHARDS_MAX)))]
    pub shards: Option<u16>,

    /// How long reads wait for a source that is gone before they fail
    ///
    /// In seconds, 0 to 86400. The background copy waits as long as it takes.
    #[arg(long, value_name = "SECONDS", default_value_t = SOURCE_TIMEOUT_SECONDS_DEFAULT,
          value_parser = clap::value_parser!(u32).range(..=i64::from(SOURCE_TIMEOUT_SECONDS_MAX)))]
    pub source_timeout: u32,

    /// Use a destination that holds something unknown: it is overwritten
    ///
    /// And vouch for a source or destination that is not the one that the metadata know: it is recorded as that of the
    /// clone, and the one before is refused from then on.
    #[arg(long)]
    pub force: bool,

    /// Check everything, say what would be done, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Run the clones that configuration files describe, in the foreground
#[derive(Args, Debug)]
#[command(long_about = "\
Runs a daemon with every clone of the given configuration files (TOML) until SIGTERM or SIGINT: it then drains, commits \
and exits (a second signal exits at once). The files are read as one: a [daemon] in one of them, any number of [[clone]] \
in each. A clone that can't be started does not keep the others from it; where the reason may pass (a server or a file that \
is not there yet) it is tried again, without force, with pauses of up to a minute. The daemon ends with status 1 when none \
can be started and none may be later.

The keys are the options of 'hydrant clone' with _ for -. Relative paths are taken from the directory of their file.")]
#[command(after_long_help = "\
Examples:
  hydrant serve /etc/hydrant/appliance.toml
  hydrant serve /etc/hydrant/daemon.toml /etc/hydrant/clones/*.toml
  hydrant serve --dry-run appliance.toml

A configuration file:
      [[clone]]
      name = \"vm1\"
      source = \"nbd://backup/vm1\"
      destination = \"/dev/vg/vm1\"
      metadata = \"/var/lib/hydrant/vm1.meta\"
      [clone.nbd]
      address = \"tcp:127.0.0.1:10809\"")]
pub struct ServeArgs {
    /// Configuration files
    #[arg(required = true, value_name = "CONFIG.toml")]
    pub files: Vec<PathBuf>,

    /// Check everything, say what would be done, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Look at configuration files; nothing is started
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  hydrant config check appliance.toml")]
pub struct ConfigArgs {
    #[command(subcommand)]
    pub verb: ConfigVerb,
}

#[derive(Subcommand, Debug)]
pub enum ConfigVerb {
    /// Say what configuration files mean, or everything that is wrong with them
    ///
    /// The files are read as one, as 'hydrant serve' does. A line per clone, or a line per error with file, line and
    /// column, and exit status 1. The devices are not looked at: 'hydrant serve --dry-run' does that.
    Check(ConfigFiles),
}

#[derive(Args, Debug)]
pub struct ConfigFiles {
    /// Configuration files
    #[arg(required = true, value_name = "CONFIG.toml")]
    pub files: Vec<PathBuf>,
}

fn parse_size(text: &str, bounds: RangeInclusive<u64>) -> Result<u64, String> {
    let bytes = text.parse::<ByteSize>()?.0;
    match bounds.contains(&bytes) {
        true => Ok(bytes),
        false => Err(format!("not from {} to {}", ByteSize(*bounds.start()), ByteSize(*bounds.end()))),
    }
}

fn parse_clone_size(text: &str) -> Result<u64, String> {
    parse_size(text, 1..=SIZE_MAX)
}

fn parse_hydration_rate(text: &str) -> Result<u64, String> {
    parse_size(text, HYDRATION_RATE_MIN..=HYDRATION_RATE_MAX)
}

/// Show what clones do
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  hydrant status                   every clone that runs here
  hydrant status vm1 --watch       a progress bar, until it is hydrated
  hydrant status vm1 --json        one JSON object per line and clone, with every number
  hydrant status vm1 --dm          dm-clone's status line:
      0 524288 clone 8 8/1024 8 47654/65536 16 0 4 hydration_threshold 16 hydration_batch_size 16 rw")]
pub struct StatusArgs {
    /// Which clone [default: all that have a control socket in the runtime directory]
    pub name: Option<CloneName>,

    /// One JSON object per clone and line
    #[arg(long, group = "format")]
    pub json: bool,

    /// dm-clone's status line, as 'dmsetup status' prints it
    #[arg(long, group = "format")]
    pub dm: bool,

    /// A progress bar with rate and ETA, until the clone is hydrated
    ///
    /// A line per change when standard output is not a terminal. Fails when the daemon ends before.
    #[arg(long, group = "format")]
    pub watch: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Print the table line of clones that run, as 'dmsetup table' does
#[derive(Args, Debug)]
#[command(long_about = "\
Prints dm-clone's table line of a clone, or of all clones that run here, each after its name: what 'hydrant clone --table' \
or 'table' in a configuration file would start it with. Messages never change it; 'hydrant status --dm' shows what is in \
force.")]
#[command(after_long_help = "\
Examples:
  hydrant table vm1
      0 524288 clone /var/lib/vm1.meta /dev/vg/vm1 nbd://backup/vm1 128 1 no_hydration")]
pub struct TableArgs {
    /// Which clone [default: all]
    pub name: Option<CloneName>,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Start clones in a daemon that runs
#[derive(Args, Debug)]
#[command(long_about = "\
Starts the [[clone]]s of a configuration file in the daemon that 'hydrant serve' runs, and returns when they are served. The \
other clones go on undisturbed. Paths in the file are relative to its directory. A clone that can't be started is told and \
leaves nothing behind; one that takes longer than 20 seconds goes on starting ('hydrant list' shows it, 'hydrant remove' \
gives it up).")]
#[command(after_long_help = "\
Examples:
  hydrant create vm2.toml

A configuration file:
      [[clone]]
      name = \"vm2\"
      source = \"nbd://backup/vm2\"
      destination = \"/dev/vg/vm2\"
      metadata = \"/var/lib/hydrant/vm2.meta\"")]
pub struct CreateArgs {
    /// A configuration file with [[clone]]s only
    #[arg(value_name = "FILE.toml")]
    pub file: PathBuf,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Show what every shard has counted and timed
#[derive(Args, Debug)]
#[command(long_about = "\
Shows what a daemon has counted and timed since it started: load and messages of each shard; for each clone I/O by kind \
and by route, latencies, queues, hydration, commits and memory. The text is for people and may change; the JSON is a \
stable document with a version, which docs/metrics.md describes field by field.")]
#[command(after_long_help = "\
Examples:
  hydrant metrics vm1
  hydrant metrics --json | jq '.shards[].executor.load_recent'")]
pub struct MetricsArgs {
    /// Which clone [default: all that run here]
    pub name: Option<CloneName>,

    /// One JSON object per daemon and line
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// List the clones that run here
#[derive(Args, Debug)]
#[command(long_about = "\
Lists the clones that run here, a line each: of the daemon of 'hydrant serve', and of every 'hydrant clone'. One that \
could not be started is listed as failed, with the reason.")]
#[command(after_long_help = "\
Examples:
  hydrant list
  hydrant list --json | jq -r 'select(.state == \"failed\").name'")]
pub struct ListArgs {
    /// One JSON object per clone and line
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// End one clone of a daemon; the others go on
#[derive(Args, Debug)]
#[command(long_about = "\
Ends one clone of a daemon: what is in flight is finished and committed, its sockets and devices are let go of. The other \
clones go on. Nothing is deleted: created again with the same devices, the clone goes on where it stopped. Refused while \
NBD clients are connected to it, without --force.")]
#[command(after_long_help = "\
Examples:
  hydrant remove vm1")]
pub struct RemoveArgs {
    /// Which clone
    pub name: CloneName,

    /// Also when it is in use: requests in flight are finished, then NBD clients are disconnected, and the block device
    /// goes, whatever is mounted there
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Hand a complete clone's device over to the destination, while it is in use
#[derive(Args, Debug)]
#[command(long_about = "\
Puts the destination in the place of a complete clone, under whoever uses it: /dev/mapper/NAME, which was the clone, is the \
destination from then on, at its own speed. File systems stay mounted; requests wait for a moment. Then /dev/ublkbN goes, \
and the clone. Nothing of hydrant is needed any more. The metadata stay, and say that it is complete.

The clone must have a device-mapper device (--dm-name, or dm_name of [clone.ublk]), a block device as destination, and all of \
it hydrated. Refused while NBD clients are connected, while something has /dev/ublkbN itself open, and while the clone is \
suspended. When it fails, the clone goes on as before. What was finished can be finished again, as long as its daemon runs.

'hydrant clone' ends with its clone. Started again, a clone that was finished says so. /dev/mapper/NAME stays until it is \
removed (dmsetup remove NAME) or the machine is started again; use the destination itself then.")]
#[command(after_long_help = "\
Examples:
  hydrant clone --name vm1 --ublk --dm-name vm1 --source nbd://backup/vm1 --destination /dev/vg/vm1 \\
      --metadata /var/lib/vm1.meta
  mount /dev/mapper/vm1 /srv
  hydrant finish vm1 --wait        when all is hydrated; /srv stays mounted")]
pub struct FinishArgs {
    /// Which clone
    pub name: CloneName,

    /// Wait until it is hydrated
    ///
    /// Fails as soon as it can't become that without help, as 'hydrant wait --hydrated' does.
    #[arg(long)]
    pub wait: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Change how a running clone hydrates
#[derive(Args, Debug)]
#[command(long_about = "\
Sends a message to a running clone and returns when it is in force. dm-clone's:

  enable_hydration        switch the background copy on; when it has stopped after failures, try again
  disable_hydration       switch it off; what is in flight is finished
  hydration_threshold N   the most regions being copied at a time; 0 stops the background copy
  hydration_batch_size N  how many adjacent regions are copied together, at most; 0 means 1

N is from 0 to 4294967295. Without these two, hydrant finds its own numbers. Hydrant's own:

  hydration_rate BYTES    the most bytes per second that are read to hydrate this clone, from 4KiB on; 0 means no bound
  hydration_failures_max N  so many copies that fail in a row stop the background copy; 0: it never stops
  priority N              its weight beside other clones of the daemon, from 1 to 1000; 100 if nothing is said

Messages last until the daemon ends.")]
#[command(after_long_help = "\
Examples:
  hydrant message vm1 enable_hydration
  hydrant message vm1 hydration_threshold 64
  hydrant message vm1 hydration_rate 50MiB")]
pub struct MessageArgs {
    /// Which clone
    pub name: CloneName,

    /// One of those above, with its number
    #[arg(required = true, num_args = 1.., value_name = "MESSAGE", allow_negative_numbers = true)]
    pub message: Vec<String>,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Hold the I/O of a clone, as dmsetup suspend does
#[derive(Args, Debug)]
#[command(long_about = "\
Holds the I/O of a clone, as dmsetup suspend does: requests in flight are finished, later ones wait (clients see a pause, \
no error), hydration rests, and everything that was acknowledged is committed. Nothing then reaches the destination or \
the metadata until 'hydrant resume': both can be copied or snapshotted as they are.

What is in flight may have to wait for a source that does not answer. When it has not ended in time, or the commit fails, the \
clone goes on as before and the command fails; so it does when 'hydrant resume' comes meanwhile. It goes on when the command \
itself is ended: 'hydrant status' then says \"suspending\", until it is suspended or the time is over; a second suspend, or a \
resize, is refused meanwhile. A clone that is suspended already stays so. Stopping or removing a suspended \
clone fails the requests that wait.")]
#[command(after_long_help = "\
Examples:
  hydrant suspend vm1 && lvcreate --snapshot --name vm1-snap --size 10G vg/vm1; hydrant resume vm1")]
pub struct SuspendArgs {
    /// Which clone
    pub name: CloneName,

    /// Give up after so many seconds, 1 to 3600 [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: Option<u32>,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Let a suspended clone go on
#[derive(Args, Debug)]
#[command(long_about = "\
Lets a suspended clone go on: the requests that waited are carried out, hydration continues. A suspend \
that is still waiting for what is in flight is given up at once, and fails. A clone that is neither stays as it is.")]
#[command(after_long_help = "\
Examples:
  hydrant resume vm1")]
pub struct ResumeArgs {
    /// Which clone
    pub name: CloneName,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Grow a clone while it is used
#[derive(Args, Debug)]
#[command(long_about = "\
Grows a clone while it is used: to the size that its source has now, or to --size. Destination and metadata grow with it if \
they are files; block devices must have been made larger before. What is added comes from the source, and reads as zeros \
where the source has ended. I/O is held for a moment. When it fails, files get the length back that they had; one that \
is killed on its way can leave the destination longer than the clone, and the next start says so.

Clients that are connected keep the size that they know; who connects again sees the new one. A clone never shrinks.

A complete clone has let go of its source: it is opened again, and must still be the same, unless --zeros is given.")]
#[command(after_long_help = "\
Examples:
  The source has grown:
      hydrant resize vm1
  Room behind the end of the source, say to grow the file system there:
      hydrant resize vm1 --size 200GiB")]
pub struct ResizeArgs {
    /// Which clone
    pub name: CloneName,

    /// The new size [default: that of the source]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,

    /// What is added reads as zeros; the source is not asked
    #[arg(long, requires = "size")]
    pub zeros: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Show what happened to clones
#[derive(Args, Debug)]
#[command(long_about = "\
Prints the events of running clones, the oldest first: when (UTC), which clone, what kind of event, and what happened in \
words. A daemon keeps the last 256 of each clone, and 4096 in all.

Kinds: created, start_failed, hydration_started, hydration_paused, hydration_failed (it backs off and tries again), \
hydration_completed, read_only, failed, source_lost, source_found, source_changed, handed_over, suspended, resumed, resized, stopped, \
removed. What changes more than 6 times in 10 seconds is told once in 10 seconds.")]
#[command(after_long_help = "\
Examples:
  hydrant events                   of every clone that runs here
  hydrant events vm1 --follow      and go on with what happens, until the daemon ends
  hydrant events --follow --json | jq --unbuffered 'select(.kind == \"source_lost\")'")]
pub struct EventsArgs {
    /// Which clone [default: all]
    pub name: Option<CloneName>,

    /// Go on with what happens from now
    ///
    /// Fails when the daemon ends.
    #[arg(long)]
    pub follow: bool,

    /// One JSON object per line: seq, clone, nr, time_unix_ms, kind, text
    ///
    /// seq counts the daemon's events, nr those of the clone; both from 1.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Wait for an event of a clone, as 'dmsetup wait'
#[derive(Args, Debug)]
#[command(long_about = "\
Waits until the event number of a clone is greater than N, as 'dmsetup wait' does; prints nothing. It counts what dm-clone \
raises events for: the hydration is completed, the metadata mode is 'ro', the metadata mode is 'Fail'; and that the \
hydration has stopped after too many failures. Look at 'hydrant status' for which of them it was. Does not wait for a clone \
that is complete, whatever N is. Fails when the clone or its daemon ends.

With --hydrated it waits until the clone is complete, and fails as soon as it can't become that without help: in the modes \
'ro' and 'Fail', and when its hydration has stopped after failures.")]
#[command(after_long_help = "\
Examples:
  hydrant wait vm1                 until it is hydrated, has failed or has stopped
  hydrant wait vm1 --hydrated && echo 'the source is not needed any more'
  hydrant wait vm1 --event 1 --timeout 60 --json")]
pub struct WaitArgs {
    /// Which clone
    pub name: CloneName,

    /// The last event number that is known
    ///
    /// It is 'event_nr' in 'hydrant status NAME --json'.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub event: u64,

    /// Until it is hydrated, whatever else happens; fail when that can't be
    #[arg(long, conflicts_with = "event")]
    pub hydrated: bool,

    /// Give up after so many seconds [default: never]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u32>,

    /// Print the status after the event, as one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// Stop a running clone: it drains, commits and exits
#[derive(Args, Debug)]
#[command(long_about = "\
Stops a running clone: it drains, commits and exits. Returns when the daemon has ended. Started again, the clone goes \
on where it stopped.")]
#[command(after_long_help = "\
Examples:
  hydrant stop vm1
  hydrant stop --control /run/vm1.control")]
pub struct StopArgs {
    /// Which clone [default: the one that runs]
    pub name: Option<CloneName>,

    /// Also when a block device is in use: it is left, and who uses it waits for the next daemon of the clone
    ///
    /// The same happens at SIGTERM: a daemon can be restarted under a file system that stays mounted.
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub control: ControlArgs,
}

/// See it work: clone a small disk under load in a temporary directory and check every byte
#[derive(Args, Debug)]
#[command(long_about = "\
Makes a small source in a temporary directory, starts a real 'hydrant clone' on it, reads and writes random places \
while it hydrates, and checks at the end that every byte of the destination is what the source held or what was \
written since. Prints throughput and latencies. Needs no root, no network, less than 1 GiB of temporary space and \
well under a minute; leaves nothing behind. Exit status 1 when a single byte differs.")]
pub struct DemoArgs {
    /// Where to make the temporary directory [default: $TMPDIR or /tmp; /var/tmp when that is in memory]
    #[arg(long, value_name = "PATH")]
    pub dir: Option<PathBuf>,
}

/// Print the version of hydrant, and of what it is made of
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  hydrant version --targets        as 'dmsetup targets' for the kernel's
      engine    clone            v1.0.0
      frontend  nbd              v1.0.0")]
pub struct VersionArgs {
    /// Every engine, frontend, source and metadata format of this build
    #[arg(long)]
    pub targets: bool,

    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// How to find the daemon.
#[derive(Args, Debug)]
pub struct ControlArgs {
    /// Control socket of the daemon [default: found in the runtime directory]
    ///
    /// It is named NAME.control by 'hydrant clone', control by 'hydrant serve'. The runtime directory is
    /// $XDG_RUNTIME_DIR/hydrant, or /run/hydrant.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn is_consistent() {
        Cli::command().debug_assert();
    }
}
