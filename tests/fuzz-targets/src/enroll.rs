//! The enrolment protocol and the CNI plugin's inputs.

use mesh_enroll::cni::conflist::{chain, unchain};
use mesh_enroll::cni::{AskError, Ending, Environment, Plan, conclude, plan};
use mesh_enroll::{
    EnrollReply, EnrollRequest, FrameError, MAX_FRAME_BYTES, PodPhase, Refusal, encode, read_reply,
    read_request,
};
use serde_json::Value;

use crate::input::{Input, long, texts};

/// A frame from a client: what is read is written and read back as itself, and only good names come through.
pub fn request(data: &[u8]) {
    let request = match read_request(&mut &*data) {
        Ok(request) => request,
        Err(error) => return check(&error, data),
    };
    let frame = encode(&request).expect("what came in a frame fits into one");
    assert_eq!(read_request(&mut &*frame).expect("our own frame"), request);
    if let EnrollRequest::Enroll(enroll) = &request {
        assert!(enroll.ips.len() <= 16 && enroll.nameservers.len() <= 16);
        assert!(enroll.ips.iter().all(|ip| !ip.is_loopback() && ip.to_canonical() == *ip));
        assert!(enroll.netns.as_str().starts_with('/'), "{}", enroll.netns.as_str());
    }
}

fn check(error: &FrameError, data: &[u8]) {
    if let Some(length) = data.first_chunk::<4>()
        && u32::from_be_bytes(*length) as usize > MAX_FRAME_BYTES
    {
        assert!(matches!(error, FrameError::TooLong { .. }));
    }
}

fn frames(json: &[&str]) -> Vec<Vec<u8>> {
    let framed = |json: &&str| {
        let length = u32::try_from(json.len()).expect("a seed is short");
        [&length.to_be_bytes(), json.as_bytes()].concat()
    };
    json.iter().map(framed).collect()
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let mut seeds = frames(&[
        r#"{"request":"enroll","pod":{"uid":"u-1","namespace":"shop","name":"cart","service_account":"cart"},"netns":"/run/netns/cart","ips":["10.0.0.1","fd00::1"],"container_id":"c0ffee","nameservers":["127.0.0.53"],"live":true}"#,
        r#"{"request":"unenroll","pod":{"container":"c0ffee"},"gone":true}"#,
        r#"{"request":"check","pod":{"name":{"namespace":"shop","name":"cart"}}}"#,
        r#"{"request":"gc","valid":["a","b"]}"#,
        r#"{"request":"status"}"#,
        r#"{"request":"list"}"#,
    ]);
    seeds.push(vec![0xff, 0xff, 0xff, 0xff, b'{']);
    seeds
}

/// A frame from an agent.
pub fn reply(data: &[u8]) {
    let reply = match read_reply(&mut &*data) {
        Ok(reply) => reply,
        Err(error) => return check(&error, data),
    };
    let frame = encode(&reply).expect("what came in a frame fits into one");
    assert_eq!(read_reply(&mut &*frame).expect("our own frame"), reply);
    if let EnrollReply::Pods { pods } = &reply {
        assert!(
            pods.iter()
                .all(|pod| !matches!(pod.phase, PodPhase::Enrolled) || pod.ips.len() < 1 << 16)
        );
    }
    drop(conclude(Ending::Checked, Ok(reply)));
}

pub(crate) fn reply_seeds() -> Vec<Vec<u8>> {
    frames(&[
        r#"{"reply":"ok"}"#,
        r#"{"reply":"excluded","reason":"namespace kube-system is excluded"}"#,
        r#"{"reply":"refused","reason":"no","remedy":"yes","retryable":true}"#,
        r#"{"reply":"pods","pods":[{"pod":{"uid":"u-1","namespace":"shop","name":"cart","service_account":""},"netns":"/run/netns/c","ips":["10.0.0.1"],"container_id":"c","phase":"enrolled","detail":""}]}"#,
    ])
}

