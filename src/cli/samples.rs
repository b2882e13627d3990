//! Prometheus' text format, read back: what a node's `/metrics` says.

use std::collections::BTreeMap;

/// One sample: its name, labels and value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    /// The metric.
    pub(super) name: String,
    /// Its labels.
    pub(super) labels: BTreeMap<String, String>,
    /// Its value.
    pub(super) value: f64,
}

/// The samples of a text; comments and lines that are none are passed over.
pub(super) fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (key, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(key.trim_start_matches(',').trim().into(), value);
            rest = after;
        }
        rest = &rest[1..];
    }
    // A time may follow the value.
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.into(),
        labels,
        value,
    })
}

/// What stands before the closing quote, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, c)) = letters.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match letters.next()?.1 {
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn samples_are_read_with_their_labels() {
        let text = "# HELP a b\n# TYPE a counter\na 1\n\na{x=\"1\",y=\"a \\\"b\\\\\\n{},\"} 2.5\nb{} +Inf\nodd\nc{x=\"1} 3\n";
        let found = parse(text);
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!((found[0].name.as_str(), found[0].value), ("a", 1.0));
        assert_eq!(found[1].labels["x"], "1");
        assert_eq!(found[1].labels["y"], "a \"b\\\n{},");
        assert_eq!(found[1].value, 2.5);
        assert!(found[2].value.is_infinite());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_passed_over(text in "(a|\\{|\\}|\"|=|,| |\\\\|1|\n|ä){0,40}") {
            parse(&text);
        }
    }
}
