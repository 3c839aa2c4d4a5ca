//! What came of trying what the kernel has, and which fallback the agent uses.

use mesh_ebpf::{Attachments, CaptureError, CgroupOrder, GuardAttachment, Probes};
use mesh_model::error_chain;

use super::Finding;

const NEWER: &str =
    "use Linux 6.1 or later with BPF, cgroup2 and namespaces, such as that of Debian 12";

/// One finding for each thing that was tried.
pub(super) fn findings(probes: &Probes) -> Vec<Finding> {
    let mut findings =
        vec![needed("netns cookie", "namespaces have cookies", &probes.netns_cookie)];
    match &probes.programs {
        Ok(attachments) => {
            findings.push(Finding::ok("programs", "the kernel takes all of them"));
            findings.extend(attached(attachments));
        }
        Err(error) => findings.push(Finding::fail("programs", error_chain(error), NEWER)),
    }
    findings.push(match &probes.sock_destroy {
        Ok(()) => Finding::ok("SOCK_DESTROY", "sockets can be ended"),
        Err(error) => Finding::warn(
            "SOCK_DESTROY",
            format!("{}: pods of a node always talk through the agent", error_chain(error)),
            "use a kernel with CONFIG_INET_DIAG_DESTROY, or modprobe tcp_diag",
        ),
    });
    findings
}

fn attached(attachments: &Attachments) -> [Finding; 3] {
    let guard = match &attachments.guard {
        Ok(GuardAttachment::Tcx) => Finding::ok("guard", "by tcx"),
        Ok(GuardAttachment::Clsact) => Finding::warn(
            "guard",
            "no tcx: it falls back to clsact, which any tool with CAP_NET_ADMIN can remove",
            "use Linux 6.6 or later; until then the agent looks after it and puts it back",
        ),
        Err(error) => Finding::fail(
            "guard",
            format!("neither tcx nor clsact: {}", error_chain(error)),
            "use Linux 6.6 or later, or install the kernel module sch_ingress",
        ),
    };
    let order = match &attachments.cgroup_order {
        Ok(order @ (CgroupOrder::PreOrder | CgroupOrder::Adopted)) => {
            Finding::ok("cgroup order", order.to_string())
        }
        Ok(order @ CgroupOrder::Before) => {
            Finding::ok("cgroup order", format!("no preorder: {order} instead"))
        }
        Ok(order @ CgroupOrder::AttachOrder) => Finding::warn(
            "cgroup order",
            format!("neither preorder nor before: {order}"),
            "start the agent before other tools with connect hooks, such as a socket load balancer",
        ),
        Err(error) => Finding::fail("cgroup order", error_chain(error), NEWER),
    };
    let sk_lookup =
        needed("sk_lookup", "inbound connections can be steered", &attachments.sk_lookup);
    [guard, order, sk_lookup]
}

fn needed(name: &'static str, found: &str, tried: &Result<(), CaptureError>) -> Finding {
    match tried {
        Ok(()) => Finding::ok(name, found),
        Err(error) => Finding::fail(name, error_chain(error), NEWER),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Level;
    use super::*;

    fn lacks<T>() -> Result<T, CaptureError> {
        Err(CaptureError::Kernel { what: "trying", source: io::ErrorKind::Unsupported.into() })
    }

    fn levels(probes: &Probes) -> Vec<(&'static str, Level)> {
        findings(probes).iter().map(|finding| (finding.name, finding.level)).collect()
    }

    #[test]
    fn every_lack_and_every_fallback_is_named() {
        let whole = Probes {
            netns_cookie: Ok(()),
            sock_destroy: Ok(()),
            programs: Ok(Attachments {
                guard: Ok(GuardAttachment::Tcx),
                cgroup_order: Ok(CgroupOrder::PreOrder),
                sk_lookup: Ok(()),
            }),
        };
        assert!(findings(&whole).iter().all(|finding| finding.level == Level::Ok));
        let fallbacks = Probes {
            sock_destroy: lacks(),
            programs: Ok(Attachments {
                guard: Ok(GuardAttachment::Clsact),
                cgroup_order: Ok(CgroupOrder::AttachOrder),
                sk_lookup: Ok(()),
            }),
            ..whole
        };
        let expected = [
            ("netns cookie", Level::Ok),
            ("programs", Level::Ok),
            ("guard", Level::Warn),
            ("cgroup order", Level::Warn),
            ("sk_lookup", Level::Ok),
            ("SOCK_DESTROY", Level::Warn),
        ];
        assert_eq!(levels(&fallbacks), expected);
        assert!(
            findings(&fallbacks)
                .iter()
                .all(|one| one.remedy.is_empty() == (one.level == Level::Ok))
        );
        let nothing = Probes {
            netns_cookie: lacks(),
            sock_destroy: lacks(),
            programs: Ok(Attachments { guard: lacks(), cgroup_order: lacks(), sk_lookup: lacks() }),
        };
        let failed = levels(&nothing).iter().filter(|(_, level)| *level == Level::Fail).count();
        assert_eq!(failed, 4);
        let refused = Probes { programs: lacks(), ..nothing };
        assert!(levels(&refused).contains(&("programs", Level::Fail)));
    }
}
