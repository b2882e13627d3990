//! What a person is told when something could not be done: what failed, on what, what to do.

use serde::{Deserialize, Serialize};

use super::host::HostError;
use super::model::BadName;
use super::units::BadUnit;
use crate::registry::{CasError, RegistryError};

/// The kinds of failure a script can tell apart; each has its exit code and HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Nothing of that name.
    NotFound,
    /// The name is taken.
    Exists,
    /// What was given makes no sense.
    InvalidInput,
    /// It makes sense, and the present state forbids it.
    InvalidState,
    /// The same request may succeed later.
    TryAgain,
    /// A fault of ours or of the machine.
    Internal,
}

impl Code {
    /// The command line's exit code (interface: 8 not found … 13 internal).
    pub fn exit(self) -> u8 {
        match self {
            Self::NotFound => 8,
            Self::Exists => 9,
            Self::InvalidInput => 10,
            Self::InvalidState => 11,
            Self::TryAgain => 12,
            Self::Internal => 13,
        }
    }

    /// The HTTP status of an answer that carries it.
    pub fn status(self) -> u16 {
        match self {
            Self::NotFound => 404,
            Self::Exists | Self::InvalidState => 409,
            Self::InvalidInput => 400,
            Self::TryAgain => 503,
            Self::Internal => 500,
        }
    }
}

/// A failure as the API answers it: `{code, message, hint}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Which kind.
    pub code: Code,
    /// What failed and on what, one sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Fault {
    /// A failure without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// [`Code::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// [`Code::InvalidInput`].
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidInput, message)
    }

    /// [`Code::InvalidState`].
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidState, message)
    }

    /// [`Code::TryAgain`].
    pub fn try_again(message: impl Into<String>) -> Self {
        Self::new(Code::TryAgain, message)
    }

    /// [`Code::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }
}

impl From<RegistryError> for Fault {
    fn from(error: RegistryError) -> Self {
        let text = error.to_string();
        match error {
            RegistryError::Unavailable { .. } => Self::try_again(text)
                .hint("volumes that are attached go on serving meanwhile; try again"),
            RegistryError::Unusable { .. } | RegistryError::Malformed { .. } => {
                Self::internal(text)
            }
            RegistryError::Moved { to, .. } => Self::state(text).hint(format!(
                "start the node with --registry {to}; the records left behind are of the past"
            )),
        }
    }
}

impl From<CasError> for Fault {
    fn from(error: CasError) -> Self {
        match error {
            CasError::Registry(e) => e.into(),
            CasError::Conflict { .. } | CasError::Ambiguous { .. } => {
                Self::try_again(error.to_string()).hint("look at the present state, then try again")
            }
        }
    }
}

impl From<BadName> for Fault {
    fn from(error: BadName) -> Self {
        Self::input(error.to_string())
    }
}

impl From<BadUnit> for Fault {
    fn from(error: BadUnit) -> Self {
        Self::input(error.to_string())
    }
}

impl From<HostError> for Fault {
    fn from(error: HostError) -> Self {
        let text = error.to_string();
        match error {
            HostError::Connected | HostError::Refused(_) | HostError::NoSpace(_) => {
                Self::state(text)
            }
            HostError::Busy(_) => Self::try_again(text),
            HostError::Io(_) => Self::internal(text),
        }
    }
}
