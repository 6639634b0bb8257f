//! Texts that nobody writes by mistake.

use super::{EXAMPLE, HOST, changed, said, said_of_changes};
use crate::fleet::{LIMIT, load, load_file};
use proptest::prelude::*;
use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

#[test]
fn cf7_numbers() {
    let all = said_of_changes(&[
        ("vcpus = 4", "vcpus = nan"),
        ("vcpus = 4", "vcpus = 1e400"),
        ("vcpus = 4", "vcpus = 18446744073709551616"),
        ("vcpus = 4", "vcpus = -99999999999999999999"),
        ("vcpus = 4", "vcpus = 0xffffffffffffffffff"),
    ]);
    insta::assert_snapshot!(all);
    let json = |number: &str| said("fleet.json", format!("{{\"schema\": 1, \"vms\": {number}}}").as_bytes());
    let all: Vec<String> =
        ["NaN", "Infinity", "1e400", "18446744073709551616", "-", "01", "0x10"].map(json).into();
    let all = all.join("\n");
    insta::assert_snapshot!(all);
}

#[test]
fn cf7_encodings() {
    let bytes = |parts: &[&[u8]]| parts.concat();
    let all = [
        said("fleet.toml", &bytes(&[b"schema = 1\n# caf\xe9\n"])),
        said("fleet.toml", &bytes(&[b"\xff\xfes\0c\0h\0"])),
        said("fleet.toml", &bytes(&["\u{feff}".as_bytes(), EXAMPLE.as_bytes()])),
        said("fleet.json", "\u{feff}{}".as_bytes()),
        said("fleet.toml", b"schema = 1\0"),
        said("fleet.json", b"{\"schema\": 1}\0"),
        said("fleet.json", b"{\"schema\": \"\\ud800\"}"),
        said("fleet.toml", b""),
        said("fleet.json", b""),
        said("fleet.json", b" [1]"),
        said("fleet.toml", b"schema = 1\rstore = 2"),
    ];
    let all = all.join("\n");
    insta::assert_snapshot!(all);
}

#[test]
fn cf7_line_ends_of_other_systems_are_line_ends() {
    let toml = EXAMPLE.replace('\n', "\r\n");
    let json = serde_json::to_string_pretty(&super::example()).unwrap().replace('\n', "\r\n");
    for (name, text) in [("fleet.toml", toml), ("fleet.json", json)] {
        assert_eq!(load(name, text.as_bytes(), &HOST).unwrap().fleet, super::example(), "{name}");
    }
    let wrong = changed("vcpus = 4", "vcpus = 0").replace('\n', "\r\n");
    assert!(said("fleet.toml", wrong.as_bytes()).starts_with("fleet.toml:17:9: "));
}

#[test]
fn cf7_syntax_errors_have_a_place() {
    let all = [
        said("fleet.toml", changed("vcpus = 4", "vcpus 4").as_bytes()),
        said("fleet.toml", changed("role = \"hydra\"", "role = hydra").as_bytes()),
        said("fleet.toml", changed("role = \"hydra\"", "role = \"hydra").as_bytes()),
        said("fleet.json", b"{\n  \"schema\": 1\n  \"vms\": {}\n}"),
        said("fleet.json", b"{\n  \"schema\": 1,\n}"),
        said("fleet.json", b"{\n  \"schema\": 1\n"),
        said("fleet.json", b"{ // no comments\n}"),
        said("fleet.json", b"{} {}"),
    ];
    let all = all.join("\n");
    insta::assert_snapshot!(all);
}

/// Texts that grow: each is filled up to the limit.
fn floods() -> Vec<(&'static str, String)> {
    // Room for what closes them.
    let limit = LIMIT as usize - 1;
    let fill = |name, head: &str, piece: &str, tail: &str| {
        let times = (limit - head.len()) / piece.len();
        (name, [head, &piece.repeat(times), tail].concat())
    };
    let keys = |name, line: &dyn Fn(usize) -> String| {
        let mut text = String::new();
        for number in 0.. {
            let line = line(number);
            if text.len() + line.len() > limit {
                break;
            }
            text.push_str(&line);
        }
        (name, text)
    };
    vec![
        fill("fleet.json", "", "[", ""),
        fill("fleet.json", "", "{\"a\":", ""),
        fill("fleet.json", "[0", ",0", "]"),
        fill("fleet.json", "[[]", ",[]", "]"),
        fill("fleet.json", "{\"schema\": \"", "a", ""),
        fill("fleet.toml", "a = ", "[", ""),
        fill("fleet.toml", "a = ", "{a=", ""),
        fill("fleet.toml", "a = [0", ",0", "]"),
        fill("fleet.toml", "a", ".a", ""),
        fill("fleet.toml", "[a", ".a", "]"),
        fill("fleet.toml", "", "[[a]]\n", ""),
        fill("fleet.toml", "", "[a]\n", ""),
        fill("fleet.toml", "", "a=1\n", ""),
        fill("fleet.toml", "", "\"", ""),
        fill("fleet.toml", "", "\n", ""),
        keys("fleet.toml", &|number| format!("k{number}=1\n")),
        keys("fleet.toml", &|number| format!("[vms.v{number}]\n")),
        keys("fleet.toml", &|number| format!("[[a.b]]\nc.d{number}.e=1\n")),
    ]
}

