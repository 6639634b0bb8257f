//! The demo as a test, with `laird` dead while the build runs.

use anyhow::{Result, ensure};
use lair_harness::testbed::Testbed;
use std::process::Command;

#[test]
fn the_demo_succeeds_although_laird_is_killed_during_the_build() -> Result<()> {
    if Testbed::find()?.is_none() {
        return Ok(());
    }
    let output = Command::new(env!("CARGO_BIN_EXE_demo")).arg("--kill-laird").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", output.status);
    ensure!(said.contains("laird killed with SIGKILL") && said.contains("all VMs adopted"));
    Ok(())
}
