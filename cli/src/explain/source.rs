//! A service as the source of a connection: its workloads dial, one of them stands for all.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::question::Question;
use crate::admin::AdminClient;
use crate::failure::Failure;

#[derive(Debug, Deserialize)]
struct Dump {
    workloads: Vec<Workload>,
}

#[derive(Debug, Deserialize)]
struct Workload {
    uid: String,
    namespace: String,
    name: String,
    /// By `namespace/host`.
    services: BTreeMap<String, IgnoredAny>,
}

/// Puts a workload in place of a service that is named as the source, and says so.
///
/// # Errors
/// When the controller cannot be asked, or no workload belongs to the service.
pub(super) fn replace_service(
    question: &mut Question,
    controller: &AdminClient,
) -> Result<Option<String>, Failure> {
    let name = &question.from;
    if name.contains('/') || name.parse::<IpAddr>().is_ok() {
        return Ok(None);
    }
    let dump: Dump = controller.read(&controller.get("/config_dump")?)?;
    let mut own: Vec<&Workload> = dump.workloads.iter().filter(|one| one.is_of(name)).collect();
    own.sort_by_key(|one| (&one.namespace, &one.name));
    let Some(first) = own.first() else {
        return Err(Failure::Usage {
            problem: format!("no workload belongs to a service {name:?}"),
            remedy: "name the source as NAMESPACE/POD, SERVICE.NAMESPACE or an address; culvert \
                     config --of controller lists them"
                .to_owned(),
        });
    };
    let note = format!(
        "{name} has {}; asked for {}/{}",
        crate::show::count(own.len(), "workload"),
        first.namespace,
        first.name
    );
    question.from = first.uid.clone();
    Ok(Some(note))
}

impl Workload {
    /// True when it belongs to `service.namespace`, or to a service with that host name.
    fn is_of(&self, service: &str) -> bool {
        self.services.keys().any(|key| {
            let host = key.split_once('/').map_or(key.as_str(), |(_, host)| host);
            host == service
                || (service.contains('.')
                    && host.strip_prefix(service).is_some_and(|rest| {
                        rest.starts_with(".svc.")
                            || service.ends_with(".svc") && rest.starts_with('.')
                    }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_of_a_service_are_found() {
        let workload: Workload = serde_json::from_value(serde_json::json!({
            "uid": "Kubernetes//Pod/shop/web-1", "namespace": "shop", "name": "web-1",
            "services": { "shop/web.shop.svc.cluster.local": [], "shop/api.example.com": [] },
        }))
        .unwrap();
        for name in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "api.example.com"] {
            assert!(workload.is_of(name), "{name}");
        }
        for name in ["web", "web.sho", "shop", "eb.shop", "api.example"] {
            assert!(!workload.is_of(name), "{name}");
        }
    }
}
