//! What is refused when it is written, and that the chart with every option is what an API server takes.

use std::fs;

use crate::chart::Mesh;
use crate::support::eventually;

/// What each object of `tests/cluster/impossible.yaml` is refused with.
const REFUSALS: &[(&str, &str)] = &[
    ("action", "spec.action: MAYBE is not known"),
    ("both", "given together with targetRefs"),
    ("target", "spec.targetRefs: use Service"),
    ("nothing", "without rules matches nothing"),
    ("address", "neither an IP address nor a CIDR"),
    ("port", "use numbers from 1 to 65535"),
    ("mode", "spec.mtls.mode: not known"),
    ("level", "needs a selector"),
];

pub(crate) fn what_cannot_be_is_refused_at_once(mesh: &Mesh) {
    let try_it = |file: &str| mesh.cluster.try_kubectl(&["apply", "--dry-run=server", "-f", file]);
    // A policy on policies holds a moment after it was made.
    eventually("every refusal", || {
        let complaint = try_it("tests/cluster/impossible.yaml").expect_err("it is refused");
        let missing = REFUSALS.iter().find(|(name, refusal)| {
            let mut lines = complaint.split("Error from server");
            !lines.any(|line| line.contains(&format!("\"{name}\"")) && line.contains(refusal))
        });
        match missing {
            None if complaint.contains("configmap/not-ours created") => Ok(()),
            None => Err(format!("too much is refused: {complaint}")),
            Some((name, _)) => Err(format!("{name} is not: {complaint}")),
        }
    });
    try_it("tests/cluster/possible.yaml").expect("what can be is let in");
    let label = ["label", "namespace", "mesh", "--overwrite", "--dry-run=server"];
    let label =
        mesh.cluster.try_kubectl(&[&label[..], &["culvert.dev/dataplane-mode=yes"]].concat());
    assert!(label.expect_err("it is refused").contains("use ambient or none"));
    the_controller_keeps_to_gateways(mesh);
    every_option_renders(mesh);
    // From here on what cannot be read is the controller's to report.
    for policy in ["authorizationpolicies", "peerauthentications"] {
        let binding = format!("validatingadmissionpolicybinding/culvert-{policy}");
        mesh.cluster.kubectl(&["delete", &binding]);
    }
    eventually("nothing to be refused any more", || {
        mesh.cluster
            .try_kubectl(&["apply", "--dry-run=server", "-f", "tests/cluster/broken-policy.yaml"])
            .map(drop)
    });
}

/// It may deploy waypoints; with its account nothing else can be changed by it.
fn the_controller_keeps_to_gateways(mesh: &Mesh) {
    let account = "--as=system:serviceaccount:culvert-system:culvert-controller";
    let create = ["create", "deployment", "other", "-n", "mesh", "--image=other:1"];
    let patch = ["label", "service", "web", "-n", "mesh", "other=label"];
    for command in [&create[..], &patch[..]] {
        let refused = mesh.cluster.try_kubectl(&[command, &["--dry-run=server", account]].concat());
        let complaint = refused.expect_err("it is refused");
        assert!(complaint.contains("belongs to a Gateway"), "{complaint}");
    }
    let secrets = mesh.cluster.try_kubectl(&["get", "secrets", "-A", account]);
    assert!(secrets.expect_err("it is refused").contains("forbidden"));
}

/// The chart with everything switched on, field by field.
fn every_option_renders(mesh: &Mesh) {
    let options = [
        "admissionPolicies.enabled=true",
        "monitoring.podMonitor.enabled=true",
        "monitoring.serviceMonitor.enabled=true",
        "controller.podDisruptionBudget.enabled=true",
        "ca.secretName=authority",
        "ca.crlConfigMap=lists",
        "networkPolicy.nodeCidrs={10.0.0.0/24}",
        "waypoints.namespaces={culvert-system}",
        "mesh.podCidrs={10.244.0.0/16}",
        "agent.compat={missing-policy,foreign-authority}",
        "agent.waypoints=preferred",
        "agent.workers=2",
        "image.pullSecrets={registry}",
        "profile=secure",
    ];
    let mut template =
        vec!["helm", "template", "culvert", "charts/culvert", "-n", "culvert-system"];
    // Without a cluster to ask.
    template.extend(["--kube-version", "1.34.4"]);
    template.extend(["--api-versions", "gateway.networking.k8s.io/v1/GatewayClass"]);
    template.extend(options.iter().flat_map(|option| ["--set", option]));
    let rendered = mesh.cluster.try_exec(&template).expect("the chart renders");
    for kind in ["PodMonitor", "ServiceMonitor", "ValidatingAdmissionPolicy", "GatewayClass"] {
        assert!(rendered.contains(&format!("kind: {kind}\n")), "no {kind}");
    }
    let file = mesh.scratch.path().join("rendered.yaml");
    fs::write(&file, rendered).expect("our own file");
    let file = file.display().to_string();
    let apply = ["apply", "-n", "culvert-system", "--dry-run=server", "--validate=strict"];
    mesh.cluster.kubectl(&[&apply[..], &["-f", &file]].concat());
    for wrong in ["agent.waypoints=maybe", "waypoints.replicas=0", "ca.warnBefore=soon"] {
        let refused = mesh.cluster.try_exec(&[&template[..], &["--set", wrong]].concat());
        assert!(refused.is_err(), "{wrong} is accepted");
    }
}
