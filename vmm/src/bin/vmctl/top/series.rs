//! What `top` needs of Prometheus' text format (OpenMetrics, section "ABNF"). Pure.

/// One line with a number.
#[derive(Debug, PartialEq)]
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    labels: Vec<(&'a str, String)>,
    pub(super) value: f64,
}

impl Series<'_> {
    /// The value of a label.
    pub(super) fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| *label == name).map(|(_, value)| value.as_str())
    }
}

/// All lines with labels and a finite number. Others are not for us.
pub(super) fn series(text: &str) -> impl Iterator<Item = Series<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(line)
}

fn line(line: &str) -> Option<Series<'_>> {
    let (name, mut rest) = line.split_once('{')?;
    let mut labels = Vec::new();
    loop {
        if let Some(behind) = rest.strip_prefix('}') {
            let value: f64 = behind.split_ascii_whitespace().next()?.parse().ok()?;
            return value.is_finite().then_some(Series { name, labels, value });
        }
        let (label, behind) = rest.split_once("=\"")?;
        let (value, behind) = quoted(behind)?;
        labels.push((label.trim_start_matches([',', ' ']), value));
        rest = behind;
    }
}

/// What is before the closing quote, and what is behind it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let (mut value, mut characters) = (String::new(), text.char_indices());
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, text.get(at.saturating_add(1)..)?)),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_with_labels_are_read_and_all_others_left_out() {
        let text = "# TYPE lair_x counter\nlair_x_total{vm=\"a\",to=\"/p\\\"q\\\\r\\ns}\"} 4 1700000000\nlair_y{} 2.5\n\
                    lair_z 7\nlair_n{vm=\"a\"} NaN\nlair_open{vm=\"a\nlair_bad{vm} 1\nlair_none{vm=\"a\"}\n# EOF\n";
        let found: Vec<_> = series(text).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[0].name, found[0].label("vm"), found[0].value), ("lair_x_total", Some("a"), 4.0));
        assert_eq!(found[0].label("to"), Some("/p\"q\\r\ns}"));
        assert_eq!(found[0].label("from"), None);
        assert_eq!((found[1].name, found[1].value), ("lair_y", 2.5));
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in "(?s)[a-z{}=\"\\\\,\n #0-9.é]{0,60}") {
            let _ = series(&text).count();
        }
    }
}
