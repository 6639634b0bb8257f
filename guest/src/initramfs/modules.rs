//! Which kernel modules to load, and in which order: `depmod`'s files as data, the order as a pure function.

use super::{InitramfsError, read};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::Path,
};

/// What `depmod` has written about the modules of one kernel. Modules go by name, with `_` for `-`.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Files, relative to the folder of modules, and those that they need, with blanks between them. A kernel has thousands, of which a few
    /// are looked at.
    files: BTreeMap<String, (String, String)>,
    /// Names that are part of the kernel.
    builtin: BTreeSet<String>,
    /// Names of modules and what is to be loaded before, if it exists: names or aliases.
    softdeps: BTreeMap<String, Vec<String>>,
    /// Aliases without wildcards, and the names behind them.
    aliases: BTreeMap<String, Vec<String>>,
}

impl Index {
    pub(super) fn read(folder: &Path) -> Result<Self, InitramfsError> {
        let dependencies = folder.join("modules.dep");
        if !dependencies.exists() {
            return Err(InitramfsError::NotIndexed(dependencies));
        }
        let text = |name: &str| match read(&folder.join(name)) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(InitramfsError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Ok(String::new())
            }
            Err(error) => Err(error),
        };
        let dep = text("modules.dep")?;
        Ok(Self::parse(&dep, &text("modules.builtin")?, &text("modules.softdep")?, &text("modules.alias")?))
    }

    fn parse(dep: &str, builtin: &str, softdep: &str, alias: &str) -> Self {
        let mut index = Self::default();
        for (file, needs) in dep.lines().filter_map(|line| line.split_once(':')) {
            index.files.insert(name_of(file), (file.to_string(), needs.to_string()));
        }
        index.builtin = builtin.lines().map(name_of).collect();
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            if let (Some("softdep"), Some(module)) = (words.next(), words.next()) {
                let before =
                    words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| *word != "post:");
                index.softdeps.entry(name_of(module)).or_default().extend(before.map(name_of));
            }
        }
        // Tens of thousands have wildcards, for devices.
        for line in alias.lines().filter(|line| !line.contains('*')) {
            let words: Vec<_> = line.split_whitespace().collect();
            if let ["alias", alias, module] = words[..] {
                index.aliases.entry(name_of(alias)).or_default().push(name_of(module));
            }
        }
        index
    }
}

/// A module's name: the file's, without folder and endings, `-` and `_` being the same.
fn name_of(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

/// The files to load for the `wanted` modules, each after what it needs, without what is built in.
/// The error is the name of a module that the kernel does not have.
pub(super) fn resolve(index: &Index, wanted: &[&str]) -> Result<Vec<String>, String> {
    let mut order = Order { index, seen: BTreeSet::new(), files: Vec::new() };
    for module in wanted {
        order.add(&name_of(module))?;
    }
    Ok(order.files)
}

struct Order<'a> {
    index: &'a Index,
    seen: BTreeSet<String>,
    files: Vec<String>,
}

impl Order<'_> {
    fn add(&mut self, module: &str) -> Result<(), String> {
        if self.index.builtin.contains(module) || !self.seen.insert(module.to_string()) {
            return Ok(());
        }
        let (file, needs) = self.index.files.get(module).ok_or_else(|| module.to_string())?;
        for soft in self.index.softdeps.get(module).into_iter().flatten() {
            let names = self.index.aliases.get(soft);
            for name in std::iter::once(soft).chain(names.into_iter().flatten()) {
                if self.index.files.contains_key(name) {
                    self.add(name)?;
                }
            }
        }
        for need in needs.split_whitespace() {
            self.add(&name_of(need))?;
        }
        self.files.push(file.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        Index::parse(
            "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n\
             kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\nkernel/crypto/crc32c_generic.ko.xz:\n\
             kernel/arch/x86/crypto/crc32c-intel.ko.xz:\nkernel/x.ko: kernel/y.ko\nkernel/y.ko: kernel/x.ko\n",
            "kernel/fs/fuse/virtiofs.ko\n",
            "# a comment\nsoftdep ext4 pre: crc32c gone post: late\n",
            "alias crc32c crc32c_generic\nalias crc32c crc32c_intel\nalias pci:v0000* other\n",
        )
    }

    #[test]
    fn dependencies_come_first_and_builtin_modules_not_at_all() {
        assert_eq!(
            resolve(&index(), &["virtiofs", "ext4", "jbd2"]).unwrap(),
            [
                "kernel/crypto/crc32c_generic.ko.xz",
                "kernel/arch/x86/crypto/crc32c-intel.ko.xz",
                "kernel/fs/jbd2/jbd2.ko.xz",
                "kernel/lib/crc16.ko.xz",
                "kernel/fs/ext4/ext4.ko.xz"
            ]
        );
    }

    #[test]
    fn an_unknown_module_is_named_and_a_circle_ends() {
        assert_eq!(resolve(&index(), &["no-such"]).unwrap_err(), "no_such");
        assert_eq!(resolve(&index(), &["x"]).unwrap(), ["kernel/y.ko", "kernel/x.ko"]);
    }
}
