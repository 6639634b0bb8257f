//! The demo's fleet: what the design's example says, with keys made for the run.

use anyhow::Result;
use lair_harness::{
    fleet::{empty, link, mib, service, vm, writable},
    keys::{SshKey, secret},
    testbed::Testbed,
};
use lair_vmm::fleet::schema::{Credential, Fleet, Role, Volume};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The name of the key with which the cache signs.
pub(crate) const SIGNING_KEY: &str = "lair-demo-1";

/// All keys of one run.
#[derive(Debug)]
pub(crate) struct Keys {
    /// Hydra's key to the others.
    pub(crate) client: SshKey,
    /// The builder's own.
    pub(crate) builder_host: SshKey,
    /// The cache's own.
    pub(crate) cache_host: SshKey,
    /// What only the cache has.
    pub(crate) signing: PathBuf,
    /// `NAME:BASE64`, for those who check.
    pub(crate) signing_public: String,
    authorized: PathBuf,
    known_hosts: PathBuf,
}

impl Keys {
    /// Makes all keys in a new directory.
    pub(crate) fn make(testbed: &Testbed, directory: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().mode(0o700).create(directory)?;
        let client = SshKey::make(directory, "hydra")?;
        let builder_host = SshKey::make(directory, "builder-host")?;
        let cache_host = SshKey::make(directory, "cache-host")?;
        let (signing, public) = (directory.join("signing"), directory.join("signing.pub"));
        testbed.nix(
            "nix-store",
            &[
                "--generate-binary-cache-key",
                SIGNING_KEY,
                &signing.to_string_lossy(),
                &public.to_string_lossy(),
            ],
        )?;
        let known = format!("builder {}\ncache {}\n", builder_host.public, cache_host.public);
        Ok(Self {
            authorized: secret(&directory.join("authorized"), &format!("{}\n", client.public))?,
            known_hosts: secret(&directory.join("known-hosts"), &known)?,
            signing_public: fs::read_to_string(public)?.trim().to_owned(),
            client,
            builder_host,
            cache_host,
            signing,
        })
    }
}

/// Where the cache keeps and serves what it signed.
pub(crate) const CACHE_ADDRESS: &str = "127.0.0.1:5000";

/// The fleet of the demo.
pub(crate) fn fleet(testbed: &Testbed, keys: &Keys) -> Result<Fleet> {
    let openssh = testbed.path("openssh")?;
    let busybox = testbed.path("busybox")?;
    let sshd = format!("{openssh}/bin/sshd");
    let sshd = service("sshd", &[&sshd, "-D", "-e", "-f", "/etc/ssh/sshd_config"], Some("127.0.0.1:22"));

    let mut hydra = vm(testbed, &["profile-hydra"])?;
    hydra.role = Role::Hydra;
    hydra.overlay = writable();
    hydra.credentials =
        credentials(&[("ssh-key", &*keys.client.private), ("known-hosts", &keys.known_hosts)]);

    let mut cache = vm(testbed, &["profile-cache"])?;
    cache.role = Role::Cache;
    cache.overlay = writable();
    cache.volumes = vec![Volume { name: "cache".into(), size: mib(256), mount: "/srv/cache".into() }];
    cache.credentials = credentials(&[
        ("ssh-host-key", &keys.cache_host.private),
        ("authorized-keys", &keys.authorized),
        ("signing-key", &keys.signing),
    ]);
    let httpd = format!("{busybox}/bin/httpd");
    let httpd =
        service("httpd", &[&httpd, "-f", "-p", CACHE_ADDRESS, "-h", "/srv/cache"], Some(CACHE_ADDRESS));
    cache.services = vec![sshd.clone(), httpd];

    let mut builder = vm(testbed, &["profile-builder"])?;
    builder.role = Role::Builder;
    builder.memory = mib(768);
    builder.overlay = writable();
    builder.credentials =
        credentials(&[("ssh-host-key", &keys.builder_host.private), ("authorized-keys", &keys.authorized)]);
    builder.services = vec![sshd];

    let mut fleet = empty(testbed);
    fleet.vms =
        BTreeMap::from([("hydra".into(), hydra), ("cache".into(), cache), ("builder".into(), builder)]);
    let mut cache_http = link(&["builder"], "cache", 5000, CACHE_ADDRESS);
    cache_http.listen = Some(CACHE_ADDRESS.into());
    fleet.links = BTreeMap::from([
        ("build".into(), link(&["hydra"], "builder", 1022, "127.0.0.1:22")),
        ("push".into(), link(&["hydra"], "cache", 1022, "127.0.0.1:22")),
        ("substitute".into(), cache_http),
    ]);
    Ok(fleet)
}

fn credentials(named: &[(&str, &Path)]) -> BTreeMap<String, Credential> {
    named.iter().map(|(name, path)| ((*name).into(), PathBuf::from(path).into())).collect()
}
