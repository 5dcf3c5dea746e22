//! The metrics document for people at a terminal: at most 100 columns, shards in a table, clones summed over shards. Pure.

use super::record::{How, Kind, Route};
use super::schema::{CloneMetrics, CommitMetrics, Distribution, IoCount, MetricsDocument, SliceMetrics, merge_all};
use crate::human::{count, duration, latency, percent, size};
use crate::units::ByteSize;
use std::fmt::{Result, Write};

/// Ends with a newline.
pub fn text_of(document: &MetricsDocument) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = write_document(&mut text, document);
    text
}

fn write_document(text: &mut String, document: &MetricsDocument) -> Result {
    let process = &document.process;
    writeln!(
        text,
        "pid {}, version {}, up {}: {:.1} s of CPU time, {} resident (at most {})",
        process.pid,
        process.version,
        duration(document.uptime_seconds as u64),
        process.cpu_seconds,
        size(process.rss_bytes),
        size(process.rss_max_bytes)
    )?;
    write_shards(text, document)?;
    for clone in &document.clones {
        let slices = document.shards.iter().flat_map(|shard| &shard.clones);
        let slices: Vec<_> = slices.filter(|slice| slice.name == clone.name).collect();
        writeln!(text)?;
        write_clone(text, clone, &slices)?;
    }
    Ok(())
}

fn write_shards(text: &mut String, document: &MetricsDocument) -> Result {
    writeln!(
        text,
        "\nshard  cpu    load  lately   CPU time  clients    requests        hops   system calls      buffers"
    )?;
    for shard in &document.shards {
        let (executor, memory) = (&shard.executor, &shard.memory);
        let buffers = u64::try_from(memory.buffers_bytes).unwrap_or(0).saturating_add(memory.buffers_cached_bytes);
        writeln!(
            text,
            "{:>5} {:>4} {:>7} {:>7} {:>8.1} s {:>8} {:>11} {:>11} {:>14} {:>12}",
            shard.shard,
            shard.cpu,
            percent(executor.load),
            percent(executor.load_recent),
            executor.cpu_us as f64 / 1e6,
            count(shard.nbd.connections),
            count(shard.nbd.requests),
            count(shard.mesh.hops),
            count(executor.system_calls),
            size(buffers)
        )?;
    }
    Ok(())
}

fn write_clone(text: &mut String, clone: &CloneMetrics, slices: &[&SliceMetrics]) -> Result {
    let fraction = match clone.regions {
        0 => 0.0,
        all if clone.hydrated_regions >= all => 1.0,
        all => (clone.hydrated_regions as f64 / all as f64).min(0.9999),
    };
    writeln!(
        text,
        "{}: {}, {} regions of {}, {} hydrated, {} in flight",
        clone.name,
        ByteSize(clone.size_bytes),
        count(clone.regions),
        ByteSize(clone.region_size_bytes),
        percent(fraction),
        count(clone.hydrating_regions)
    )?;
    write_requests(text, slices)?;
    write_routes(text, slices)?;
    write_hydration(text, slices)?;
    write_queues(text, slices)?;
    write_commits(text, &clone.commits)
}

/// `name`, how many, bytes, errors and latencies, in columns.
fn row(text: &mut String, name: &str, io: &IoCount, times: Option<&Distribution>) -> Result {
    let time = |pick: fn(&Distribution) -> u64| times.map_or(String::new(), |times| latency(pick(times)));
    let line = format!(
        "  {name:<24} {:>11} {:>11} {:>7} {:>9} {:>9} {:>9} {:>9}",
        count(io.requests),
        if io.bytes > 0 { size(io.bytes) } else { String::new() },
        if io.errors > 0 { count(io.errors) } else { String::new() },
        time(|times| times.p50),
        time(|times| times.p99),
        time(|times| times.p999),
        time(|times| times.max)
    );
    writeln!(text, "{}", line.trim_end())
}

fn heading(text: &mut String, name: &str, columns: [&str; 7]) -> Result {
    let [a, b, c, d, e, f, g] = columns;
    let line = format!("  {name:<24} {a:>11} {b:>11} {c:>7} {d:>9} {e:>9} {f:>9} {g:>9}");
    writeln!(text, "{}", line.trim_end())
}

fn sum_io(parts: impl Iterator<Item = IoCount>) -> IoCount {
    parts.fold(IoCount::default(), |sum, part| IoCount {
        requests: sum.requests.saturating_add(part.requests),
        bytes: sum.bytes.saturating_add(part.bytes),
        errors: sum.errors.saturating_add(part.errors),
    })
}

fn write_requests(text: &mut String, slices: &[&SliceMetrics]) -> Result {
    heading(text, "requests", ["", "bytes", "errors", "p50", "p99", "p99.9", "max"])?;
    for kind in Kind::ALL {
        let name = format!("{kind:?}").to_ascii_lowercase().replace("writezeroes", "write zeroes");
        let io = sum_io(slices.iter().map(|slice| slice.io.of(*kind).clone()));
        if io.requests == 0 {
            continue;
        }
        let by_destination = merge_all(slices.iter().map(|slice| &slice.latency_us.of(*kind).destination));
        row(text, &name, &io, by_destination.as_ref())?;
        let by_source = merge_all(slices.iter().map(|slice| &slice.latency_us.of(*kind).source));
        if let Some(times) = by_source {
            row(text, "  awaiting the source", &IoCount { requests: times.count, ..Default::default() }, Some(&times))?;
        }
    }
    Ok(())
}

