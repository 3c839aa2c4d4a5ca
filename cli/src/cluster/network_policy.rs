//! `culvert check` of a cluster: which NetworkPolicies stop the mesh, and which mean something else in it.
//!
//! Between pods of the mesh all TCP goes to port 15008 of the destination, from the client's own address. A CNI sees that
//! port and no other: a policy that admits 8080 alone stops it, and one that admits 15008 admits every port behind it.
//! Source: `NetworkPolicySpec` of `networking.k8s.io/v1`; rules of all policies that select a pod add up.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kubectl::{Kubectl, text};
use super::print;
use crate::arguments::Output;
use crate::failure::{Ending, Failure};
use crate::show::{self, Columns};

/// Where tunnels go.
const HBONE: u16 = 15008;

/// What is wrong with a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Effect {
    /// No tunnel arrives at, or leaves, pods that it selects.
    Stops,
    /// Its rules for ports do not hold between pods of the mesh.
    Widened,
}

/// A policy that an operator should look at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Finding {
    effect: Effect,
    policy: String,
    direction: Direction,
    pods: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Direction {
    Ingress,
    Egress,
}

#[derive(Debug, Deserialize)]
struct Policy {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    pod_selector: Selector,
    policy_types: Vec<String>,
    ingress: Vec<Rule>,
    egress: Vec<Rule>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Rule {
    ports: Vec<Port>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Port {
    protocol: Option<String>,
    port: Value,
    end_port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Selector {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<Expression>,
}

#[derive(Debug, Deserialize)]
struct Expression {
    key: String,
    operator: String,
    #[serde(default)]
    values: Vec<String>,
}

impl Selector {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let holds = |one: &Expression| {
            let value = labels.get(&one.key);
            let listed = value.is_some_and(|value| one.values.contains(value));
            match one.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                // One that is not known: looking at more pods than it selects hides nothing.
                _ => true,
            }
        };
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(holds)
    }
}

impl Port {
    /// True when the tunnels' port is among them.
    fn has_tunnels(&self) -> bool {
        if self.protocol.as_deref().is_some_and(|protocol| protocol != "TCP") {
            return false;
        }
        match self.port.as_u64() {
            Some(first) => {
                let last = self.end_port.map_or(first, u64::from);
                (first..=last).contains(&u64::from(HBONE))
            }
            // No port is every port; a name is a port of the application.
            None => self.port.is_null(),
        }
    }
}

impl Rule {
    fn admits_tunnels(&self) -> bool {
        self.ports.is_empty() || self.ports.iter().any(Port::has_tunnels)
    }

    /// True when it admits some ports of applications and not all.
    fn names_ports(&self) -> bool {
        self.ports.iter().any(|port| !port.has_tunnels())
    }
}

impl Policy {
    /// The rules of a direction; none when it says nothing about it.
    fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        let Spec { policy_types, ingress, egress, .. } = &self.spec;
        let named = |word: &str| policy_types.iter().any(|one| one == word);
        match direction {
            Direction::Ingress => (policy_types.is_empty() || named("Ingress")).then_some(ingress),
            Direction::Egress => {
                (named("Egress") || policy_types.is_empty() && !egress.is_empty()).then_some(egress)
            }
        }
        .map(Vec::as_slice)
    }

    fn name(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }
}

/// Looks at the cluster and prints. Ends with no when a policy stops the mesh.
pub(super) fn run(kubectl: &Kubectl, output: Output) -> Result<Ending, Failure> {
    let pods: Vec<Metadata> = super::overview::pods(kubectl)?
        .into_iter()
        .filter(|pod| pod.running && pod.wanted)
        .map(|pod| Metadata { name: pod.name, namespace: pod.namespace, ..Metadata::default() })
        .collect();
    let labels: BTreeMap<(String, String), BTreeMap<String, String>> = kubectl
        .list("pods", &[])?
        .iter()
        .map(|pod| {
            let meta = &pod["metadata"];
            let labels = serde_json::from_value(meta["labels"].clone()).unwrap_or_default();
            ((text(&meta["namespace"]), text(&meta["name"])), labels)
        })
        .collect();
    let pods: Vec<Metadata> = pods
        .into_iter()
        .map(|pod| {
            let at = (pod.namespace.clone(), pod.name.clone());
            Metadata { labels: labels.get(&at).cloned().unwrap_or_default(), ..pod }
        })
        .collect();
    let policies: Result<Vec<Policy>, _> =
        kubectl.list("networkpolicies", &[])?.into_iter().map(serde_json::from_value).collect();
    let policies = policies.map_err(|source| Failure::Unreadable { who: "cluster", source })?;
    let findings = judge(&policies, &pods);
    print(&findings, &render(&findings, pods.len()), output)?;
    let stops = findings.iter().any(|finding| finding.effect == Effect::Stops);
    Ok(if stops { Ending::No } else { Ending::Yes })
}

