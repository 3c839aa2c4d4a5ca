//! The two halves of the delta conversation against each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_authorize::{
    Action, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, UnreadablePolicy,
};
use mesh_model::{NamespacedHostname, Service, Workload};
use mesh_wire::pb::discovery::DeltaDiscoveryResponse;
use mesh_wire::pb::{discovery, security};
use mesh_wire::{
    DeltaClientState, DeltaServerState, NodeView, Published, Received, RemovedResource, Resource,
    ResourceKind, Update,
};
use proptest::prelude::*;
use prost::Message as _;

use crate::samples::Dice;

#[derive(Default)]
struct World(BTreeMap<Arc<str>, Published>);

impl NodeView for World {
    fn get(&self, kind: ResourceKind, name: &str) -> Option<&Published> {
        self.0.get(name).filter(|resource| resource.kind() == kind)
    }

    fn for_each(&self, kind: ResourceKind, show: &mut dyn FnMut(&Published)) {
        self.0.values().filter(|resource| resource.kind() == kind).for_each(show);
    }
}

fn resource(n: u8, variant: u8) -> Resource {
    if n.is_multiple_of(2) {
        let mut workload = Workload::named(&format!("c//Pod/ns/w{n}"), "ns", &format!("w{n}"));
        workload.capacity = variant.into();
        Resource::Workload(workload)
    } else {
        let mut service = Service::named("ns", &format!("s{n}.ns.svc"), "s");
        service.canonical = variant.is_multiple_of(2);
        Resource::Service(service)
    }
}

fn node() -> discovery::Node {
    discovery::Node::default()
}

fn world<'r>(resources: impl IntoIterator<Item = &'r Resource>) -> World {
    let published = resources.into_iter().map(Published::new);
    World(published.map(|published| (Arc::clone(published.name()), published)).collect())
}

fn policy(name: &str) -> Policy {
    let name: PolicyName = name.parse().unwrap();
    Policy {
        origin: PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            unreadable: None,
        },
        name,
        scope: PolicyScope::Namespace,
        action: Action::Deny,
        dry_run: false,
        rules: Vec::new(),
    }
}

/// A policy whose content was changed on the way.
fn changed(name: &str, change: impl FnOnce(&mut security::Authorization)) -> discovery::Resource {
    let mut wire = Published::new(&Resource::Policy(policy(name))).to_wire();
    let any = wire.resource.as_mut().unwrap();
    let mut content = security::Authorization::decode(any.value.as_slice()).unwrap();
    change(&mut content);
    any.value = content.encode_to_vec();
    wire
}

fn unreadable_action(name: &str) -> discovery::Resource {
    changed(name, |policy| policy.action = 9)
}

fn policies(resources: Vec<discovery::Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: ResourceKind::Authorization.type_url().to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        nonce: "n".to_owned(),
        ..Default::default()
    }
}

fn policy_client() -> DeltaClientState {
    DeltaClientState::new(&[ResourceKind::Authorization])
}

fn handle(client: &mut DeltaClientState, response: DeltaDiscoveryResponse) -> Update {
    client.handle(response).unwrap().0
}

fn claimed(client: &mut DeltaClientState) -> Vec<(String, String)> {
    client.start(&node()).remove(0).initial_resource_versions.into_iter().collect()
}

fn removal(name: &str) -> RemovedResource {
    RemovedResource::Policy(name.parse().unwrap())
}

#[test]
fn both_kinds_are_answered_even_when_empty_under_nonces_of_their_own() {
    let mut client = DeltaClientState::new(&ResourceKind::ISTIO);
    let mut server = DeltaServerState::new(1);
    for request in client.start(&node()) {
        server.handle(request).unwrap();
    }
    let mut nonces = BTreeSet::new();
    while let Some(response) = server.poll_response(&World::default()) {
        assert!(nonces.insert(response.nonce.clone()));
        let (_, ack) = client.handle(response).unwrap();
        assert!(matches!(server.handle(ack), Ok(Received::Acknowledged(_))));
    }
    assert_eq!(nonces.len(), 2);
    assert!(client.is_synced());
}

