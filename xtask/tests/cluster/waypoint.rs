//! A waypoint that the controller deploys for a Gateway: requests are judged by it, nobody gets around it, and it goes with
//! its Gateway.

use std::path::Path;
use std::process::Command;

use crate::chart::Mesh;
use crate::support::eventually;

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
/// Selects whatever belongs to the Gateway.
const ITS: &str = "gateway.networking.k8s.io/gateway-name=waypoint";

/// Defines the Gateway API's kinds, as its own release does.
pub(crate) fn define(mesh: &Mesh) {
    let asked = Command::new(XTASK).args(["cluster", "definitions"]).output();
    let asked = asked.expect("xtask starts");
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let folder = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    for kind in ["gatewayclasses", "gateways"] {
        let file = Path::new(&folder).join(format!("gateway.networking.k8s.io_{kind}.yaml"));
        mesh.cluster.kubectl(&["apply", "--server-side", "-f", &file.display().to_string()]);
    }
    mesh.cluster.kubectl(&["wait", "--for=condition=Established", "--all", "crd", "--timeout=60s"]);
}

pub(crate) fn requests_are_judged(mesh: &Mesh) {
    assert_eq!(status(mesh, "POST"), "200", "without a waypoint methods are nobody's business");
    mesh.cluster.kubectl(&["apply", "-f", "tests/cluster/waypoint.yaml"]);
    for (object, condition) in
        [("gateway/waypoint", "Programmed"), ("gatewayclass/culvert-waypoint", "Accepted")]
    {
        let condition = format!("--for=condition={condition}");
        mesh.cluster.kubectl(&["wait", "-n", "mesh", object, &condition, "--timeout=60s"]);
    }
    let addresses = "jsonpath={.status.addresses[*].value}";
    let addresses = ["get", "gateway", "waypoint", "-n", "mesh", "-o", addresses];
    let addresses = mesh.cluster.kubectl(&addresses);
    assert!(addresses.starts_with("waypoint.mesh.svc.cluster.local 10.96."), "{addresses}");
    eventually("a waypoint on each node", || {
        let ready = "jsonpath={.status.readyReplicas}";
        let ready = ["get", "deployment", "waypoint", "-n", "mesh", "-o", ready];
        let ready = mesh.cluster.try_kubectl(&ready)?;
        if ready == "2" { Ok(()) } else { Err(ready) }
    });
    let nodes = ["get", "pods", "-n", "mesh", "-l", ITS, "-o", "jsonpath={..nodeName}"];
    let nodes = mesh.cluster.kubectl(&nodes);
    assert!(nodes.contains("node1") && nodes.contains("node2"), "{nodes}");

    mesh.cluster.kubectl(&["label", "namespace", "mesh", "istio.io/use-waypoint=waypoint"]);
    eventually("a request that the policy does not allow to be refused", || {
        let answer = curl(mesh, &["-i", "-X", "POST", "http://web/"])?;
        let named = answer.contains("403") && answer.contains("culvert-denied-by");
        if named { Ok(()) } else { Err(answer) }
    });
    assert_eq!(status(mesh, "GET"), "200", "one that it allows passes");
    assert_eq!(status(mesh, "DELETE"), "403");
    nobody_gets_around(mesh);
    it_goes_with_its_gateway(mesh);
}

/// By the pod's own address the waypoint is not asked, and so nobody gets in.
fn nobody_gets_around(mesh: &Mesh) {
    let address = ["get", "pod", "web", "-n", "mesh", "-o", "jsonpath={.status.podIP}"];
    let url = format!("http://{}:8080/", mesh.cluster.kubectl(&address));
    let answer = curl(mesh, &["-f", &url]);
    assert!(answer.is_err(), "past the waypoint: {answer:?}");
    eventually("the reason in an agent's log", || {
        let agents = "app.kubernetes.io/component=agent";
        let logs = ["logs", "-n", "culvert-system", "-l", agents, "--tail=-1"];
        let logs = mesh.cluster.try_kubectl(&logs)?;
        if logs.contains("not through the required waypoint") { Ok(()) } else { Err(logs) }
    });
}

fn it_goes_with_its_gateway(mesh: &Mesh) {
    mesh.cluster.kubectl(&["delete", "gateway", "waypoint", "-n", "mesh"]);
    eventually("everything of the Gateway to be gone", || {
        let kinds = "deployment,service,serviceaccount,poddisruptionbudget,configmap,pod";
        let left = ["get", kinds, "-n", "mesh", "-l", ITS, "-o", "name"];
        let left = mesh.cluster.try_kubectl(&left)?;
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    assert!(mesh.curl("client").is_err(), "who is bound to a waypoint that is gone is not open");
    // What only a waypoint can allow, nobody is allowed without one.
    mesh.cluster.kubectl(&["delete", "authorizationpolicy", "reads", "-n", "mesh"]);
    mesh.cluster.kubectl(&["label", "namespace", "mesh", "istio.io/use-waypoint-"]);
    eventually("the server without a waypoint", || mesh.curl("client").map(drop));
}

/// The status that the client gets for a request with this method.
fn status(mesh: &Mesh, method: &str) -> String {
    let ask = ["-o", "/dev/null", "-w", "%{http_code}", "-X", method, "http://web/"];
    curl(mesh, &ask).expect("it is answered")
}

fn curl(mesh: &Mesh, arguments: &[&str]) -> Result<String, String> {
    let exec = ["exec", "-n", "mesh", "client", "--", "curl", "-sSm", "5"];
    mesh.cluster.try_kubectl(&[&exec[..], arguments].concat())
}