/// A configuration list of another tool: chaining to it and back changes nothing of it, and chaining twice is once.
pub fn conflist(data: &[u8]) {
    let settings = serde_json::Map::from_iter([("agentSocket".to_owned(), "/s".into())]);
    let Ok(chained) = chain(data, &settings) else {
        assert!(unchain(data).is_err(), "both read alike");
        return;
    };
    let Some(chained) = chained else { return };
    assert!(matches!(chain(&chained, &settings), Ok(None)), "done already");
    let back = unchain(&chained).expect("what was written is read").expect("it holds the plugin");
    let plain = unchain(data).expect("it was read before").unwrap_or_else(|| data.to_vec());
    let parse = |text: &[u8]| serde_json::from_slice::<Value>(text).expect("it was read before");
    let (back, plain) = (parse(&back), parse(&plain));
    // A fraction may be read as its neighbour: reading is not exact to the last bit.
    assert!(back == plain || has_fraction(&plain), "{back} is not {plain}");
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fraction),
        Value::Object(members) => members.values().any(has_fraction),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

pub(crate) fn conflist_seeds() -> Vec<Vec<u8>> {
    let lists = [
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"},{"type":"portmap"}]}"#,
        r#"{"plugins":[{"type":"culvert-cni"},{"type":"ptp"},{"type":"culvert-cni","agentSocket":"/s"}]}"#,
        r#"{"plugins":[]}"#,
        r#"{"type":"bridge"}"#,
    ];
    lists.map(|list| list.as_bytes().to_vec()).into()
}

/// An invocation by a runtime: five variables and standard input. The result of the plugins before goes through as it
/// came, and an error has the specification's form.
pub fn cni(data: &[u8]) {
    let mut input = Input::new(data);
    let mut variable = || {
        let text = input.long();
        (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
    };
    let environment = Environment {
        command: variable(),
        container_id: variable(),
        netns: variable(),
        interface: variable(),
        args: variable(),
    };
    let stdin = input.rest();
    let question = match plan(&environment, stdin) {
        Ok(Plan::Answer(_)) => return,
        Ok(Plan::Ask(question)) => question,
        Err(error) => {
            let json = error.to_json("1.0.0");
            assert!(json["code"].is_u64() && json["msg"].is_string(), "{json}");
            return;
        }
    };
    assert!(question.socket.is_absolute());
    assert!((1..=300).contains(&question.answer_within.as_secs()));
    encode(&question.request).map_or_else(
        |error| assert!(matches!(error, FrameError::TooLong { .. })),
        |frame| assert_eq!(read_request(&mut &*frame).expect("our own frame"), question.request),
    );
    let refusal = Refusal { reason: "r".to_owned(), remedy: String::new(), retryable: false };
    let refused = conclude(question.ending.clone(), Ok(refusal.into()));
    let away = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    let unasked = conclude(question.ending.clone(), Err(AskError::Away(away)));
    let passed = conclude(question.ending.clone(), Ok(EnrollReply::Ok));
    match question.ending {
        Ending::Added(result) => {
            assert!(refused.is_err() && unasked.is_err(), "a pod would start in the clear");
            // Text in keys of others is not looked at, so the whole may still be no JSON.
            if let Ok(config) = serde_json::from_slice::<Value>(stdin) {
                assert_eq!(config["prevResult"], result);
            }
            assert_eq!(passed, Ok(Some(result)));
        }
        Ending::Deleted => assert!(refused.is_ok() && unasked.is_ok() && passed.is_ok()),
        Ending::Checked | Ending::Available | Ending::Collected => {
            assert!(refused.is_err() && unasked.is_err() && passed == Ok(None));
        }
    }
}

pub(crate) fn cni_seeds() -> Vec<Vec<u8>> {
    let seed = |command: &str, config: &str| {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u-1";
        let variables = [command, "c0ffee", "/run/netns/cart", "eth0", args];
        let mut seed: Vec<u8> = variables.iter().flat_map(|text| long(text.as_bytes())).collect();
        seed.extend(config.as_bytes());
        seed
    };
    let result = r#""prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/run/netns/cart"}],"ips":[{"address":"10.0.0.1/24","interface":1},{"address":"fd00::1/64"}],"dns":{"nameservers":["10.96.0.10"]}}"#;
    let config =
        |rest: &str| format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"culvert-cni",{rest}}}"#);
    let mut seeds = vec![
        seed("ADD", &config(result)),
        seed("DEL", &config(r#""agentSocket":"/run/a.sock","timeoutSeconds":5"#)),
        seed("CHECK", &config(result)),
        seed("STATUS", &config(r#""agentWaitSeconds":0"#)),
        seed(
            "GC",
            &config(r#""cni.dev/valid-attachments":[{"containerID":"c0ffee","ifname":"eth0"}]"#),
        ),
        seed("VERSION", r#"{"cniVersion":"1.1.0"}"#),
    ];
    seeds.extend(texts(&["{}"]));
    seeds
}
