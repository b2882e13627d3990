//! Labels: which keys mean something to us, and what may be written.

use super::fault::Fault;
use super::model::Labels;

/// The prefix of labels that mean something to us.
pub const PREFIX: &str = "lockstep.io/";
/// The same keys under the name that StorageOS users know.
const ALIAS: &str = "storageos.com/";
/// The longest key or value, in bytes: they travel in every record.
const LABEL_MAX: usize = 253;
/// The most labels of one thing.
const LABELS_MAX: usize = 64;

/// What a label with our prefix may be called, and on what.
const VOLUME_KEYS: [&str; 6] = [
    "replicas",
    "failure-mode",
    "failure-tolerance",
    "nocompress",
    "hint.master",
    "topology-key",
];
const NODE_KEYS: [&str; 1] = ["computeonly"];

/// What labels are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A volume's.
    Volume,
    /// A node's.
    Node,
}

impl Of {
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Volume => &VOLUME_KEYS,
            Self::Node => &NODE_KEYS,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Volume => Self::Node,
            Self::Node => Self::Volume,
        }
    }

    fn things(self) -> &'static str {
        match self {
            Self::Volume => "volumes",
            Self::Node => "nodes",
        }
    }
}

/// Labels from `k=v` texts.
pub fn parse_all<S: AsRef<str>>(texts: &[S], of: Of) -> Result<Labels, Fault> {
    let mut labels = Labels::new();
    for text in texts {
        let Some((key, value)) = text.as_ref().split_once('=') else {
            return Err(Fault::input(format!(
                "label '{}' has no value: write k=v",
                text.as_ref()
            )));
        };
        let (key, value) = (key.trim(), value.trim());
        if labels
            .insert(key.into(), value.into())
            .is_some_and(|before| before != value)
        {
            return Err(Fault::input(format!(
                "label {key} is given twice with different values"
            )));
        }
    }
    check(labels, of)
}

/// Checks labels and writes those of the alias prefix under ours.
pub fn check(labels: Labels, of: Of) -> Result<Labels, Fault> {
    if labels.len() > LABELS_MAX {
        return Err(Fault::input(format!(
            "{} labels: at most {LABELS_MAX}",
            labels.len()
        )));
    }
    let mut checked = Labels::new();
    for (key, value) in labels {
        let key = own_key(&key, of)?;
        if value.len() > LABEL_MAX || value.chars().any(|c| c.is_control() || c == ',') {
            return Err(Fault::input(format!(
                "label {key}: a value is at most {LABEL_MAX} bytes without commas and control characters"
            )));
        }
        if checked.get(&key).is_some_and(|other| *other != value) {
            return Err(Fault::input(format!(
                "label {key} is given twice, under {PREFIX} and under {ALIAS}, with different values"
            )));
        }
        checked.insert(key, value);
    }
    Ok(checked)
}

/// The key as it is stored; one of ours must be known.
pub fn own_key(key: &str, of: Of) -> Result<String, Fault> {
    let good = !key.is_empty() && key.len() <= LABEL_MAX && key.chars().all(is_key_char);
    if !good {
        return Err(Fault::input(format!(
            "'{key}' is not a label key: use letters, digits, '-', '_', '.' and '/'"
        )));
    }
    let Some(short) = key.strip_prefix(PREFIX).or_else(|| key.strip_prefix(ALIAS)) else {
        return Ok(key.into());
    };
    if of.keys().contains(&short) {
        return Ok(format!("{PREFIX}{short}"));
    }
    let other = of.other();
    if other.keys().contains(&short) {
        return Err(Fault::input(format!(
            "label '{key}' means something on {}, not on {}",
            other.things(),
            of.things()
        )));
    }
    let fault = Fault::input(format!("label '{key}' is not known"));
    Err(match nearest(short, of.keys()) {
        Some(near) => fault.hint(format!("did you mean {PREFIX}{near}?")),
        None => fault,
    })
}

/// Whether a key may have this letter.
pub fn is_key_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')
}

/// The known word that takes the fewest changes of letters.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known.iter().copied().min_by_key(|k| distance(word, k))
}

/// Letters to insert, delete or replace to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// Whether a label's value means yes; an empty one does (`lockstep.io/nocompress=`).
pub fn is_true(value: &str) -> bool {
    !matches!(
        value.to_ascii_lowercase().as_str(),
        "false" | "0" | "no" | "off"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alias_prefix_is_stored_as_ours() {
        let labels = parse_all(&["storageos.com/replicas=2", "env=prod"], Of::Volume).unwrap();
        assert_eq!(labels["lockstep.io/replicas"], "2");
        assert_eq!(labels["env"], "prod");
    }

    #[test]
    fn an_unknown_key_of_ours_is_refused_with_the_nearest_known_one() {
        let fault = parse_all(&["lockstep.io/replcas=2"], Of::Volume).unwrap_err();
        assert!(fault.hint.unwrap().contains("lockstep.io/replicas"));
        assert!(parse_all(&["lockstep.io/computeonly=true"], Of::Volume).is_err());
        assert!(parse_all(&["lockstep.io/computeonly=true"], Of::Node).is_ok());
        let elsewhere = parse_all(&["lockstep.io/replicas=1"], Of::Node).unwrap_err();
        assert!(elsewhere.message.contains("on volumes, not on nodes"));
        assert!(parse_all(&["novalue"], Of::Volume).is_err());
        assert!(parse_all(&["=x"], Of::Volume).is_err());
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for twice in [
            ["env=prod", "env=dev"],
            ["lockstep.io/replicas=1", "storageos.com/replicas=2"],
        ] {
            assert!(parse_all(&twice, Of::Volume).is_err(), "{twice:?}");
        }
        let same = [
            "lockstep.io/replicas=1",
            "storageos.com/replicas=1",
            "a=b",
            "a=b",
        ];
        assert_eq!(parse_all(&same, Of::Volume).unwrap().len(), 2);
    }
}
