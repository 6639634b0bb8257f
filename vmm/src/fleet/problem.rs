//! What is wrong with a fleet file, where, and what would be right.

use super::document::Document;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write};

/// No more problems than this are told of one file; the rest is counted.
const MOST: usize = 50;

/// The longest piece of a file that a message repeats, in characters.
const QUOTED: usize = 64;

/// One step into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// A way into a document, shown as `vms.builder.volumes[0].name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path(Vec<Step>);

impl Path {
    pub(super) fn root() -> Self {
        Self(Vec::new())
    }

    pub(super) fn key(&self, key: &str) -> Self {
        self.with(Step::Key(key.into()))
    }

    pub(super) fn index(&self, index: usize) -> Self {
        self.with(Step::Index(index))
    }

    /// This way and then `further`.
    pub(super) fn join(&self, further: &Self) -> Self {
        Self(self.0.iter().chain(&further.0).cloned().collect())
    }

    pub(super) fn steps(&self) -> &[Step] {
        &self.0
    }

    fn with(&self, step: Step) -> Self {
        Self(self.0.iter().cloned().chain([step]).collect())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key) => {
                    if index > 0 {
                        f.write_char('.')?;
                    }
                    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                    if !key.is_empty() && key.len() <= QUOTED && key.chars().all(bare) {
                        f.write_str(key)?;
                    } else {
                        f.write_str(&quoted(key))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// `text` in quotes, on one line, of bounded length, with nothing in it that a terminal would obey.
pub(super) fn quoted(text: &str) -> String {
    let mut end = text.char_indices().skip(QUOTED);
    match end.next() {
        None => format!("\"{}\"", text.escape_debug()),
        Some((end, _)) => format!("\"{}\"...", text.get(..end).unwrap_or_default().escape_debug()),
    }
}

/// `words` for a message, each in quotes.
pub(super) fn listed<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(quoted).collect::<Vec<_>>().join(", ")
}

/// The word of `words` that `word` was probably meant to be.
pub(super) fn nearest<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > QUOTED {
        return None;
    }
    let limit = (word.len() / 3).max(1);
    words
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Where in a document a finding is.
#[derive(Debug, Clone)]
pub(super) enum Spot {
    /// At a byte; the path says what is there, and is empty where nobody knows.
    Offset(usize, Path),
    /// At a key.
    Key(Path),
    /// At a value.
    Value(Path),
}

impl Spot {
    /// The same, one step deeper: `step` comes before its path.
    pub(super) fn below(self, step: Step) -> Self {
        let deeper = |path: Path| Path([step].into_iter().chain(path.0).collect());
        match self {
            Self::Offset(at, path) => Self::Offset(at, deeper(path)),
            Self::Key(path) => Self::Key(deeper(path)),
            Self::Value(path) => Self::Value(deeper(path)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Offset(_, path) | Self::Key(path) | Self::Value(path) => path,
        }
    }
}

/// Something wrong, before it is known on which line it stands.
#[derive(Debug, Clone)]
pub(super) struct Finding {
    spot: Spot,
    message: String,
    hint: Option<String>,
    other: Option<Spot>,
}

impl Finding {
    pub(super) fn new(spot: Spot, message: impl Into<String>) -> Self {
        Self { spot, message: message.into(), hint: None, other: None }
    }

    /// At the value of `path`.
    pub(super) fn at(path: &Path, message: impl Into<String>) -> Self {
        Self::new(Spot::Value(path.clone()), message)
    }

    /// At the key of `path`.
    pub(super) fn at_key(path: &Path, message: impl Into<String>) -> Self {
        Self::new(Spot::Key(path.clone()), message)
    }

    /// The same, found in what is one step deeper.
    pub(super) fn below(self, step: Step) -> Self {
        let other = self.other.map(|spot| spot.below(step.clone()));
        Self { spot: self.spot.below(step), other, ..self }
    }

    /// With what is allowed, or what to do.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With the other place that it is about.
    pub(super) fn other(mut self, spot: Spot) -> Self {
        self.other = Some(spot);
        self
    }
}

/// A place in a fleet file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The file's name.
    pub file: String,
    /// The line, from 1.
    pub line: Option<usize>,
    /// The column in characters, from 1.
    pub column: Option<usize>,
    /// The way to it, such as `vms.builder.memory`.
    pub path: Option<String>,
}

impl Place {
    fn of_spot(file: &str, document: &Document<'_>, spot: &Spot) -> Self {
        let (line, column) = document.place(spot);
        let path = Some(spot.path().to_string()).filter(|path| !path.is_empty());
        Self { file: file.into(), line: Some(line), column: Some(column), path }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.escape_debug())?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        match &self.path {
            Some(path) => write!(f, ": {path}"),
            None => Ok(()),
        }
    }
}

/// One thing that is wrong with a fleet file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// What.
    pub message: String,
    /// What is allowed, or what to do.
    pub hint: Option<String>,
    /// The other place, of things that exclude each other.
    pub other: Option<Place>,
}

impl Problem {
    /// About a file as a whole.
    pub(super) fn of_file(file: &str, message: impl Into<String>) -> Self {
        Self::at_position(file, None, message)
    }

    /// At a line and column of a file that is not understood yet.
    pub(super) fn at_position(
        file: &str,
        position: Option<(usize, usize)>,
        message: impl Into<String>,
    ) -> Self {
        let (line, column) = position.unzip();
        let place = Place { file: file.into(), line, column, path: None };
        Self { place, message: message.into(), hint: None, other: None }
    }
}

impl fmt::Display for Problem {
    /// As compilers say it: the place and the message on one line, more below it and indented.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  {hint}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  the other: {other}")?;
        }
        Ok(())
    }
}

/// All that is wrong with a fleet file, or all that it is warned of, in the order in which it stands there. Shown one below the
/// other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", self.text())]
pub struct Problems {
    /// At least one where the file is refused.
    pub problems: Vec<Problem>,
    /// How many more there are.
    pub omitted: usize,
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem], omitted: 0 }
    }
}

impl Problems {
    /// Each as its own text, and last how many are not told.
    pub fn texts(&self) -> Vec<String> {
        let mut texts: Vec<String> = self.problems.iter().map(ToString::to_string).collect();
        if self.omitted > 0 {
            texts.push(format!("... and {} more", self.omitted));
        }
        texts
    }

    fn text(&self) -> String {
        self.texts().join("\n")
    }
}

/// Findings of one document.
#[derive(Debug, Default)]
pub(super) struct Findings {
    kept: Vec<Finding>,
    omitted: usize,
}

impl Findings {
    pub(super) fn push(&mut self, finding: Finding) {
        self.push_with(|| finding);
    }

    /// For what is costly to say: it is not asked for where there are enough.
    pub(super) fn push_with(&mut self, finding: impl FnOnce() -> Finding) {
        if self.kept.len() < MOST {
            self.kept.push(finding());
        } else {
            self.omitted = self.omitted.saturating_add(1);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// With their lines, sorted by them.
    pub(super) fn located(self, file: &str, document: &Document<'_>) -> Problems {
        let mut problems: Vec<Problem> = self
            .kept
            .into_iter()
            .map(|finding| Problem {
                place: Place::of_spot(file, document, &finding.spot),
                message: finding.message,
                hint: finding.hint,
                other: finding.other.map(|spot| Place::of_spot(file, document, &spot)),
            })
            .collect();
        problems.sort();
        Problems { problems, omitted: self.omitted }
    }
}
