//! The built program against daemons that say what they are told to: what it prints, and how it ends.

mod daemon;

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output};

use daemon::Daemon;
use mesh_authorize::explain::{Explanation, Outcome, PolicyStep, RuleStep};
use mesh_authorize::{
    Action, Denial, DenialDetail, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, RuleRef,
};
use mesh_enroll::{EnrollReply, EnrollRequest, PodSelector, Refusal};
use mesh_model::{CloseReason, NamespacedHostname, Revision, ServicePort, Workload, WorkloadUid};
use mesh_resolve::Step;
use serde_json::{Value, json};

fn culvert(daemon: &Daemon, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_culvert"))
        .args(arguments)
        .env_clear()
        .env("CULVERT_RUN_DIR", daemon.folder())
        .env("CULVERT_CONTROLLER_SOCKET", daemon.folder().join("controller.sock"))
        .output()
        .expect("the program runs")
}

#[track_caller]
fn ends(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("it prints text");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "stdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

fn denial() -> Value {
    let origin = PolicyOrigin {
        kind: PolicyKind::AuthorizationPolicy,
        namespace: "shop".into(),
        name: "web-allow".into(),
        unreadable: None,
    };
    let explanation = Explanation {
        outcome: Outcome::Denied(Denial {
            reason: CloseReason::PolicyDenied,
            rule: Some(RuleRef { origin: origin.clone(), rule_index: None }),
            detail: DenialDetail::NoAllowMatched { considered: vec![origin.clone()], more: 0 },
        }),
        policies: vec![PolicyStep {
            name: PolicyName { namespace: "shop".into(), name: "web-allow".into() },
            origin,
            scope: PolicyScope::Workload,
            action: Action::Allow,
            dry_run: false,
            matched: None,
            rules: vec![RuleStep { rule_index: 0, failed_clause: Some(0), failed: vec![] }],
        }],
        notes: vec![],
        revision: Revision(7),
    };
    let uid = "Kubernetes//Pod/shop/intruder";
    let dialled = Step::Dialled {
        source: WorkloadUid::new(uid),
        destination: "10.96.0.1:80".parse().expect("an address"),
    };
    json!({
        "allowed": false,
        "reason": "PolicyDenied",
        "summary": "not allowed by AuthorizationPolicy shop/web-allow",
        "stages": [
            { "side": "source", "workload": uid, "authorize": null, "outcome": "through the tunnel",
              "resolve": [dialled, { "step": "asked_the_oracle", "answer": 42 }] },
            { "side": "destination", "workload": "Kubernetes//Pod/shop/web", "resolve": [],
              "authorize": explanation, "outcome": "not allowed" },
        ],
    })
}

#[test]
fn explain_prints_every_step_and_the_rule_and_ends_with_no() {
    let daemon = Daemon::start();
    let target = "/explain?from=shop/intruder&to=web.shop&port=80";
    daemon.serve_http("controller.sock", &[(target, 200, denial().to_string())]);
    for arguments in [
        &["explain", "shop/intruder", "->", "web.shop:80"][..],
        &["explain", "shop/intruder -> web.shop:80"],
        &["explain", "shop/intruder", "web.shop:80", "-o", "table"],
    ] {
        let (stdout, _) = ends(&culvert(&daemon, arguments), 1);
        for part in [
            "shop/intruder -> web.shop:80\n",
            "At the source, Kubernetes//Pod/shop/intruder\n",
            "Kubernetes//Pod/shop/intruder dials 10.96.0.1:80\n",
            "asked_the_oracle",
            "At the destination, Kubernetes//Pod/shop/web\n",
            "ALLOW AuthorizationPolicy shop/web-allow: no rule matches\n",
            "rule 0: clause 0 does not hold",
            "DENIED (PolicyDenied): not allowed by AuthorizationPolicy shop/web-allow\n",
            "decided by AuthorizationPolicy shop/web-allow\n",
        ] {
            assert!(stdout.contains(part), "{part:?} is missing:\n{stdout}");
        }
    }
    let arguments = ["explain", "-o", "json", "shop/intruder", "->", "web.shop:80"];
    let (stdout, _) = ends(&culvert(&daemon, &arguments), 1);
    assert_eq!(stdout, denial().to_string(), "JSON is untouched");
}

#[test]
fn explain_takes_a_service_for_its_source() {
    let daemon = Daemon::start();
    let mut workload = Workload::named("Kubernetes//Pod/shop/cart-1", "shop", "cart-1");
    let key = NamespacedHostname::new("shop", "cart.shop.svc.cluster.local");
    workload.services.insert(key, vec![ServicePort { service_port: 80, target_port: 80 }]);
    let allowed = json!({ "allowed": true, "reason": null, "summary": "delivered", "stages": [] });
    let target = "/explain?from=Kubernetes//Pod/shop/cart-1&to=10.0.0.2&port=1";
    let dump = json!({ "workloads": [workload], "services": [], "policies": [] }).to_string();
    daemon.serve_http(
        "controller.sock",
        &[("/config_dump", 200, dump), (target, 200, allowed.to_string())],
    );
    let (stdout, _) = ends(&culvert(&daemon, &["explain", "cart.shop", "10.0.0.2:1"]), 0);
    assert!(stdout.contains("cart.shop has 1 workload; asked for shop/cart-1\n"), "{stdout}");
    assert!(stdout.contains("ALLOWED: delivered\n"), "{stdout}");
    let (_, stderr) = ends(&culvert(&daemon, &["explain", "none.shop", "10.0.0.2:1"]), 2);
    assert!(stderr.contains("no workload belongs to a service \"none.shop\""), "{stderr}");
    let (stdout, _) = ends(&culvert(&daemon, &["config", "workloads"]), 0);
    assert!(stdout.starts_with("WORKLOAD ") && stdout.contains("\nshop/cart-1 "), "{stdout}");
    let (_, stderr) = ends(&culvert(&daemon, &["explain", "a/b", "c:1"]), 2);
    assert_eq!(
        stderr,
        "culvert: nothing like /explain?from=a/b&to=c&port=1\n  \
         remedy: culvert config --of controller lists what it knows\n"
    );
}

#[test]
fn a_daemon_that_is_away_is_named_with_its_socket_and_a_remedy() {
    let daemon = Daemon::start();
    for (arguments, who, socket) in [
        (&["status"][..], "agent", "admin.sock"),
        (&["status", "controller"], "controller", "controller.sock"),
        (&["explain", "a/b", "c:1"], "controller", "controller.sock"),
        (&["connections"], "agent", "admin.sock"),
        (&["certs"], "agent", "admin.sock"),
        (&["config"], "agent", "admin.sock"),
        (&["pod", "list"], "agent", "agent.sock"),
    ] {
        let (_, stderr) = ends(&culvert(&daemon, arguments), 3);
        let socket = daemon.folder().join(socket);
        let expected = format!("culvert: cannot reach the {who} at {}: ", socket.display());
        assert!(stderr.starts_with(&expected), "{stderr}");
        assert!(stderr.contains(&format!("\n  remedy: see that the {who} runs")), "{stderr}");
    }
}

#[test]
fn status_of_both_daemons() {
    let daemon = Daemon::start();
    let status = |ready: bool| {
        json!({
            "version": "0.1.0", "node": "node-a", "ready": ready, "waitingFor": ["controller"],
            "controller": { "connected": false, "synced": true, "lastError": "refused" },
            "capture": { "cgroupOrder": "first", "guard": "tcx", "cgroupRoot": "/sys/fs/cgroup",
                         "adopted": true },
            "pods": [daemon::pod("shop", "cart-1")], "workloads": 2, "services": 1, "policies": 1,
            "denying": ["AuthorizationPolicy shop/p (unreadable: odd)"],
            "certificates": 1, "indexRevision": 9, "policyRevision": 3,
        })
        .to_string()
    };
    daemon.serve_http("admin.sock", &[("/status", 200, status(true))]);
    let (stdout, _) = ends(&culvert(&daemon, &["status"]), 0);
    for part in [
        "node:       node-a\n",
        "DENYING:    AuthorizationPolicy shop/p (unreadable: odd)\n",
        "agent:      ready (version 0.1.0)\n",
        "controller: away; going on with what it said last (refused)\n",
        "2 workloads, 1 service, 1 policy (revision 3), 1 certificate, index revision 9\n",
        "\nPOD          PHASE ",
        "\nshop/cart-1  enrolled  10.0.0.7",
    ] {
        assert!(stdout.contains(part), "{part:?} is missing:\n{stdout}");
    }
    let (stdout, _) = ends(&culvert(&daemon, &["-o", "json", "status"]), 0);
    assert_eq!(stdout, status(true));

    let other = Daemon::start();
    other.serve_http("admin.sock", &[("/status", 200, status(false))]);
    let (stdout, _) = ends(&culvert(&other, &["status"]), 1);
    assert!(stdout.contains("not ready, waiting for controller"), "{stdout}");

    let controller = json!({
        "synced": true,
        "source": { "objects": 5, "ignored": [["Ingress", 2]], "refused": [{
            "file": "a.yaml", "line": 3, "object": "Service shop/web", "field": "spec.ports",
            "problem": "not a port", "remedy": "use 1 to 65535", "last_good_in_use": true }] },
        "policies": { "AuthorizationPolicy shop/p": {
            "enforced_as_written": false, "place": "agent", "notes": ["L7 rules need a waypoint"] } },
        "notes": [],
    });
    let only = Daemon::start();
    only.serve_http("controller.sock", &[("/status", 200, controller.to_string())]);
    let (stdout, _) = ends(&culvert(&only, &["status"]), 1);
    let no_agent = only.folder().join("admin.sock");
    let no_agent = format!("agent:      cannot be reached: nothing at {}\n", no_agent.display());
    assert!(stdout.starts_with(&no_agent), "{stdout}");
    let (named, _) = ends(&culvert(&only, &["status", "controller"]), 1);
    assert!(!named.contains("agent: "), "{named}");
    for part in [
        "objects:    5 in use, 1 refused\n",
        "refused: Service shop/web at a.yaml:3, spec.ports: not a port\n",
        "its last good version is still in use",
        "not as written",
    ] {
        assert!(stdout.contains(part), "{part:?} is missing:\n{stdout}");
    }
}

#[test]
fn a_controller_that_fails_closed_or_runs_on_kept_objects_says_so() {
    let refusal = |object: Value, denied: bool| {
        json!({ "file": "a.yaml", "line": 3, "object": object, "field": "", "problem": "odd",
                "remedy": "mend it", "last_good_in_use": false, "denied": denied })
    };
    let status = |source: Value, revocations: Value| {
        let mut all = json!({ "objects": 5, "ignored": [], "refused": [] });
        all.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        json!({ "synced": true, "source": all, "revocations": revocations, "notes": [],
                "policies": { "AuthorizationPolicy shop/p": { "enforced_as_written": false,
                    "denying": true, "place": "every workload of namespace shop", "notes": [] } } })
    };
    let good = json!({ "file": "/crl.pem", "problem": null });
    for (answer, code, part) in [
        (status(json!({}), good.clone()), 0, "DENYING"),
        (
            status(
                json!({ "refused": [refusal(json!("AuthorizationPolicy shop/p"), true)] }),
                good.clone(),
            ),
            1,
            "\n  DENYING: whatever it may refuse",
        ),
        (
            status(json!({ "refused": [refusal(Value::Null, false)] }), good.clone()),
            1,
            "\n  NOT ENFORCED: nothing stands in",
        ),
        (
            status(json!({ "kept": 3, "kept_objects": ["Pod shop/a"] }), good.clone()),
            1,
            "KEPT:       3 objects in an earlier version: Pod shop/a and 2 more\n",
        ),
        (
            status(json!({ "missing": "/m: it holds no manifest" }), good.clone()),
            1,
            "MISSING:    /m: it holds no manifest; everything stays as it was\n  remedy: mount or fill \
             the folder again; if it is meant to be empty: culvert-controller source accept-empty\n",
        ),
        (
            status(json!({ "not_remembered": "disk full" }), good),
            1,
            "cannot be kept for a restart: disk full\n",
        ),
        (
            status(json!({}), json!({ "file": "/crl.pem", "problem": "empty" })),
            1,
            "the last good revocation lists, instead of /crl.pem: empty\n",
        ),
    ] {
        let daemon = Daemon::start();
        daemon.serve_http("controller.sock", &[("/status", 200, answer.to_string())]);
        let (stdout, _) = ends(&culvert(&daemon, &["status"]), code);
        assert!(stdout.contains(part), "{part:?} is missing:\n{stdout}");
    }
}

#[test]
fn explain_of_an_unknown_name_is_a_mistake_of_the_question() {
    let daemon = Daemon::start();
    let target = "/explain?from=shop/nobody&to=web.shop&port=80";
    let answer = json!({ "error": "no workload \"shop/nobody\"" }).to_string();
    daemon.serve_http("controller.sock", &[(target, 404, answer)]);
    let (_, stderr) = ends(&culvert(&daemon, &["explain", "shop/nobody", "web.shop:80"]), 2);
    assert!(
        stderr.contains("no workload") && stderr.contains("remedy: culvert config"),
        "{stderr}"
    );
}

#[test]
fn connections_and_certificates_are_tables_or_the_servers_json() {
    let daemon = Daemon::start();
    let connections = json!([{
        "id": "2a", "direction": "Outbound", "pod": "u", "pod_namespace": "shop",
        "pod_name": "cart-1", "client": "10.0.0.7:4711", "destination": "10.96.0.1:80",
        "source_principal": null, "destination_principal": "spiffe://cluster.local/ns/shop/sa/web",
        "service": "web.shop.svc.cluster.local", "path": "tunnel", "rule": null,
        "established": true, "bytes": { "client_to_server": 2048, "server_to_client": 5 },
        "age_ms": 61_000,
    }, {
        "id": "2b", "direction": "InboundTunnel", "pod": "v", "pod_namespace": "shop",
        "pod_name": "web", "client": "10.0.0.7:4711", "destination": "10.0.0.8:80",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/cart", "destination_principal": null,
        "service": null, "path": "tunnel", "rule": null,
        "established": true, "bytes": { "client_to_server": 2048, "server_to_client": 5 },
        "age_ms": 61_000,
    }])
    .to_string();
    let certs = json!([{
        "identity": "spiffe://cluster.local/ns/shop/sa/cart", "state": "Expired", "rootCerts": [{}],
        "certChain": [{ "pem": "", "serialNumber": "0a", "validFrom": "2020-01-01T00:00:00Z",
                        "expirationTime": "2020-01-02T00:00:00Z" }, { "pem": "" }],
    }])
    .to_string();
    daemon.serve_http(
        "admin.sock",
        &[("/connections", 200, connections.clone()), ("/certs", 200, certs.clone())],
    );
    let (stdout, _) = ends(&culvert(&daemon, &["connections"]), 0);
    let row = stdout.lines().nth(1).expect("a row");
    let words = "shop/cart-1 out 10.0.0.7:4711 10.96.0.1:80 (web.shop.svc.cluster.local) tunnel \
                 spiffe://cluster.local/ns/shop/sa/web 2.0 KiB 5 B 1m 1s -";
    assert_eq!(row.split_whitespace().collect::<Vec<_>>().join(" "), words);
    let row = stdout.lines().nth(2).expect("the other end's row");
    let words = row.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("shop/web in 10.0.0.7:4711"), "{words}");
    assert!(words.contains("5 B 2.0 KiB"), "the server sent what the client received: {words}");
    let (stdout, _) = ends(&culvert(&daemon, &["connections", "--pod", "shop/other"]), 0);
    assert_eq!(stdout, "no open connections\n");
    let (stdout, _) = ends(&culvert(&daemon, &["connections", "-o", "json"]), 0);
    assert_eq!(stdout, connections);
    let (stdout, _) = ends(&culvert(&daemon, &["certs"]), 0);
    assert!(stdout.contains("expired") && stdout.contains(" ago "), "{stdout}");
    let (stdout, _) = ends(&culvert(&daemon, &["certs", "-o", "json"]), 0);
    assert_eq!(stdout, certs);
}

