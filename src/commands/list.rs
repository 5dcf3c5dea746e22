//! `hydrant list`: the clones that run here, a line each.

use super::daemons;
use super::output_error;
use crate::cli::ListArgs;
use crate::control::api::{CloneRunState, Status};
use crate::error::{Result, plain};
use crate::human::{percent, size};
use serde_json::json;
use std::io::Write;

pub fn run(args: &ListArgs, out: &mut dyn Write) -> Result<()> {
    let found = daemons::find(None, &args.control)?;
    let clones: Vec<&Status> = found.iter().map(|(_, status)| status).collect();
    let text = if args.json { json_of(&clones) } else { table_of(&clones) };
    out.write_all(text.as_bytes()).map_err(output_error)
}

/// One object per line.
fn json_of(clones: &[&Status]) -> String {
    let line = |status: &&Status| {
        let object = json!({
            "name": status.name,
            "state": status.state,
            "error": status.error,
            "hydration": status.hydration.state,
            "size": status.size,
            "nr_regions": status.nr_regions,
            "hydrated_regions": status.hydrated_regions,
            "connections": status.nbd.connections,
            "source": status.source.spec,
            "destination": status.destination,
            "pid": status.pid,
        });
        format!("{object}\n")
    };
    clones.iter().map(line).collect()
}

fn table_of(clones: &[&Status]) -> String {
    let header = ["NAME", "STATE", "HYDRATED", "SIZE", "CLIENTS", "SOURCE"].map(String::from);
    let rows: Vec<[String; 6]> =
        std::iter::once(header).chain(clones.iter().map(|status| row_of(status).map(plain))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).chain([row[5].clone()]).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row_of(status: &Status) -> [String; 6] {
    let clients = status.nbd.connections.to_string();
    match status.state {
        CloneRunState::Running => [
            status.name.clone(),
            status.hydration.state.to_string(),
            percent(status.hydrated_fraction()),
            size(status.size),
            clients,
            status.source.spec.clone(),
        ],
        state => [
            status.name.clone(),
            state.to_string(),
            "-".into(),
            "-".into(),
            clients,
            status.error.clone().unwrap_or_else(|| status.source.spec.clone()),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{HydrationState, SourceStatus};

    #[test]
    fn a_line_for_each() {
        let mut running = Status { name: "vm1".into(), size: 16 << 30, nr_regions: 8, ..Default::default() };
        running.hydrated_regions = 2;
        running.hydration.state = HydrationState::Running;
        running.source = SourceStatus { spec: "nbd://backup/vm1".into(), ..Default::default() };
        let mut failed = Status { name: "database".into(), state: CloneRunState::Failed, ..Default::default() };
        failed.error = Some("destination /dev/x\n: no such file".into());
        let expected = "\
NAME      STATE    HYDRATED  SIZE      CLIENTS  SOURCE
vm1       running  25.0%     16.0 GiB  0        nbd://backup/vm1
database  failed   -         -         0        destination /dev/x\\n: no such file
";
        assert_eq!(table_of(&[&running, &failed]), expected);
        let json = json_of(&[&failed]);
        assert!(json.ends_with("\n") && json.contains(r#""state":"failed""#), "{json}");
        assert_eq!(table_of(&[]), "NAME  STATE  HYDRATED  SIZE  CLIENTS  SOURCE\n");
    }
}
