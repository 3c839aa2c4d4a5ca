//! A namespace that is captured is let go when it is gone, and not before.

use super::*;

#[test]
fn a_new_sandbox_of_a_pod_leaves_the_old_one_captured_until_it_is_deleted() {
    let (node, old, new) =
        (Node::new(), TestNetns::with_addresses("old"), TestNetns::with_addresses("new"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &old, &IPS), &wanted()), EnrollReply::Ok);
    assert_eq!(enroller.enroll(&request("cart", "c2", &new, &IPS), &wanted()), EnrollReply::Ok);
    assert!(node.kernel.captures(&old) && node.kernel.captures(&new), "the old one may live on");
    assert_eq!(*node.kernel.closed.lock().unwrap(), [old.cookie()]);
    let listed: Vec<PodPhase> = enroller.list_all().iter().map(|pod| pod.phase).collect();
    assert_eq!(listed, [PodPhase::Enrolled, PodPhase::Closed]);
    enroller.tick(Instant::now());
    // Neither does a restart let it go.
    drop(enroller);
    let enroller = node.start();
    let adopted = enroller.adopt(&wanted_list(true), Instant::now());
    assert_eq!(adopted, Adopted { enrolled: 1, pending: 0, gone: 0, orphans: 0 });
    assert!(node.kernel.captures(&old) && node.kernel.released.lock().unwrap().is_empty());
    let late = PodSelector::Container(ContainerId::new("c1").unwrap());
    let now = Instant::now() + Duration::from_secs(3600);
    assert_eq!(enroller.unenroll(&late, true, now), EnrollReply::Ok);
    enroller.tick(now);
    assert!(node.kernel.captures(&old), "it has a name yet, by which it can be entered");
    let cookie = old.cookie();
    drop(old);
    // Deleted again: it is looked at without waiting for its next turn.
    assert_eq!(enroller.unenroll(&late, true, now), EnrollReply::Ok);
    enroller.tick(now);
    assert!(!node.kernel.pods.lock().unwrap().contains_key(&cookie) && node.kernel.captures(&new));
    let proper = PodSelector::Container(ContainerId::new("c2").unwrap());
    assert_eq!(enroller.unenroll(&proper, true, now), EnrollReply::Ok);
    assert!(node.kernel.captures(&new) && enroller.list().is_empty());
}

/// A runtime deletes a pod whose processes have all ended. Whoever holds its namespace can enter it all the same.
#[test]
fn a_deleted_pod_stays_captured_until_its_namespace_is_gone() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("held"));
    let enroller = node.start();
    let cart = request("cart", "c1", &netns, &IPS);
    assert_eq!(enroller.enroll(&cart, &wanted()), EnrollReply::Ok);
    let container = PodSelector::Container(cart.container_id.clone());
    let now = Instant::now();
    for _ in 0..3 {
        assert_eq!(enroller.unenroll(&container, true, now), EnrollReply::Ok);
        assert!(node.kernel.captures(&netns) && enroller.list().is_empty());
        assert_eq!(enroller.list_all()[0].phase, PodPhase::Closed);
        assert_eq!(*node.kernel.closed.lock().unwrap(), [netns.cookie()], "once");
        enroller.tick(now);
    }
    let cookie = netns.cookie();
    let captured = || node.kernel.pods.lock().unwrap().contains_key(&cookie);
    // Only a descriptor is left of it, as the kernel knows by what is attached.
    node.kernel.living.lock().unwrap().insert(cookie);
    drop(netns);
    enroller.tick(now + Duration::from_secs(60));
    drop(enroller);
    let enroller = node.start();
    assert_eq!(enroller.adopt(&wanted_list(true), now).orphans, 0);
    assert!(captured() && enroller.list_all().len() == 1);
    node.kernel.living.lock().unwrap().clear();
    enroller.tick(now + Duration::from_secs(60));
    assert!(!captured() && enroller.list_all().is_empty());
    assert_eq!(enroller.unenroll(&container, true, now), EnrollReply::Ok);
    // One that was not captured is no more than forgotten.
    let other = TestNetns::with_addresses("plain");
    let plain = request("web", "c2", &other, &IPS);
    enroller.exclude(&plain, "not in the mesh");
    let container = PodSelector::Container(plain.container_id);
    assert_eq!(enroller.unenroll(&container, true, now), EnrollReply::Ok);
    assert!(enroller.list_all().is_empty());
}

