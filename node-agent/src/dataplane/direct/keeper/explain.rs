//! Whether a connection would go directly, for people.

use std::net::{IpAddr, SocketAddr};

use mesh_direct::{Judgement, Pair, Pod, Vip};

use super::super::DirectExplanation;
use super::super::judge::LocalPods;
use super::Keeper;

impl Keeper {
    pub(super) fn explain(&mut self, from: &str, to: &str, port: u16) -> Option<DirectExplanation> {
        let find = |pods: &LocalPods, name: &str| match name.parse::<IpAddr>() {
            Ok(address) => pods.owner(address.to_canonical()).map(|pod| (pod, Some(address))),
            Err(_name) => pods.named(name).map(|pod| (pod, None)),
        };
        let (client, dials_from) = find(&self.pods, from)?;
        let Some((server, dialled)) = find(&self.pods, to) else {
            let address = SocketAddr::new(to.parse::<IpAddr>().ok()?.to_canonical(), port);
            return self.explain_vip(&Vip { client, address });
        };
        let first = |pods: &LocalPods, pod: Pod, like: Option<IpAddr>| {
            let addresses = &pods.get(pod)?.sockets.addresses;
            let alike = |one: &&IpAddr| like.is_none_or(|like| like.is_ipv4() == one.is_ipv4());
            addresses.iter().find(alike).copied()
        };
        let target = match dialled {
            Some(address) => address.to_canonical(),
            None => first(&self.pods, server, dials_from)?,
        };
        let client_address = first(&self.pods, client, Some(target))?;
        let pair = Pair { client, client_address, server, target: SocketAddr::new(target, port) };
        let judged = self.ask(&pair);
        Some(DirectExplanation {
            direct: judged.judgement == Judgement::Grant,
            in_force: self.ledger.is_permitted(&pair),
            because: judged.because.clone().into_owned(),
            rule: judged.rule.as_ref().map(ToString::to_string),
        })
    }

    /// Of a virtual address; none when no service has it, or no pod of this node is an endpoint.
    fn explain_vip(&mut self, vip: &Vip) -> Option<DirectExplanation> {
        let spreading = self.bench().ask_vip(vip);
        let stays = |because: String, rule| {
            Some(DirectExplanation { direct: false, in_force: false, because, rule })
        };
        match &*spreading {
            Ok(pairs) => {
                for pair in pairs {
                    let judged = self.ask(pair);
                    if judged.judgement != Judgement::Grant {
                        let because = format!("endpoint {}: {}", pair.target, judged.because);
                        return stays(because, judged.rule.as_ref().map(ToString::to_string));
                    }
                }
                Some(DirectExplanation {
                    direct: true,
                    in_force: self.ledger.endpoints(vip).is_some(),
                    because: "all endpoints that count are captured here and policy allows each"
                        .to_owned(),
                    rule: None,
                })
            }
            Err(because) => {
                let is_here = self.bench().has_endpoint_here(vip);
                is_here.then(|| stays(because.clone().into_owned(), None)).flatten()
            }
        }
    }
}
