//! The control socket: a client sends the line `stats`, gets the counters, and is done.

use crate::stats::Stats;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::Duration,
};

/// How long a client may take to say what it wants, or to take the answer. Clients are served one after the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest request in bytes.
const LINE_MAX: u64 = 64;

/// Serves clients until the process ends.
pub fn serve(listener: &UnixListener, stats: &Arc<Stats>) {
    for client in listener.incoming() {
        match client {
            // A client that breaks off is its own affair.
            Ok(client) => drop(answer(client, stats)),
            // Out of descriptors, say: nothing that trying again at once would mend.
            Err(_) => std::thread::sleep(PATIENCE),
        }
    }
}

fn answer(mut client: UnixStream, stats: &Stats) -> std::io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(&client).take(LINE_MAX).read_line(&mut line)?;
    match line.trim_end() {
        "stats" => client.write_all(stats.text().as_bytes()),
        _ => client.write_all(b"error: the only request is: stats\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(text: &[u8]) -> String {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(text).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = answer(server, &Stats::default());
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        said
    }

    #[test]
    fn anything_but_stats_is_an_error() {
        assert!(ask(b"stats\n").starts_with("# TYPE"));
        assert!(ask(b"grant everything\n").starts_with("error"));
        assert!(ask(&[b'x'; 60]).starts_with("error"));
        assert_eq!(ask(b"\xff\xfe\n"), "");
    }
}
