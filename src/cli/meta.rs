//! `hydrant meta ...`: the words of the metadata tools.

use crate::units::{ByteSize, RegionSize};
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// Look at metadata, make, save and mend them, exchange them with the kernel's dm-clone
#[derive(Args, Debug)]
#[command(long_about = "\
Works on the metadata of clones that do not run. Whatever is written is locked, as by a daemon, and nothing is changed \
when anything is wrong; what is only read is never written.")]
#[command(after_long_help = "\
Examples:
  hydrant meta check vm1.meta
  hydrant meta dump --json vm1.meta >vm1.json
  hydrant meta import-dm /dev/vg/meta --destination /dev/vg/vm1 --metadata vm1.meta")]
pub struct MetaArgs {
    #[command(subcommand)]
    pub verb: MetaVerb,
}

#[derive(Subcommand, Debug)]
pub enum MetaVerb {
    Check(CheckArgs),
    Dump(DumpArgs),
    Format(FormatArgs),
    Restore(RestoreArgs),
    Repair(RepairArgs),
    #[command(name = "import-dm")]
    ImportDm(ImportDmArgs),
    #[command(name = "export-dm")]
    ExportDm(ExportDmArgs),
}

/// Whose metadata to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum MetaFormat {
    /// Hydrant's own
    #[default]
    Hydrant,
    /// Those of the kernel's dm-clone
    DmClone,
}

/// Say what the metadata is of, and everything that is wrong with it
///
/// Exit status 1 when something is wrong. Of dm-clone's metadata the first thing that is wrong is told.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  hydrant meta check vm1.meta
  hydrant meta check --format dm-clone --json /dev/vg/meta")]
pub struct CheckArgs {
    /// The metadata: a file or a block device
    pub path: PathBuf,

    /// One line of JSON
    #[arg(long)]
    pub json: bool,

    /// Whose metadata it is
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub format: MetaFormat,
}

/// Print the metadata, with every run of hydrated regions
///
/// Runs are first and last region, inclusive. Damaged metadata is refused. In JSON: region_size and size in bytes,
/// nr_regions, hydrated_count, hydrated as [[first, last], ...], and more.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  hydrant meta dump vm1.meta
  hydrant meta dump --json vm1.meta >vm1.json           'hydrant meta restore' takes it back
  hydrant meta dump --format dm-clone --json /dev/vg/meta")]
pub struct DumpArgs {
    /// The metadata: a file or a block device
    pub path: PathBuf,

    /// One line of JSON
    #[arg(long)]
    pub json: bool,

    /// Whose metadata it is
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub format: MetaFormat,
}

/// Make empty metadata, for a clone to come
#[derive(Args, Debug)]
#[command(long_about = "\
Makes the metadata of a clone in which nothing is hydrated. 'hydrant clone' does that by itself; this is for those who \
prepare a clone ahead. What is not given is taken, and recorded, at the first use: any source that is at least as large \
as SIZE, and a destination under the same conditions as that of a new clone.")]
#[command(after_long_help = "\
Examples:
  hydrant meta format --source /dev/vg/old --destination /dev/vg/new vm1.meta
  hydrant meta format --size 100GiB --region-size 1MiB vm1.meta")]
#[command(group(ArgGroup::new("of").required(true).args(["source", "size"])))]
pub struct FormatArgs {
    /// The metadata: a file (created when missing) or a block device
    pub path: PathBuf,

    /// The source: a file, a block device or an NBD URI; gives the size, and is the only one accepted later
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new())]
    pub source: Option<String>,

    /// The size of the clone, when the source is not at hand
    #[arg(long, value_name = "SIZE", alias = "source-size")]
    pub size: Option<ByteSize>,

    /// The destination, which must exist; the only one accepted later
    #[arg(long, value_name = "PATH")]
    pub destination: Option<PathBuf>,

    /// Unit of the copy: a power of two, 4KiB to 1GiB
    #[arg(long, value_name = "SIZE", default_value_t)]
    pub region_size: RegionSize,

    /// Use metadata, and a destination, that hold something: it is overwritten, now or by the clone
    #[arg(long)]
    pub force: bool,
}

/// Make metadata from what 'dump --json' printed
#[derive(Args, Debug)]
#[command(long_about = "\
Writes metadata that are those that were dumped: the same clone, with the same regions hydrated. Right only when the \
destination is as it was then, or when all that was hydrated since was copied only, never written: those regions would \
be read from the source again.")]
#[command(after_long_help = "\
Examples:
  hydrant meta dump --json vm1.meta >vm1.json
  hydrant meta restore vm1.json vm1.meta")]
pub struct RestoreArgs {
    /// What 'hydrant meta dump --json' printed
    pub dump: PathBuf,

    /// The metadata to make: a file (created when missing) or a block device
    pub path: PathBuf,

    /// Use metadata that hold something: it is overwritten
    #[arg(long)]
    pub force: bool,
}

/// Mend damaged metadata, by explicit choice
#[derive(Args, Debug)]
#[command(long_about = "\
Mends metadata that 'hydrant meta check' finds damaged.

