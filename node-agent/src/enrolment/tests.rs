//! Enrolment in real network namespaces, with the sockets and programs replaced by a list. Needs root.

mod captured;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_ebpf::PodSettings;
use mesh_enroll::{
    ContainerId, Enroll, EnrollReply, NetnsPath, PodName, PodPhase, PodRef, PodSelector, Refusal,
};
use mesh_model::PodUid;
use mesh_net::Netns;

use super::attachment::{AttachError, AttachedPod, PodAttachments, Remains};
use super::enroller::{Enroller, EnrollerConfig, SaidAddresses, WantedPod};
use super::namespace;
use super::reconcile::Adopted;
use crate::dataplane::Drain;

/// What a fake kernel captures.
#[derive(Debug, Default)]
pub(crate) struct FakeAttachments {
    pods: Mutex<BTreeMap<u64, AttachedPod>>,
    failing: Mutex<bool>,
    /// Pods of which some, not all, has been taken away.
    damaged: Mutex<BTreeSet<u64>>,
    /// A folder that is moved away by the next attachment.
    doomed: Mutex<Option<PathBuf>>,
    lingering: Mutex<bool>,
    drains: Mutex<Vec<Drain>>,
    /// Pods whose namespace exists without a name or a process.
    living: Mutex<BTreeSet<u64>>,
    /// Namespaces in which the agent's sockets were closed while capture stayed.
    closed: Mutex<Vec<u64>>,
    /// What was captured at any time, and is no more.
    released: Mutex<Vec<u64>>,
    /// Pods that were told as let go by an earlier process.
    left: Mutex<Vec<PodUid>>,
    /// How often all captured pods were asked for.
    walks: Mutex<usize>,
}

impl FakeAttachments {
    fn fail(&self, failing: bool) {
        *self.failing.lock().unwrap() = failing;
    }

    pub(crate) fn captures(&self, netns: &TestNetns) -> bool {
        self.pods.lock().unwrap().contains_key(&netns.cookie())
    }
}

impl PodAttachments for FakeAttachments {
    fn attach(&self, pod: &AttachedPod) -> Result<(), AttachError> {
        if *self.failing.lock().unwrap() {
            return Err(AttachError {
                what: "attaching fails on purpose",
                remedy: "",
                retryable: true,
                source: "test".into(),
            });
        }
        self.pods.lock().unwrap().insert(pod.netns.cookie(), pod.clone());
        self.damaged.lock().unwrap().remove(&pod.netns.cookie());
        if let Some(folder) = self.doomed.lock().unwrap().take() {
            std::fs::rename(&folder, folder.with_extension("away")).unwrap();
        }
        Ok(())
    }

    fn detach(&self, _uid: &PodUid, cookie: u64, drain: Drain) -> Result<(), AttachError> {
        if self.pods.lock().unwrap().remove(&cookie).is_some() {
            self.released.lock().unwrap().push(cookie);
        }
        self.drains.lock().unwrap().push(drain);
        Ok(())
    }

    fn close(&self, _uid: &PodUid, cookie: u64) -> Result<(), AttachError> {
        self.closed.lock().unwrap().push(cookie);
        Ok(())
    }

    fn remains(&self, cookie: u64) -> Result<Remains, AttachError> {
        if !self.pods.lock().unwrap().contains_key(&cookie) {
            return Ok(Remains::Nothing);
        }
        let lives = self.living.lock().unwrap().contains(&cookie);
        Ok(if lives { Remains::OfLiving } else { Remains::OfUnknown })
    }

    fn left(&self, pod: &AttachedPod) {
        self.left.lock().unwrap().push(pod.pod.uid.clone());
    }

    fn lingers(&self, _uid: &PodUid, _cookie: u64) -> bool {
        *self.lingering.lock().unwrap()
    }

    fn captured(&self) -> Result<BTreeSet<u64>, AttachError> {
        *self.walks.lock().unwrap() += 1;
        Ok(self.pods.lock().unwrap().keys().copied().collect())
    }

