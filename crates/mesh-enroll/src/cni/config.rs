//! The plugin's part of a network configuration list.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use mesh_model::error_chain;
use serde::Deserialize;
use serde_json::Value;

use super::SUPPORTED_VERSIONS;
use super::error::{CniError, Code};
use crate::DEFAULT_SOCKET;
use crate::names::ContainerId;

/// What standard input says, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// One of [`SUPPORTED_VERSIONS`].
    pub version: String,
    /// The agent's socket; default [`DEFAULT_SOCKET`].
    pub agent_socket: PathBuf,
    /// How long an answer of the agent may take. Seconds, 1..=300; default 30.
    pub timeout: Duration,
    /// How long to wait for an agent that does not listen, as one that restarts. Seconds, 0..=60; default 2.
    pub agent_wait: Duration,
    /// Namespaces whose pods are never the mesh's and never wait for it; default [`DEFAULT_EXCLUDED`].
    pub excluded: BTreeSet<String>,
    /// The result of the plugins before this one.
    pub previous: Option<Value>,
    /// For `GC`: the sandboxes that still exist.
    pub valid: Option<BTreeSet<ContainerId>>,
}

/// Excluded unless configured: what the mesh itself needs to start, on a node where nothing runs yet.
pub const DEFAULT_EXCLUDED: [&str; 2] = mesh_model::EXCLUDED_NAMESPACES;

/// Largest configuration read, bytes. Real ones have a few thousand.
pub const MAX_CONFIG_BYTES: usize = 1024 * 1024;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfig {
    cni_version: Option<String>,
    agent_socket: Option<PathBuf>,
    timeout_seconds: Option<u64>,
    agent_wait_seconds: Option<u64>,
    exclude_namespaces: Option<BTreeSet<String>>,
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<RawAttachment>>,
}

#[derive(Deserialize)]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container_id: ContainerId,
}

impl Config {
    /// Reads a configuration. Keys of others are ignored: runtimes add their own.
    ///
    /// # Errors
    /// [`Code::Decode`] for what is no JSON of this shape, [`Code::IncompatibleVersion`], [`Code::InvalidConfig`].
    pub fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let raw: RawConfig = serde_json::from_slice(stdin).map_err(|error| {
            CniError::new(Code::Decode, "network configuration cannot be read", error_chain(&error))
        })?;
        let version = raw.cni_version.unwrap_or_default();
        if !SUPPORTED_VERSIONS.contains(&version.as_str()) {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!("CNI version {version:?} is not supported"),
                format!("supported are {}", SUPPORTED_VERSIONS.join(", ")),
            ));
        }
        let agent_socket = raw.agent_socket.unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
        if !agent_socket.is_absolute() {
            return Err(invalid("agentSocket", "must be an absolute path"));
        }
        let defaults = || DEFAULT_EXCLUDED.map(str::to_owned).into();
        Ok(Self {
            version,
            agent_socket,
            timeout: seconds("timeoutSeconds", raw.timeout_seconds, 30, 1, 300)?,
            agent_wait: seconds("agentWaitSeconds", raw.agent_wait_seconds, 2, 0, 60)?,
            excluded: raw.exclude_namespaces.unwrap_or_else(defaults),
            previous: raw.prev_result,
            valid: raw
                .valid_attachments
                .map(|list| list.into_iter().map(|one| one.container_id).collect()),
        })
    }

    /// The version to answer in when nothing else of the configuration could be used.
    #[must_use]
    pub fn version_of(stdin: &[u8]) -> String {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Version {
            cni_version: String,
        }
        let newest = SUPPORTED_VERSIONS[SUPPORTED_VERSIONS.len() - 1];
        serde_json::from_slice(stdin)
            .map_or_else(|_unreadable| newest.to_owned(), |raw: Version| raw.cni_version)
    }
}

fn seconds(
    key: &str,
    given: Option<u64>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<Duration, CniError> {
    let value = given.unwrap_or(default);
    if (least..=most).contains(&value) {
        Ok(Duration::from_secs(value))
    } else {
        Err(invalid(key, &format!("{value} is not within {least}..={most}")))
    }
}

fn invalid(key: &str, what: &str) -> CniError {
    CniError::new(Code::InvalidConfig, format!("invalid network configuration: {key}"), what)
}
