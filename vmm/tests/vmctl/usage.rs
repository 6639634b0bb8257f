//! Wrong use of `vmctl`.

use crate::support::*;

#[test]
fn cl1_unknown_verbs_and_flags_are_status_2_with_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let said = |arguments: &[&str]| {
        format!("$ vmctl {}\n{}", arguments.join(" "), said(&vmctl(directory.path(), arguments)))
    };
    let all = [
        &["strat", "a"][..],
        &["start"],
        &["start", "--wiat", "a"],
        &["start", "--timeout", "soon", "a"],
        &["--jsno", "status"],
        &["connect", "a"],
        &["events", "--after", "x"],
        &["schema", "--ipa"],
    ];
    insta::assert_snapshot!(all.map(said).join("\n"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn the_document_of_the_api_is_printed_without_a_laird() {
    let directory = tempfile::tempdir().unwrap();
    let output = vmctl(directory.path(), &["schema", "--api"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
}