    fn whole(&self) -> Result<BTreeSet<u64>, AttachError> {
        let captured = self.captured()?;
        Ok(captured.difference(&self.damaged.lock().unwrap()).copied().collect())
    }

    fn is_whole(&self, cookie: u64) -> Result<bool, AttachError> {
        let damaged = self.damaged.lock().unwrap().contains(&cookie);
        Ok(!damaged && self.pods.lock().unwrap().contains_key(&cookie))
    }
}

/// A network namespace with one interface, gone when dropped.
pub(crate) struct TestNetns(String);

impl TestNetns {
    fn new(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "needs root: run the tests with sudo");
        let name = format!("cvagent-{name}-{}", std::process::id());
        let _leftover = Command::new("ip").args(["netns", "del", &name]).output();
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link add eth0 type veth peer name eth1"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set eth1 up"));
        Self(name)
    }

    pub(crate) fn with_addresses(name: &str) -> Self {
        let netns = Self::new(name);
        netns.ip("addr add 10.9.0.2/24 dev eth0");
        netns.ip("addr add fd09::2/64 dev eth0 nodad");
        netns
    }

    fn ip(&self, args: &str) -> String {
        ip(&format!("-n {} {args}", self.0))
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn cookie(&self) -> u64 {
        Netns::open(&self.path()).unwrap().cookie()
    }

    fn sysctl(&self, name: &str) -> String {
        let path = Path::new("/proc/sys").join(name);
        let read = || std::fs::read_to_string(path).unwrap().trim().to_owned();
        Netns::open(&self.path()).unwrap().enter(read).unwrap()
    }

    fn set_sysctl(&self, name: &str, value: &str) {
        let path = Path::new("/proc/sys").join(name);
        Netns::open(&self.path()).unwrap().enter(|| std::fs::write(path, value)).unwrap().unwrap();
    }

    /// Everything that enrolment changes, as text.
    fn traces(&self) -> String {
        let mut traces = self.ip("rule show") + &self.ip("-6 rule show");
        traces += &self.ip("route show table all type local table 133");
        traces += &self.ip("-6 route show table 133");
        for name in ["tcp_fwmark_accept", "fwmark_reflect", "tcp_tw_reuse", "tcp_migrate_req"] {
            traces += &format!("{name}={}\n", self.sysctl(&format!("net/ipv4/{name}")));
        }
        traces + "v6 " + &self.sysctl("net/ipv6/fwmark_reflect")
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        let _gone = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    // A table without routes does not exist, which iproute2 calls an error.
    assert!(output.status.success() || errors.contains("FIB table"), "ip {args}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// One node: a folder and a fake kernel that outlive the agent.
pub(crate) struct Node {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) kernel: Arc<FakeAttachments>,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), kernel: Arc::default() }
    }

    pub(crate) fn start(&self) -> Enroller {
        self.start_in_boot("boot-1")
    }

    fn start_in_boot(&self, boot_id: &str) -> Enroller {
        let config = EnrollerConfig {
            file: self.file(),
            boot_id: boot_id.to_owned(),
            host_cookie: namespace::host_cookie().unwrap(),
            excluded: BTreeSet::from(["kube-system".to_owned()]),
        };
        let kernel: Arc<FakeAttachments> = Arc::clone(&self.kernel);
        Enroller::open(config, kernel).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("enrolled.json")
    }
}

pub(crate) fn request(name: &str, container: &str, netns: &TestNetns, ips: &[&str]) -> Enroll {
    Enroll {
        pod: PodRef::new(&format!("uid-{name}"), "shop", name, "").unwrap(),
        netns: NetnsPath::new(&netns.path().to_string_lossy()).unwrap(),
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        container_id: ContainerId::new(container).unwrap(),
        nameservers: BTreeSet::new(),
        live: false,
        patience_ms: None,
    }
}

pub(crate) fn wanted() -> WantedPod {
    WantedPod {
        uid: String::new(),
        captured: true,
        service_account: "cart".to_owned(),
        settings: PodSettings::default(),
        said: SaidAddresses::default(),
    }
}

