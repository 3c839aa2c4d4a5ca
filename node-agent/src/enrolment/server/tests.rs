//! The socket with real namespaces behind it. Needs root.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use super::super::tests::{IPS, Node, TestNetns, refusal, request, wanted};
use super::*;

/// What the controller says of `shop/cart`: the uid it means, and whether it is in the mesh.
fn word(uid: &str, captured: bool) -> Arc<WantedPods> {
    let wanted = WantedPod { uid: uid.to_owned(), captured, ..wanted() };
    let pods = BTreeMap::from([(PodName::new("shop", "cart").unwrap(), wanted)]);
    Arc::new(WantedPods { known: true, pods })
}

#[tokio::test]
async fn a_word_about_a_predecessor_is_not_taken() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("word"));
    let request = request("cart", "c1", &netns, &IPS);
    let controller = watch::Sender::new(word("uid-before", false));
    let mut enrolment = Enrolment::new(Arc::new(node.start()), controller.subscribe());
    enrolment.word_patience = Duration::from_millis(300);
    let refused = refusal(enrolment.enroll(request.clone()).await);
    assert!(refused.retryable && refused.reason.contains("has not said"), "{}", refused.reason);
    // A pod of this name is in the mesh: so is this one, until something better is known.
    controller.send_replace(word("uid-before", true));
    assert_eq!(enrolment.enroll(request.clone()).await, EnrollReply::Ok);
    assert!(node.kernel.captures(&netns));
    enrolment.word_patience = WORD_PATIENCE;
    let asking = tokio::spawn({
        let (enrolment, mut other) = (enrolment.clone(), request.clone());
        other.container_id = mesh_enroll::ContainerId::new("c2").unwrap();
        controller.send_replace(word("uid-before", false));
        async move { enrolment.enroll(other).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asking.is_finished());
    controller.send_replace(word("uid-cart", false));
    assert!(matches!(asking.await.unwrap(), EnrollReply::Excluded { .. }));
}

/// An operator who names a uid that the controller does not mean is told so, and whom it means.
#[tokio::test]
async fn an_operator_is_told_whom_the_controller_means() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("meant"));
    let mut request = request("cart", "c1", &netns, &IPS);
    request.live = true;
    let controller = watch::Sender::new(word("uid-of-another", true));
    let mut enrolment = Enrolment::new(Arc::new(node.start()), controller.subscribe());
    enrolment.word_patience = Duration::from_millis(300);
    let refused = refusal(enrolment.enroll(request.clone()).await);
    let expected =
        "the controller does not know uid uid-cart: its shop/cart has uid uid-of-another";
    assert_eq!(refused.reason, expected);
    assert!(refused.remedy.contains("--uid uid-of-another"), "{}", refused.remedy);
    controller.send_replace(Arc::new(WantedPods { known: true, pods: BTreeMap::new() }));
    let refused = refusal(enrolment.enroll(request).await);
    let expected = "the controller knows no pod shop/cart with uid uid-cart on this node";
    assert!(refused.reason.starts_with(expected), "{}", refused.reason);
    assert!(!node.kernel.captures(&netns));
}

/// Who does not wait long hears the reason all the same.
#[tokio::test]
async fn the_answer_comes_before_the_askers_patience_ends() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("hasty"));
    let mut request = request("cart", "c1", &netns, &IPS);
    let controller = watch::Sender::new(Arc::new(WantedPods::default()));
    let enrolment = Enrolment::new(Arc::new(node.start()), controller.subscribe());
    request.patience_ms = Some(1500);
    let began = Instant::now();
    let refused = refusal(enrolment.enroll(request).await);
    let took = began.elapsed();
    assert!(took < Duration::from_millis(1500), "after {took:?}");
    assert!(refused.reason.contains("has not said"), "{}", refused.reason);
}

#[tokio::test]
async fn where_a_uid_is_unknown_the_name_decides() {
    let (node, netns) = (Node::new(), TestNetns::with_addresses("noword"));
    let mut request = request("cart", "c1", &netns, &IPS);
    let controller = watch::Sender::new(word("", false));
    let enrolment = Enrolment::new(Arc::new(node.start()), controller.subscribe());
    assert!(matches!(enrolment.enroll(request.clone()).await, EnrollReply::Excluded { .. }));
    // A runtime that names no uid: the sandbox's id stands in.
    controller.send_replace(word("uid-cart", false));
    request.pod.uid = mesh_model::PodUid::new("c1");
    assert!(matches!(enrolment.enroll(request).await, EnrollReply::Excluded { .. }));
}

/// The socket's mode keeps others out; the peer's credentials do so too, where somebody opens it.
#[tokio::test(flavor = "multi_thread")]
async fn only_root_may_ask() {
    let node = Node::new();
    let socket = node.folder.path().join("agent.sock");
    let listener = listen(&socket).unwrap();
    for (path, mode) in [(node.folder.path(), 0o755), (socket.as_path(), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let (_controller, wanted) = watch::channel(word("", true));
    let enrolment = Enrolment::new(Arc::new(node.start()), wanted);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(enrolment.serve(listener, stop.clone()));
    let frame = encode(&EnrollRequest::Status).unwrap();
    let script = "import socket, sys\n\
        s = socket.socket(socket.AF_UNIX)\n\
        s.connect(sys.argv[1])\n\
        try: s.sendall(bytes.fromhex(sys.argv[2]))\n\
        except BrokenPipeError: pass\n\
        print(s.recv(65536).decode('latin-1'))\n";
    let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
    let ask = |uid: u32| {
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(&socket).arg(&hex).uid(uid);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let told = |output: std::process::Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let refused = told(ask(65_534).await.unwrap());
    assert!(refused.contains("uid 65534 may not enrol pods"), "{refused}");
    let answered = told(ask(0).await.unwrap());
    assert!(!answered.contains("may not"), "{answered}");
    stop.cancel();
    serving.await.unwrap();
}
