//! When a volume with fewer replicas than asked for may still serve: one pure function (PROTOCOL 7).

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the operator chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "mode", content = "tolerance")]
pub enum FailureMode {
    /// All replicas, or nothing.
    Hard,
    /// Tolerates the loss of this many replicas; `None` is the default: 1 if R = 1, otherwise R − 1.
    Soft(Option<u8>),
    /// Any copy in sync is enough.
    AlwaysOn,
}

/// As people type it: `hard`, `soft`, `soft(2)`, `alwayson`.
impl fmt::Display for FailureMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hard => f.write_str("hard"),
            Self::Soft(None) => f.write_str("soft"),
            Self::Soft(Some(t)) => write!(f, "soft({t})"),
            Self::AlwaysOn => f.write_str("alwayson"),
        }
    }
}

impl FailureMode {
    /// Whether a volume that asks for `wanted` replicas may serve with `in_sync` copies (the master included).
    pub fn serves(self, wanted: u8, in_sync: usize) -> bool {
        let healthy = in_sync.saturating_sub(1);
        let wanted = usize::from(wanted);
        let lost = wanted.saturating_sub(healthy);
        in_sync > 0
            && match self {
                Self::Hard => lost == 0,
                Self::Soft(tolerance) => {
                    let default = if wanted == 1 {
                        1
                    } else {
                        wanted.saturating_sub(1)
                    };
                    lost <= tolerance.map_or(default, usize::from)
                }
                Self::AlwaysOn => true,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::FailureMode::{self, AlwaysOn, Hard, Soft};

    #[test]
    fn each_mode_serves_as_the_table_says() {
        // (mode, R, copies in sync, serves)
        let table: &[(FailureMode, u8, usize, bool)] = &[
            (Hard, 0, 1, true),
            (Hard, 1, 2, true),
            (Hard, 1, 1, false),
            (Hard, 2, 3, true),
            (Hard, 2, 2, false),
            (Hard, 2, 4, true),
            (Soft(None), 0, 1, true),
            (Soft(None), 1, 1, true),
            (Soft(None), 2, 2, true),
            (Soft(None), 2, 1, false),
            (Soft(None), 3, 2, true),
            (Soft(None), 3, 1, false),
            (Soft(None), 5, 2, true),
            (Soft(None), 5, 1, false),
            (Soft(Some(0)), 1, 1, false),
            (Soft(Some(0)), 1, 2, true),
            (Soft(Some(2)), 2, 1, true),
            (Soft(Some(1)), 3, 2, false),
            (AlwaysOn, 5, 1, true),
            (AlwaysOn, 0, 1, true),
            (AlwaysOn, 2, 0, false),
            (Soft(Some(5)), 2, 0, false),
            (Hard, 0, 0, false),
        ];
        for &(mode, wanted, in_sync, serves) in table {
            assert_eq!(
                mode.serves(wanted, in_sync),
                serves,
                "{mode:?} R={wanted} in sync {in_sync}"
            );
        }
    }
}