#[test]
fn a_bad_resource_is_refused_alone_and_what_went_while_away_is_removed() {
    let mut client = DeltaClientState::new(&[ResourceKind::Address]);
    let mut server = DeltaServerState::new(1);
    let world = world(&[resource(0, 1), resource(1, 1)]);
    for request in client.start(&node()) {
        server.handle(request).unwrap();
    }
    let mut response = server.poll_response(&world).unwrap();
    response.resources[0].name = "another".to_owned();
    let (update, nack) = client.handle(response).unwrap();
    assert_eq!((update.resources.len(), update.rejected.len()), (1, 1));
    assert!(nack.error_detail.is_some());
    assert!(matches!(server.handle(nack), Ok(Received::Refused { .. })));
    assert_eq!(server.poll_response(&world), None);

    let mut server = DeltaServerState::new(2);
    for request in client.start(&node()) {
        server.handle(request).unwrap();
    }
    let (update, _) = client.handle(server.poll_response(&World::default()).unwrap()).unwrap();
    let gone = NamespacedHostname::new("ns", "s1.ns.svc");
    assert_eq!(update.removed, [RemovedResource::Service(gone)]);
}

#[test]
fn of_a_refused_policy_is_told_whom_it_may_be_about() {
    use security::Scope;
    let scoped = |scope: Scope| {
        changed("shop/p", |policy| {
            policy.scope = scope.into();
            policy.action = 9;
        })
    };
    let mut undecodable = unreadable_action("shop/p");
    undecodable.resource.as_mut().unwrap().value = vec![0xff];
    let empty = discovery::Resource { name: "shop/p".to_owned(), ..Default::default() };
    let other_name = changed("shop/p", |policy| policy.namespace = "bank".to_owned());
    let other_type = {
        let mut wire = unreadable_action("shop/p");
        wire.resource.as_mut().unwrap().type_url = "x".to_owned();
        wire
    };
    for (wire, scope) in [
        (scoped(Scope::Global), Some(PolicyScope::Global)),
        (scoped(Scope::Namespace), Some(PolicyScope::Namespace)),
        (scoped(Scope::WorkloadSelector), Some(PolicyScope::Workload)),
        (changed("shop/p", |policy| policy.scope = 9), Some(PolicyScope::Global)),
        (undecodable, Some(PolicyScope::Global)),
        (empty, Some(PolicyScope::Global)),
        (other_name, Some(PolicyScope::Global)),
        (other_type, Some(PolicyScope::Global)),
        // Noted only, also when it is readable.
        (
            changed("shop/p", |policy| {
                policy.dry_run = true;
                policy.action = 9;
            }),
            None,
        ),
    ] {
        let mut client = policy_client();
        let update = handle(&mut client, policies(vec![wire.clone()], &[]));
        let told = update.unreadable.first().map(|policy| (policy.name.to_string(), policy.scope));
        assert_eq!(told, scope.map(|scope| ("shop/p".to_owned(), scope)), "{wire:?}");
        assert_eq!((update.resources.len(), update.rejected.len()), (0, 1));
    }
    let update = handle(&mut policy_client(), policies(vec![unreadable_action("shop/p")], &[]));
    let reason = update.rejected[0].error.to_string().into();
    let name = "shop/p".parse().unwrap();
    let expected = UnreadablePolicy { name, scope: PolicyScope::Namespace, reason };
    assert_eq!(update.unreadable, [expected]);
}

#[test]
fn an_unreadable_policy_ends_with_a_readable_one_or_its_removal() {
    let mut client = policy_client();
    let bad = || vec![unreadable_action("shop/p")];
    assert_eq!(handle(&mut client, policies(bad(), &[])).unreadable.len(), 1);
    // A name that is not claimed would never be removed; the version is none that could be skipped as held.
    assert_eq!(claimed(&mut client), [("shop/p".to_owned(), "unreadable".to_owned())]);
    let mut server = DeltaServerState::new(1);
    for request in client.start(&node()) {
        server.handle(request).unwrap();
    }
    let gone = server.poll_response(&World::default()).unwrap();
    assert_eq!(handle(&mut client, gone).removed, [removal("shop/p")]);
    assert_eq!(claimed(&mut client), []);

    handle(&mut client, policies(bad(), &[]));
    let good = Published::new(&Resource::Policy(policy("shop/p")));
    let update = handle(&mut client, policies(vec![good.to_wire()], &[]));
    assert_eq!((update.removed.len(), update.resources.len(), update.unreadable.len()), (0, 1, 0));
    let held = [("shop/p".to_owned(), good.version().to_string())];
    assert_eq!(claimed(&mut client), held);
    // The last good one stays, in force and claimed, when a newer one cannot be read.
    let update = handle(&mut client, policies(bad(), &[]));
    assert_eq!((update.rejected.len(), update.unreadable.len()), (1, 0));
    assert_eq!(claimed(&mut client), held);
    let update = handle(&mut client, policies(Vec::new(), &["shop/p"]));
    assert_eq!(update.removed, [removal("shop/p")]);

    // One that is to be noted only from now on.
    handle(&mut client, policies(bad(), &[]));
    let noted = changed("shop/p", |policy| {
        policy.dry_run = true;
        policy.action = 9;
    });
    let update = handle(&mut client, policies(vec![noted], &[]));
    assert_eq!((update.removed, update.unreadable), (vec![removal("shop/p")], Vec::new()));
}

