//! Errors as text.

use std::error::Error;

/// An error and all its sources on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::frame::FrameError;

    #[test]
    fn sources_follow() {
        let error = FrameError::Io(std::io::Error::other("it broke"));
        assert_eq!(chain(&error), "Connection failed: it broke");
    }
}
