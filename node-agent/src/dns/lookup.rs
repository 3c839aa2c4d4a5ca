//! Resolves host names of workloads without addresses, as the dialling pod would.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use mesh_model::PodUid;
use tokio::runtime::Handle;

use super::{DnsDesk, PodDns, exchange};
use crate::dataplane::{HostResolver, ResolveAnswer};

/// Looks names up for the data plane.
pub(crate) struct PodResolver {
    desk: Arc<DnsDesk>,
    runtime: Handle,
}

impl PodResolver {
    /// Lookups through the pods' resolvers.
    pub(crate) fn new(desk: Arc<DnsDesk>, runtime: Handle) -> Self {
        Self { desk, runtime }
    }
}

impl HostResolver for PodResolver {
    fn resolve(&self, pod: &PodUid, hostname: &str, answer: ResolveAnswer) {
        let desk = Arc::clone(&self.desk);
        let (pod, hostname) = (pod.clone(), hostname.to_owned());
        self.runtime.spawn(async move {
            let result = match desk.pod(&pod) {
                Some(pod) => lookup(&desk, &pod, &hostname).await,
                None => Err(io::Error::new(io::ErrorKind::NotFound, "the pod has no resolver")),
            };
            answer(result);
        });
    }
}

async fn lookup(desk: &DnsDesk, pod: &PodDns, hostname: &str) -> io::Result<Vec<IpAddr>> {
    let name = Name::from_ascii(hostname).map_err(io::Error::other)?;
    desk.meter.on_demand(desk.workload_of(pod).as_deref(), hostname);
    let (v4, v6) = tokio::join!(
        records(desk, pod, name.clone(), RecordType::A),
        records(desk, pod, name, RecordType::AAAA),
    );
    match (v4, v6) {
        (Err(error), Err(_)) => Err(error),
        (v4, v6) => {
            let mut addresses = v4.unwrap_or_default();
            addresses.extend(v6.unwrap_or_default());
            let usable =
                |ip: &IpAddr| pod.first_of_each_family().any(|own| own.is_ipv4() == ip.is_ipv4());
            addresses.retain(usable);
            Ok(addresses)
        }
    }
}

async fn records(
    desk: &DnsDesk,
    pod: &PodDns,
    name: Name,
    kind: RecordType,
) -> io::Result<Vec<IpAddr>> {
    let nameserver = pod.nameservers.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let resolver = pod
        .fallback((nameserver, 0).into())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the pod has no nameserver"))?;
    let mut query = Message::query();
    query.add_query(Query::query(name, kind));
    query.metadata.recursion_desired = true;
    let query = query.to_vec().map_err(io::Error::other)?;
    let mut answer = exchange::over_udp(desk, pod, resolver, &query).await?;
    let mut message = Message::from_vec(&answer).map_err(io::Error::other)?;
    if message.metadata.truncation {
        answer = exchange::over_tcp(desk, pod, resolver, &query).await?;
        message = Message::from_vec(&answer).map_err(io::Error::other)?;
    }
    let address = |data: &RData| data.ip_addr();
    Ok(message.answers.iter().filter_map(|record| address(&record.data)).collect())
}
