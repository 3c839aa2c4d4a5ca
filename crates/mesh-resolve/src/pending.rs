//! Flows whose endpoint has a host name instead of an address.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{Flow, IpFamilies, Workload, canonical_ip};

use crate::balance::{Dice, Purpose, allows};
use crate::outbound::Ending;
use crate::route::ResolvedFlow;
use crate::trace::Trace;
use crate::unroutable::Unroutable;

/// A flow that is resolved but for one DNS lookup: the endpoint is chosen, its address is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingDns {
    pub(crate) ending: Ending,
    pub(crate) families: IpFamilies,
    pub(crate) entropy: u64,
}

impl PendingDns {
    /// The name to look up, as the pod would.
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.ending.workload.hostname
    }

    /// The endpoint that was chosen.
    #[must_use]
    pub const fn workload(&self) -> &Arc<Workload> {
        &self.ending.workload
    }

    /// The flow.
    #[must_use]
    pub const fn flow(&self) -> &Flow {
        &self.ending.flow
    }

    /// Goes on with the addresses of [`hostname`](Self::hostname): one of the family dialled if there is one, else of the
    /// other, at random.
    ///
    /// # Errors
    /// [`Unroutable::NoDnsAnswer`] when none can be used; otherwise as [`resolve`](crate::resolve), never `NeedsDns`.
    pub fn complete(self, addresses: &[IpAddr]) -> Result<ResolvedFlow, Unroutable> {
        self.complete_traced(addresses, &mut Trace::off())
    }

    /// As [`complete`](Self::complete), with its steps.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_traced(
        self,
        addresses: &[IpAddr],
        trace: &mut Trace,
    ) -> Result<ResolvedFlow, Unroutable> {
        let dialled_v4 = self.ending.flow.orig_dst.ip().is_ipv4();
        let usable: Vec<_> = addresses
            .iter()
            .map(|ip| canonical_ip(*ip))
            .filter(|ip| allows(self.families, *ip))
            .collect();
        let same: Vec<_> = usable.iter().copied().filter(|ip| ip.is_ipv4() == dialled_v4).collect();
        let pool = if same.is_empty() { usable } else { same };
        match Dice::new(self.entropy).pick(Purpose::Address, &pool) {
            Some(ip) => self.ending.at(*ip, trace),
            None => Err(Unroutable::NoDnsAnswer { hostname: Arc::clone(self.hostname()) }),
        }
    }
}