fn wanted_list(captured: bool) -> BTreeMap<PodName, WantedPod> {
    let wanted = WantedPod { captured, ..wanted() };
    BTreeMap::from([(PodName::new("shop", "cart").unwrap(), wanted)])
}

pub(crate) fn refusal(reply: EnrollReply) -> Refusal {
    match reply {
        EnrollReply::Refused(refusal) => refusal,
        EnrollReply::Ok | EnrollReply::Excluded { .. } | EnrollReply::Pods { .. } => {
            panic!("not refused: {reply:?}")
        }
    }
}

fn phase(enroller: &Enroller) -> Option<PodPhase> {
    enroller.list().first().map(|pod| pod.phase)
}

pub(crate) const IPS: [&str; 2] = ["10.9.0.2", "fd09::2"];

#[test]
fn a_pod_enters_and_leaves_without_a_trace() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("trace"));
    let before = netns.traces();
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    assert!(node.kernel.captures(&netns));
    assert_ne!(netns.traces(), before);
    assert!(netns.ip("rule show").contains("50:\tfrom all fwmark 0x539 lookup 133"));
    assert!(netns.ip("-6 rule show").contains("50:\tfrom all fwmark 0x539 lookup 133"));
    let check = PodSelector::Uid(request.pod.uid.clone());
    assert_eq!(enroller.check(&check), EnrollReply::Ok);

    let now = Instant::now();
    assert_eq!(enroller.unenroll(&check, false, now), EnrollReply::Ok);
    assert_eq!(phase(&enroller), Some(PodPhase::Draining));
    assert_ne!(netns.traces(), before, "its last connections still need the routes");
    enroller.tick(now + Duration::from_secs(6));
    assert_eq!(netns.traces(), before);
    assert_eq!(phase(&enroller), Some(PodPhase::Excluded));
    assert!(!node.kernel.captures(&netns));
}

#[test]
fn enrolling_again_changes_nothing_and_keeps_the_originals() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("again"));
    netns.set_sysctl("net/ipv4/tcp_tw_reuse", "0");
    let before = netns.traces();
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    for _ in 0..3 {
        assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    }
    assert_eq!(enroller.list().len(), 1);
    assert!(enroller.remove_all().is_empty());
    assert_eq!(netns.traces(), before);
}

#[test]
fn a_failed_step_is_rolled_back() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("rollback"));
    let before = netns.traces();
    let enroller = node.start();
    node.kernel.fail(true);
    let refused = refusal(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()));
    assert!(refused.retryable);
    assert!(refused.reason.contains("on purpose: test"), "{}", refused.reason);
    assert_eq!(netns.traces(), before);
    assert!(enroller.list().is_empty());
    node.kernel.fail(false);
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
}

#[test]
fn a_full_disk_refuses_the_pod() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("disk"));
    let before = netns.traces();
    let enroller = node.start();
    // The folder is gone: as good as full, and root cannot be kept out otherwise.
    std::fs::remove_dir(node.folder.path()).unwrap();
    let refused = refusal(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()));
    assert!(refused.retryable && refused.remedy.contains("state folder"));
    assert_eq!(netns.traces(), before);
    assert!(!node.kernel.captures(&netns));
}

/// The runtime asks again for a pod that is captured, and the disk is full by then: the pod stays captured.
#[test]
fn a_full_disk_opens_no_pod_that_is_captured() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("second"));
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let enrolled = netns.traces();
    // The first write succeeds, the one after the attachment does not.
    *node.kernel.doomed.lock().unwrap() = Some(node.folder.path().to_owned());
    let refused = refusal(enroller.enroll(&request, &wanted()));
    std::fs::rename(node.folder.path().with_extension("away"), node.folder.path()).unwrap();
    assert!(refused.retryable && refused.remedy.contains("state folder"), "{}", refused.reason);
    assert!(node.kernel.captures(&netns), "captured before, captured after");
    assert_eq!(netns.traces(), enrolled);
    assert_eq!(phase(&enroller), Some(PodPhase::Enrolled));
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
}

