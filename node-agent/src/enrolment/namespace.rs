//! A pod's network namespace: proof that it is the pod's, and the routing that delivery needs in it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mesh_model::canonical_ip;
use mesh_net::Netns;
use mesh_net::socket::ORIGINAL_SOURCE_MARK;

use super::netlink::{Change, Family, MarkRule, Netlink};
use super::sysctl::{self, Originals};

/// Table that leads marked packets to `lo`. Source: reference/ebpf.md C.
const TABLE: u8 = 133;
/// Before `main` (32766), after `local` (0).
const PRIORITY: u32 = 50;
const RULE: MarkRule = MarkRule { mark: ORIGINAL_SOURCE_MARK, table: TABLE, priority: PRIORITY };

/// A namespace that was found to be a pod's own.
#[derive(Debug)]
pub(crate) struct PodNamespace {
    /// Where it was opened.
    pub(crate) path: PathBuf,
    /// The open namespace.
    pub(crate) netns: Netns,
    /// The pod's addresses, all of them present in the namespace.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// What else the namespace has, which nobody says is the pod's: TCP from and to it is dropped by the guard.
    pub(crate) left_out: BTreeSet<IpAddr>,
}

/// A namespace that cannot be the pod's, or cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    /// There is none at the path.
    #[error("cannot open network namespace {path:?}")]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is the node's own.
    #[error("{path:?} is the node's own network namespace: a hostNetwork pod cannot be enrolled")]
    Host {
        /// The path.
        path: PathBuf,
    },
    /// An address of the request is not there.
    #[error("{path:?} does not hold {missing}: it has {present:?}")]
    NotThePods {
        /// The path.
        path: PathBuf,
        /// The first address that is missing.
        missing: IpAddr,
        /// What is there.
        present: BTreeSet<IpAddr>,
    },
    /// There is no address to capture.
    #[error("{path:?} has no address yet")]
    NoAddress {
        /// The path.
        path: PathBuf,
    },
    /// The pod has IPv6 addresses, but its loopback interface may not use IPv6.
    #[error("{path:?} has IPv6 addresses but IPv6 is disabled on its loopback interface")]
    LoopbackWithoutIpv6 {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed inside.
    #[error("cannot {what} in the pod's network namespace")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl NamespaceError {
    fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { what, source }
    }
}

impl PodNamespace {
    /// Opens a namespace and checks that it is no other than the pod's.
    ///
    /// `claimed` empty: whatever global addresses the namespace has are the pod's.
    pub(crate) fn open(
        path: &Path,
        claimed: &BTreeSet<IpAddr>,
        host_cookie: u64,
    ) -> Result<Self, NamespaceError> {
        let netns = Netns::open(path)
            .map_err(|source| NamespaceError::Open { path: path.to_owned(), source })?;
        if netns.cookie() == host_cookie {
            return Err(NamespaceError::Host { path: path.to_owned() });
        }
        let present = within(&netns, "read addresses", addresses)?;
        if let Some(missing) = claimed.difference(&present).next() {
            let (path, missing) = (path.to_owned(), *missing);
            return Err(NamespaceError::NotThePods { path, missing, present });
        }
        let (addresses, left_out) = if claimed.is_empty() {
            (present, BTreeSet::new())
        } else {
            (claimed.clone(), present.difference(claimed).copied().collect())
        };
        if addresses.is_empty() {
            return Err(NamespaceError::NoAddress { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), netns, addresses, left_out })
    }

    /// What is said of a pod that has addresses which are not captured; empty where there are none.
    pub(crate) fn about_left_out(&self) -> String {
        let left_out: Vec<String> = self.left_out.iter().map(ToString::to_string).collect();
        if left_out.is_empty() {
            return String::new();
        }
        format!(
            "not captured, and its TCP dropped: {} (not in the CNI result)",
            left_out.join(", ")
        )
    }

    /// The settings as they are before [`prepare`](Self::prepare); `known` as in [`sysctl::originals`].
    pub(crate) fn originals(&self, known: &Originals) -> Result<Originals, NamespaceError> {
        within(&self.netns, "read kernel settings", || sysctl::originals(known))
    }

