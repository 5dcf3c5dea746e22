//! Block devices of hydrant in a virtual machine (`tests/vm`), on and beside what device-mapper of its kernel does: beside
//! dm-clone, on disks that fail, that stall, and whose power is cut.

use super::harness::*;

mod beside_dm_clone;
mod failing_disks;
mod life;
mod log_writes;
mod memory;
mod power_cuts;
mod pulled;
mod two_frontends;
mod under_load;

/// Boots with these disks, modules and programs for the scripts, with hydrant and what all scripts want. `None`: it can't be
/// done here.
fn boot(bench: &Bench, scripts: &[&str], modules: &[&str], programs: &[&str], disks: &[&str]) -> Option<vm::Said> {
    if !vm::has_kernel() {
        return None;
    }
    let mut options = vec!["-t", "330", "-m", "ublk_drv"];
    modules.iter().for_each(|module| options.extend(["-m", module]));
    let common = [env!("CARGO_BIN_EXE_hydrant"), "dmsetup", "dd", "blkdiscard"];
    common.iter().chain(programs).for_each(|program| options.extend(["-p", program]));
    let scripts: Vec<_> = ["ublk-lib.guest", "ublk-dm-lib.guest"].iter().chain(scripts).copied().collect();
    let said = vm::boot(bench, &scripts, &options, disks);
    said.has("end");
    Some(said)
}
