//! Which certificates are kept, by real pods' namespaces. Needs root.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use arc_swap::ArcSwap;
use mesh_authorize::PolicySet;
use mesh_enroll::{EnrollReply, PodSelector};
use mesh_identity::{CaConfig, CaCore};
use mesh_model::PodUid;
use mesh_resolve::{ResolveSettings, WorkloadIndex};

use super::*;
use crate::config::KeepKeys;
use crate::control::session::{ControllerConfig, Credential};
use crate::dataplane::{
    DataPlane, DataPlaneConfig, FlowEvent, FlowSink, HostResolver, KernelCapture, PodSockets,
    ResolveAnswer, Shared,
};
use crate::enrolment::tests::{IPS, Node, TestNetns, request, wanted};

/// A data plane that serves no pod asks nobody anything.
struct Nobody;

impl FlowSink for Nobody {
    fn report(&self, _event: FlowEvent) -> bool {
        true
    }
}

impl IdentityDesk for Nobody {
    fn want(&self, _id: &SpiffeId) {}
}

impl HostResolver for Nobody {
    fn resolve(&self, _pod: &PodUid, _hostname: &str, answer: ResolveAnswer) {
        answer(Ok(Vec::new()));
    }
}

impl KernelCapture for Nobody {
    fn orig_dst(&self, _cookie: u64, _client: SocketAddr) -> io::Result<Option<SocketAddr>> {
        Ok(None)
    }

    fn label(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn add_listener(
        &self,
        _pod: &PodSockets,
        _port: u16,
        _slot: u16,
        _listener: BorrowedFd<'_>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn switch_on(&self, _pod: &PodSockets, _slots: u16) -> io::Result<()> {
        Ok(())
    }
}

fn picture(ca: &CaCore) -> Arc<Picture> {
    let trust = TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), "").unwrap();
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::from_pointee(Snapshot {
            index: WorkloadIndex::default(),
            policies: PolicySet::default(),
            synced: true,
            settings: ResolveSettings::default(),
            trust: Arc::new(trust),
            svids: imbl::OrdMap::new(),
        }),
        flows: Arc::new(Nobody),
        identities: Arc::new(Nobody),
        resolver: Arc::new(Nobody),
    });
    let config = DataPlaneConfig { workers: 1, ..DataPlaneConfig::default() };
    let data_plane = DataPlane::start(config, Arc::clone(&shared), Arc::new(Nobody)).unwrap();
    Arc::new(Picture::new(shared, Arc::new(data_plane)))
}

/// Pods of one service account share a certificate, which is kept while any of them lives and forgotten afterwards.
#[tokio::test]
async fn an_identity_is_kept_while_any_pod_of_it_lives() {
    let now = SystemTime::now();
    let ca = CaCore::create("cluster.local", CaConfig::default(), now).unwrap();
    let picture = picture(&ca);
    let node = Node::new();
    let enroller = Arc::new(node.start());
    let pods = ["first", "second", "other"].map(|name| {
        let netns = TestNetns::with_addresses(&format!("id-{name}"));
        let request = request(name, &format!("c-{name}"), &netns, &IPS);
        let mut wanted = wanted();
        wanted.service_account = if name == "other" { "web" } else { "cart" }.to_owned();
        assert_eq!(enroller.enroll(&request, &wanted), EnrollReply::Ok);
        (request, netns)
    });
    let session = ControllerSession::new(ControllerConfig {
        address: http::Uri::from_static("https://192.0.2.1:15012"),
        root: "/none".into(),
        node: "n".to_owned(),
        credential: Credential::File("/none".into()),
    });
    let mut rotation = Rotation::new(
        session,
        Arc::clone(&picture),
        Arc::clone(&enroller),
        (KeepKeys::None, PathBuf::new()),
    );
    let id = |account: &str| SpiffeId::new("cluster.local", "shop", account).unwrap();
    rotation.look().await;
    let mut asked = rotation.commands();
    asked.sort();
    assert_eq!(asked, [id("cart"), id("web")], "one for each identity");
    for id in asked {
        let (key, pem) = csr(&id).unwrap();
        let chain = ca.sign(&pem, &id, LEAF_LIFE, now).unwrap();
        let answer = IssuedAnswer::check(&chain, &id, key, now).unwrap();
        rotation.answered((id, Ok(answer)));
    }
    let held = |rotation: &mut Rotation| -> Vec<SpiffeId> {
        assert!(rotation.commands().is_empty(), "nothing further is asked for");
        picture.snapshot().svids.keys().cloned().collect()
    };
    assert_eq!(held(&mut rotation), [id("cart"), id("web")]);
    let ends = |index: usize| {
        let pod = PodSelector::Uid(pods[index].0.pod.uid.clone());
        assert_eq!(enroller.unenroll(&pod, true, Instant::now()), EnrollReply::Ok);
    };
    ends(0);
    rotation.look().await;
    assert_eq!(held(&mut rotation), [id("cart"), id("web")], "another pod of it lives");
    ends(1);
    rotation.look().await;
    assert_eq!(held(&mut rotation), [id("web")]);
}
