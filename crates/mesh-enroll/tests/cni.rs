//! The plugin's answers, by the specification: what a runtime says goes in, what it reads comes out.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io;

use mesh_enroll::cni::{
    AskError, CniError, Code, Config, Ending, Environment, Plan, Question, conclude, plan,
};
use mesh_enroll::{EnrollReply, EnrollRequest, FrameError, PodSelector, Refusal};
use proptest::prelude::*;
use serde_json::{Value, json};

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;\
    K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID=0b1c";

fn environment(command: &str) -> Environment {
    let set = |text: &str| Some(text.to_owned());
    Environment {
        command: set(command),
        container_id: set("c0ffee"),
        netns: set("/run/netns/cart"),
        interface: set("eth0"),
        args: set(ARGS),
    }
}

fn previous() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            { "name": "cni0" },
            { "name": "veth1", "mac": "0a:00:00:00:00:01" },
            { "name": "eth0", "sandbox": "/run/netns/cart", "mtu": 1500 },
        ],
        "ips": [
            { "interface": 2, "address": "10.0.0.2/24", "gateway": "10.0.0.1" },
            { "interface": 2, "address": "fd00::2/64" },
            { "interface": 0, "address": "10.0.0.1/24" },
        ],
        "routes": [{ "dst": "0.0.0.0/0" }],
        "dns": { "nameservers": ["10.0.0.10", "no address"] },
        "x-unknown": { "kept": [1, 2.5, null] },
    })
}

fn config() -> Value {
    json!({ "cniVersion": "1.0.0", "name": "net", "type": "culvert-cni", "prevResult": previous() })
}

fn planned(environment: &Environment, config: &Value) -> Result<Plan, CniError> {
    plan(environment, config.to_string().as_bytes())
}

fn question(command: &str, config: &Value) -> Question {
    match planned(&environment(command), config).unwrap() {
        Plan::Ask(question) => *question,
        Plan::Answer(answer) => panic!("answered {answer:?}"),
    }
}

fn refused(code: bool) -> EnrollReply {
    EnrollReply::Refused(Refusal {
        reason: "why".to_owned(),
        remedy: "what to do".to_owned(),
        retryable: code,
    })
}

fn away() -> AskError {
    AskError::Away(io::Error::from(io::ErrorKind::NotFound))
}

#[test]
fn add_asks_for_the_pods_addresses_and_passes_the_result_on_unchanged() {
    let question = question("ADD", &config());
    let EnrollRequest::Enroll(enroll) = &question.request else { panic!("{question:?}") };
    assert_eq!(enroll.pod.name.to_string(), "shop/cart-0");
    assert_eq!(enroll.pod.uid.as_str(), "0b1c");
    let ips: Vec<String> = enroll.ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.0.0.2", "fd00::2"]);
    assert_eq!(enroll.nameservers.len(), 1);
    assert!(!enroll.live);
    assert_eq!(
        enroll.patience_ms, None,
        "the usual patience is not told: agents of before do not know the word"
    );
    let mut hasty = config();
    hasty["timeoutSeconds"] = json!(3);
    let hasty = self::question("ADD", &hasty);
    let EnrollRequest::Enroll(told) = &hasty.request else { panic!("{hasty:?}") };
    assert_eq!(told.patience_ms, Some(3000));
    let printed = conclude(question.ending, Ok(EnrollReply::Ok)).unwrap();
    assert_eq!(printed, Some(previous()));
}

#[test]
fn versions_are_told_without_a_configuration() {
    for stdin in ["", r#"{"cniVersion":"0.4.0"}"#] {
        let Plan::Answer(Some(answer)) = plan(&environment("VERSION"), stdin.as_bytes()).unwrap()
        else {
            panic!("no answer")
        };
        assert_eq!(answer["supportedVersions"], json!(["0.4.0", "1.0.0", "1.1.0"]));
        assert!(answer["cniVersion"].is_string());
    }
}

