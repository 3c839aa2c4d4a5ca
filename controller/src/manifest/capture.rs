//! The annotations by which a pod, or a WorkloadEntry, tunes its capture.

use std::net::IpAddr;

use mesh_model::IpPrefix;

use super::metadata::{InvalidField, Metadata};

const PREFIX: &str = "culvert.dev/";

/// Most entries in one list.
const MAX_ENTRIES: usize = 64;

/// What is captured of a workload; everything, unless its annotations say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureSettings {
    /// `culvert.dev/include-outbound-ports`: only these destination ports are captured; empty means all.
    pub include_outbound_ports: Vec<u16>,
    /// `culvert.dev/exclude-outbound-ports`: these are not.
    pub exclude_outbound_ports: Vec<u16>,
    /// `culvert.dev/include-outbound-cidrs`: only these destinations are captured; empty means all.
    pub include_outbound_cidrs: Vec<IpPrefix>,
    /// `culvert.dev/exclude-outbound-cidrs`: these are not.
    pub exclude_outbound_cidrs: Vec<IpPrefix>,
    /// `culvert.dev/include-inbound-ports`: only these local ports are captured; empty means all.
    pub include_inbound_ports: Vec<u16>,
    /// `culvert.dev/exclude-inbound-ports`: these are not.
    pub exclude_inbound_ports: Vec<u16>,
    /// `culvert.dev/include-inbound-cidrs`: only clients from here are captured; empty means all.
    pub include_inbound_cidrs: Vec<IpPrefix>,
    /// `culvert.dev/exclude-inbound-cidrs`: clients from here are not.
    pub exclude_inbound_cidrs: Vec<IpPrefix>,
    /// `culvert.dev/dns-capture: "false"` leaves DNS alone.
    pub dns_capture: bool,
    /// `culvert.dev/bypass-inbound-capture: "true"` leaves plaintext inbound alone.
    pub bypass_inbound: bool,
    /// `culvert.dev/same-node`, where it is set.
    pub same_node: Option<SameNode>,
}

/// How connections between two pods of one node go, by label or annotation `culvert.dev/same-node` of a pod or a namespace.
/// A pod's own word counts more than its namespace's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNode {
    /// Directly, where the node's agent is set to it and both pods may.
    Direct,
    /// Always by a tunnel.
    Tunnel,
}

impl SameNode {
    /// The setting of an object; none when it says nothing.
    pub(super) fn parse(meta: &Metadata) -> Result<Option<Self>, InvalidField> {
        const KEY: &str = "culvert.dev/same-node";
        match meta.setting(KEY) {
            None => Ok(None),
            Some("direct") => Ok(Some(Self::Direct)),
            Some("tunnel") => Ok(Some(Self::Tunnel)),
            Some(other) => {
                let place = if meta.annotation(KEY).is_some() { "annotations" } else { "labels" };
                Err(InvalidField::new(
                    &format!("metadata.{place}"),
                    format!("{KEY} is {other:?}"),
                    "use direct or tunnel",
                ))
            }
        }
    }
}

impl CaptureSettings {
    pub(super) fn parse(meta: &Metadata) -> Result<Self, InvalidField> {
        Ok(Self {
            include_outbound_ports: list(meta, "include-outbound-ports", one_port)?,
            exclude_outbound_ports: list(meta, "exclude-outbound-ports", one_port)?,
            include_outbound_cidrs: list(meta, "include-outbound-cidrs", one_cidr)?,
            exclude_outbound_cidrs: list(meta, "exclude-outbound-cidrs", one_cidr)?,
            include_inbound_ports: list(meta, "include-inbound-ports", one_port)?,
            exclude_inbound_ports: list(meta, "exclude-inbound-ports", one_port)?,
            include_inbound_cidrs: list(meta, "include-inbound-cidrs", one_cidr)?,
            exclude_inbound_cidrs: list(meta, "exclude-inbound-cidrs", one_cidr)?,
            dns_capture: flag(meta, "dns-capture", true)?,
            bypass_inbound: flag(meta, "bypass-inbound-capture", false)?,
            same_node: SameNode::parse(meta)?,
        })
    }