#[test]
fn the_log_level_is_shown_and_changed() {
    let daemon = Daemon::start();
    let level = |text: &str| json!({ "level": text }).to_string();
    let answers = [
        ("/logging", 200, level("info")),
        ("POST /logging?level=info%2Cmesh_net%3Ddebug", 200, level("info,mesh_net=debug")),
        ("POST /logging?reset", 200, level("warn")),
        ("POST /logging?level=nonsense", 400, json!({ "error": "no such level" }).to_string()),
    ];
    daemon.serve_http("admin.sock", &answers);
    daemon.serve_http("controller.sock", &[("/logging", 200, level("error"))]);
    for (arguments, shown) in [
        (&["log-level"][..], "info\n"),
        (&["log-level", "info,mesh_net=debug"], "info,mesh_net=debug\n"),
        (&["log-level", "--reset"], "warn\n"),
        (&["log-level", "--of", "controller"], "error\n"),
    ] {
        assert_eq!(ends(&culvert(&daemon, arguments), 0).0, shown, "{arguments:?}");
    }
    let (_, stderr) = ends(&culvert(&daemon, &["log-level", "nonsense"]), 4);
    assert!(stderr.contains("no such level"), "{stderr}");
}

#[test]
fn answers_that_make_no_sense_are_told() {
    let daemon = Daemon::start();
    daemon.serve_http(
        "admin.sock",
        &[
            ("/status", 200, "[]".to_owned()),
            ("/certs", 500, "\u{1b}[2J broken".to_owned()),
            ("/connections", 403, json!({ "error": "only root may ask here" }).to_string()),
        ],
    );
    let (_, stderr) = ends(&culvert(&daemon, &["status"]), 4);
    assert!(stderr.contains("the agent's answer cannot be read: "), "{stderr}");
    let (_, stderr) = ends(&culvert(&daemon, &["certs"]), 4);
    assert!(stderr.contains("500") && !stderr.contains('\u{1b}'), "{stderr}");
    let (_, stderr) = ends(&culvert(&daemon, &["connections"]), 4);
    assert!(stderr.contains("only root may ask here\n  remedy: ask as root"), "{stderr}");
}