#[test]
fn namespaces_that_are_not_the_pods_are_refused() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("foreign"));
    let enroller = node.start();
    let check = |request: &Enroll, text: &str, retryable: bool| {
        let refused = refusal(enroller.enroll(request, &wanted()));
        assert!(refused.reason.contains(text), "{}", refused.reason);
        assert_eq!(refused.retryable, retryable, "{}", refused.reason);
    };
    check(&request("cart", "c1", &netns, &["10.9.0.3"]), "does not hold 10.9.0.3", false);
    let mut host = request("cart", "c1", &netns, &[]);
    host.netns = NetnsPath::new("/proc/self/ns/net").unwrap();
    check(&host, "node's own", false);
    host.netns = NetnsPath::new("/run/netns/cvagent-none").unwrap();
    check(&host, "cannot open", true);
    host.netns = NetnsPath::new("/etc/hostname").unwrap();
    check(&host, "cannot open", true);
    let bare = TestNetns::new("bare");
    check(&request("cart", "c1", &bare, &[]), "no address yet", true);
    assert!(enroller.list().is_empty());
    let first = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&first, &wanted()), EnrollReply::Ok);
    check(&request("other", "c2", &netns, &IPS), "that of pod shop/cart", false);
}

#[test]
fn a_namespace_without_ipv6_gets_no_ipv6_rules() {
    let (node, netns) = (Node::new(), TestNetns::new("v4only"));
    netns.set_sysctl("net/ipv6/conf/all/disable_ipv6", "1");
    netns.ip("addr add 10.9.0.2/24 dev eth0");
    let before = netns.traces();
    let enroller = node.start();
    assert_eq!(
        enroller.enroll(&request("cart", "c1", &netns, &["10.9.0.2"]), &wanted()),
        EnrollReply::Ok
    );
    assert!(!netns.ip("-6 rule show").contains("lookup 133"));
    assert!(enroller.remove_all().is_empty());
    assert_eq!(netns.traces(), before);
}

#[test]
fn ipv6_only_pods_are_enrolled() {
    let (node, netns) = (Node::new(), TestNetns::new("v6only"));
    netns.ip("addr add fd09::2/64 dev eth0 nodad");
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &[]), &wanted()), EnrollReply::Ok);
    let attached = node.kernel.pods.lock().unwrap()[&netns.cookie()].clone();
    assert_eq!(attached.addresses, BTreeSet::from(["fd09::2".parse().unwrap()]));
    assert_eq!(attached.pod.service_account, "cart");
}

/// A CNI plugin may tell of one family only. What else the namespace has is not the pod's for the guard, and that is told.
#[test]
fn addresses_that_the_cni_result_lacks_are_named() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("lacks"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    assert_eq!(enroller.list()[0].detail, "", "link-local ones are everybody's");
    let fewer = request("cart", "c1", &netns, &IPS[..1]);
    for _ in 0..2 {
        assert_eq!(enroller.enroll(&fewer, &wanted()), EnrollReply::Ok);
        let listed = &enroller.list()[0];
        let told = "not captured, and its TCP dropped: fd09::2 (not in the CNI result)";
        assert_eq!((listed.phase, listed.detail.as_str()), (PodPhase::Enrolled, told));
        let captured = node.kernel.pods.lock().unwrap()[&netns.cookie()].addresses.clone();
        assert_eq!(captured, [IPS[0].parse().unwrap()].into());
    }
    // After a restart it is told again, and a whole result ends it.
    drop(enroller);
    let enroller = node.start();
    assert_eq!(enroller.adopt(&wanted_list(true), Instant::now()).enrolled, 1);
    assert!(enroller.list()[0].detail.contains("fd09::2"));
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    assert_eq!(enroller.list()[0].detail, "");
}