/// Whoever names a pod's uid with another namespace lets nothing out: an operator is refused, while the old one lives.
#[test]
fn a_uid_that_is_captured_elsewhere_is_refused() {
    let (node, old, other) =
        (Node::new(), TestNetns::with_addresses("first"), TestNetns::with_addresses("other"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &old, &IPS), &wanted()), EnrollReply::Ok);
    let before = old.traces();
    let mut elsewhere = request("cart", "c1", &other, &IPS);
    elsewhere.live = true;
    for container in ["c1", "c2"] {
        elsewhere.container_id = ContainerId::new(container).unwrap();
        let refused = refusal(enroller.enroll(&elsewhere, &wanted()));
        let expected = format!(
            "uid uid-cart is enrolled in netns {}, which still lives",
            old.path().display()
        );
        assert_eq!(refused.reason, expected);
        assert!(!refused.retryable && refused.remedy.contains("culvert pod unenroll --uid"));
    }
    assert!(node.kernel.captures(&old) && !node.kernel.captures(&other));
    assert_eq!(old.traces(), before);
    assert!(node.kernel.drains.lock().unwrap().is_empty(), "its connections go on");
    // It is not gone because its name is: something may live in it.
    let cookie = old.cookie();
    node.kernel.living.lock().unwrap().insert(cookie);
    drop(old);
    assert!(refusal(enroller.enroll(&elsewhere, &wanted())).reason.contains("still lives"));
    node.kernel.living.lock().unwrap().clear();
    assert_eq!(enroller.enroll(&elsewhere, &wanted()), EnrollReply::Ok);
    enroller.tick(Instant::now());
    assert!(
        node.kernel.captures(&other) && !node.kernel.pods.lock().unwrap().contains_key(&cookie)
    );
}

/// The same sandbox under another name: nothing of the capture is touched, and the old name has no hold on it.
#[test]
fn another_container_id_of_the_same_namespace_is_taken_in_place() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("rename"));
    let enroller = node.start();
    assert_eq!(enroller.enroll(&request("cart", "c1", &netns, &IPS), &wanted()), EnrollReply::Ok);
    let enrolled = netns.traces();
    assert_eq!(enroller.enroll(&request("cart", "c2", &netns, &IPS), &wanted()), EnrollReply::Ok);
    assert!(node.kernel.released.lock().unwrap().is_empty());
    assert!(node.kernel.drains.lock().unwrap().is_empty());
    assert!(node.kernel.closed.lock().unwrap().is_empty());
    assert_eq!(netns.traces(), enrolled);
    let [before, now] =
        ["c1", "c2"].map(|id| PodSelector::Container(ContainerId::new(id).unwrap()));
    assert_eq!(enroller.unenroll(&before, true, Instant::now()), EnrollReply::Ok);
    assert!(node.kernel.captures(&netns));
    // Nor is it let go when the controller's word is about to let it go: that has its own way.
    assert!(matches!(
        enroller.exclude(&request("cart", "c3", &netns, &IPS), "no"),
        EnrollReply::Excluded { .. }
    ));
    assert!(node.kernel.captures(&netns));
    assert_eq!(enroller.unenroll(&now, true, Instant::now()), EnrollReply::Ok);
    assert!(node.kernel.captures(&netns), "its name is c3 by now");
}

