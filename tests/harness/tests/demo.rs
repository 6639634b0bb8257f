//! The demo as a test, with `laird` dead while the build runs, and with `laird` killed and started again and again.

use anyhow::{Result, ensure};
use lair_harness::testbed::Testbed;
use std::process::Command;

fn demo(arguments: &[&str]) -> Result<Option<String>> {
    if Testbed::find()?.is_none() {
        return Ok(None);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_demo")).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", output.status);
    Ok(Some(said))
}

#[test]
fn the_demo_succeeds_although_laird_is_killed_during_the_build() -> Result<()> {
    if let Some(said) = demo(&["--kill-laird"])? {
        ensure!(said.contains("laird killed with SIGKILL") && said.contains("all VMs adopted"));
    }
    Ok(())
}

#[test]
fn sv1_ten_restarts_of_laird_during_a_build_are_noticed_by_nobody() -> Result<()> {
    if let Some(said) = demo(&["--restarts", "10", "60"])? {
        ensure!(said.contains("10 of 10") && said.contains("all as before"));
    }
    Ok(())
}