A superblock copy that is damaged is written again from the other one: nothing is lost.

Of a damaged sector of the bitmap nobody knows which of its regions were hydrated, and either guess can lose data:
  unhydrated  they are read from the source, and copied from there again. What was written to
              them since the clone was made is lost; the rest is right.
  hydrated    they are read from the destination. Those that were not copied yet hold whatever
              the destination held before, and are never copied; the rest is right.
So without --assume or --force nothing is changed, and the regions are listed. Say unhydrated when nothing was written \
there (the clone was only read, or the file system's checker will tell), hydrated when you know that all of them were \
copied. In a clone that is marked complete every region is hydrated, and of a sector whose bits are intact they are known: \
there nothing has to be assumed.")]
#[command(after_long_help = "\
Examples:
  hydrant meta repair --dry-run vm1.meta
  hydrant meta repair --backup vm1.meta.bad --assume unhydrated vm1.meta
  hydrant meta repair --assume 16=hydrated --assume 23=unhydrated vm1.meta")]
pub struct RepairArgs {
    /// The metadata: a file or a block device
    pub path: PathBuf,

    /// What to take the regions of damaged sectors for: hydrated or unhydrated; repeatable
    ///
    /// With SECTOR, those of that 512-byte sector (as check lists them); without, all others.
    #[arg(long, value_name = "[SECTOR=]STATE")]
    pub assume: Vec<AssumeArg>,

    /// Take what is neither known nor assumed for unhydrated; overwrite what is in place of a superblock copy
    #[arg(long)]
    pub force: bool,

    /// Copy the metadata to this new file first
    #[arg(long, value_name = "PATH")]
    pub backup: Option<PathBuf>,

    /// Say what would be done, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// One `--assume`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AssumeArg {
    /// `None`: every sector that is not named by another one.
    pub sector: Option<u64>,
    pub hydrated: bool,
}

impl FromStr for AssumeArg {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (sector, state) = match text.split_once('=') {
            Some((sector, state)) => {
                let number = sector.bytes().all(|b| b.is_ascii_digit()).then(|| sector.parse().ok()).flatten();
                (Some(number.ok_or_else(|| format!("'{sector}' is not the number of a sector"))?), state)
            }
            None => (None, text),
        };
        match state {
            "hydrated" => Ok(Self { sector, hydrated: true }),
            "unhydrated" => Ok(Self { sector, hydrated: false }),
            _ => Err(format!("'{state}' is neither hydrated nor unhydrated")),
        }
    }
}

/// Take over a clone from the metadata of the kernel's dm-clone
#[derive(Args, Debug)]
#[command(long_about = "\
Reads dm-clone's metadata and makes hydrant's from them, so that 'hydrant clone' with the same source, the same \
destination and the new metadata goes on where dm-clone stopped. Remove the dm-clone device first ('dmsetup remove', \
which commits): metadata that are in use are refused. dm-clone's own metadata are not changed: until hydrant has run, the \
clone can go back to the kernel. Damaged metadata are refused with the block and the reason.")]
#[command(after_long_help = "\
Examples:
  dmsetup remove vm1
  hydrant meta import-dm /dev/vg/meta --destination /dev/vg/vm1 --metadata vm1.meta
  hydrant clone --name vm1 --source /dev/vg/old --destination /dev/vg/vm1 --metadata vm1.meta")]
pub struct ImportDmArgs {
    /// dm-clone's metadata: a block device, or an image of it in a file; only read
    pub image: PathBuf,

    /// The destination of the clone, as it is
    #[arg(long, value_name = "PATH")]
    pub destination: PathBuf,

    /// The metadata to make: a file (created when missing) or a block device
    #[arg(long, value_name = "PATH")]
    pub metadata: PathBuf,

    /// The source, to be recorded now [default: the one of the first use]
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new())]
    pub source: Option<String>,

    /// Use metadata that hold something: it is overwritten
    #[arg(long)]
    pub force: bool,
}

/// Give a clone to the kernel: make dm-clone's metadata
#[derive(Args, Debug)]
#[command(long_about = "\
Reads hydrant's metadata and makes those of dm-clone from them, so that the kernel goes on with the same source and \
destination. hydrant's own metadata are not changed; they must not be in use. A clone of more than 2147483648 regions, \
or whose size is not a multiple of 512 bytes, is more than dm-clone can do, and refused. Prints the table for dmsetup.")]
#[command(after_long_help = "\
Examples:
  hydrant meta export-dm vm1.meta /dev/vg/meta
  dmsetup create vm1 --table '0 209715200 clone /dev/vg/meta /dev/vg/vm1 /dev/vg/old 128'")]
pub struct ExportDmArgs {
    /// hydrant's metadata: a file or a block device; only read
    pub path: PathBuf,

    /// Where dm-clone's metadata go: a file (created when missing) or a block device
    pub image: PathBuf,

    /// Size of a file to be created [default: half as much again as dm-clone needs, at least 4MiB]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,

    /// Use an image that holds something: it is overwritten
    #[arg(long)]
    pub force: bool,
}
