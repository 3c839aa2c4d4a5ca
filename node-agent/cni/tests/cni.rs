//! The plugin as a container runtime runs it: behind Debian's bridge and host-local, with a fake agent. Needs root.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use mesh_enroll::{EnrollReply, EnrollRequest, PodSelector, Refusal, read_request, write_reply};
use serde_json::{Value, json};

const PLUGINS: &str = "/usr/lib/cni";
const OURS: &str = env!("CARGO_BIN_EXE_culvert-cni");

/// A node in two namespaces: the plugins run in one, the pod is the other.
struct Lab {
    folder: tempfile::TempDir,
    node: String,
    pod: String,
}

impl Lab {
    fn new(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "needs root: run the tests with sudo");
        assert!(
            Path::new(PLUGINS).join("bridge").exists(),
            "needs Debian's package containernetworking-plugins"
        );
        let id = std::process::id();
        let lab = Self {
            folder: tempfile::tempdir().unwrap(),
            node: format!("cvcni-{name}-n{id}"),
            pod: format!("cvcni-{name}-p{id}"),
        };
        for netns in [&lab.node, &lab.pod] {
            ip(&["netns", "add", netns]);
        }
        lab
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// Serves `replies`, one connection each, and tells what was asked.
    fn agent(&self, replies: Vec<EnrollReply>) -> Receiver<EnrollRequest> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let (asked, questions) = channel();
        std::thread::spawn(move || {
            for reply in replies {
                let (mut stream, _from) = listener.accept().unwrap();
                asked.send(read_request(&mut stream).unwrap()).unwrap();
                write_reply(&mut stream, &reply).unwrap();
            }
        });
        questions
    }

    fn config(&self, version: &str, plugin: Value, previous: Option<&Value>) -> Value {
        let mut config = plugin;
        config["cniVersion"] = version.into();
        config["name"] = "lab".into();
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        config
    }

    fn bridge(&self, version: &str) -> Value {
        let plugin = json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": self.folder.path().join("ipam"),
                "ranges": [[{ "subnet": "10.88.7.0/24" }], [{ "subnet": "fd88:7::/64" }]],
            },
        });
        self.config(version, plugin, None)
    }

    fn ours(&self, version: &str, previous: Option<&Value>) -> Value {
        let plugin = json!({
            "type": "culvert-cni",
            "agentSocket": self.socket(),
            "timeoutSeconds": 5,
            "agentWaitSeconds": 0,
        });
        self.config(version, plugin, previous)
    }

    fn run(&self, program: &Path, verb: &str, config: &Value) -> (bool, Value) {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.node])
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c0ffee")
            .env("CNI_NETNS", format!("/run/netns/{}", self.pod))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS)
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let printed = match output.stdout.trim_ascii() {
            [] => Value::Null,
            json => serde_json::from_slice(json).unwrap(),
        };
        (output.status.success(), printed)
    }

    fn add_bridge(&self, version: &str) -> Value {
        let (done, result) =
            self.run(&Path::new(PLUGINS).join("bridge"), "ADD", &self.bridge(version));
        assert!(done, "{result}");
        result
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for netns in [&self.node, &self.pod] {
            let _gone = Command::new("ip").args(["netns", "del", netns]).output();
        }
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_chain_of_real_plugins_ends_with_the_agents_word() {
    for version in ["0.4.0", "1.0.0"] {
        let lab = Lab::new(&format!("chain{}", &version[..1]));
        let result = lab.add_bridge(version);
        let questions = lab.agent(vec![EnrollReply::Ok, EnrollReply::Ok, EnrollReply::Ok]);
        let ours = lab.ours(version, Some(&result));
        let (done, passed_on) = lab.run(Path::new(OURS), "ADD", &ours);
        assert!(done, "{passed_on}");
        assert_eq!(passed_on, result, "the result is passed on unchanged");
        let EnrollRequest::Enroll(enroll) = questions.recv().unwrap() else { panic!() };
        assert_eq!(enroll.pod.name.to_string(), "shop/cart-0");
        assert_eq!(enroll.ips.len(), 2, "{:?}", enroll.ips);
        assert!(enroll.ips.iter().all(|ip| {
            let text = ip.to_string();
            text.starts_with("10.88.7.") || text.starts_with("fd88:7:")
        }));
        assert_eq!(enroll.netns.as_str(), format!("/run/netns/{}", lab.pod));

        let (done, printed) = lab.run(Path::new(OURS), "CHECK", &ours);
        assert!(done && printed.is_null(), "{printed}");
        assert!(matches!(questions.recv().unwrap(), EnrollRequest::Check { .. }));
        let (done, printed) = lab.run(Path::new(OURS), "DEL", &ours);
        assert!(done && printed.is_null(), "{printed}");
        let EnrollRequest::Unenroll { pod: PodSelector::Container(id), gone: true } =
            questions.recv().unwrap()
        else {
            panic!()
        };
        assert_eq!(id.as_str(), "c0ffee");
        let bridge = Path::new(PLUGINS).join("bridge");
        assert!(lab.run(&bridge, "DEL", &lab.bridge(version)).0);
    }
}

#[test]
fn without_an_agent_no_pod_starts_and_every_pod_can_go() {
    let lab = Lab::new("away");
    let result = lab.add_bridge("1.0.0");
    let ours = lab.ours("1.1.0", Some(&result));
    let (done, error) = lab.run(Path::new(OURS), "ADD", &ours);
    assert!(!done);
    assert_eq!(error["code"], 11);
    assert_eq!(error["cniVersion"], "1.1.0");
    assert!(error["msg"].as_str().unwrap().contains("not running"), "{error}");
    let (done, printed) = lab.run(Path::new(OURS), "DEL", &ours);
    assert!(done && printed.is_null());
    let (done, error) = lab.run(Path::new(OURS), "STATUS", &lab.ours("1.1.0", None));
    assert!(!done);
    assert_eq!(error["code"], 51);
}

#[test]
fn an_agent_that_restarts_is_waited_for() {
    let lab = Lab::new("wait");
    let result = lab.add_bridge("1.0.0");
    let mut ours = lab.ours("1.0.0", Some(&result));
    ours["agentWaitSeconds"] = 30.into();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| lab.run(Path::new(OURS), "ADD", &ours));
        // The plugin may or may not have tried already: both orders have to end well.
        let questions = lab.agent(vec![EnrollReply::Ok]);
        assert!(questions.recv().is_ok());
        assert!(waiting.join().unwrap().0);
    });
}