#[test]
fn bad_environment_is_code_4() {
    let check = |change: fn(&mut Environment), named: &str| {
        for command in ["ADD", "CHECK"] {
            let mut environment = environment(command);
            change(&mut environment);
            let error = planned(&environment, &config()).unwrap_err();
            assert_eq!(error.code, Code::InvalidEnvironment, "{named}");
            assert!(error.message.contains(named), "{error:?}");
        }
    };
    check(|e| e.command = None, "CNI_COMMAND");
    check(|e| e.command = Some("add".to_owned()), "CNI_COMMAND");
    check(|e| e.container_id = None, "CNI_CONTAINERID");
    check(|e| e.container_id = Some("a/b".to_owned()), "CNI_CONTAINERID");
    check(|e| e.netns = Some(String::new()), "CNI_NETNS");
    check(|e| e.netns = Some("relative".to_owned()), "CNI_NETNS");
    check(|e| e.interface = None, "CNI_IFNAME");
    check(|e| e.interface = Some("a/b".to_owned()), "CNI_IFNAME");
    check(|e| e.interface = Some("sixteen-letters-".to_owned()), "CNI_IFNAME");
    check(|e| e.args = None, "CNI_ARGS");
    check(|e| e.args = Some("K8S_POD_NAMESPACE".to_owned()), "CNI_ARGS");
    check(|e| e.args = Some("K8S_POD_NAMESPACE=shop".to_owned()), "CNI_ARGS");
    check(|e| e.args = Some("K8S_POD_NAMESPACE=Shop;K8S_POD_NAME=a".to_owned()), "CNI_ARGS");
    check(|e| e.args = Some("K8S_POD_NAMESPACE=a;K8S_POD_NAMESPACE=b".to_owned()), "CNI_ARGS");
    check(|e| e.args = Some(ARGS.replace("0b1c", "../x")), "CNI_ARGS");
    check(|e| e.args = Some(ARGS.replace("c0ffee", "other")), "CNI_ARGS");
}

#[test]
fn bad_configurations_have_their_codes() {
    let check = |key: &str, value: Value, code: Code| {
        let mut config = config();
        config[key] = value;
        let error = planned(&environment("ADD"), &config).unwrap_err();
        assert_eq!(error.code, code, "{key}: {error:?}");
    };
    check("cniVersion", Value::Null, Code::IncompatibleVersion);
    check("cniVersion", "0.3.1".into(), Code::IncompatibleVersion);
    check("cniVersion", "2.0.0".into(), Code::IncompatibleVersion);
    check("cniVersion", 1.into(), Code::Decode);
    check("agentSocket", "run/agent.sock".into(), Code::InvalidConfig);
    check("timeoutSeconds", 0.into(), Code::InvalidConfig);
    check("timeoutSeconds", 301.into(), Code::InvalidConfig);
    check("timeoutSeconds", (-1).into(), Code::Decode);
    check("agentWaitSeconds", 61.into(), Code::InvalidConfig);
    check("excludeNamespaces", "kube-system".into(), Code::Decode);
    check("prevResult", Value::Null, Code::InvalidConfig);
    check("prevResult", json!([]), Code::InvalidConfig);
    check("prevResult", json!({}), Code::Decode);
    check("prevResult", json!({ "ips": [{ "address": "10.0.0/24" }] }), Code::Decode);
    check("prevResult", json!({ "ips": [{ "address": "127.0.0.1/8" }] }), Code::Decode);
    check(
        "prevResult",
        json!({ "ips": [{ "interface": 9, "address": "10.0.0.2" }] }),
        Code::Decode,
    );
    check(
        "prevResult",
        json!({ "ips": [{ "interface": -1, "address": "10.0.0.2" }] }),
        Code::Decode,
    );
    for stdin in ["", "{", "[]", "null", "\u{0}"] {
        let error = plan(&environment("ADD"), stdin.as_bytes()).unwrap_err();
        assert_eq!(error.code, Code::Decode, "{stdin:?}");
    }
}

#[test]
fn excluded_namespaces_never_wait_for_the_agent() {
    let mut environment = environment("ADD");
    environment.args = Some(ARGS.replace("shop", "kube-system"));
    assert_eq!(planned(&environment, &config()).unwrap(), Plan::Answer(Some(previous())));
    let mut own_list = config();
    own_list["excludeNamespaces"] = json!(["other"]);
    assert!(matches!(planned(&environment, &own_list).unwrap(), Plan::Ask(_)));
}

#[test]
fn delete_names_the_sandbox_only_and_never_fails_for_want_of_an_agent() {
    let mut environment = environment("DEL");
    environment.netns = None;
    environment.args = None;
    let Plan::Ask(question) = planned(&environment, &config()).unwrap() else { panic!() };
    let EnrollRequest::Unenroll { pod: PodSelector::Container(id), gone: true } = question.request
    else {
        panic!("{:?}", question.request)
    };
    assert_eq!(id.as_str(), "c0ffee");
    for answer in [Err(away()), Err(AskError::NoAnswer(FrameError::Truncated)), Ok(refused(false))]
    {
        assert_eq!(conclude(Ending::Deleted, answer), Ok(None));
    }
}