    /// The annotation that leaves a connection to `ip` and `port` alone; none when it is captured. As `ebpf/programs`
    /// select: exclusions first, then one inclusion is enough.
    #[must_use]
    pub fn leaves_outbound(&self, ip: IpAddr, port: u16) -> Option<&'static str> {
        let lists = Lists {
            include_ports: (&self.include_outbound_ports, "culvert.dev/include-outbound-ports"),
            exclude_ports: (&self.exclude_outbound_ports, "culvert.dev/exclude-outbound-ports"),
            include_cidrs: (&self.include_outbound_cidrs, "culvert.dev/include-outbound-cidrs"),
            exclude_cidrs: (&self.exclude_outbound_cidrs, "culvert.dev/exclude-outbound-cidrs"),
        };
        lists.leaves(ip, port)
    }

    /// The annotation that leaves a plaintext connection from `client` to the workload's `port` alone.
    #[must_use]
    pub fn leaves_inbound(&self, client: IpAddr, port: u16) -> Option<&'static str> {
        if self.bypass_inbound {
            return Some("culvert.dev/bypass-inbound-capture");
        }
        let lists = Lists {
            include_ports: (&self.include_inbound_ports, "culvert.dev/include-inbound-ports"),
            exclude_ports: (&self.exclude_inbound_ports, "culvert.dev/exclude-inbound-ports"),
            include_cidrs: (&self.include_inbound_cidrs, "culvert.dev/include-inbound-cidrs"),
            exclude_cidrs: (&self.exclude_inbound_cidrs, "culvert.dev/exclude-inbound-cidrs"),
        };
        lists.leaves(client, port)
    }
}

/// The lists of one direction, with the annotations they come from.
struct Lists<'a> {
    include_ports: (&'a [u16], &'static str),
    exclude_ports: (&'a [u16], &'static str),
    include_cidrs: (&'a [IpPrefix], &'static str),
    exclude_cidrs: (&'a [IpPrefix], &'static str),
}

impl Lists<'_> {
    fn leaves(&self, ip: IpAddr, port: u16) -> Option<&'static str> {
        let holds = |prefixes: &[IpPrefix]| prefixes.iter().any(|prefix| prefix.contains(ip));
        if self.exclude_ports.0.contains(&port) {
            return Some(self.exclude_ports.1);
        }
        if holds(self.exclude_cidrs.0) {
            return Some(self.exclude_cidrs.1);
        }
        if self.include_ports.0.contains(&port) || holds(self.include_cidrs.0) {
            return None;
        }
        match (self.include_ports.0.is_empty(), self.include_cidrs.0.is_empty()) {
            (true, true) => None,
            (false, _) => Some(self.include_ports.1),
            (true, false) => Some(self.include_cidrs.1),
        }
    }
}

fn one_port(text: &str) -> Result<u16, &'static str> {
    text.parse::<u16>()
        .ok()
        .filter(|port| *port != 0)
        .ok_or("write ports from 1 to 65535, separated by commas")
}

fn one_cidr(text: &str) -> Result<IpPrefix, &'static str> {
    text.parse::<IpPrefix>().map_err(|_source| "write addresses or CIDRs, separated by commas")
}

fn list<T: Ord>(
    meta: &Metadata,
    name: &str,
    parse: fn(&str) -> Result<T, &'static str>,
) -> Result<Vec<T>, InvalidField> {
    let key = format!("{PREFIX}{name}");
    let Some(text) = meta.annotation(&key) else { return Ok(Vec::new()) };
    let complain = |part: &str, remedy: &str| {
        InvalidField::new("metadata.annotations", format!("{key} has {part:?}"), remedy)
    };
    let mut entries = Vec::new();
    // "*" is everything, which is what an include list says when it is absent.
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty() && *part != "*") {
        entries.push(parse(part).map_err(|remedy| complain(part, remedy))?);
    }
    if text.split(',').any(|part| part.trim() == "*") {
        if name.starts_with("exclude") {
            return Err(complain(
                "*",
                "name ports or CIDRs; to leave a pod out, label it culvert.dev/dataplane-mode: none",
            ));
        }
        return Ok(Vec::new());
    }
    if entries.len() > MAX_ENTRIES {
        return Err(complain(
            &format!("{} entries", entries.len()),
            "use at most 64; a wider CIDR may do",
        ));
    }
    entries.sort();
    entries.dedup();
    Ok(entries)
}

fn flag(meta: &Metadata, name: &str, default: bool) -> Result<bool, InvalidField> {
    let key = format!("{PREFIX}{name}");
    match meta.annotation(&key) {
        None => Ok(default),
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => Err(InvalidField::new(
            "metadata.annotations",
            format!("{key} is {other:?}"),
            "use \"true\" or \"false\"",
        )),
    }
}
