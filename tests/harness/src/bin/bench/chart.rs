//! The latencies as a picture: bars on a logarithmic scale, as SVG.

use crate::{
    backends::{BEST, DEFAULT, OURS},
    operation::Operation,
    results::{Results, wait_key},
};
use anyhow::{Result, anyhow};
use lair_harness::frontend::queue::Wait;
use plotters::prelude::*;

const SIZE: (u32, u32) = (860, 460);
/// Each backend's colour; grey for the one that is there for comparison only.
const BARS: [(&str, RGBColor); 3] =
    [(DEFAULT, RGBColor(176, 176, 176)), (BEST, RGBColor(120, 120, 120)), (OURS, RGBColor(32, 108, 178))];

/// Median latencies of all operations with one way of waiting. Empty where there is nothing to show.
pub(crate) fn latency(results: &Results, wait: Wait) -> Result<String> {
    let operations: Vec<_> = Operation::ALL
        .into_iter()
        .filter(|operation| BARS.iter().any(|(backend, _)| bar(results, *operation, wait, backend).is_some()))
        .collect();
    let values = || {
        operations
            .iter()
            .flat_map(|operation| BARS.map(|(backend, _)| bar(results, *operation, wait, backend)))
            .flatten()
    };
    let (low, high) =
        values().fold((f64::MAX, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return Ok(String::new());
    }
    // Whole decades, so that the shortest bar is seen as one.
    let low = 10.0_f64.powf((low / 1.5).log10().floor());
    let mut svg = String::new();
    let mut draw = || -> Result<(), Box<dyn std::error::Error + '_>> {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let title = format!("One request at a time, frontend {}: median, us", wait_key(wait));
        let count = operations.len() as f64;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(170)
            .build_cartesian_2d((low..high * 1.6).log_scale(), 0.0..count)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(operations.len())
            .y_label_formatter(&|_| String::new())
            .x_label_formatter(&|value| {
                if *value < 1.0 { format!("{value:.1}") } else { format!("{value:.0}") }
            })
            .set_tick_mark_size(LabelAreaPosition::Left, 0)
            .x_desc("us, logarithmic: shorter is faster")
            .draw()?;
        for (index, (backend, colour)) in BARS.into_iter().enumerate() {
            // The first operation on top.
            let top = |row: usize| count - row as f64 - 0.12 - 0.26 * index as f64;
            let rows: Vec<_> = operations
                .iter()
                .enumerate()
                .map(|(row, operation)| (bar(results, *operation, wait, backend), top(row)))
                .collect();
            chart
                .draw_series(rows.iter().filter_map(|&(value, top)| {
                    Some(Rectangle::new([(low, top - 0.23), (value?, top)], colour.filled()))
                }))?
                .label(backend)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
            let style = ("sans-serif", 11).into_font().color(&BLACK);
            chart.draw_series(rows.iter().map(|&(value, top)| {
                let text = match value {
                    None => "no requests".into(),
                    Some(value) if value < 10.0 => format!("{value:.2}"),
                    Some(value) => format!("{value:.0}"),
                };
                Text::new(text, (value.unwrap_or(low) * 1.03, top - 0.01), style.clone())
            }))?;
        }
        let (left, plane) = (12, chart.plotting_area().get_pixel_range().1);
        let step = f64::from(plane.end - plane.start) / count;
        for (row, operation) in operations.iter().enumerate() {
            let y = f64::from(plane.start) + step * (row as f64 + 0.5) - 7.0;
            area.draw(&Text::new(operation.title(), (left, y as i32), ("sans-serif", 13)))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 13))
            .draw()?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|error| anyhow!("Cannot draw the chart: {error}"))?;
    Ok(svg)
}

/// Microseconds; `None` where nothing is sent.
fn bar(results: &Results, operation: Operation, wait: Wait, backend: &str) -> Option<f64> {
    let row = results.row(operation, wait, backend)?;
    (row.messages > 0.0 && row.median_ns > 0).then_some(row.median_ns as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::sample;

    #[test]
    fn every_latency_is_a_bar() {
        let svg = latency(&sample(), Wait::Polling).unwrap();
        let bars = |colour: &str| svg.matches(&format!("fill=\"{colour}\"")).count();
        // One in the legend; nothing for an operation without messages.
        assert_eq!((bars("#B0B0B0"), bars("#206CB2")), (10, 9), "{svg}");
        assert_eq!(svg.matches(">\n0.20\n<").count(), 8);
        assert_eq!(svg.matches("no requests").count(), 1);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }
}
