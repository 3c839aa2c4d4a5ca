//! Failures in the form the specification asks for.

use serde_json::{Value, json};

/// A failure's number. Source: CNI specification 1.1.0, section 5, "Error"; from 100 on they are the plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The configuration's version is not one of ours.
    IncompatibleVersion,
    /// An environment variable is missing or wrong.
    InvalidEnvironment,
    /// Standard input could not be read.
    Io,
    /// Standard input is not the JSON expected.
    Decode,
    /// The configuration means nothing.
    InvalidConfig,
    /// The same call may succeed a little later.
    TryAgainLater,
    /// No new pod can be served.
    Unavailable,
    /// No new pod can be served, and pods that run may be unable to open connections.
    UnavailableLimited,
    /// The agent refused for good.
    Refused,
    /// The pod is not in the state `ADD` left it in.
    NotAsExpected,
}

impl Code {
    /// The number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgainLater => 11,
            Self::Unavailable => 50,
            Self::UnavailableLimited => 51,
            Self::Refused => 100,
            Self::NotAsExpected => 101,
        }
    }
}

/// A failure as the runtime shows it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    /// Its number.
    pub code: Code,
    /// One line.
    pub message: String,
    /// What lies behind it and what to do; may be empty.
    pub details: String,
}

impl CniError {
    /// A failure with its explanation.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }

    /// What goes to standard output; `version` is the configuration's, where it was understood.
    #[must_use]
    pub fn to_json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code.number(),
            "msg": self.message,
            "details": self.details,
        })
    }
}
