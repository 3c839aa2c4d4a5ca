//! The result of the plugins before this one: read for the pod's addresses, passed on as it came.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_model::{canonical_ip, error_chain};
use serde::Deserialize;
use serde_json::Value;

use super::error::{CniError, Code};
use crate::request::pod_addresses;

/// What is taken from a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Previous {
    /// The pod's addresses; at least one.
    pub(super) ips: BTreeSet<IpAddr>,
    /// Nameservers the network names; often none.
    pub(super) nameservers: BTreeSet<IpAddr>,
}

#[derive(Deserialize)]
struct RawResult {
    #[serde(default)]
    interfaces: Vec<RawInterface>,
    #[serde(default)]
    ips: Vec<RawIp>,
    #[serde(default)]
    dns: RawDns,
}

#[derive(Deserialize)]
struct RawInterface {
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct RawIp {
    address: String,
    interface: Option<i64>,
}

#[derive(Default, Deserialize)]
struct RawDns {
    #[serde(default)]
    nameservers: Vec<String>,
}

/// Reads a result of version 0.4.0 or later.
///
/// An address that belongs to an interface outside the sandbox (the host's end) is not the pod's.
pub(super) fn read(result: &Value) -> Result<Previous, CniError> {
    let raw: RawResult = Deserialize::deserialize(result)
        .map_err(|error: serde_json::Error| invalid(error_chain(&error)))?;
    let inside = |ip: &&RawIp| match ip.interface {
        None => true,
        Some(number) => usize::try_from(number)
            .ok()
            .and_then(|number| raw.interfaces.get(number))
            .is_some_and(|interface| !interface.sandbox.is_empty()),
    };
    let ips = raw.ips.iter().filter(inside).map(address).collect::<Result<Vec<_>, _>>()?;
    let ips = pod_addresses(ips).map_err(|error| invalid(error.to_string()))?;
    if ips.is_empty() {
        return Err(invalid("it gives the pod no address".to_owned()));
    }
    let nameservers =
        raw.dns.nameservers.iter().filter_map(|text| text.parse().ok()).map(canonical_ip).collect();
    Ok(Previous { ips, nameservers })
}

/// The address of `10.0.0.2/24`.
fn address(ip: &RawIp) -> Result<IpAddr, CniError> {
    let bare = ip.address.split_once('/').map_or(ip.address.as_str(), |(bare, _length)| bare);
    bare.parse().map_err(|_not_one| invalid(format!("no address: {:?}", ip.address)))
}

fn invalid(what: String) -> CniError {
    CniError::new(Code::Decode, "prevResult cannot be used", what)
}