    /// Sets routes, rules and kernel settings. Doing it again changes nothing.
    pub(crate) fn prepare(&self) -> Result<(), NamespaceError> {
        within(&self.netns, "set kernel settings", sysctl::apply)?;
        let has_ipv6 = self.has_ipv6()?;
        if !has_ipv6 && self.addresses.iter().any(IpAddr::is_ipv6) {
            return Err(NamespaceError::LoopbackWithoutIpv6 { path: self.path.clone() });
        }
        let mut netlink = within(&self.netns, "open a routing socket", Netlink::open)?;
        netlink.loopback_up().map_err(NamespaceError::kernel("bring lo up"))?;
        for family in families(has_ipv6) {
            netlink
                .local_default(Change::Add, family, TABLE)
                .map_err(NamespaceError::kernel("add a route"))?;
            netlink
                .mark_rule(Change::Add, family, RULE)
                .map_err(NamespaceError::kernel("add a routing rule"))?;
        }
        Ok(())
    }

    /// The first thing that is not as [`prepare`](Self::prepare) leaves it.
    pub(crate) fn drifted(&self) -> Result<Option<&'static str>, NamespaceError> {
        let setting = within(&self.netns, "read kernel settings", || Ok(sysctl::drifted()))?;
        if setting.is_some() {
            return Ok(setting);
        }
        let mut netlink = within(&self.netns, "open a routing socket", Netlink::open)?;
        for family in families(self.has_ipv6()?) {
            let leads = netlink
                .leads_to_loopback(family, RULE)
                .map_err(NamespaceError::kernel("look up a route"))?;
            if !leads {
                return Ok(Some("the route of marked packets to lo"));
            }
        }
        Ok(None)
    }

    fn has_ipv6(&self) -> Result<bool, NamespaceError> {
        within(&self.netns, "read kernel settings", || Ok(sysctl::has_ipv6()))
    }
}

/// Takes back what [`PodNamespace::prepare`] did in `netns`. Everything is tried; the first failure is told.
pub(crate) fn restore(netns: &Netns, originals: &Originals) -> Result<(), NamespaceError> {
    let mut outcome = Ok(());
    let mut keep_first = |done: Result<(), NamespaceError>| {
        if outcome.is_ok() {
            outcome = done;
        }
    };
    match within(netns, "open a routing socket", Netlink::open) {
        Err(error) => keep_first(Err(error)),
        Ok(mut netlink) => {
            let has_ipv6 = within(netns, "read kernel settings", || Ok(sysctl::has_ipv6()))?;
            for family in families(has_ipv6) {
                let rule = netlink.mark_rule(Change::Remove, family, RULE);
                keep_first(rule.map_err(NamespaceError::kernel("remove a routing rule")));
                let route = netlink.local_default(Change::Remove, family, TABLE);
                keep_first(route.map_err(NamespaceError::kernel("remove a route")));
            }
        }
    }
    keep_first(within(netns, "restore kernel settings", || sysctl::restore(originals)));
    outcome
}

/// The node's own namespace: that of the thread which asks, which has to be none that entered a pod's.
pub(crate) fn host_cookie() -> io::Result<u64> {
    Netns::current().map(|netns| netns.cookie())
}

fn families(has_ipv6: bool) -> impl Iterator<Item = Family> {
    [Some(Family::V4), has_ipv6.then_some(Family::V6)].into_iter().flatten()
}

/// The addresses of the calling thread's namespace that others can reach: no loopback, no link-local.
fn addresses() -> io::Result<BTreeSet<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let ip = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        address
            .as_sockaddr_in()
            .map(|v4| IpAddr::V4(v4.ip()))
            .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    Ok(interfaces.filter_map(ip).map(canonical_ip).filter(is_reachable).collect())
}

fn is_reachable(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !link_local
}

fn within<R>(
    netns: &Netns,
    what: &'static str,
    work: impl FnOnce() -> io::Result<R>,
) -> Result<R, NamespaceError> {
    netns.enter(work).and_then(|done| done).map_err(NamespaceError::kernel(what))
}