#[test]
fn refusals_reach_the_runtime_with_their_remedy() {
    let lab = Lab::new("refuse");
    let result = lab.add_bridge("1.0.0");
    let refused = |retryable| {
        EnrollReply::Refused(Refusal {
            reason: "why".to_owned(),
            remedy: "what to do".to_owned(),
            retryable,
        })
    };
    let questions = lab.agent(vec![
        refused(false),
        refused(true),
        EnrollReply::Excluded { reason: "namespace".to_owned() },
        refused(true),
    ]);
    let ours = lab.ours("1.1.0", Some(&result));
    let expected = |code: u32| {
        (
            false,
            json!({ "cniVersion": "1.1.0", "code": code, "msg": "why", "details": "what to do" }),
        )
    };
    assert_eq!(lab.run(Path::new(OURS), "ADD", &ours), expected(100));
    assert_eq!(lab.run(Path::new(OURS), "ADD", &ours), expected(11));
    assert_eq!(lab.run(Path::new(OURS), "ADD", &ours), (true, result));
    let (done, error) = lab.run(Path::new(OURS), "STATUS", &lab.ours("1.1.0", None));
    assert!(!done && error["code"] == 50, "{error}");
    assert_eq!(questions.iter().count(), 4);
}

#[test]
fn versions_and_bad_calls_need_no_agent() {
    let lab = Lab::new("calls");
    let (done, printed) = lab.run(Path::new(OURS), "VERSION", &json!({ "cniVersion": "1.0.0" }));
    assert!(done);
    assert_eq!(printed["supportedVersions"], json!(["0.4.0", "1.0.0", "1.1.0"]));
    let (done, error) = lab.run(Path::new(OURS), "ADD", &lab.ours("1.0.0", None));
    assert!(!done && error["code"] == 7, "{error}");
    let (done, error) = lab.run(Path::new(OURS), "JUMP", &lab.ours("1.0.0", None));
    assert!(!done && error["code"] == 4, "{error}");
    let (done, error) = lab.run(Path::new(OURS), "ADD", &lab.ours("9.0.0", None));
    assert!(!done && error["code"] == 1, "{error}");
    let (done, error) = lab.run(Path::new(OURS), "ADD", &json!("text"));
    assert!(!done && error["code"] == 6, "{error}");
    let (done, error) = lab.run(Path::new(OURS), "GC", &lab.ours("1.1.0", None));
    assert!(!done && error["code"] == 7, "{error}");
}