fn write_routes(text: &mut String, slices: &[&SliceMetrics]) -> Result {
    heading(text, "routes", [""; 7])?;
    for route in Route::ALL {
        let parts = slices.iter().map(|slice| slice.routes.of(*route));
        let io = sum_io(parts.map(|part| IoCount { requests: part.parts, bytes: part.bytes, ..Default::default() }));
        if io.requests > 0 {
            row(text, &format!("  {}", route_words(*route)), &io, None)?;
        }
    }
    Ok(())
}

fn route_words(route: Route) -> &'static str {
    match route {
        Route::ReadDestination => "read: destination",
        Route::ReadSourceKept => "read: source, kept",
        Route::ReadSourcePast => "read: source, past",
        Route::WriteDestination => "write: destination",
        Route::WriteWholeRegion => "write: whole regions",
        Route::WritePartialRegion => "write: partial region",
        Route::TrimDestination => "trim: destination",
        Route::TrimWholeRegion => "trim: whole regions",
        Route::TrimIgnored => "trim: ignored",
        Route::WriteZeroesDestination => "zeroes: destination",
        Route::WriteZeroesWholeRegion => "zeroes: whole regions",
        Route::WriteZeroesPartialRegion => "zeroes: partial region",
        Route::CacheHydrated => "cache: hydrated",
        Route::CacheCopied => "cache: copied",
    }
}

fn how_words(how: How) -> &'static str {
    match how {
        How::Background => "background",
        How::Zeroes => "zeroes",
        How::Read => "read",
        How::Cache => "cache",
        How::PartialWrite => "partial write",
        How::Overwrite => "overwrite",
        How::Discard => "discard",
    }
}

fn write_hydration(text: &mut String, slices: &[&SliceMetrics]) -> Result {
    let reads = sum_io(slices.iter().map(|slice| slice.hydration.source_read.clone()));
    let times = merge_all(slices.iter().map(|slice| &slice.hydration.source_read_latency_us));
    row(text, "source reads", &reads, times.as_ref())?;
    if let Some(times) = merge_all(slices.iter().map(|slice| &slice.hydration.copy_latency_us)) {
        let copied = slices.iter().fold(0u64, |sum, slice| sum.saturating_add(slice.hydration.copied_bytes));
        row(text, "copies", &IoCount { requests: times.count, bytes: copied, errors: 0 }, Some(&times))?;
    }
    let ways = How::ALL.iter().filter_map(|how| {
        let regions = slices.iter().fold(0u64, |sum, slice| sum.saturating_add(*slice.hydration.by.of(*how)));
        (regions > 0).then(|| format!("{} by {}", count(regions), how_words(*how)))
    });
    let ways: Vec<_> = ways.collect();
    if !ways.is_empty() {
        // Seven of them are too long for one line.
        let lines: Vec<_> = ways.chunks(4).map(|part| part.join(", ")).collect();
        writeln!(text, "  {:<24} {}", "regions hydrated", lines.join(&format!(",\n{:27}", "")))?;
    }
    let sum = |pick: fn(&SliceMetrics) -> u64| slices.iter().map(|s| pick(s)).fold(0, u64::saturating_add);
    let (failures, bad) = (sum(|slice| slice.hydration.failures), sum(|slice| slice.hydration.failed_regions));
    if failures > 0 {
        let stopped = slices.iter().any(|slice| slice.hydration.stopped);
        let stopped = if stopped { "; hydration has stopped" } else { "" };
        writeln!(text, "  {:<24} {}, {} bad regions now{stopped}", "copies that failed", count(failures), count(bad))?;
    }
    Ok(())
}

fn write_queues(text: &mut String, slices: &[&SliceMetrics]) -> Result {
    let sum = |pick: fn(&SliceMetrics) -> u64| count(slices.iter().map(|s| pick(s)).fold(0, u64::saturating_add));
    writeln!(
        text,
        "  {:<24} {} in flight, {} waiting for bytes ({} ever did), {} for copy memory",
        "queues",
        sum(|slice| slice.queue.in_flight),
        sum(|slice| slice.queue.hold_waiting),
        sum(|slice| slice.queue.hold_waits),
        sum(|slice| slice.queue.copy_memory_waiting)
    )?;
    writeln!(
        text,
        "  {:<24} map {}, histograms {}, copies {} of {}",
        "memory",
        size(slices.iter().map(|slice| slice.memory.map_bytes).fold(0, u64::saturating_add)),
        size(slices.iter().map(|slice| slice.memory.histogram_bytes).fold(0, u64::saturating_add)),
        size(slices.iter().map(|slice| slice.memory.copy_bytes).fold(0, u64::saturating_add)),
        size(slices.iter().map(|slice| slice.memory.copy_max_bytes).fold(0, u64::saturating_add)),
    )
}

fn write_commits(text: &mut String, commits: &CommitMetrics) -> Result {
    let of = |requests: u64, errors: u64| IoCount { requests, bytes: 0, errors };
    row(text, "flushes", &of(commits.requests, 0), commits.request_latency_us.as_ref())?;
    row(text, "commits", &of(commits.commits, commits.failures), commits.latency_us.as_ref())?;
    for (name, times) in [
        ("snapshot", &commits.snapshot_us),
        ("destination flush", &commits.destination_flush_us),
        ("metadata write", &commits.metadata_write_us),
        ("metadata flush", &commits.metadata_flush_us),
    ] {
        if let Some(times) = times {
            row(text, &format!("  {name}"), &of(times.count, 0), Some(times))?;
        }
    }
    writeln!(
        text,
        "  {:<24} {} written, generation {}",
        "metadata blocks",
        count(commits.blocks_written),
        commits.generation
    )
}

#[cfg(test)]
mod tests;