/// An operator may name a namespace by one of its processes. When that ends, others live on.
#[test]
fn a_namespace_is_known_by_a_path_that_lasts() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("lasts"));
    let asleep = || {
        let mut sleep = Command::new("ip");
        let child = sleep.args(["netns", "exec", &netns.0, "sleep", "60"]).spawn().unwrap();
        let inode = std::fs::metadata(netns.path()).unwrap().ino();
        let path = format!("/proc/{}/ns/net", child.id());
        while !std::fs::metadata(&path).is_ok_and(|found| found.ino() == inode) {
            std::thread::yield_now();
        }
        (child, NetnsPath::new(&path).unwrap())
    };
    let end = |mut child: std::process::Child| {
        child.kill().unwrap();
        child.wait().unwrap();
    };
    let mut named = request("cart", "c1", &netns, &IPS);
    named.live = true;
    // Without a restart, and over one.
    for restarts in [false, true] {
        let (process, path) = asleep();
        let by_process = Enroll { netns: path, ..named.clone() };
        let mut enroller = node.start();
        enroller.adopt(&wanted_list(true), Instant::now());
        assert_eq!(enroller.enroll(&by_process, &wanted()), EnrollReply::Ok);
        assert_eq!(enroller.list()[0].netns, by_process.netns);
        end(process);
        if restarts {
            drop(enroller);
            enroller = node.start();
            assert_eq!(enroller.adopt(&wanted_list(true), Instant::now()).enrolled, 1);
        } else {
            enroller.tick(Instant::now());
        }
        assert_eq!(enroller.list()[0].netns, named.netns);
        assert!(node.kernel.captures(&netns));
        // What is known by its name stays so.
        let (process, path) = asleep();
        let by_process = Enroll { netns: path, ..named.clone() };
        assert_eq!(enroller.enroll(&by_process, &wanted()), EnrollReply::Ok);
        assert_eq!(enroller.list()[0].netns, named.netns);
        end(process);
        assert!(enroller.remove_all().is_empty());
        assert!(enroller.list().is_empty() && !node.kernel.captures(&netns));
    }
}

/// Some runtimes take a pod's network away before they end its processes; others never say that it is gone.
#[test]
fn a_namespace_in_which_a_process_lives_stays_captured() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("alive"));
    let enroller = node.start();
    let request = request("cart", "c1", &netns, &IPS);
    let asleep = || {
        let mut sleep = Command::new("ip");
        let mut child = sleep.args(["netns", "exec", &netns.0, "sleep", "60"]).spawn().unwrap();
        let namespace = std::fs::metadata(netns.path()).unwrap();
        let of_child = format!("/proc/{}/ns/net", child.id());
        while !std::fs::metadata(&of_child).is_ok_and(|found| found.ino() == namespace.ino()) {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        child
    };
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    let mut process = asleep();
    let container = PodSelector::Container(request.container_id.clone());
    assert_eq!(enroller.unenroll(&container, true, Instant::now()), EnrollReply::Ok);
    assert!(node.kernel.captures(&netns) && enroller.list().is_empty());
    assert_eq!(*node.kernel.closed.lock().unwrap(), [netns.cookie()]);
    // Back in the mesh without a gap, with what its settings were before it ever was.
    assert_eq!(enroller.enroll(&request, &wanted()), EnrollReply::Ok);
    assert!(node.kernel.released.lock().unwrap().is_empty());
    assert_eq!(enroller.list_all().len(), 1);
    // Its name goes; the process does not.
    let cookie = netns.cookie();
    let captured = || node.kernel.pods.lock().unwrap().contains_key(&cookie);
    drop(netns);
    let now = Instant::now();
    enroller.tick(now);
    assert!(captured() && enroller.list().is_empty());
    assert_eq!(enroller.collect(&BTreeSet::new()), EnrollReply::Ok);
    drop(enroller);
    let enroller = node.start();
    assert_eq!(enroller.adopt(&wanted_list(true), now).orphans, 0);
    assert!(captured());
    process.kill().unwrap();
    process.wait().unwrap();
    enroller.tick(now + Duration::from_secs(60));
    assert!(!captured() && enroller.list_all().is_empty());
}