/// A second failure finds the pod waiting for its next try: it is captured all the same.
#[test]
fn a_repair_that_fails_again_and_again_opens_nothing() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("twice"));
    let first = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    assert_eq!(first.enroll(&request, &wanted()), EnrollReply::Ok);
    drop(first);
    node.kernel.fail(true);
    let second = node.start();
    let now = Instant::now();
    assert_eq!(second.adopt(&BTreeMap::new(), now).pending, 1);
    second.tick(now + Duration::from_secs(60));
    assert!(node.kernel.captures(&netns), "by a tick");
    assert!(refusal(second.enroll(&request, &wanted())).reason.contains("on purpose"));
    assert!(node.kernel.captures(&netns), "by a request");
    assert_eq!(phase(&second), Some(PodPhase::Pending));
    assert!(node.kernel.released.lock().unwrap().is_empty());
}

#[test]
fn addresses_are_compared_with_what_the_controller_says() {
    let (node, netns, mate) =
        (Node::new(), TestNetns::with_addresses("said"), TestNetns::with_addresses("mate"));
    let enroller = node.start();
    let mut said = wanted();
    said.said.own = BTreeSet::from(["10.9.0.77".parse().unwrap()]);
    let mut by_hand = request("cart", "c1", &netns, &[]);
    by_hand.live = true;
    let refused = refusal(enroller.enroll(&by_hand, &said));
    for part in ["uid uid-cart has", "10.9.0.77", "10.9.0.2"] {
        assert!(refused.reason.contains(part), "{}", refused.reason);
    }
    // A runtime's new sandbox has other addresses than the controller knows yet.
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &said), EnrollReply::Ok);
    // But not those of a pod that is captured and lives.
    let mut stolen = wanted();
    let owner = PodName::new("shop", "cart").unwrap();
    stolen.said.of_others = BTreeMap::from([("10.9.0.2".parse().unwrap(), owner)]);
    let thief = request("thief", "c2", &mate, &IPS);
    let refused = refusal(enroller.enroll(&thief, &stolen));
    let expected = "10.9.0.2 is the address of shop/cart, which is enrolled in netns ";
    assert!(refused.retryable && refused.reason.starts_with(expected), "{}", refused.reason);
    drop(netns);
    assert_eq!(enroller.enroll(&thief, &stolen), EnrollReply::Ok);
}

/// Two pods of one name: what is said of the one is not done to the other.
#[test]
fn pods_of_one_name_are_told_apart_by_their_uids() {
    let (node, old, new) =
        (Node::new(), TestNetns::with_addresses("name1"), TestNetns::with_addresses("name2"));
    let enroller = node.start();
    let now = Instant::now();
    let (ending, mut coming) =
        (request("cart", "c1", &old, &IPS), request("cart", "c2", &new, &IPS));
    coming.pod = PodRef::new("uid-next", "shop", "cart", "").unwrap();
    assert_eq!(enroller.enroll(&ending, &wanted()), EnrollReply::Ok);
    let word = |captured: bool| {
        let wanted = WantedPod { uid: "uid-next".to_owned(), captured, ..wanted() };
        BTreeMap::from([(PodName::new("shop", "cart").unwrap(), wanted)])
    };
    enroller.configure(&word(false), now);
    assert!(node.kernel.captures(&old), "the word is about the next pod of its name");
    assert_eq!(enroller.missing(&word(true)).len(), 1, "which nobody has told of");
    assert_eq!(enroller.enroll(&coming, &wanted()), EnrollReply::Ok);
    assert!(enroller.missing(&word(true)).is_empty());
    let by_name = PodSelector::Name(coming.pod.name.clone());
    let refused = refusal(enroller.unenroll(&by_name, false, now));
    assert_eq!(refused.reason, "several pods are called shop/cart: uid-cart, uid-next");
    assert!(refused.remedy.contains("--uid"), "{}", refused.remedy);
    assert!(node.kernel.captures(&old) && node.kernel.captures(&new));
    let by_uid = PodSelector::Uid(ending.pod.uid.clone());
    assert_eq!(enroller.unenroll(&by_uid, false, now), EnrollReply::Ok);
    assert!(!node.kernel.captures(&old) && node.kernel.captures(&new));
}