#[test]
fn unreadable_policies_of_any_name_are_told_apart() {
    let names = ["", "/", "x", "/x", "a/b", "a/b/c", "a/", "//x"];
    let mut client = policy_client();
    let bad = names
        .iter()
        .map(|name| discovery::Resource { name: (*name).to_owned(), ..Default::default() });
    let update = handle(&mut client, policies(bad.collect(), &[]));
    let marked: BTreeSet<_> = update.unreadable.into_iter().map(|policy| policy.name).collect();
    assert_eq!(marked.len(), names.len());
    let update = handle(&mut client, policies(Vec::new(), &names));
    let lifted = marked.iter().cloned().map(RemovedResource::Policy);
    assert_eq!(update.removed.len(), marked.len());
    assert!(lifted.into_iter().all(|lifted| update.removed.contains(&lifted)));
}

#[test]
fn an_unreadable_policy_outlives_a_restart() {
    let mut client = policy_client();
    let update = handle(&mut client, policies(vec![unreadable_action("shop/p")], &[]));
    let state = client.save(|_, _| None);
    let mut restarted = policy_client();
    assert_eq!(restarted.restore(&state)[0].unreadable, update.unreadable);
    assert_eq!(claimed(&mut restarted), claimed(&mut client));
}

/// A connected pair that is in step, and the world it shows.
fn in_step(shown: &World) -> (DeltaClientState, DeltaServerState) {
    let mut client = DeltaClientState::new(&ResourceKind::ISTIO);
    let mut server = DeltaServerState::new(1);
    for request in client.start(&node()) {
        server.handle(request).unwrap();
    }
    while let Some(response) = server.poll_response(shown) {
        server.handle(client.handle(response).unwrap().1).unwrap();
    }
    (client, server)
}

fn kinds_sent(server: &mut DeltaServerState, shown: &World) -> Vec<(ResourceKind, usize, usize)> {
    std::iter::from_fn(|| server.poll_response(shown))
        .map(|response| {
            let kind = ResourceKind::from_type_url(&response.type_url).unwrap();
            (kind, response.resources.len(), response.removed_resources.len())
        })
        .collect()
}

#[test]
fn policies_come_before_the_workloads_that_list_them_and_leave_after() {
    let listed = Resource::Policy(policy("ns/p"));
    let without = Workload::named("c//Pod/ns/w", "ns", "w");
    let with = Workload { authorization_policies: vec!["ns/p".into()], ..without.clone() };
    let third = Resource::Workload(Workload { capacity: 7, ..with.clone() });
    let (without, with) = (Resource::Workload(without), Resource::Workload(with));
    let (policy_name, uid): (Arc<str>, Arc<str>) = ("ns/p".into(), with.name().into());

    let before = world([&without]);
    let (_, mut server) = in_step(&before);
    let after = world([&with, &listed]);
    server.changed(ResourceKind::Address, [&uid]);
    server.changed(ResourceKind::Authorization, [&policy_name]);
    let expected = [(ResourceKind::Authorization, 1, 0), (ResourceKind::Address, 1, 0)];
    assert_eq!(kinds_sent(&mut server, &after), expected);

    let (_, mut server) = in_step(&after);
    server.changed(ResourceKind::Authorization, [&policy_name]);
    server.changed(ResourceKind::Address, [&uid]);
    let expected = [(ResourceKind::Address, 1, 0), (ResourceKind::Authorization, 0, 1)];
    assert_eq!(kinds_sent(&mut server, &before), expected);

    // While the agent has not answered for workloads, a change of them waits, and the removal behind it.
    let (mut client, mut server) = in_step(&after);
    server.changed(ResourceKind::Address, [&uid]);
    let under_way = server.poll_response(&world([&third, &listed])).unwrap();
    server.changed(ResourceKind::Authorization, [&policy_name]);
    server.changed(ResourceKind::Address, [&uid]);
    assert_eq!(kinds_sent(&mut server, &before), []);
    server.handle(client.handle(under_way).unwrap().1).unwrap();
    assert_eq!(kinds_sent(&mut server, &before), expected);

    // Workloads that turn out unchanged hold nothing back.
    let (_, mut server) = in_step(&after);
    server.changed(ResourceKind::Authorization, [&policy_name]);
    server.changed(ResourceKind::Address, [&uid]);
    let removed = [(ResourceKind::Authorization, 0, 1)];
    assert_eq!(kinds_sent(&mut server, &world([&with])), removed);
}

