//! A client that is not captured dials the destination itself, in plaintext.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_model::{Direction, LoadBalancingMode, Service, Workload};
use mesh_resolve::{Addressed, ResolveSettings, endpoints_at};

use super::capture::Capture;
use super::{Answer, Side, Stage, at_source, done, flow, inbound_stage};
use crate::mesh::Picture;

/// Endpoints that are judged; one more is only counted.
const MAX_JUDGED: usize = 1_000;

/// Who dials what.
pub(super) struct PlainDial<'a> {
    pub(super) picture: &'a Picture,
    pub(super) settings: &'a ResolveSettings,
    pub(super) source: &'a Workload,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
    pub(super) now: Instant,
}

impl PlainDial<'_> {
    /// The answer; `why` it is not captured.
    pub(super) fn answer(&self, why: &str) -> Answer {
        let index = &self.picture.index;
        let Self { source, target, .. } = self;
        match index.find_address(&source.network, target.ip(), &source.namespace) {
            Some(Addressed::Workload(local)) => match self.judge(&local, *target) {
                Ok(judged) => with_source(source, format!("{why}: it dials in plaintext"), judged),
                Err(left_out) => {
                    at_source(source, &format!("{why}: it dials in plaintext, and {left_out}"))
                }
            },
            Some(Addressed::Service(service))
                if service.load_balancing.mode != LoadBalancingMode::Passthrough =>
            {
                self.through_service(&service, why)
            }
            Some(Addressed::Service(_)) | None => self.on_its_own(why),
        }
    }

    fn on_its_own(&self, why: &str) -> Answer {
        at_source(self.source, &format!("{why}: its own network decides where this goes"))
    }

    /// The client's own network chooses the endpoint, so that each of them is judged.
    fn through_service(&self, service: &Service, why: &str) -> Answer {
        let index = &self.picture.index;
        let endpoints = endpoints_at(index, service, self.source, self.target);
        let (mut refused, mut allowed) = (Vec::new(), Vec::new());
        for (local, target) in endpoints.iter().take(MAX_JUDGED) {
            let judged = self.judge(local, *target).unwrap_or_else(|why| outside(*target, &why));
            if judged.allowed {
                allowed.push((local, judged))
            } else {
                refused.push((local, judged))
            }
        }
        let dialled =
            format!("{why}: its own network decides which endpoint of {} it reaches", service.key);
        let judged = refused.len() + allowed.len();
        let more = endpoints.len() - judged;
        let mut answer = match (refused.first(), allowed.first()) {
            (None, None) => {
                let mut answer = at_source(self.source, &dialled);
                let none =
                    format!("none is ready for port {} in the mesh's eyes", self.target.port());
                answer.warnings.push(none);
                answer
            }
            (Some((_, one)), None) | (None, Some((_, one))) => {
                with_source(self.source, dialled, one.clone())
            }
            (Some((local, denied)), Some((_, one))) => {
                let count = refused.len();
                let summary = format!(
                    "depends on the endpoint: {count} of {judged} refuse it, such as {} ({})",
                    local.uid, denied.summary
                );
                let mut stages = denied.stages.clone();
                stages.extend(one.stages.iter().cloned());
                let warnings = [&denied.warnings[..], &one.warnings].concat();
                let both = Answer { summary, stages, warnings, ..one.clone() };
                with_source(self.source, dialled, both)
            }
        };
        if more > 0 {
            answer.warnings.push(format!("{more} more endpoints were not judged"));
        }
        answer
    }

    /// What one workload makes of it.
    ///
    /// # Errors
    /// Why nothing is captured there.
    fn judge(&self, local: &Arc<Workload>, target: SocketAddr) -> Result<Answer, String> {
        let Self { picture, settings, source, client, now, .. } = *self;
        let mut warnings = Vec::new();
        match Capture::inbound(picture, local, source, client.ip(), target.port()) {
            Capture::Captured => {}
            Capture::Unconfirmed(why) => warnings.push(why),
            Capture::Not(why) | Capture::Inside(why) => return Err(why),
        }
        let inbound = flow(now, Direction::InboundPlaintext, client, target, local);
        let answer = inbound_stage(picture, settings, Vec::new(), &inbound, local, None, None);
        Ok(Answer { warnings, ..answer })
    }
}

fn outside(target: SocketAddr, why: &str) -> Answer {
    done(Vec::new(), &format!("reached in plaintext at {target}: {why}"))
}

fn with_source(source: &Workload, outcome: String, mut answer: Answer) -> Answer {
    let stage = Stage {
        side: Side::Source,
        workload: source.uid.to_string(),
        resolve: Vec::new(),
        authorize: None,
        outcome,
    };
    answer.stages.insert(0, stage);
    answer
}