#[test]
fn a_restart_adopts_what_is_captured_and_forgets_what_is_gone() {
    let (node, stays) = (Node::new(), TestNetns::with_addresses("stays"));
    let goes = TestNetns::with_addresses("goes");
    let before = stays.traces();
    let first = node.start();
    assert_eq!(first.enroll(&request("cart", "c1", &stays, &IPS), &wanted()), EnrollReply::Ok);
    assert_eq!(first.enroll(&request("gone", "c2", &goes, &IPS), &wanted()), EnrollReply::Ok);
    drop(first);
    let cookie = goes.cookie();
    // The fake kernel holds a descriptor of the namespace, as real pins do not.
    let held = node.kernel.pods.lock().unwrap().remove(&cookie).unwrap();
    drop(goes);
    node.kernel.pods.lock().unwrap().insert(cookie, held);
    let second = node.start();
    let adopted = second.adopt(&wanted_list(true), Instant::now());
    assert_eq!(adopted, Adopted { enrolled: 1, pending: 0, gone: 1, orphans: 0 });
    assert!(node.kernel.captures(&stays));
    assert_eq!(node.kernel.pods.lock().unwrap().len(), 1);
    assert!(second.remove_all().is_empty());
    assert_eq!(stays.traces(), before, "originals outlive the first process");
}

#[test]
fn a_pod_that_cannot_be_adopted_stays_captured_and_is_tried_again() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("later"));
    let first = node.start();
    assert_eq!(first.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    drop(first);
    node.kernel.fail(true);
    let second = node.start();
    let now = Instant::now();
    let adopted = second.adopt(&BTreeMap::new(), now);
    assert_eq!(adopted.pending, 1);
    assert!(node.kernel.captures(&netns), "closed, never open");
    assert!(second.tick(now).is_some());
    assert_eq!(phase(&second), Some(PodPhase::Pending));
    node.kernel.fail(false);
    second.tick(now + Duration::from_secs(60));
    assert_eq!(phase(&second), Some(PodPhase::Enrolled));
}

#[test]
fn after_a_reboot_an_operators_pod_is_captured_in_its_new_namespace() {
    let node = Node::new();
    let netns = TestNetns::with_addresses("reboot");
    let mut live = request("cart", "c1", &netns, &IPS);
    live.live = true;
    let first = node.start();
    assert_eq!(first.enroll(&live, &wanted()), EnrollReply::Ok);
    drop(first);
    node.kernel.pods.lock().unwrap().clear();
    drop(netns);
    let netns = TestNetns::with_addresses("reboot");
    let second = node.start_in_boot("boot-2");
    assert_eq!(second.adopt(&wanted_list(true), Instant::now()).enrolled, 1);
    assert!(node.kernel.captures(&netns));
}

#[test]
fn a_damaged_list_leaves_its_pods_closed() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("damaged"));
    let first = node.start();
    assert_eq!(first.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    drop(first);
    std::fs::write(node.file(), b"{\"version\":1,").unwrap();
    let second = node.start();
    let adopted = second.adopt(&wanted_list(true), Instant::now());
    assert_eq!(adopted, Adopted { enrolled: 0, pending: 0, gone: 0, orphans: 1 });
    assert!(node.kernel.captures(&netns));
    assert!(node.folder.path().join("enrolled.json.unusable").exists());
    let again = second.enroll(&request("cart", "c1", &netns, &IPS), &wanted());
    assert_eq!(again, EnrollReply::Ok);
}