#[test]
fn pods_are_enrolled_listed_and_let_go() {
    let daemon = Daemon::start();
    let asked = daemon.serve_enrolment(vec![
        EnrollReply::Ok,
        EnrollReply::Ok,
        EnrollReply::Pods { pods: vec![daemon::pod("shop", "cart-1")] },
        EnrollReply::Refused(Refusal {
            reason: "the interface is no veth".to_owned(),
            remedy: "use a bridge".to_owned(),
            retryable: false,
        }),
        EnrollReply::Excluded { reason: "not labelled".to_owned() },
    ]);
    let enroll = [
        "pod",
        "enroll",
        "--netns",
        "/run/netns/a",
        "--namespace",
        "shop",
        "--name",
        "cart-1",
        "--service-account",
        "cart",
        "--uid",
        "u-1",
        "--live",
        "--ip",
        "10.0.0.7",
    ];
    let (stdout, _) = ends(&culvert(&daemon, &enroll), 0);
    assert_eq!(stdout, "shop/cart-1 is in the mesh\n");
    let EnrollRequest::Enroll(request) = asked.recv().unwrap() else { panic!("no enrolment") };
    assert!(request.live && request.netns.as_str() == "/run/netns/a");
    assert_eq!(request.container_id.as_str(), "u-1", "the uid stands for the sandbox");
    assert_eq!(request.ips.len(), 1);

    let (stdout, _) = ends(&culvert(&daemon, &["pod", "unenroll", "shop/cart-1"]), 0);
    assert_eq!(stdout, "shop/cart-1 is out of the mesh\n");
    let request = asked.recv().unwrap();
    assert!(matches!(request, EnrollRequest::Unenroll { pod: PodSelector::Name(_), gone: false }));

    let (stdout, _) = ends(&culvert(&daemon, &["pod", "list", "-o", "json"]), 0);
    let listed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(listed, json!([daemon::pod("shop", "cart-1")]));

    let (_, stderr) = ends(&culvert(&daemon, &enroll), 1);
    assert_eq!(stderr, "culvert: the interface is no veth\n  remedy: use a bridge\n");
    let (stdout, _) = ends(&culvert(&daemon, &enroll), 1);
    assert_eq!(stdout, "stays outside the mesh: not labelled\n");
}

