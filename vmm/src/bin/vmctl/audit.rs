//! `vmctl audit`.

use crate::{
    Context,
    error::CommandError,
    output::{bytes, harmless},
    status,
};
use jiff::{SignedDuration, Timestamp};
use lair_vmm::api::types::{AuditQuery, AuditRecord};
use serde_json::Value;
use std::{collections::BTreeMap, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Go on with what is recorded, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Only records from then on: a time such as 2026-01-31T12:00:00Z, or how long ago, such as 30m or 2h
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Only records that are about this VM
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// Only the newest records, this many at most [default: 1000]
    #[arg(short = 'n', long, value_name = "NUMBER")]
    limit: Option<usize>,
}

fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago: SignedDuration = text
        .parse()
        .map_err(|_| "write a time such as 2026-01-31T12:00:00Z, or 30m or 2h for so long ago")?;
    Timestamp::now().checked_sub(ago.abs()).map_err(|_| "that is too long ago".into())
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let Arguments { follow, since, vm, limit } = arguments;
    let mut records = context.client.audit(&AuditQuery { since, vm, limit, follow }).await?;
    let mut users = Users::default();
    while let Some(record) = records.next().await? {
        if context.json {
            status::print_json_line(&record)?;
        } else {
            println!("{}", harmless(&line(&record, &mut users).replace('\n', "; ")));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The names of users, each asked for once.
#[derive(Default)]
struct Users(BTreeMap<u32, String>);

impl Users {
    fn name(&mut self, uid: &Value) -> String {
        let Some(uid) = uid.as_u64().and_then(|uid| u32::try_from(uid).ok()) else { return "-".into() };
        let name = || nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name);
        self.0.entry(uid).or_insert_with(|| name().unwrap_or_else(|| uid.to_string())).clone()
    }
}

fn line(record: &AuditRecord, users: &mut Users) -> String {
    let field = |key: &str| record.fields.get(key).unwrap_or(&Value::Null);
    let text = |key: &str| field(key).as_str().unwrap_or_default();
    let number = |key: &str| field(key).as_u64();
    let mut about = Vec::new();
    let what = match (text("verb"), text("kind")) {
        ("", "") => "counted",
        ("", "link") => "link",
        ("", kind) => kind,
        (verb, _) => verb,
    };
    if !text("link").is_empty() {
        about.push(text("link").to_owned());
    }
    if !text("from").is_empty() && !text("to").is_empty() {
        about.push(format!("{} > {}", text("from"), text("to")));
    }
    if !text("detail").is_empty() {
        about.push(text("detail").to_owned());
    }
    if let Some(command) = field("command").as_array() {
        about.push(Value::from(command.clone()).to_string());
    }
    if let Some(port) = number("port") {
        about.push(format!("port {port}"));
    }
    if let (Some(sent), Some(received)) = (number("bytes_out"), number("bytes_in"))
        && sent.saturating_add(received) > 0
    {
        about.push(format!("{} sent, {} received", bytes(sent), bytes(received)));
    }
    for (key, words) in [("status", "status"), ("signal", "signal")] {
        if let Some(value) = field(key).as_i64() {
            about.push(format!("{words} {value}"));
        }
    }
    for (key, words) in [("suppressed", "more attempts"), ("lost", "records lost")] {
        if let Some(count) = number(key) {
            about.push(format!("{count} {words}"));
        }
    }
    if !text("reason").is_empty() {
        about.push(text("reason").to_owned());
    }
    let vm = if text("vm").is_empty() { "-" } else { text("vm") };
    let line = format!(
        "{}  {:8}  {what:8}  {vm:10}  {:7}  {}",
        record.time.strftime("%F %T"),
        users.name(field("uid")),
        text("verdict"),
        about.join("; ")
    );
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each() {
        let records = [
            r#"{"uid":4294967294,"gid":1,"role":"operate","verb":"start","vm":"builder","verdict":"allowed","duration_ms":1}"#,
            r#"{"uid":4294967294,"gid":1,"role":null,"verb":"kill","vm":"builder","verdict":"refused","reason":"kill takes the role `operate`","duration_ms":0}"#,
            r#"{"uid":4294967294,"verb":"exec","vm":"hydra","detail":"[\"ls\"]","verdict":"allowed","duration_ms":1}"#,
            r#"{"vm":"builder","kind":"link","link":"substitute","from":"builder","to":"cache","verdict":"allowed","bytes_out":4096,"bytes_in":1048576,"duration_ms":9}"#,
            r#"{"vm":"builder","kind":"exec","command":["sh","-c","x"],"uid":4294967294,"from":"host","to":"builder","verdict":"allowed","status":3,"bytes_out":0,"bytes_in":5,"duration_ms":9}"#,
            r#"{"kind":"fault","device":"0000:01:00.0","vm":"builder","detail":"0000:01:00.0 Xid 79 (the GPU has fallen off the bus), as the guest says"}"#,
            r#"{"kind":"lease","device":"0000:01:00.0","vm":"builder","detail":"0000:01:00.0 noted after 600 s; resets 120 ms before, 130 ms after; 2 Xids, 0 PCIe errors; Xid 31 (memory page fault), 2 times"}"#,
            r#"{"uid":null,"verdict":"refused","suppressed":4980}"#,
        ];
        let mut users = Users::default();
        let lines = records.map(|text| {
            let fields = serde_json::from_str(text).unwrap();
            line(&AuditRecord { time: Timestamp::UNIX_EPOCH, source: "laird".into(), fields }, &mut users)
        });
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn since_is_a_time_or_a_duration() {
        assert_eq!(since("2026-01-31T12:00:00Z").unwrap().as_second(), 1_769_860_800);
        let ago = |text| Timestamp::now().as_second() - since(text).unwrap().as_second();
        assert!((1799..1900).contains(&ago("30m")) && (7199..7300).contains(&ago("2h")));
        for text in ["yesterday", "", "30"] {
            assert!(since(text).is_err(), "{text}");
        }
    }
}
