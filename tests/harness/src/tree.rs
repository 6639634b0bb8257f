//! A store directory for measurements, the same in every run: names, sizes and contents follow from numbers alone, so nothing
//! has to be looked up on the disk to know what a reply must be.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

/// How much there is to be.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Store paths. They have some 140 inodes each, most of them few and a few of them thousands.
    pub store_paths: usize,
    /// Bytes of a file for sequential reading.
    pub large: u64,
}

/// Bytes of a file that is read again and again.
pub const HOT: u64 = 1 << 20;

/// To be changed with anything that changes the tree.
const VERSION: u32 = 1;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
    },
    /// A symbolic link.
    Link {
        /// What it says.
        target: String,
    },
}

/// An inode of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The path below the store directory.
    pub path: String,
    /// What it is.
    pub kind: Kind,
}

impl Entry {
    /// The directory that holds it, and its name; `None` for a store path.
    pub fn split(&self) -> Option<(&str, &str)> {
        self.path.rsplit_once('/')
    }
}

/// The whole tree; a directory comes before what is in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree {
    /// Store paths, the last components.
    pub names: Vec<String>,
    /// All inodes.
    pub entries: Vec<Entry>,
    /// The path of the file for sequential reading, and its size.
    pub large: (String, u64),
    /// The path of the file that has [`HOT`] bytes.
    pub hot: String,
}

/// SplitMix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any() % bound
    }

    /// From `low` to `high`, each order of magnitude as likely as any other.
    fn magnitude(&mut self, low: u64, high: u64) -> u64 {
        let fraction = self.any() as f64 / u64::MAX as f64;
        (low as f64 * (high as f64 / low as f64).powf(fraction)) as u64
    }

    fn one_of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

const WORDS: &[&str] = &[
    "alsa", "boost", "cairo", "curl", "dbus", "expat", "ffmpeg", "glib", "harfbuzz", "icu", "jansson",
    "krb5", "libxml2", "mesa", "ncurses", "openssl", "pango", "qtbase", "readline", "sqlite", "tcl",
    "unbound", "vim", "wayland", "xz", "yaml", "zlib",
];
const FOLDERS: &[&str] =
    &["bin", "doc", "etc", "include", "lib", "libexec", "locale", "man", "share", "site-packages"];
const ENDINGS: &[&str] =
    &["", ".a", ".conf", ".gz", ".h", ".hpp", ".html", ".mo", ".pc", ".pm", ".py", ".so"];

impl Tree {
    /// The tree of this scale.
    pub fn new(scale: Scale) -> Self {
        let mut random = Random(u64::from(VERSION));
        let large = (String::new(), scale.large);
        let mut tree = Self { names: vec![], entries: vec![], large, hot: String::new() };
        for number in 0..scale.store_paths {
            tree.store_path(number, &mut random);
        }
        tree
    }

    fn store_path(&mut self, number: usize, random: &mut Random) {
        const BASE32: &[u8] = b"0123456789abcdfghijklmnpqrsvwxyz";
        let hash: String = (0..32).map(|_| BASE32[random.below(32) as usize] as char).collect();
        let version = (random.below(9) + 1, random.below(30));
        let name = format!("{hash}-{}-{}.{}", random.one_of(WORDS), version.0, version.1);
        self.names.push(name.clone());
        match number {
            0 => {
                self.push(name.clone(), Kind::Directory);
                (self.large.0, self.hot) = (format!("{name}/large"), format!("{name}/hot"));
                self.push(self.large.0.clone(), Kind::File { size: self.large.1 });
                self.push(self.hot.clone(), Kind::File { size: HOT });
            }
            // Patches, derivations and the like.
            _ if number % 10 == 9 => {
                let size = random.magnitude(200, 20 << 10);
                self.push(name, Kind::File { size });
            }
            _ => {
                let inodes = match random.below(100) {
                    0..40 => random.magnitude(3, 20),
                    40..85 => random.magnitude(20, 150),
                    85..97 => random.magnitude(200, 1000),
                    _ => random.magnitude(1500, 3500),
                };
                self.push(name.clone(), Kind::Directory);
                self.fill(&name, inodes, 0, random);
            }
        }
    }

    /// Puts this many inodes below a directory.
    fn fill(&mut self, directory: &str, mut inodes: u64, depth: u32, random: &mut Random) {
        let mut number = 0;
        let mut last_file = None;
        while inodes > 0 {
            number += 1;
            let stem = random.one_of(WORDS);
            inodes -= 1;
            if depth < 6 && inodes >= 4 && random.below(100) < 9 {
                let path = format!("{directory}/{}-{number}", random.one_of(FOLDERS));
                let below = random.magnitude(3, 200).min(inodes);
                inodes -= below;
                self.push(path.clone(), Kind::Directory);
                self.fill(&path, below, depth + 1, random);
            } else if let (Some(target), true) = (&last_file, random.below(100) < 6) {
                self.push(
                    format!("{directory}/{stem}-{number}.so.1"),
                    Kind::Link { target: String::clone(target) },
                );
            } else {
                let name = format!("{stem}-{number}{}", random.one_of(ENDINGS));
                let size = match random.below(1000) {
                    0 => random.magnitude(256 << 10, 2 << 20),
                    1..20 => random.magnitude(20 << 10, 128 << 10),
                    _ => random.magnitude(200, 20 << 10),
                };
                self.push(format!("{directory}/{name}"), Kind::File { size });
                last_file = Some(name);
            }
        }
    }

