//! What is sent is what arrives.

use mesh_wire::pb::discovery;
use mesh_wire::{Published, Resource, certificate_request, impersonated_identity};
use proptest::prelude::*;
use prost::Message as _;

use crate::samples::Dice;

/// As the other side reads it from the bytes of a response.
fn sent(resource: &Resource) -> discovery::Resource {
    let bytes = Published::new(resource).to_wire().encode_to_vec();
    discovery::Resource::decode(bytes.as_slice()).unwrap()
}

fn check(resource: &Resource) -> Result<(), TestCaseError> {
    let wire = sent(resource);
    let arrived = Resource::decode(resource.kind(), &wire);
    prop_assert_eq!(arrived.as_ref(), Ok(resource));
    let again = Published::new(resource);
    prop_assert_eq!(&wire.version, again.version().as_ref());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn workloads(seed: u64) {
        check(&Resource::Workload(Dice(seed).workload()))?;
    }

    #[test]
    fn services(seed: u64) {
        check(&Resource::Service(Dice(seed).service()))?;
    }

    #[test]
    fn policies(seed: u64) {
        check(&Resource::Policy(Dice(seed).policy()))?;
    }

    #[test]
    fn mesh_settings(seed: u64) {
        check(&Resource::Mesh(Dice(seed).mesh()))?;
    }

    #[test]
    fn pod_settings(seed: u64) {
        check(&Resource::Pod(Dice(seed).pod()))?;
    }

    #[test]
    fn different_resources_have_different_versions(seed: u64) {
        let mut dice = Dice(seed);
        let (one, other) = (dice.resource(), dice.resource());
        let same = Published::new(&one).version() == Published::new(&other).version();
        // The version is of the content; an empty list of one kind looks like one of another.
        prop_assert!(!same || one == other || one.kind() != other.kind());
    }
}

#[test]
fn certificate_requests() {
    let id = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let mut request = certificate_request("csr".to_owned(), &id, std::time::Duration::from_secs(9));
    assert_eq!((request.csr.as_str(), request.validity_duration), ("csr", 9));
    assert_eq!(impersonated_identity(&request), Ok(Some(id)));
    let fields = &mut request.metadata.as_mut().unwrap().fields;
    for value in fields.values_mut() {
        *value = prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(1.0)) };
    }
    assert!(impersonated_identity(&request).is_err(), "not a text");
    request.metadata = None;
    assert_eq!(impersonated_identity(&request), Ok(None));
}