/// What to look at, the worst first.
fn judge(policies: &[Policy], pods: &[Metadata]) -> Vec<Finding> {
    let mut counts: BTreeMap<(Effect, String, Direction), BTreeSet<&str>> = BTreeMap::new();
    for pod in pods {
        for direction in [Direction::Ingress, Direction::Egress] {
            let selecting: Vec<(&Policy, &[Rule])> = policies
                .iter()
                .filter(|one| one.metadata.namespace == pod.namespace)
                .filter(|one| one.spec.pod_selector.matches(&pod.labels))
                .filter_map(|one| Some((one, one.rules(direction)?)))
                .collect();
            let admitted =
                selecting.iter().any(|(_, rules)| rules.iter().any(Rule::admits_tunnels));
            for (policy, rules) in selecting {
                let widened = rules.iter().any(Rule::names_ports);
                let effect = match (admitted, widened) {
                    (false, _) => Effect::Stops,
                    (true, true) => Effect::Widened,
                    (true, false) => continue,
                };
                let pods = counts.entry((effect, policy.name(), direction)).or_default();
                pods.insert(&pod.name);
            }
        }
    }
    let finding = |((effect, policy, direction), pods): (_, BTreeSet<&str>)| Finding {
        effect,
        policy,
        direction,
        pods: pods.len(),
    };
    counts.into_iter().map(finding).collect()
}

fn render(findings: &[Finding], pods: usize) -> String {
    if findings.is_empty() {
        let pods = show::count(pods, "pod");
        return format!("No NetworkPolicy stops the mesh ({pods} looked at).\n");
    }
    let mut columns = Columns::new(&["", "NETWORKPOLICY", "DIRECTION", ">PODS", "WHAT IT DOES"]);
    for finding in findings {
        let (level, what) = match finding.effect {
            Effect::Stops => {
                ("FAIL", "stops port 15008: add {port: 15008, protocol: TCP} to its rules")
            }
            Effect::Widened => (
                "warn",
                "its ports do not hold between pods of the mesh: write an AuthorizationPolicy",
            ),
        };
        let direction = match finding.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        columns.row([
            level.to_owned(),
            finding.policy.clone(),
            direction.to_owned(),
            finding.pods.to_string(),
            what.to_owned(),
        ]);
    }
    columns.render()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, app: &str) -> Metadata {
        let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        Metadata { name: name.into(), namespace: "shop".into(), labels }
    }

    fn check(specs: &[Value], expected: &[(Effect, &str, Direction, usize)]) {
        let policies: Vec<Policy> = specs
            .iter()
            .enumerate()
            .map(|(at, spec)| {
                let meta = json!({"name": format!("p{at}"), "namespace": "shop"});
                serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap()
            })
            .collect();
        let pods = [pod("web-1", "web"), pod("web-2", "web"), pod("db", "db")];
        let found = judge(&policies, &pods);
        let found: Vec<_> = found
            .iter()
            .map(|one| (one.effect, one.policy.as_str(), one.direction, one.pods))
            .collect();
        assert_eq!(found, expected, "{specs:#?}");
    }

    #[test]
    fn a_policy_that_admits_the_applications_port_alone_stops_tunnels() {
        use Direction::{Egress, Ingress};
        use Effect::{Stops, Widened};
        let web = json!({"matchLabels": {"app": "web"}});
        let ports = |ports: Value| json!({"podSelector": web, "ingress": [{"ports": ports}]});
        check(&[], &[]);
        check(&[ports(json!([{"port": 8080}]))], &[(Stops, "shop/p0", Ingress, 2)]);
        check(&[ports(json!([{"port": "http"}]))], &[(Stops, "shop/p0", Ingress, 2)]);
        check(&[ports(json!([{"port": 15008}]))], &[]);
        check(
            &[ports(json!([{"port": 15008, "protocol": "UDP"}]))],
            &[(Stops, "shop/p0", Ingress, 2)],
        );
        check(&[ports(json!([{"port": 15000, "endPort": 16000}]))], &[]);
        check(
            &[ports(json!([{"port": 15000, "endPort": 15007}]))],
            &[(Stops, "shop/p0", Ingress, 2)],
        );
        let both = json!([{"port": 8080}, {"port": 15008}]);
        check(&[ports(both)], &[(Widened, "shop/p0", Ingress, 2)]);
        // Rules add up: the second admits what the first would stop.
        let open = json!({"podSelector": {}, "ingress": [{}]});
        check(&[ports(json!([{"port": 8080}])), open], &[(Widened, "shop/p0", Ingress, 2)]);
        let deny = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        check(&[deny], &[(Stops, "shop/p0", Ingress, 3), (Stops, "shop/p0", Egress, 3)]);
        let dns = json!({"podSelector": web, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]});
        check(&[dns], &[(Stops, "shop/p0", Egress, 2)]);
        let not_web = json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}});
        check(&[not_web], &[(Stops, "shop/p0", Ingress, 1)]);
    }
}
