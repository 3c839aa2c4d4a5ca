//! Looks after what the kernel holds of capture, for as long as the agent runs.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_ebpf::{Capture, GuardAttachment, Interfaces, NetnsCookie, monotonic_now};
use mesh_telemetry::metric;
use tokio_util::sync::CancellationToken;

/// Between rounds of looking after the kernel's tables.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// Flows that ended leave the kernel's table, guards that another tool removed come back, and the node's addresses,
/// from which probes come, are kept current.
pub(crate) async fn tend_kernel(capture: Arc<Capture>, stop: CancellationToken) {
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut guards = tokio::time::interval(guard_interval(capture.features().guard));
    guards.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut unguardable = BTreeSet::new();
    loop {
        let capture = Arc::clone(&capture);
        let tended = tokio::select! {
            _ = sweep.tick() => {
                let known = std::mem::take(&mut unguardable);
                let tended = tokio::task::spawn_blocking(move || tend_once(&capture, known)).await;
                tended.map(|found| unguardable = found)
            }
            _ = guards.tick() => {
                tokio::task::spawn_blocking(move || tend_guards(&capture)).await
            }
            () = stop.cancelled() => return,
        };
        if let Err(error) = tended {
            tracing::error!(%error, "the kernel's tables were not looked after");
        }
    }
}

/// How often guards are looked at. A link stays where it is, as long as its pin is left alone; a clsact filter goes with
/// any tool that replaces the qdisc.
const fn guard_interval(guard: GuardAttachment) -> Duration {
    match guard {
        GuardAttachment::Tcx => SWEEP_INTERVAL,
        GuardAttachment::Clsact => Duration::from_secs(5),
    }
}

fn tend_guards(capture: &Capture) {
    match capture.verify_guards() {
        Ok(0) => {}
        Ok(gone) => {
            metrics::counter!(metric::GUARDS_RESTORED.name)
                .increment(u64::try_from(gone).unwrap_or(u64::MAX));
            tracing::error!(gone, "another tool had removed guards of pods; they are back");
        }
        Err(error) => tracing::error!(%error, "guards of pods cannot be verified"),
    }
}

/// `known` are interfaces that cannot be guarded and were told of; gives those there are now.
fn tend_once(
    capture: &Capture,
    known: BTreeSet<(NetnsCookie, String)>,
) -> BTreeSet<(NetnsCookie, String)> {
    if let Err(error) = capture.sweep_flows(monotonic_now()) {
        tracing::warn!(%error, "ended flows stay in the kernel's table");
    }
    retire_foreign_layouts(capture);
    let unguardable = match capture.guard_new_interfaces() {
        Ok(Interfaces { guarded, unguardable }) => {
            if guarded > 0 {
                tracing::info!(guarded, "interfaces that pods got after enrolment are under guard");
            }
            unguardable.into_iter().collect()
        }
        Err(error) => {
            tracing::error!(%error, "interfaces of pods cannot be looked at");
            known.clone()
        }
    };
    for (cookie, interface) in unguardable.difference(&known) {
        tracing::error!(
            %cookie, interface,
            "an interface that a pod got after enrolment cannot be guarded: what it sends there is not held to the mesh"
        );
    }
    let count = u32::try_from(unguardable.len()).unwrap_or(u32::MAX);
    metrics::gauge!(metric::INTERFACES_UNGUARDED.name).set(f64::from(count));
    let told = node_addresses().map_err(|error| error.to_string()).and_then(|addresses| {
        capture.set_node_addresses(&addresses).map_err(|error| error.to_string())
    });
    if let Err(error) = told {
        tracing::warn!(error, "the node's addresses are not current; probes may be refused");
    }
    unguardable
}

/// Capture of another version goes with its last pod, which may have to wait for something.
pub(crate) fn retire_foreign_layouts(capture: &Capture) {
    match capture.retire_foreign_layouts() {
        Ok(layouts) if layouts.is_empty() => {}
        Ok(layouts) => tracing::warn!(
            ?layouts,
            "capture of another version still refuses connections of pods that are not captured anew"
        ),
        Err(error) => tracing::warn!(%error, "capture of another version is not removed"),
    }
}

/// The node's own addresses; link-local ones too, from which a kubelet may probe.
pub(crate) fn node_addresses() -> io::Result<Vec<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let mut addresses: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .filter(|ip| !ip.is_loopback())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_NODE_ADDRESSES);
    Ok(addresses)
}

/// Bound of the kernel's table. Source: `Capture::set_node_addresses`.
const MAX_NODE_ADDRESSES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_any_tool_may_remove_are_looked_at_often() {
        assert!(guard_interval(GuardAttachment::Clsact) <= Duration::from_secs(10));
        assert!(guard_interval(GuardAttachment::Tcx) <= SWEEP_INTERVAL);
    }
}
