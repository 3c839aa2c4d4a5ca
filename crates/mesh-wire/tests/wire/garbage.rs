//! Bytes from outside: refused or converted, never a panic; and what is taken means the same when it is sent on.

use mesh_wire::pb::auth::IstioCertificateRequest;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use mesh_wire::pb::mesh::SavedState;
use mesh_wire::{
    DeltaClientState, DeltaServerState, Published, Resource, ResourceKind, certificate_request,
    impersonated_identity, node_name,
};
use proptest::prelude::*;
use prost::Message;

use crate::samples::Dice;

/// `bytes` with a few of them changed, cut out, doubled or cut off.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = dice.below(bytes.len());
        match dice.below(5) {
            0 => bytes[at] = dice.byte(),
            1 => bytes[at] ^= 1 << dice.below(8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, dice.byte()),
            _ => bytes.truncate(at),
        }
    }
}

fn damaged<M: Message + Default>(message: &M, dice: &mut Dice) -> M {
    let mut bytes = message.encode_to_vec();
    damage(&mut bytes, dice);
    M::decode(bytes.as_slice()).unwrap_or_default()
}

fn response(dice: &mut Dice) -> DeltaDiscoveryResponse {
    let kind = ResourceKind::ALL[dice.below(ResourceKind::ALL.len())];
    let mut resources = Vec::new();
    for _ in 0..dice.below(4) {
        let mut wire = Published::new(&dice.resource()).to_wire();
        if let Some(any) = wire.resource.as_mut().filter(|_| dice.below(2) == 0) {
            damage(&mut any.value, dice);
        }
        resources.push(wire);
    }
    DeltaDiscoveryResponse {
        resources,
        type_url: kind.type_url().to_owned(),
        removed_resources: (0..dice.below(3)).map(|_| dice.resource().name()).collect(),
        nonce: "1".to_owned(),
        ..Default::default()
    }
}

/// Random bytes, whole.
fn all(bytes: &[u8]) {
    for kind in ResourceKind::ALL {
        let resource =
            prost_types::Any { type_url: kind.type_url().to_owned(), value: bytes.to_vec() };
        let wire = mesh_wire::pb::discovery::Resource {
            name: "a/b".to_owned(),
            resource: Some(resource),
            ..Default::default()
        };
        drop(Resource::decode(kind, &wire));
    }
    if let Ok(node) = Node::decode(bytes) {
        let _name = node_name(&node);
    }
    if let Ok(request) = IstioCertificateRequest::decode(bytes) {
        drop(impersonated_identity(&request));
    }
    if let Ok(request) = DeltaDiscoveryRequest::decode(bytes) {
        drop(DeltaServerState::new(1).handle(request));
    }
    if let Ok(response) = DeltaDiscoveryResponse::decode(bytes) {
        drop(DeltaClientState::new(&ResourceKind::ALL).handle(response));
    }
    if let Ok(state) = SavedState::decode(bytes) {
        drop(DeltaClientState::new(&ResourceKind::ALL).restore(&state));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        all(&bytes);
    }

    #[test]
    fn what_is_taken_of_damaged_resources_survives_being_sent_on(seed: u64) {
        let mut dice = Dice(seed);
        let resource = dice.resource();
        let kind = resource.kind();
        let mut wire = Published::new(&resource).to_wire();
        damage(&mut wire.resource.as_mut().unwrap().value, &mut dice);
        if let Ok(taken) = Resource::decode(kind, &wire) {
            let again = Published::new(&taken).to_wire();
            prop_assert_eq!(Resource::decode(kind, &again), Ok(taken));
        }
    }

    #[test]
    fn conversations_of_damaged_messages(seed: u64) {
        let mut dice = Dice(seed);
        let mut client = DeltaClientState::new(&ResourceKind::ALL);
        let mut server = DeltaServerState::new(1);
        for request in client.start(&Node::default()) {
            let request = damaged(&request, &mut dice);
            drop(server.handle(request));
        }
        for _ in 0..4 {
            let response = response(&mut dice);
            let response =
                if dice.below(2) == 0 { damaged(&response, &mut dice) } else { response };
            let sent = response.resources.len();
            if let Ok((update, reply)) = client.handle(response) {
                prop_assert_eq!(update.resources.len() + update.rejected.len(), sent);
                prop_assert!(update.unreadable.len() <= update.rejected.len());
                prop_assert_eq!(reply.error_detail.is_some(), !update.rejected.is_empty());
                drop(server.handle(damaged(&reply, &mut dice)));
            }
        }
        let saved = client.save(|_, _| None);
        client.restore(&damaged(&saved, &mut dice));
    }

    #[test]
    fn certificate_requests_of_damaged_bytes(seed: u64) {
        let id = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let request =
            certificate_request("csr".to_owned(), &id, std::time::Duration::from_secs(9));
        drop(impersonated_identity(&damaged(&request, &mut Dice(seed))));
    }
}