#[test]
fn cf7_floods_end_soon_and_say_little() {
    for (name, flood) in floods() {
        let began = Instant::now();
        let said = said(name, flood.as_bytes());
        let start: String = flood.chars().take(20).collect();
        assert_ne!(said, "fine", "{start}");
        assert!(said.len() < 50_000, "{start}: {} bytes", said.len());
        assert!(began.elapsed().as_secs() < 30, "{start}: {:?}", began.elapsed());
    }
    for depth in [50, 79, 80, 200, 511, 512, 513, 5000, LIMIT as usize / 2 - 8] {
        for (name, head) in [("fleet.json", ""), ("fleet.toml", "a = ")] {
            let text = [head, &"[".repeat(depth), &"]".repeat(depth)].concat();
            assert_ne!(said(name, text.as_bytes()), "fine", "{name} {depth}");
        }
    }
    // A fleet of the greatest size that is right.
    let flood = fill_links();
    let began = Instant::now();
    assert_eq!(said("fleet.toml", flood.as_bytes()), "fine");
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}

fn fill_links() -> String {
    let mut text = EXAMPLE.to_owned();
    for number in 10_000.. {
        let link = format!("[links.l{number}]\nfrom=[\"cache\"]\nto={{vm=\"builder\",port={number}}}\n");
        if text.len() + link.len() > LIMIT as usize {
            return text;
        }
        text.push_str(&link);
    }
    text
}

#[test]
fn cf7_a_text_over_the_limit_is_not_parsed() {
    let text = vec![b'#'; LIMIT as usize + 1];
    assert_eq!(
        said("fleet.toml", &text),
        "fleet.toml: has more than 1048576 bytes, the most that a fleet file may have"
    );
}

#[test]
fn cf8_a_fleet_file_is_not_used_that_others_may_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fleet.toml");
    let text = EXAMPLE.split("[vms.").next().unwrap();
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(load_file(&path, &HOST).unwrap().fleet.vms.is_empty());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o646)).unwrap();
    let said = load_file(&path, &HOST).unwrap_err().to_string();
    assert!(said.contains("fleet.toml: may be changed by everybody (mode 0646, "), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text, "a refused file is left as it is");
}

/// Pieces of which fleet files are made, to get further than bytes at random do.
fn pieces() -> impl Strategy<Value = String> {
    let words: Vec<String> = EXAMPLE.split_inclusive([' ', '\n', '.', '"']).map(Into::into).collect();
    let noise = prop::sample::select(vec![
        "\u{0}", "}", "]", "\"", "'''", "\\u", "9e999", "\r", "é", "[[", "null", ",",
    ]);
    let piece = prop_oneof![8 => prop::sample::select(words), 1 => noise.prop_map(Into::into)];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cf7_any_bytes_get_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300), json: bool) {
        let name = if json { "fleet.json" } else { "fleet.toml" };
        prop_assert!(load(name, &bytes, &HOST).is_err());
    }

    #[test]
    fn cf7_any_words_get_an_answer(text in pieces(), name in prop::sample::select(vec!["f.json", "f.toml", "f"])) {
        let said = said(name, text.as_bytes());
        prop_assert!(said.len() < 50_000);
        prop_assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
    }

    #[test]
    fn cf7_a_fleet_with_one_piece_replaced_gets_an_answer(at in 0..EXAMPLE.len(), length in 0usize..40, piece in pieces()) {
        let end = (at + length).min(EXAMPLE.len());
        let text = [&EXAMPLE[..at], &piece, &EXAMPLE[end..]].concat();
        let said = said("fleet.toml", text.as_bytes());
        prop_assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
    }
}