#[test]
fn labels_take_running_pods_in_and_out() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("label"));
    let before = netns.traces();
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    let now = Instant::now();
    assert!(matches!(enroller.exclude(&request, "not labelled"), EnrollReply::Excluded { .. }));
    assert_eq!(netns.traces(), before);
    enroller.configure(&wanted_list(true), now);
    assert_eq!(phase(&enroller), Some(PodPhase::Enrolled));
    enroller.configure(&wanted_list(false), now);
    assert_eq!(phase(&enroller), Some(PodPhase::Draining));
    enroller.configure(&wanted_list(true), now);
    assert_eq!(phase(&enroller), Some(PodPhase::Enrolled), "back before it had drained");
    enroller.configure(&wanted_list(false), now);
    enroller.tick(now + Duration::from_secs(6));
    assert_eq!(netns.traces(), before);
    enroller.configure(&BTreeMap::new(), now);
    assert_eq!(phase(&enroller), Some(PodPhase::Excluded));
}

/// A pod that leaves the mesh and lives on keeps its connections, however long they last, and what they need.
#[test]
fn a_pod_that_leaves_is_restored_when_its_last_connection_has_ended() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("linger"));
    let before = netns.traces();
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    let now = Instant::now();
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let enrolled = netns.traces();
    *node.kernel.lingering.lock().unwrap() = true;
    enroller.configure(&wanted_list(false), now);
    assert!(!node.kernel.captures(&netns));
    enroller.tick(now + Duration::from_secs(24 * 3600));
    assert_eq!(*node.kernel.drains.lock().unwrap(), [Drain::WhenOver]);
    assert_eq!((phase(&enroller), netns.traces()), (Some(PodPhase::Draining), enrolled));
    // Neither does a restart of the agent end them, where they were handed over.
    drop(enroller);
    let enroller = node.start();
    assert_eq!(enroller.adopt(&wanted_list(false), now), Adopted::default());
    enroller.tick(now + Duration::from_secs(60));
    assert_eq!(*node.kernel.drains.lock().unwrap(), [Drain::WhenOver, Drain::WhenOver]);
    assert_eq!(node.kernel.left.lock().unwrap().len(), 1, "the next process is not told of it");
    assert_eq!(phase(&enroller), Some(PodPhase::Draining));
    *node.kernel.lingering.lock().unwrap() = false;
    enroller.tick(now + Duration::from_secs(120));
    assert_eq!((phase(&enroller), netns.traces()), (Some(PodPhase::Excluded), before));
}

#[test]
fn an_operators_word_outlasts_the_label() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("operator"));
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    let now = Instant::now();
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let pod = PodSelector::Name(request.pod.name.clone());
    assert_eq!(enroller.unenroll(&pod, false, now), EnrollReply::Ok);
    enroller.configure(&wanted_list(true), now);
    assert_eq!(phase(&enroller), Some(PodPhase::Draining));
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    assert_eq!(phase(&enroller), Some(PodPhase::Enrolled));
}

#[test]
fn changed_settings_reach_the_kernel() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("settings"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    let mut list = wanted_list(true);
    for wanted in list.values_mut() {
        wanted.settings.probe_ports.insert(8080);
    }
    enroller.configure(&list, Instant::now());
    let attached = node.kernel.pods.lock().unwrap()[&netns.cookie()].clone();
    assert!(attached.settings.probe_ports.contains(&8080));
}

#[test]
fn what_a_pod_undoes_is_noticed_and_repaired() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("undo"));
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let check = PodSelector::Container(request.container_id.clone());
    netns.set_sysctl("net/ipv4/fwmark_reflect", "0");
    assert!(refusal(enroller.check(&check)).reason.contains("fwmark_reflect"));
    assert_eq!(enroller.repair(), 1);
    assert_eq!(enroller.check(&check), EnrollReply::Ok);
    node.kernel.pods.lock().unwrap().clear();
    assert!(refusal(enroller.check(&check)).reason.contains("does not capture"));
    assert_eq!(enroller.repair(), 1);
    assert_eq!(enroller.repair(), 0);
    node.kernel.damaged.lock().unwrap().insert(netns.cookie());
    assert!(refusal(enroller.check(&check)).reason.contains("does not capture all"));
    assert_eq!(enroller.repair(), 1);
    assert_eq!(enroller.repair(), 0);
}

