//! Names, limits, and what does not go together.

use super::{EXAMPLE, HOST, changed, example, said, said_of_changes};
use crate::fleet::{load, schema::Fleet, view};
use std::path::PathBuf;

#[test]
fn cf2_things_that_must_differ() {
    let all = said_of_changes(&[
        (
            "{ name = \"state\", size = \"40GiB\", mount = \"/var\" }",
            "{ name = \"a\", size = \"1GiB\", mount = \"/a\" }, { name = \"a\", size = \"1GiB\", mount = \"/a\" }",
        ),
        (
            "[vms.builder]",
            "[[vms.cache.services]]\nname = \"httpd\"\ncommand = [\"/bin/true\"]\n[vms.builder]",
        ),
        ("port = 9198", "port = 3000"),
        ("listen = \"127.0.0.1:9198\"", "listen = \"/run/lair-web/hydra.sock\""),
        ("listen = \"127.0.0.1:9198\"", "listen = \"/run//lair-web/hydra.sock/\""),
        (
            "[links.store]\nfrom = [\"builder\"]",
            "[links.store]\nfrom = [\"builder\"]\nlisten = \"127.0.0.1:5000\"",
        ),
        (
            "[links.store]\nfrom = [\"builder\"]",
            "[links.store]\nfrom = [\"builder\"]\nlisten = \"127.0.0.1:05000\"",
        ),
        ("from = [\"hydra\"]", "from = [\"hydra\", \"hydra\"]"),
        ("{ root = \"/var/lib/lair/store\" }", "{ root = \"/\" }"),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn vf1_devices_that_make_no_sense() {
    let at = |text: &str| ("{ address = \"0000:01:00.0\" }".to_owned(), text.to_owned());
    let changes = [
        at("{ address = \"01:00.0\" }"),
        at("{ address = \"0000:01:00.0\" }, { address = \"0000:01:00.0\" }"),
        at("{ adress = \"0000:01:00.0\" }"),
        at("{ address = \"0000:01:00.0\", vendor = \"nvidia\" }"),
        at("{ address = \"0000:01:00.0\", vfio = true }"),
        at("{ arch = \"ada\" }"),
        at("{ vendor = \"nvida\" }"),
        at("{ vendor = \"amd\", arch = \"ada\" }"),
        at("{ vendor = \"nvidia\", arch = \"adda\" }"),
        at("{ vendor = \"nvidia\", count = 0 }"),
        at("{ vendor = \"nvidia\", class = \"0x0302\" }"),
        at("\"0000:01:00.0\""),
    ];
    let changes: Vec<_> = changes.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    insta::assert_snapshot!(said_of_changes(&changes));
}

#[test]
fn vf10_a_device_that_two_vms_ask_for_is_warned_of() {
    let text = EXAMPLE.replacen(
        "autostart = false",
        "autostart = false\ngpus = [{ address = \"0000:01:00.0\" }]",
        1,
    );
    let loaded = load("fleet.toml", text.as_bytes(), &HOST).unwrap();
    let warned = loaded.warnings.to_string();
    assert!(warned.contains("another VM asks for this device as well"), "{warned}");
    assert!(!load("fleet.toml", EXAMPLE.as_bytes(), &HOST).unwrap().warnings.to_string().contains("device"));
}

#[test]
fn cf3_names_of_vms() {
    let long = format!("[vms.{}]", "a".repeat(65));
    let names = [
        "[vms.\"\"]",
        "[vms.\"a/b\"]",
        "[vms.\"..\"]",
        "[vms.\"a\\u0000\"]",
        "[vms.\"a\\nb\"]",
        "[vms.\"bäcker\"]",
        "[vms.-a]",
        "[vms.a_b]",
        "[vms.host]",
        &long,
        "[vms.\"--sandbox=none\"]",
    ];
    // Nothing links to the cache under its new name, so that only the name is wrong.
    let alone = EXAMPLE.split("[links.substitute]").next().unwrap();
    let all: Vec<String> = names
        .iter()
        .map(|name| {
            let text = alone
                .replace("[vms.cache]", name)
                .replace("[[vms.cache", &name.replace("[vms", "[[vms").replace(']', ""));
            said("fleet.toml", text.as_bytes())
        })
        .collect();
    let all = all.join("\n");
    insta::assert_snapshot!(all);
    for name in ["a", "A-1", "9", "a-", &"a".repeat(64)] {
        let text = alone.replace("vms.cache", &format!("vms.{name}"));
        assert_eq!(said("fleet.toml", text.as_bytes()), "fine", "{name}");
    }
}

#[test]
fn cf2_what_a_credential_restarts_has_to_be_there() {
    let units = "[\"nginx.service\"]";
    let many = format!("[{}]", "\"a.service\", ".repeat(33));
    let service = |name: &str| {
        format!("autostart = false\ncredentials.key = {{ file = \"/run/key\", restart = [\"{name}\"] }}")
    };
    let (known, unknown) = (service("httpd"), service("httpd.service"));
    insta::assert_snapshot!(said_of_changes(&[
        (units, "[\"nginx\"]"),
        (units, "[\"-h.service\"]"),
        (units, "[\"a b.service\", \".service\", \"home.mount\"]"),
        (units, &many),
        ("autostart = false", &unknown),
    ]));
    let escaped = "[\"nginx.service\", \"user@0.service\", \"sshd.socket\", \"a\\\\x2db.target\"]";
    for (from, to) in [(units, "[]"), (units, escaped), ("autostart = false", &known)] {
        assert_eq!(said("fleet.toml", EXAMPLE.replace(from, to).as_bytes()), "fine", "{to}");
    }
}

#[test]
fn cf3_other_names() {
    let all = said_of_changes(&[
        ("[links.build]", "[links.\"a/b\"]"),
        ("name = \"state\"", "name = \"a-name-with-21-letters\""),
        ("name = \"httpd\"", "name = \"http d\""),
        ("ssh-key =", "\".ssh\" ="),
        ("ssh-key =", "\"a/b\" ="),
        ("TZ =", "\"1=2\" ="),
        ("TZ = \"UTC\"", "TZ = \"a\\u0000\""),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn cf4_processors_and_memory() {
    let all = said_of_changes(&[
        ("vcpus = 4", "vcpus = 0"),
        ("vcpus = 4", "vcpus = 100000"),
        ("vcpus = 4", "vcpus = -1"),
        ("vcpus = 4", "vcpus = 256"),
        ("vcpus = 4", "vcpus = 4294967296"),
        ("vcpus = 4", "vcpus = 17"),
        ("memory = \"8GiB\"", "memory = \"0MiB\""),
        ("memory = \"8GiB\"", "memory = \"62MiB\""),
        ("memory = \"8GiB\"", "memory = \"131073KiB\""),
        ("memory = \"8GiB\"", "memory = \"65GiB\""),
        ("memory = \"8GiB\"", "memory = \"8388607TiB\""),
        ("tmpfs = \"8GiB\"", "tmpfs = \"17GiB\""),
        ("tmpfs = \"8GiB\"", "tmpfs = \"0GiB\""),
        ("size = \"40GiB\"", "size = \"1MiB\""),
        ("size = \"40GiB\"", "size = \"1000TiB\""),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn cf5_more_memory_than_the_host_has_is_a_warning_before_the_start() {
    assert_eq!(HOST.budget().to_string(), "60GiB");
    assert_eq!(said("fleet.toml", changed("memory = \"16GiB\"", "memory = \"49GiB\"").as_bytes()), "fine");
    let warned = said("fleet.toml", changed("memory = \"16GiB\"", "memory = \"51GiB\"").as_bytes());
    insta::assert_snapshot!(warned, @r"
    fine, but
    fleet.toml:15:2: vms: all VMs together need 63260MiB with their processes, more than the 60GiB for VMs (the host has 64GiB and keeps 4GiB); not all can run at once
    ");
}

#[test]
fn limits_of_vms_and_of_the_host() {
    let all = said_of_changes(&[
        ("percent = 400", "percent = 0"),
        ("weight = 200", "weight = 10001"),
        ("pids = 2048", "pids = 10"),
        ("pids = 2048", "pids = \"2048\""),
        ("read = \"200MiB\"", "read = \"200\""),
        ("read = \"200MiB\"", "read = \"200KiB\""),
        ("write_ops = 2000", "write_ops = 1"),
        ("write_ops = 2000", "write_op = 2000"),
        ("store_cache = \"1GiB\"", "store_cache = \"2TiB\""),
        ("store_cache = \"1GiB\"", "stor_cache = \"1GiB\""),
        ("autostart = false", "autostart = false\nlimits = { pids = 500, memory = \"1GiB\" }"),
        ("network = \"none\"", "network = \"none\"\nlimits = { io = { read = \"10MiB\" } }"),
        ("limits = \"cgroup\"", "limits = \"cgroups\""),
        ("limits = \"cgroup\"", "limits = \"none\""),
        ("users = \"own\"", "users = \"root\""),
        ("first = 2100000000", "first = 999"),
        ("first = 2100000000", "first = 65000"),
        ("first = 2100000000", "first = 4294967290"),
        ("count = 65536", "count = 7"),
        (", count = 65536", ""),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn cf6_paths() {
    let all = said_of_changes(&[
        ("kernel = \"/boot/bzImage\"", "kernel = \"bzImage\""),
        ("kernel = \"/boot/bzImage\"", "kernel = \"\""),
        ("kernel = \"/boot/bzImage\"", "kernel = \"/boot/../bzImage\""),
        ("kernel = \"/boot/bzImage\"", "kernel = \"/boot/a\\nb\""),
        ("modules = \"/lib/modules/6.12\"", "modules = \"./modules\""),
        ("-nixos-system-hydra\"]", "-nixos-system-hydra/init\"]"),
        ("[\"/nix/store/3123456789abcdfghijklmnpqrsvwxyz-profile\"]", "[\"/etc\"]"),
        ("[\"/nix/store/3123456789abcdfghijklmnpqrsvwxyz-profile\"]", "[]"),
        ("-nixos-system-hydra/init\"", "-nixos-system-hydra/../init\""),
        (
            "init = \"/nix/store/1123456789abcdfghijklmnpqrsvwxyz-nixos-system-hydra/init\"",
            "init = \"/sbin/init\"",
        ),
        ("/run/secrets/hydra-ssh-key", "hydra-ssh-key"),
        ("/run/secrets/tls", "tls"),
        ("mount = \"/var\"", "mount = \"/\""),
        ("mount = \"/var\"", "mount = \"/nix\""),
        ("mount = \"/var\"", "mount = \"/proc/x\""),
        ("store = \"/nix/store\"", "store = \"nix\""),
        ("\"/bin/httpd\", ", "\"httpd\", "),
        ("[\"/bin/httpd\", \"-f\", \"-p\", \"127.0.0.1:5000\"]", "[]"),
    ]);
    insta::assert_snapshot!(all);
}

/// `laird` compares a VM with what it was started with; this is what it compares.
#[test]
fn cf9_a_vm_differs_when_its_meaning_does() {
    let vm = |text: &str| load("fleet.toml", text.as_bytes(), &HOST).unwrap().fleet.vms["hydra"].clone();
    let started = vm(EXAMPLE);
    for (old, new) in [
        ("[vms.hydra]", "# a remark\n[vms.hydra]"),
        ("memory = \"8GiB\"", "memory = \"8192MiB\""),
        ("role = \"hydra\"\nvcpus = 4", "vcpus = 4\nautostart = true\nrole = \"hydra\""),
        ("vcpus = 8", "vcpus = 9"),
    ] {
        assert_eq!(vm(&changed(old, new)), started, "{new}");
    }
    for (old, new) in [
        ("memory = \"8GiB\"", "memory = \"9GiB\""),
        ("vcpus = 4", "vcpus = 5"),
        ("size = \"40GiB\"", "size = \"41GiB\""),
        ("cmdline = \"systemd.log_level=warning\"", ""),
    ] {
        assert_ne!(vm(&changed(old, new)), started, "{new}");
    }
}

#[test]
fn cf11_kernel_command_line() {
    let long = format!("cmdline = \"{}\"", "a".repeat(1793));
    let all = said_of_changes(&[
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = \"a\\nb\""),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = \"a\\u0000\""),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = \"ä\""),
        ("cmdline = \"systemd.log_level=warning\"", &long),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = \"quiet console=ttyS0\""),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = '\"console=ttyS0\"'"),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = 'a=\"b'"),
        ("cmdline = \"systemd.log_level=warning\"", "cmdline = \"-- single\""),
    ]);
    insta::assert_snapshot!(all);
    for word in ["init=/bin/sh", "rdinit=/x", "panic=0", "reboot=f", "root=/dev/vda", "initrd=/x", "init"] {
        let text = changed("systemd.log_level=warning", word);
        assert!(said("fleet.toml", text.as_bytes()).contains("Lair sets"), "{word}");
    }
    for word in ["quiet", "initcall_debug", "systemd.unit=rescue.target", "consoleblank=0", "a=\\\"b c\\\""] {
        assert_eq!(
            said("fleet.toml", changed("systemd.log_level=warning", word).as_bytes()),
            "fine",
            "{word}"
        );
    }
}

/// What options of QEMU and Cloud Hypervisor, shells and line-based files would take for something else.
const METACHARACTERS: &str = ",=:;@#%&|<>()[]{}*?!~^$`'\"\\ \t\n\r\0/+._";

#[test]
fn cf12_metacharacters_in_names_are_refused() {
    let change: [fn(&mut Fleet, String); 5] = [
        |fleet, name| {
            fleet
                .vms
                .values_mut()
                .for_each(|vm| vm.volumes.iter_mut().for_each(|volume| volume.name = name.clone()))
        },
        |fleet, name| fleet.vms.get_mut("cache").unwrap().services[0].name = name,
        |fleet, name| {
            let vm = fleet.vms["hydra"].clone();
            fleet.vms.insert(name, vm);
        },
        |fleet, name| {
            let link = fleet.links["build"].clone();
            fleet.links = [(name, link)].into();
        },
        |fleet, name| {
            fleet.vms.get_mut("cache").unwrap().overlay = Some(crate::fleet::schema::Overlay::Volume(name))
        },
    ];
    for (number, change) in change.iter().enumerate() {
        for name in
            METACHARACTERS.chars().map(|c| format!("a{c}b")).chain(["--sandbox=none".into(), "-a".into()])
        {
            let mut fleet = example();
            change(&mut fleet, name.clone());
            let text = serde_json::to_vec(&fleet).unwrap();
            assert!(load("fleet.json", &text, &HOST).is_err(), "{number}: {name:?}");
        }
    }
}

#[test]
fn cf12_metacharacters_in_paths_stay_as_they_are_or_are_refused() {
    for c in METACHARACTERS.chars() {
        let path = format!("/boot/a{c}b,if=none,file=/etc/shadow");
        let mut fleet = example();
        fleet.vms.get_mut("builder").unwrap().kernel = path.clone().into();
        let loaded = load("fleet.json", &serde_json::to_vec(&fleet).unwrap(), &HOST);
        if c.is_control() {
            assert!(loaded.is_err(), "{c:?}");
        } else {
            assert_eq!(loaded.unwrap().fleet.vms["builder"].kernel, PathBuf::from(path));
        }
    }
}

#[test]
fn links() {
    let all = said_of_changes(&[
        ("from = [\"hydra\"]", "from = []"),
        ("from = [\"hydra\"]", "from = [\"hydar\"]"),
        ("from = [\"hydra\"]", "from = [\"builder\"]"),
        ("from = [\"hydra\"]", "from = [\"host\"]"),
        ("vm = \"builder\"", "vm = \"bulider\""),
        ("vm = \"builder\"", "vm = \"host\""),
        ("port = 1022", "port = 1"),
        ("port = 1022", "port = 2"),
        ("port = 1022", "port = 0"),
        ("port = 1022", "port = 4294967295"),
        ("port = 1022", "port = 4294967296"),
        ("connect = \"127.0.0.1:22\"", "connect = \"localhost:22\""),
        ("connect = \"127.0.0.1:22\"", "connect = \"192.168.1.1:22\""),
        ("connect = \"/run/hydra/web.sock\"", "connect = \"run/web.sock\""),
        ("listen = \"127.0.0.1:9198\"", "listen = \"0.0.0.0:9198\""),
        ("listen = \"127.0.0.1:5000\"", "listen = \"/run/cache.sock\""),
        ("host = \"/run/lair/store.sock\"", "host = \"store.sock\""),
        (
            "host = \"/run/lair/store.sock\"",
            "host = \"/run/a-path-that-is-much-too-long-for-the-address-of-a-unix-socket/as-there-are-but-108-bytes-for-it-with-the-nul\"",
        ),
        ("[links.store]\nfrom = [\"builder\"]", "[links.store]\nfrom = [\"host\"]\nlisten = \"127.0.0.1:1\""),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn what_does_not_go_together() {
    let all = said_of_changes(&[
        ("overlay = { volume = \"data\" }", "overlay = { volume = \"date\" }"),
        ("overlay = { tmpfs = \"8GiB\" }", "overlay = { volume = \"data\" }"),
        ("autostart = false", "init = \"/nix/store/2123456789abcdfghijklmnpqrsvwxyz-profile/init\""),
        ("ready = \"127.0.0.1:5000\"", "ready = \"5000\""),
        (
            "  { store = \"/nix/store\", database = \"/nix/var/nix/db\" },\n  { root = \"/var/lib/lair/store\" },\n",
            "",
        ),
    ]);
    insta::assert_snapshot!(all);
}

#[test]
fn what_a_vm_runs_must_be_in_its_view() {
    let mut vm = example().vms["cache"].clone();
    let path = |name: &str| format!("/nix/store/4123456789abcdfghijklmnpqrsvwxyz-{name}");
    vm.services[0].command[0] = path("httpd") + "/bin/httpd";
    let profile = vm.profile.clone().unwrap().to_string_lossy().into_owned();
    let said =
        |outside: Vec<view::Outside>| outside.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert_eq!(view::outside(&vm, |whole| whole == profile || whole == path("httpd")), []);
    insta::assert_snapshot!(said(view::outside(&vm, |whole| whole == profile)), @"services[0].command[0] /nix/store/4123456789abcdfghijklmnpqrsvwxyz-httpd/bin/httpd is not in the closure of the roots, so the guest would not have it; add its store path to roots");
    insta::assert_snapshot!(said(view::outside(&example().vms["hydra"], |_| false)), @"init /nix/store/1123456789abcdfghijklmnpqrsvwxyz-nixos-system-hydra/init is not in the closure of the roots, so the guest would not have it; add its store path to roots");
    vm.services[0].command[0] = "/bin/httpd".into();
    assert_eq!(view::outside(&vm, |whole| whole == profile), []);
}

#[test]
fn cl3_names_in_access_and_where_metrics_are() {
    insta::assert_snapshot!(said_of_changes(&[
        ("view = [\"@monitoring\"]", "view = [\"@\", \"a b\", \"-x\", \"@4000\", \"alice\", \"alice\"]"),
        ("view = [\"@monitoring\"]", "veiw = [\"x\"]"),
        ("administer = [\"@wheel\"]", "administer = \"@wheel\""),
        ("listen = \"127.0.0.1:9110\"", "listen = \"0.0.0.0:9110\""),
        ("listen = \"127.0.0.1:9110\"", "listen = \"/run/metrics.sock\""),
    ]));
}