#[test]
fn collection_needs_the_list_of_what_is_valid() {
    let error = planned(&environment("GC"), &config()).unwrap_err();
    assert_eq!(error.code, Code::InvalidConfig);
    let mut listed = config();
    listed["cni.dev/valid-attachments"] = json!([
        { "containerID": "a", "ifname": "eth0" },
        { "containerID": "b", "ifname": "eth0" },
        { "containerID": "a", "ifname": "net1" },
    ]);
    let EnrollRequest::Gc { valid } = question("GC", &listed).request else { panic!() };
    assert_eq!(valid.len(), 2);
    listed["cni.dev/valid-attachments"] = json!([{ "containerID": "../a" }]);
    assert_eq!(planned(&environment("GC"), &listed).unwrap_err().code, Code::Decode);
}

#[test]
fn answers_become_the_runtimes_codes() {
    let check = |ending: Ending, answer: Result<EnrollReply, AskError>, code: Option<Code>| {
        let shown = format!("{ending:?} {answer:?}");
        assert_eq!(conclude(ending, answer).err().map(|error| error.code), code, "{shown}");
    };
    let excluded = || Ok(EnrollReply::Excluded { reason: "namespace".to_owned() });
    let pods = || Ok(EnrollReply::Pods { pods: Vec::new() });
    let timed_out = || Err(AskError::NoAnswer(FrameError::Late));
    let added = || Ending::Added(json!({}));
    check(added(), Ok(EnrollReply::Ok), None);
    check(added(), excluded(), None);
    check(added(), Err(away()), Some(Code::TryAgainLater));
    check(added(), timed_out(), Some(Code::TryAgainLater));
    check(added(), Ok(refused(true)), Some(Code::TryAgainLater));
    check(added(), Ok(refused(false)), Some(Code::Refused));
    check(added(), pods(), Some(Code::TryAgainLater));
    check(Ending::Checked, Ok(EnrollReply::Ok), None);
    check(Ending::Checked, excluded(), None);
    check(Ending::Checked, Ok(refused(false)), Some(Code::NotAsExpected));
    check(Ending::Checked, Err(away()), Some(Code::TryAgainLater));
    check(Ending::Available, Ok(EnrollReply::Ok), None);
    check(Ending::Available, Ok(refused(true)), Some(Code::Unavailable));
    check(Ending::Available, Err(away()), Some(Code::UnavailableLimited));
    check(Ending::Collected, Ok(EnrollReply::Ok), None);
    check(Ending::Collected, Err(away()), Some(Code::TryAgainLater));
}

#[test]
fn errors_have_the_form_of_the_specification() {
    let shown = CniError::new(Code::TryAgainLater, "why", "details").to_json("1.1.0");
    let expected = json!({ "cniVersion": "1.1.0", "code": 11, "msg": "why", "details": "details" });
    assert_eq!(shown, expected);
    let numbers: Vec<u32> = [Code::IncompatibleVersion, Code::Decode, Code::UnavailableLimited]
        .map(Code::number)
        .into();
    assert_eq!(numbers, [1, 6, 51]);
}

#[test]
fn an_unusable_configuration_still_tells_its_version() {
    assert_eq!(Config::version_of(br#"{"cniVersion":"0.3.1","prevResult":7}"#), "0.3.1");
    assert_eq!(Config::version_of(b"{"), "1.1.0");
}

proptest! {
    #[test]
    fn nothing_a_runtime_says_makes_the_plugin_panic(
        args in "[A-Z0-9_=;/. ]{0,60}", stdin in proptest::collection::vec(any::<u8>(), 0..200)
    ) {
        for command in ["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"] {
            let environment = Environment { args: Some(args.clone()), ..environment(command) };
            let _whatever = plan(&environment, &stdin);
            let _with_a_good_configuration = planned(&environment, &config());
        }
    }

    #[test]
    fn no_previous_result_makes_it_panic(position in 0_usize..2000, byte in any::<u8>()) {
        let mut text = config().to_string().into_bytes();
        let at = position % text.len();
        text[at] = byte;
        let _whatever = plan(&environment("ADD"), &text);
    }
}
