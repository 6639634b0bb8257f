//! The environment of everything that the agent starts. It is made here, not inherited: nothing of PID 1's reaches
//! a service, `NIX_REMOTE` least of all.

/// Names and values.
pub(super) type Environment = Vec<(String, String)>;

/// Where systems with an init of their own have their programs; the first two are NixOS. The last one has `lair-guest`.
const SYSTEM_PATH: &str = "/run/wrappers/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:\
                           /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/lair";

/// The environment of a guest with this profile, or without one.
pub(super) fn of(profile: Option<&str>) -> Environment {
    let path = match profile {
        Some(profile) => format!("{profile}/bin:{SYSTEM_PATH}"),
        None => SYSTEM_PATH.to_string(),
    };
    vec![("PATH".into(), path), ("HOME".into(), "/root".into())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_comes_first() {
        let environment = of(Some("/nix/store/p"));
        assert!(environment[0].1.starts_with("/nix/store/p/bin:/run/wrappers/bin:"));
        assert_eq!(of(None)[1], ("HOME".to_string(), "/root".to_string()));
    }
}
