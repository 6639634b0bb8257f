//! `vmctl top`: [`sample`] reads counters, [`mod@rows`] makes rates of two readings, [`view`] shows them, [`screen`] is the terminal.

mod rows;
mod sample;
mod screen;
mod series;
#[cfg(test)]
mod tests;
mod view;

use crate::{
    Context,
    error::CommandError,
    exec,
    interactive::Signals,
    output::{colour, harmless_json, print_table, state_cell, table},
};
use comfy_table::Cell;
use lair_vmm::api::client::Client;
use rows::{Row, Sort, Totals, rows};
use sample::Sample;
use serde::Serialize;
use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, time::sleep};
use view::View;

/// Time between two readings.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print one reading, made of two a second apart, and end; needs no terminal
    #[arg(long)]
    once: bool,
}

/// One line of `vmctl --json top`.
#[derive(Debug, Serialize)]
struct Reading<'a> {
    time: jiff::Timestamp,
    /// The version of `laird`.
    version: &'a str,
    cpus: Option<u32>,
    memory_bytes: Option<u64>,
    totals: Totals,
    vms: Vec<Row>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if !terminal && !context.json && !arguments.once {
        let message =
            "top needs a terminal; `vmctl --json top` prints a line each second, `vmctl top --once` a table";
        return Err(CommandError::failed(message));
    }
    let begin = Instant::now();
    // Before the screen is taken: an error at the start belongs on the operator's own.
    let first = sample::read(&context.client, begin).await?;
    if !context.json && !arguments.once {
        return watch(first, context.client.clone(), begin).await;
    }
    let mut before = first;
    loop {
        sleep(PERIOD).await;
        let now = sample::read(&context.client, begin).await?;
        let (vms, totals) = rows(Some(&before), &now, Sort::Name);
        if context.json {
            print_line(&now, vms, totals)?;
        } else {
            print_rows(&now, &vms)?;
        }
        if arguments.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

fn print_line(now: &Sample, vms: Vec<Row>, totals: Totals) -> Result<(), CommandError> {
    let reading = Reading {
        time: now.time,
        version: &now.version,
        cpus: now.host.map(|host| host.cpus),
        memory_bytes: now.host.map(|host| host.memory.0),
        totals,
        vms,
    };
    let text = serde_json::to_string(&reading).map_err(|error| CommandError::failed(error.to_string()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", harmless_json(&text))?;
    Ok(out.flush()?)
}

fn print_rows(now: &Sample, vms: &[Row]) -> Result<(), CommandError> {
    let mut shown = table(&view::HEADINGS);
    for vm in vms {
        let named = [Cell::new(&vm.name), state_cell(&vm.state, &vm.state)];
        let figures = view::figures(vm, now.time).map(Cell::new);
        shown.add_row(named.into_iter().chain(figures).collect::<Vec<_>>());
    }
    Ok(print_table(&shown)?)
}

/// Shows readings until the operator or a signal ends that.
async fn watch(first: Sample, client: Client, begin: Instant) -> Result<ExitCode, CommandError> {
    let mut signals = Signals::listen()?;
    let mut readings = readings(client, begin);
    let mut view = View::new(first, colour());
    let mut screen = screen::Screen::open()?;
    let mut events = screen::events();
    loop {
        screen.draw(|frame| view.draw(frame))?;
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => if event.as_key_event().is_some_and(|key| view.key(key)) {
                    return Ok(ExitCode::SUCCESS);
                },
                // The terminal is gone.
                None => return Ok(ExitCode::SUCCESS),
            },
            Some(reading) = readings.recv() => view.take(reading),
            signal = signals.recv() => {
                drop(screen);
                return Ok(exec::killed(signal));
            }
        }
    }
}

/// A reading each second, or why there is none. A slow `laird` holds up nothing but the next.
fn readings(client: Client, begin: Instant) -> mpsc::Receiver<Result<Sample, String>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            sleep(PERIOD).await;
            let read = sample::read(&client, begin).await.map_err(|error| error.line());
            if sender.send(read).await.is_err() {
                return;
            }
        }
    });
    receiver
}