/// `culvert-agent &`, then `culvert pod enroll`, as the README has it.
#[test]
fn enrolling_waits_for_an_agent_that_has_just_been_started() {
    let daemon = Daemon::start();
    let enroll = [
        "pod",
        "enroll",
        "--netns",
        "/run/netns/a",
        "--namespace",
        "shop",
        "--name",
        "cart-1",
        "--uid",
        "u-1",
        "--timeout",
        "10",
    ];
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| culvert(&daemon, &enroll));
        std::thread::sleep(std::time::Duration::from_millis(500));
        let _asked = daemon.serve_enrolment(vec![EnrollReply::Ok]);
        running.join().unwrap()
    });
    let (stdout, stderr) = ends(&output, 0);
    assert_eq!(stdout, "shop/cart-1 is in the mesh\n");
    let socket = daemon.folder().join("agent.sock");
    assert_eq!(stderr, format!("waiting up to 10 s for the agent at {}\n", socket.display()));
    // In the end it says what it would have said at once.
    let nobody = Daemon::start();
    let mut hasty = enroll;
    hasty[hasty.len() - 1] = "1";
    let (_, stderr) = ends(&culvert(&nobody, &hasty), 3);
    assert!(stderr.contains("\nculvert: cannot reach the agent at "), "{stderr}");
}

