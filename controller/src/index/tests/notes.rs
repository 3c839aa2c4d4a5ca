use mesh_resolve::{IndexDelta, WorkloadIndex};

use super::*;

/// The notes, with addresses held as in the agents' picture.
fn notes_of(index: &Index, picture: &WorkloadIndex) -> Vec<String> {
    let holder = |network: &_, ip| Some(picture.workload_by_ip(network, ip)?.uid.clone());
    index.notes(holder).into_iter().map(|(object, text)| format!("{object}: {text}")).collect()
}

fn take(picture: &mut WorkloadIndex, delta: Delta) {
    let workloads = delta.workloads.iter().map(|one| Workload::clone(one)).collect();
    picture.apply(IndexDelta { workloads, ..IndexDelta::default() });
}

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop{more}}}\nspec: {{nodeName: n1, containers: []}}\n\
         status: {{phase: Running, podIP: {ip}}}\n"
    )
}

#[test]
fn pods_of_one_address_are_told_and_who_has_it() {
    let mut index = Index::new(IndexSettings::default());
    let mut picture = WorkloadIndex::default();
    take(&mut picture, index.apply(upserts(&pod("old", "10.1.0.5", ""))));
    take(&mut picture, index.apply(upserts(&pod("other", "10.1.0.6", ""))));
    assert_eq!(notes_of(&index, &picture), [""; 0]);
    take(&mut picture, index.apply(upserts(&pod("new", "10.1.0.5", ""))));
    let notes = notes_of(&index, &picture);
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(
        notes[0].starts_with("Pod shop/old: has the address 10.1.0.5, which Pod shop/new has too"),
        "{notes:?}"
    );
    // While an address changes hands, and of pods that have ended, it is as it should be.
    let leaving = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    take(&mut picture, index.apply(upserts(&pod("old", "10.1.0.5", leaving))));
    assert_eq!(notes_of(&index, &picture), [""; 0]);
    let ended = pod("old", "10.1.0.5", "").replace("Running", "Succeeded");
    take(&mut picture, index.apply(upserts(&ended)));
    assert_eq!(notes_of(&index, &picture), [""; 0]);
    let host = pod("old", "10.1.0.5", "").replace("spec: {", "spec: {hostNetwork: true, ");
    take(&mut picture, index.apply(upserts(&host)));
    assert_eq!(notes_of(&index, &picture), [""; 0]);
}

#[test]
fn an_entry_with_a_pods_or_services_address_is_told() {
    let entry = |name: &str, host: &str, ip: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{hosts: [{host}], addresses: [{ip}], ports: [{{number: 80, name: tcp, protocol: TCP}}], resolution: STATIC}}\n---\n"
        )
    };
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n\
                   spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}\n---\n";
    let mut index = Index::new(IndexSettings::default());
    let mut picture = WorkloadIndex::default();
    let manifests = [
        service.to_owned(),
        entry("good", "a.example", "10.200.0.1"),
        entry("range", "r.example", "10.1.0.0/16"),
        entry("more", "cart.shop.svc.cluster.local", "10.96.0.10"),
        entry("pods", "b.example", "10.1.0.5"),
        entry("services", "c.example", "10.96.0.10"),
        pod("cart-0", "10.1.0.5", ""),
    ]
    .concat();
    take(&mut picture, index.apply(upserts(&manifests)));
    let notes = notes_of(&index, &picture);
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[0].starts_with(
            "ServiceEntry shop/pods: the address 10.1.0.5 is that of Pod shop/cart-0, which has it"
        ),
        "{notes:?}"
    );
    assert!(
        notes[1].starts_with(
            "ServiceEntry shop/services: the address 10.96.0.10 is that of Service shop/cart too"
        ),
        "{notes:?}"
    );
}
