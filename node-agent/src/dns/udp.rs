//! Queries over UDP.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Instant;

use mesh_dns::{DnsDecision, ResolverScope, Transport};
use tokio::net::UdpSocket;

use super::{DnsDesk, PodDns, count, exchange};

/// Largest datagram there is: what is handed on is handed on whole.
const MAX_QUERY_BYTES: usize = 65_535;

/// Serves one socket for as long as its pod has a resolver.
pub(super) async fn serve(desk: Arc<DnsDesk>, pod: Weak<PodDns>, socket: Arc<UdpSocket>) {
    let stops = pod.upgrade().map(|pod| (pod.stop.clone(), pod.taking.clone()));
    let Some((stop, taking)) = stops else { return };
    loop {
        tokio::select! {
            ready = socket.readable() => {
                if let Err(error) = ready {
                    tracing::warn!(%error, "a pod's resolver socket failed");
                    return;
                }
            }
            () = stop.cancelled() => return,
            () = taking.cancelled() => return,
        }
        let Some(pod) = pod.upgrade() else { return };
        let (query, client) = match receive(&socket) {
            Ok(received) => received,
            // Errors of earlier answers (a client that is gone) show here too.
            Err(_would_block_or_of_a_client) => continue,
        };
        if !pod.addresses.contains(&client.ip().to_canonical()) {
            // The resolver is the pod's own; to others it would be an open one.
            count("foreign");
            continue;
        }
        let Ok(slot) = Arc::clone(&pod.queries).try_acquire_owned() else {
            count("refused");
            continue;
        };
        let (desk, socket) = (Arc::clone(&desk), Arc::clone(&socket));
        tokio::spawn(async move {
            if let Some(answer) = answer(&desk, &pod, &query, client).await
                && let Err(error) = socket.send_to(&answer, client).await
            {
                tracing::debug!(%error, "an answer was not sent");
            }
            drop(slot);
        });
    }
}

/// A query, read into a buffer that lives only while there is one.
fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut query = Vec::with_capacity(MAX_QUERY_BYTES);
    let (_length, client) = socket.try_recv_buf_from(&mut query)?;
    query.shrink_to_fit();
    Ok((query, client))
}

async fn answer(desk: &DnsDesk, pod: &PodDns, query: &[u8], client: SocketAddr) -> Option<Vec<u8>> {
    let (decision, counted) = desk.decide(pod, query, Transport::Udp);
    match decision {
        DnsDecision::Reply(answer) => {
            count("answered");
            Some(answer)
        }
        DnsDecision::Refuse(_why, answer) => {
            count("refused");
            answer
        }
        DnsDecision::Forward => {
            let Some(resolver) = desk.resolver_of(pod, client) else {
                count("failed");
                return mesh_dns::server_failure(query);
            };
            let scope: ResolverScope = resolver.to_string().into();
            let kept = pod.cache().find(&scope, query, Transport::Udp, Instant::now());
            if let Some(answer) = kept {
                count("cached");
                return Some(answer);
            }
            counted.forwarded();
            let asked = Instant::now();
            match exchange::over_udp(desk, pod, resolver, query).await {
                Ok(answer) => {
                    count("forwarded");
                    counted.answered(asked.elapsed());
                    pod.cache().store(&scope, query, &answer, Instant::now());
                    Some(answer)
                }
                // As without the mesh: a resolver that is silent is met with silence, and the client asks again. Where
                // nobody is, the client hears of it at once, as it would from its own socket.
                Err(error) => {
                    count("failed");
                    counted.failed();
                    tracing::debug!(%error, "a resolver did not answer");
                    if error.kind() == io::ErrorKind::TimedOut {
                        return None;
                    }
                    mesh_dns::server_failure(query)
                }
            }
        }
    }
}