#[test]
fn what_is_typed_wrong_ends_with_two() {
    let daemon = Daemon::start();
    for arguments in [
        &["nonsense"][..],
        &[],
        &["explain", "a/b", "c"],
        &["pod", "unenroll"],
        &["pod", "unenroll", "no-namespace"],
        &["pod", "unenroll", "a/b", "--uid", "c"],
        &["pod", "enroll", "--netns", "relative", "--namespace", "a", "--name", "b", "--uid", "c"],
        &["logs"],
        &["logs", "--pod", "x"],
    ] {
        let (_, stderr) = ends(&culvert(&daemon, arguments), 2);
        assert!(!stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn logs_of_one_pod() {
    let daemon = Daemon::start();
    let path = daemon.folder().join("agent.log");
    let line = |name: &str, end: &str| {
        format!("access src.workload=\"{name}\" src.namespace=\"shop\"{end} reason=x\n")
    };
    let log = [line("cart-1", ""), line("cart-2", ""), line("cart-1", " error=\"no\"")].concat();
    std::fs::write(&path, log).unwrap();
    let file = path.to_str().unwrap();
    let (stdout, _) = ends(&culvert(&daemon, &["logs", "--pod", "shop/cart-1", "--file", file]), 0);
    assert_eq!(stdout, [line("cart-1", ""), line("cart-1", " error=\"no\"")].concat());
    let arguments = ["logs", "--pod", "shop/cart-1", "--file", file, "--refused"];
    let (stdout, _) = ends(&culvert(&daemon, &arguments), 0);
    assert_eq!(stdout, line("cart-1", " error=\"no\""));
}

#[test]
fn logs_of_a_pod_that_nobody_knows() {
    let daemon = Daemon::start();
    let path = daemon.folder().join("agent.log");
    std::fs::write(&path, "access src.workload=\"gone\" src.namespace=\"shop\" reason=x\n")
        .unwrap();
    let file = path.to_str().unwrap();
    let logs = |pod: &str, more: &[&str]| {
        culvert(&daemon, &[&["logs", "--pod", pod, "--file", file], more].concat())
    };
    // Without an agent nobody can tell.
    ends(&logs("shop/nobody", &[]), 0);
    let pods = json!([daemon::pod("shop", "quiet")]).to_string();
    daemon.serve_http("admin.sock", &[("/pods", 200, pods)]);
    let (stdout, stderr) = ends(&logs("shop/nobody", &[]), 2);
    assert!(stdout.is_empty() && stderr.contains("knows no pod shop/nobody"), "{stderr}");
    assert!(stderr.contains("remedy: see what it knows: culvert pod list"), "{stderr}");
    ends(&logs("other/quiet", &[]), 2);
    let (_, stderr) = ends(&logs("shop/quiet", &[]), 0);
    assert!(stderr.is_empty(), "known, and nothing to tell: {stderr}");
    // The log tells of one that is gone, also when none of its lines is wanted.
    let (stdout, _) = ends(&logs("shop/gone", &[]), 0);
    assert!(stdout.contains("src.workload=\"gone\""), "{stdout}");
    ends(&logs("shop/gone", &["--refused"]), 0);
}

#[test]
fn check_needs_no_agent_and_says_what_to_do() {
    let daemon = Daemon::start();
    let output = culvert(&daemon, &["check", "-o", "json"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let missing = findings.iter().any(|finding| finding["level"] == "fail");
    ends(&output, i32::from(missing));
    for finding in &findings {
        assert_eq!(finding["level"] == "ok", finding["remedy"] == "", "{finding}");
    }
    // Who may, tries.
    let is_root = std::fs::metadata("/proc/self").expect("proc").uid() == 0;
    let names: Vec<&str> = findings.iter().filter_map(|finding| finding["name"].as_str()).collect();
    for tried in ["netns cookie", "programs", "cgroup order", "sk_lookup", "SOCK_DESTROY"] {
        assert_eq!(names.contains(&tried), is_root, "{tried} of {names:?}");
    }
    assert!(names.contains(&"guard"), "{names:?}");
    let elsewhere = culvert(&daemon, &["check", "--cgroup-root", "/proc", "--bpffs", "/proc/x"]);
    let (stdout, _) = ends(&elsewhere, 1);
    assert!(stdout.contains("FAIL  cgroup2 ") && stdout.contains("FAIL  bpffs "), "{stdout}");
    assert!(stdout.contains("remedy: mount -t bpf bpf /sys/fs/bpf"), "{stdout}");
}

#[test]
fn help_tells_the_exit_codes_and_shells_are_completed() {
    let daemon = Daemon::start();
    let (stdout, _) = ends(&culvert(&daemon, &["--help"]), 0);
    assert!(stdout.contains("Exit codes:\n  0  done"), "{stdout}");
    for shell in ["bash", "zsh", "fish"] {
        let (stdout, _) = ends(&culvert(&daemon, &["completions", shell]), 0);
        assert!(stdout.contains("unenroll"), "{shell}");
    }
}
