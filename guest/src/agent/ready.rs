//! `lair-guest ready`: how a system with its own init tells the agent that it is up.

use super::Agent;
use crate::{handshake::PATIENCE, paths};
use std::{
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::{fs::PermissionsExt, net},
    sync::Arc,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

const WORD: &[u8] = b"ready\n";
const ANSWER: &[u8] = b"ok\n";

/// Makes the agent's socket and answers on it. Only root can connect.
pub(super) fn listen(agent: &Arc<Agent>) -> io::Result<()> {
    // Left over from an agent that was killed.
    let _ = fs::remove_file(paths::AGENT);
    let listener = UnixListener::bind(paths::AGENT)?;
    fs::set_permissions(paths::AGENT, fs::Permissions::from_mode(0o600))?;
    if let Some(uptime_ms) = fs::read_to_string(paths::READY).ok().and_then(|text| text.parse().ok()) {
        agent.ready.send_replace(Some(uptime_ms));
    }
    let agent = agent.clone();
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                // One after the other, each for a bounded time: this is said once in a boot.
                Ok((stream, _)) => {
                    if let Ok(Ok(Some(uptime_ms))) =
                        tokio::time::timeout(PATIENCE, answer(&agent, stream)).await
                    {
                        // Only the next agent would miss it.
                        let _ = fs::write(paths::READY, uptime_ms.to_string());
                    }
                }
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

/// Answers one connection; when the guest was up, if that is what it said.
async fn answer(agent: &Agent, mut stream: UnixStream) -> io::Result<Option<u64>> {
    let mut word = [0; WORD.len()];
    stream.read_exact(&mut word).await?;
    if word != WORD {
        return Ok(None);
    }
    let uptime_ms = agent.set_ready();
    stream.write_all(ANSWER).await?;
    Ok(Some(uptime_ms))
}

/// Tells the agent, from another process.
pub(crate) fn tell() -> io::Result<()> {
    let mut stream = net::UnixStream::connect(paths::AGENT)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(WORD)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(16).read_to_end(&mut answer)?;
    if answer == ANSWER { Ok(()) } else { Err(io::Error::other("the agent did not confirm it")) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agent;
    use super::*;

    #[tokio::test]
    async fn vs10_only_the_word_makes_ready() {
        let agent = agent(true);
        for (said, ready) in [(&b"reboot"[..], false), (b"re", false), (WORD, true)] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(said).await.unwrap();
            client.shutdown().await.unwrap();
            let said = answer(&agent, server).await;
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got == ANSWER, ready);
            assert_eq!(matches!(said, Ok(Some(_))), ready);
            assert_eq!(agent.ready.borrow().is_some(), ready);
        }
    }
}
