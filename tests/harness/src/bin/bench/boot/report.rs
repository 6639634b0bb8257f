//! The results as tables.

use super::{Compared, Results, Starts};
use crate::report::{gates, table};
use std::fmt::Write;

/// All tables.
pub(super) fn tables(results: &Results) -> String {
    let host = &results.host;
    let mut text = format!("{} processors ({}), Linux {}\n", host.processors, host.processor, host.kernel);
    if let Some(start) = &results.start {
        text += &starts(start);
    }
    if !results.fleets.is_empty() {
        text += &fleets(results);
    }
    // Writing to a string cannot fail.
    let _ = write!(text, "\nGates\n{}", gates(&results.gates));
    text
}

fn starts(start: &Starts) -> String {
    let mut rows = table(&["", "LAIRD", "BY HAND", "DIFFERENCE"]);
    for (title, Compared { laird, by_hand, difference }) in
        [("until the guest runs", &start.runs_ms), ("until its agent is ready", &start.ready_ms)]
    {
        rows.add_row([title.into(), laird.to_string(), by_hand.to_string(), difference.to_string()]);
    }
    let mut steps = table(&["STEP", "WORKED", "WAITED"]);
    let ms = |us: u64| format!("{:.2}", us as f64 / 1e3);
    for row in &start.steps {
        steps.add_row([row.step.clone(), ms(row.worked_us), ms(row.waited_us)]);
    }
    format!(
        "\nA start of a guest ({}), {} pairs: ms, median (10th to 90th percentile)\n{rows}\n\
         \nWhat laird does for it: ms, medians; its own work is {} ms in all\n{steps}\n",
        start.engine,
        start.pairs.len(),
        start.own_ms
    )
}

fn fleets(results: &Results) -> String {
    let mut rows = table(&[
        "VMS",
        "READY, MS",
        "STATUS, MS",
        "RESIDENT, MIB",
        "ANONYMOUS",
        "AT REST",
        "THREADS",
        "IDLE CPU, MS",
        "WAKE-UPS",
    ]);
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let mut seconds = 0.0;
    for row in &results.fleets {
        seconds = row.seconds;
        rows.add_row([
            row.vms.to_string(),
            row.start_ms.to_string(),
            row.status_ms.to_string(),
            mib(row.at_ready.rss_bytes),
            mib(row.at_ready.rss_anon_bytes),
            mib(row.at_rest.rss_bytes),
            row.at_rest.threads.to_string(),
            format!("{:.2}", row.idle_cpu_us as f64 / 1e3),
            row.wakes.to_string(),
        ]);
    }
    format!(
        "\nlaird with VMs whose programs are stand-ins; idle for {seconds} s after the threads of the start have ended\n{rows}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::sample;

    #[test]
    fn tables_of_a_sample() {
        let text = tables(&sample(31.25, 17_000));
        let text: Vec<_> = text.lines().map(str::trim_end).collect();
        assert!(text.iter().all(|line| line.len() <= 120));
        insta::assert_snapshot!(text.join("\n"));
    }
}