    fn push(&mut self, path: String, kind: Kind) {
        self.entries.push(Entry { path, kind });
    }

    /// Regular files that have between these many bytes.
    pub fn files(&self, sizes: std::ops::RangeInclusive<u64>) -> impl Iterator<Item = (&Entry, u64)> {
        self.entries.iter().filter_map(move |entry| match entry.kind {
            Kind::File { size } if sizes.contains(&size) => Some((entry, size)),
            _ => None,
        })
    }

    /// The view of all store paths, as a file for the backend.
    pub fn view(&self) -> String {
        self.names.iter().map(|name| format!("/nix/store/{name}\n")).collect()
    }

    /// Writes the tree below `directory`, unless it is there already. Whether it had to.
    pub fn write(&self, directory: &Path) -> Result<bool> {
        let stamp = directory.with_extension("stamp");
        let text = format!("version {VERSION}, {} inodes, {} bytes\n", self.entries.len(), self.large.1);
        if fs::read_to_string(&stamp).is_ok_and(|there| there == text) {
            return Ok(false);
        }
        if directory.exists() {
            fs::remove_dir_all(directory)
                .with_context(|| format!("Cannot remove the old {}", directory.display()))?;
        }
        fs::create_dir_all(directory)?;
        for entry in &self.entries {
            let path = directory.join(&entry.path);
            self.write_entry(&path, entry).with_context(|| format!("Cannot write {}", path.display()))?;
        }
        fs::write(&stamp, text)?;
        Ok(true)
    }

    fn write_entry(&self, path: &Path, entry: &Entry) -> Result<()> {
        match &entry.kind {
            Kind::Directory => fs::create_dir(path)?,
            Kind::Link { target } => symlink(target, path)?,
            Kind::File { size } => {
                let mut file = fs::File::create_new(path)?;
                let mut content = vec![0; 1 << 20];
                for offset in (0..*size).step_by(content.len()) {
                    let length = (*size - offset).min(content.len() as u64) as usize;
                    fill_content(&entry.path, offset, &mut content[..length]);
                    file.write_all(&content[..length])?;
                }
                file.set_permissions(fs::Permissions::from_mode(0o444))?;
            }
        }
        Ok(())
    }
}

/// What a file has at an offset, a multiple of 8.
pub fn fill_content(path: &str, offset: u64, content: &mut [u8]) {
    let seed = path.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    for (index, chunk) in content.chunks_mut(8).enumerate() {
        let word = mix(seed.wrapping_add(offset / 8 + index as u64));
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
}

/// An error unless a file has this at an offset, a multiple of 8.
pub fn check_content(path: &str, offset: u64, content: &[u8]) -> Result<()> {
    let mut expected = vec![0; content.len()];
    fill_content(path, offset, &mut expected);
    ensure!(content == expected, "{path} has other contents at {offset}, {} bytes", content.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_virtiofs::store::StorePath;
    use std::collections::HashSet;

    #[test]
    fn it_is_a_store_and_always_the_same() {
        const SCALE: Scale = Scale { store_paths: 1000, large: 64 << 20 };
        let tree = Tree::new(SCALE);
        assert_eq!(tree, Tree::new(SCALE));
        assert!((130_000..150_000).contains(&tree.entries.len()), "{}", tree.entries.len());
        assert_eq!(tree.names.len(), SCALE.store_paths);
        assert!(tree.names.iter().all(|name| StorePath::from_base_name(name).is_ok()));
        let mut seen = HashSet::new();
        for entry in &tree.entries {
            if let Some((parent, name)) = entry.split() {
                assert!(seen.contains(parent) && name.len() < 40, "{entry:?}");
            }
            assert!(seen.insert(entry.path.as_str()), "{entry:?}");
        }
        let bytes: u64 = tree.files(0..=u64::MAX).map(|(_, size)| size).sum();
        assert!(bytes < 1 << 30, "{bytes}");
        let small = tree.files(200..=20 << 10).count();
        assert!(small * 10 > tree.files(0..=u64::MAX).count() * 9, "most files are small");
    }

    #[test]
    fn contents_can_be_told_from_any_offset() {
        let mut whole = vec![0; 100];
        fill_content("a", 0, &mut whole);
        check_content("a", 40, &whole[40..]).unwrap();
        assert!(check_content("b", 0, &whole).is_err());
        assert!(check_content("a", 8, &whole).is_err());
    }

    #[test]
    fn a_tree_is_written_once() {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("store");
        let tree = Tree {
            names: vec!["x".into()],
            entries: vec![
                Entry { path: "x".into(), kind: Kind::Directory },
                Entry { path: "x/f".into(), kind: Kind::File { size: 1000 } },
                Entry { path: "x/l".into(), kind: Kind::Link { target: "f".into() } },
            ],
            large: (String::new(), 0),
            hot: String::new(),
        };
        assert!(tree.write(&store).unwrap());
        let content = fs::read(store.join("x/l")).unwrap();
        assert_eq!(content.len(), 1000);
        check_content("x/f", 0, &content).unwrap();
        assert!(!tree.write(&store).unwrap());
        fs::write(store.with_extension("stamp"), "half done").unwrap();
        assert!(tree.write(&store).unwrap());
    }
}