#[test]
fn a_damaged_saved_state_is_refused_where_it_is_damaged() {
    let shown = world(&[resource(0, 1), resource(1, 1), Resource::Policy(policy("ns/p"))]);
    let (client, _) = in_step(&shown);
    let find = |kind, name: &str| Resource::decode(kind, &shown.get(kind, name)?.to_wire()).ok();
    let mut state = client.save(find);
    for response in &mut state.responses {
        for wire in &mut response.resources {
            if wire.name != "ns/s1.ns.svc" {
                wire.resource.as_mut().unwrap().value = vec![0xff];
            }
        }
    }
    let unknown = DeltaDiscoveryResponse { type_url: "x".to_owned(), ..Default::default() };
    state.responses.push(unknown);
    let mut restarted = DeltaClientState::new(&ResourceKind::ISTIO);
    let updates = restarted.restore(&state);
    let rejected: Vec<_> =
        updates.iter().flat_map(|update| &update.rejected).map(|one| one.name.as_str()).collect();
    assert_eq!(rejected, ["ns/p", "c//Pod/ns/w0"]);
    // A policy that was lost so is one that cannot be read.
    assert_eq!(updates.iter().map(|update| update.unreadable.len()).sum::<usize>(), 1);
    let held: Vec<_> = restarted.held(ResourceKind::Address).map(|(name, _)| name).collect();
    assert_eq!(held, ["ns/s1.ns.svc"]);
    assert!(!restarted.is_synced(), "only a controller makes it so");
}

proptest! {
    #[test]
    fn what_is_saved_is_restored(seed: u64) {
        let mut dice = Dice(seed);
        let resources: Vec<Resource> = (0..8).map(|_| dice.resource()).collect();
        let shown = world(&resources);
        let mut client = DeltaClientState::new(&ResourceKind::ALL);
        let mut server = DeltaServerState::new(1);
        for request in client.start(&node()) { server.handle(request).unwrap(); }
        let mut heard = Vec::new();
        while let Some(response) = server.poll_response(&shown) {
            let (update, ack) = client.handle(response).unwrap();
            heard.push(update);
            server.handle(ack).unwrap();
        }
        let state = client.save(|kind, name| {
            Resource::decode(kind, &shown.get(kind, name)?.to_wire()).ok()
        });
        let mut restarted = DeltaClientState::new(&ResourceKind::ALL);
        prop_assert_eq!(restarted.restore(&state), heard);
        for kind in ResourceKind::ALL {
            prop_assert!(restarted.held(kind).eq(client.held(kind)));
        }
        prop_assert_eq!(restarted.start(&node()), client.start(&node()));
    }

    #[test]
    fn the_client_ends_up_with_what_the_server_shows(
        steps in prop::collection::vec((0u8..8, 0u8..4, any::<bool>(), 0u8..10), 1..60)
    ) {
        let mut world = World::default();
        let mut client = DeltaClientState::new(&[ResourceKind::Address]);
        let mut streams = 0;
        let mut server = DeltaServerState::new(0);
        let mut connected = false;
        for (n, variant, present, event) in steps.into_iter().chain([(0, 0, true, 0)]) {
            if event == 9 {
                connected = false; // What is under way is lost.
            }
            let published = Published::new(&resource(n, variant));
            let name = Arc::clone(published.name());
            if present { world.0.insert(Arc::clone(&name), published); } else { world.0.remove(&name); }
            server.changed(ResourceKind::Address, [&name]);
            if !connected && event < 8 {
                streams += 1;
                server = DeltaServerState::new(streams);
                for request in client.start(&node()) { server.handle(request).unwrap(); }
                connected = true;
            }
            // Sometimes nothing is delivered for a while.
            if connected && event < 6 {
                while let Some(response) = server.poll_response(&world) {
                    let (_, ack) = client.handle(response).unwrap();
                    server.handle(ack).unwrap();
                }
            }
        }
        let held: Vec<_> = client.held(ResourceKind::Address).collect();
        let shown: Vec<_> = world.0.values().map(|p| (p.name().as_ref(), p.version().as_ref())).collect();
        prop_assert_eq!(held, shown);
    }
}
