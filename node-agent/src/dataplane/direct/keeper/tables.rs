//! What the kernel's tables have, where events say nothing.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::time::Instant;

use mesh_direct::Pair;
use mesh_ebpf::{Capture, CaptureError, DirectEnd, DirectFlow, monotonic_now};

use super::super::connections::pair;
use super::{COMPARE, Keeper, LOOK_AT_LEAVING, NOBODY};
use crate::error::error_chain;

impl Keeper {
    /// Connections whose beginning found no room in the queue are looked up in the kernel's table: what is not known is not
    /// cut when it is denied.
    pub(super) fn find_untold(&mut self) {
        let lost = match self.capture.counters() {
            Ok(counters) => counters.get(EVENTS_LOST).copied().unwrap_or(0),
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "whether direct connections were not told of is not known");
                return;
            }
        };
        if lost == self.lost {
            return;
        }
        self.read_events();
        match self.capture.direct_ends() {
            Ok(ends) => {
                self.lost = lost;
                self.find(ends);
            }
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "direct connections that were not told of are not known");
            }
        }
    }

    /// Takes up connections of the kernel's table that are not known, by who owns their addresses.
    pub(super) fn find(&mut self, ends: Vec<(DirectFlow, DirectEnd)>) {
        for (flow, _end) in ends {
            if !self.connections.contains(&flow) {
                let owner = |ip| self.pods.owner(ip).unwrap_or(NOBODY);
                let pair = pair(&flow, owner(flow.client.ip()), owner(flow.target.ip()));
                self.found(flow, pair, monotonic_now(), true);
            }
        }
    }

    /// Connections whose end was not told are ended: the queue was full.
    pub(super) fn compare(&mut self, now: Instant) {
        self.compare_at = now + COMPARE;
        match self.capture.direct_ends() {
            Ok(ends) => {
                let known: BTreeSet<_> = ends.into_iter().map(|(flow, _)| flow).collect();
                let Self { connections, pods, .. } = self;
                for flow in connections.compare(&known, |pair| !pods.has_left(pair)) {
                    self.ended(&flow, monotonic_now());
                }
            }
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "direct connections are not compared with the kernel's table");
            }
        }
        if let Err(error) = self.forget_leftovers() {
            tracing::warn!(error = %error_chain(&error), "what was dialled by connections that are over stays noted");
        }
    }

    /// Of connections whose end was not told, which virtual address they dialled is noted for ever: those that are over by
    /// now are forgotten.
    fn forget_leftovers(&mut self) -> Result<(), CaptureError> {
        let now = monotonic_now();
        let noted = self.capture.all_dialled()?;
        if noted.is_empty() {
            return Ok(());
        }
        let open: BTreeSet<_> =
            self.capture.direct_ends()?.into_iter().map(|(flow, _)| flow).collect();
        self.read_events();
        for flow in noted {
            if !open.contains(&flow) && !self.connections.contains(&flow) {
                self.capture.forget_dialled(&flow, now)?;
            }
        }
        Ok(())
    }

    /// Of pods that are captured no more the kernel tells nothing: what they have open is read from their own tables.
    pub(super) fn look_at_leaving(&mut self, now: Instant) {
        self.look_at_leaving = now + LOOK_AT_LEAVING;
        let Self { connections, pods, .. } = self;
        let mut gone = Vec::new();
        for (pod, leaving) in pods.leaving() {
            if connections.count_of(pod) == 0 {
                continue;
            }
            match Capture::sockets_of(leaving.sockets.netns.as_fd()) {
                Ok(sockets) => {
                    let both_ways = |(own, peer)| {
                        [
                            DirectFlow { client: own, target: peer },
                            DirectFlow { client: peer, target: own },
                        ]
                    };
                    let known = sockets.into_iter().flat_map(both_ways).collect();
                    let is_its = |pair: &Pair| pair.client == pod || pair.server == pod;
                    gone.extend(connections.compare(&known, is_its));
                }
                Err(error) => {
                    tracing::warn!(error = %error_chain(&error), pod = %leaving.sockets.uid, "what a pod that left has open is not known");
                }
            }
        }
        for flow in gone {
            self.ended(&flow, monotonic_now());
        }
    }
}

/// The kernel's counter of events for which the queue had no room.
const EVENTS_LOST: &str = "direct_events_lost";
