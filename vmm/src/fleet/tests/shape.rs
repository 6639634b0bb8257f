//! Keys and kinds of values.

use super::{EXAMPLE, changed, said, said_of_changes};

#[test]
fn cf1_unknown_key() {
    let all = said_of_changes(&[
        ("memory = \"8GiB\"", "memry = \"8GiB\""),
        ("memory = \"8GiB\"", "memory = \"8GiB\"\nmemry = \"8GiB\""),
        ("[host]", "[hots]"),
        ("accel = \"auto\"", "accel = \"auto\"\nlimit = \"none\""),
        ("[vms.hydra]", "[vm.hydra]"),
        ("mount = \"/var\" }", "mount = \"/var\", fstype = \"xfs\" }"),
        ("tmpfs = \"8GiB\"", "tmpf = \"8GiB\""),
        ("tmpfs = \"8GiB\"", "tmpfs = \"8GiB\", volume = \"data\""),
        ("overlay = { tmpfs = \"8GiB\" }", "overlay = { }"),
        ("to = { host = \"/run/lair/store.sock\" }", "to = { hsot = \"/run/lair/store.sock\" }"),
        ("to = { host = \"/run/lair/store.sock\" }", "to = { host = \"/run/lair/store.sock\", port = 1 }"),
        ("port = 1022, connect", "prot = 1022, connect"),
        ("{ root = \"/var/lib/lair/store\" }", "{ root = \"/var/lib/lair/store\", writable = true }"),
        ("{ root = \"/var/lib/lair/store\" }", "{ store = \"/var/lib/lair/store\" }"),
        ("[links.web]", "\"a \\u001b[31m\\n key\" = 1\n[links.web]"),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn cf1_in_json_as_well() {
    let json = r#"{
  "schema": 1,
  "store": { "sources": [ { "root": "/var/lib/lair/store", "rwo": true } ] },
  "vms": {
    "builder": { "vcpus": 1, "memory": 512, "memry": "512MiB", "overlay": null, "kernel": null }
  },
  "pools": {}
}"#;
    let all = said("fleet.json", json.as_bytes());
    insta::assert_snapshot!(all);
}

#[test]
fn values_of_the_wrong_kind() {
    let all = said_of_changes(&[
        ("vcpus = 4", "vcpus = \"4\""),
        ("vcpus = 4", "vcpus = 1.5"),
        ("vcpus = 4", "vcpus = -1"),
        ("memory = \"8GiB\"", "memory = 8"),
        ("memory = \"8GiB\"", "memory = \"8\""),
        ("memory = \"8GiB\"", "memory = \"8GB\""),
        ("memory = \"8GiB\"", "memory = 2026-01-01"),
        ("role = \"hydra\"", "role = \"hidra\""),
        ("role = \"hydra\"", "role = true"),
        ("network = \"none\"", "network = \"outward\""),
        ("from = [\"hydra\"]", "from = \"hydra\""),
        ("autostart = false", "autostart = \"no\""),
        ("overlay = { tmpfs = \"8GiB\" }", "overlay = \"tmpfs\""),
        ("[vms.hydra]", "[vms]\nx = 1\n[vms.hydra]"),
        ("sources = [", "sources = [ 7,"),
        ("\"/run/secrets/hydra-ssh-key\"", "7"),
        ("\"/run/secrets/hydra-ssh-key\"", "{}"),
        ("\"/run/secrets/hydra-ssh-key\"", "{ file = \"/k\", restrat = [] }"),
        ("[\"nginx.service\"]", "\"nginx.service\""),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn everything_is_told_at_once_in_the_order_of_the_file() {
    let text = changed("vcpus = 4", "vcpus = \"4\"").replace("mount", "muont").replace("from", "form");
    let said = said("fleet.toml", text.as_bytes());
    let lines: Vec<usize> = said
        .lines()
        .filter_map(|line| line.strip_prefix("fleet.toml:")?.split(':').next()?.parse().ok())
        .collect();
    assert_eq!(lines.len(), 8, "{said}");
    assert!(lines.is_sorted(), "{said}");
}

#[test]
fn many_problems_are_counted() {
    let text: String = (0..1000).map(|number| format!("key{number} = 1\n")).collect();
    let said = said("fleet.toml", [&text, EXAMPLE].concat().as_bytes());
    assert_eq!(said.matches("unknown key").count(), 50);
    assert!(said.ends_with("... and 950 more"), "{said}");
}

#[test]
fn cf2_the_same_name_twice() {
    let again = "\n[vms.hydra]\nvcpus = 1\n";
    let toml = [
        [EXAMPLE, again].concat(),
        changed("vcpus = 4", "vcpus = 4\n\"vcpus\" = 4"),
        changed("name = \"state\", ", "name = \"state\", name = \"other\", "),
        changed("name = \"httpd\"", "name = \"httpd\"\nname = \"other\""),
        [EXAMPLE, "\n[links.web]\nfrom = [\"host\"]\n"].concat(),
        changed("[vms.hydra]", "[vms.hydra]\nvolumes = 1\n[[vms.hydra.volumes]]"),
        [EXAMPLE, "\n[vms.hydra.volumes.x]\n"].concat(),
    ];
    let json = r#"{ "schema": 1, "vms": {
  "a": { "vcpus": 1 },
  "\u0061": { "vcpus": 2 }
} }"#;
    let mut all: Vec<String> = toml.iter().map(|text| said("fleet.toml", text.as_bytes())).collect();
    all.push(said("fleet.json", json.as_bytes()));
    let all = all.join("\n\n");
    insta::assert_snapshot!(all);
}

#[test]
fn cf10_a_newer_schema() {
    // Nothing else is said: keys of the future are no mistakes.
    let future = changed("schema = 1", "schema = 2").replace("vcpus", "processors");
    let all = [
        said("fleet.toml", future.as_bytes()),
        said("fleet.toml", changed("schema = 1", "schema = 0").as_bytes()),
        said("fleet.toml", changed("schema = 1", "schema = \"1\"").as_bytes()),
        said("fleet.toml", changed("schema = 1", "schema = 99999999999999999999").as_bytes()),
        said("fleet.toml", changed("schema = 1", "").as_bytes()),
        said("fleet.json", b"{\"schema\": 2, \"vms\": []}"),
    ];
    let all = all.join("\n");
    insta::assert_snapshot!(all);
}
