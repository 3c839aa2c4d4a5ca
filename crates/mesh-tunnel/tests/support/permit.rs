//! Permits for tests, by the one way there is: a flow to an unknown destination, judged by no policies.

use std::sync::Arc;

use mesh_authorize::{Decision, Permit, PolicySet, authorize_egress};
use mesh_model::{ClientAddr, Direction, Flow, FlowId, OrigDst, PodUid, Workload};
use mesh_resolve::{ResolveSettings, ResolvedFlow, WorkloadIndex, resolve};

thread_local! {
    static RESOLVED: ResolvedFlow = resolved();
}

pub fn permit() -> Permit {
    let verdict = RESOLVED.with(|resolved| authorize_egress(&PolicySet::default(), resolved));
    match verdict.decision {
        Decision::Allow(permit) => permit,
        Decision::Deny(denial) => panic!("{denial:?}"),
    }
}

fn resolved() -> ResolvedFlow {
    let flow = Flow {
        id: FlowId(1),
        direction: Direction::Outbound,
        client: ClientAddr::new(([10, 0, 0, 1], 40_000).into()),
        orig_dst: OrigDst::new(([192, 0, 2, 1], 80).into()),
        pod: PodUid::new("client-pod"),
        accepted_at: super::epoch(),
    };
    let source = Arc::new(Workload::named("uid", "shop", "client"));
    resolve(&WorkloadIndex::default(), &ResolveSettings::default(), &flow, &source, 0)
        .expect("an unknown destination passes through")
}