#[test]
fn deleted_routes_and_rules_are_repaired() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("routes"));
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let enrolled = netns.traces();
    let check = PodSelector::Container(request.container_id.clone());
    for damage in [
        "rule del pref 50",
        "-6 rule del pref 50",
        "route flush table 133",
        "-6 route flush table 133",
        "link set lo down",
    ] {
        netns.ip(damage);
        assert!(refusal(enroller.check(&check)).reason.contains("marked packets"), "{damage}");
        assert_eq!(enroller.repair(), 1, "{damage}");
        assert_eq!(netns.traces(), enrolled, "{damage}");
        assert_eq!(enroller.repair(), 0, "{damage}");
    }
}

#[test]
fn a_round_of_repairs_walks_the_kernels_tables_once() {
    let node = Node::new();
    let spaces: Vec<TestNetns> =
        (0..4).map(|number| TestNetns::with_addresses(&format!("walk{number}"))).collect();
    let enroller = node.start();
    for (number, netns) in spaces.iter().enumerate() {
        let request = request(&format!("pod-{number}"), &format!("c{number}"), netns, &IPS);
        assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    }
    *node.kernel.walks.lock().unwrap() = 0;
    assert_eq!(enroller.repair(), 0);
    assert_eq!(*node.kernel.walks.lock().unwrap(), 1);
}

#[test]
fn collection_takes_only_what_is_neither_valid_nor_there() {
    let (node, a, b, c) = (
        Node::new(),
        TestNetns::with_addresses("gca"),
        TestNetns::with_addresses("gcb"),
        TestNetns::with_addresses("gcc"),
    );
    let enroller = node.start();
    let mut by_hand = request("c", "c3", &c, &IPS);
    by_hand.live = true;
    for request in [request("a", "c1", &a, &IPS), request("b", "c2", &b, &IPS), by_hand] {
        assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    }
    // The list of another network: none of these is in it.
    assert_eq!(enroller.collect(&BTreeSet::new()), EnrollReply::Ok);
    assert!([&a, &b, &c].iter().all(|netns| node.kernel.captures(netns)));
    let gone = b.cookie();
    drop(b);
    let valid = BTreeSet::from([ContainerId::new("c1").unwrap()]);
    assert_eq!(enroller.collect(&valid), EnrollReply::Ok);
    assert!(node.kernel.captures(&a) && node.kernel.captures(&c));
    assert!(!node.kernel.pods.lock().unwrap().contains_key(&gone));
}

/// A namespace that the CNI plugin leaves alone is not taken in from behind.
#[test]
fn running_pods_of_excluded_namespaces_are_not_looked_for() {
    let enroller = Node::new().start();
    let named = |namespace: &str| {
        let wanted = WantedPod { uid: "u".to_owned(), ..wanted() };
        (PodName::new(namespace, "cart").unwrap(), wanted)
    };
    let wanted = BTreeMap::from([named("shop"), named("kube-system")]);
    let missing: Vec<String> = enroller.missing(&wanted).keys().map(ToString::to_string).collect();
    assert_eq!(missing, ["shop/cart"]);
}

#[test]
fn a_vanished_namespace_is_forgotten() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("vanish"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    drop(netns);
    enroller.tick(Instant::now());
    assert!(enroller.list().is_empty());
    assert!(node.kernel.pods.lock().unwrap().is_empty());
}

#[test]
fn many_at_once_are_all_enrolled() {
    let node = Node::new();
    let spaces: Vec<TestNetns> =
        (0..8).map(|number| TestNetns::with_addresses(&format!("many{number}"))).collect();
    let enroller = node.start();
    std::thread::scope(|scope| {
        for (number, netns) in spaces.iter().enumerate() {
            let enroller = &enroller;
            scope.spawn(move || {
                let request = request(&format!("pod-{number}"), &format!("c{number}"), netns, &IPS);
                for _ in 0..3 {
                    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
                }
            });
        }
    });
    assert_eq!(enroller.list().len(), 8);
    assert_eq!(node.start().adopt(&BTreeMap::new(), Instant::now()).enrolled, 8);
}
