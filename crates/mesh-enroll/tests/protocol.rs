//! The protocol as a whole: what is sent arrives, and what is not a message is refused by name.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::io::Cursor;

use mesh_enroll::{
    ContainerId, Enroll, EnrollReply, EnrollRequest, EnrolledPod, FrameError, MAX_FRAME_BYTES,
    NetnsPath, PodPhase, PodRef, PodSelector, Refusal, decode_request, encode, read_reply,
    read_request, write_reply, write_request,
};
use proptest::prelude::*;

fn enroll() -> Enroll {
    Enroll {
        pod: PodRef::new("0b1c", "shop", "cart-0", "cart").unwrap(),
        netns: NetnsPath::new("/run/netns/cart").unwrap(),
        ips: BTreeSet::from(["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]),
        container_id: ContainerId::new("c0ffee").unwrap(),
        nameservers: BTreeSet::from(["127.0.0.53".parse().unwrap()]),
        live: false,
        patience_ms: Some(3000),
    }
}

#[test]
fn every_request_arrives_as_sent() {
    let container = ContainerId::new("c0ffee").unwrap();
    let pod = enroll().pod;
    for request in [
        EnrollRequest::Enroll(enroll()),
        EnrollRequest::Unenroll { pod: PodSelector::Container(container.clone()), gone: true },
        EnrollRequest::Unenroll { pod: PodSelector::Uid(pod.uid.clone()), gone: false },
        EnrollRequest::Check { pod: PodSelector::Name(pod.name.clone()) },
        EnrollRequest::Status,
        EnrollRequest::Gc { valid: BTreeSet::from([container]) },
        EnrollRequest::List,
    ] {
        let mut wire = Vec::new();
        write_request(&mut wire, &request).unwrap();
        assert_eq!(read_request(&mut Cursor::new(wire)).unwrap(), request);
    }
}

#[test]
fn every_reply_arrives_as_sent() {
    let Enroll { pod, netns, ips, container_id, .. } = enroll();
    let listed = EnrolledPod {
        pod,
        netns,
        ips,
        container_id,
        phase: PodPhase::Pending,
        detail: "network namespace is gone".to_owned(),
    };
    for reply in [
        EnrollReply::Ok,
        EnrollReply::Excluded { reason: "namespace is not labelled".to_owned() },
        EnrollReply::Pods { pods: vec![listed] },
        EnrollReply::Refused(Refusal {
            reason: "not ready".to_owned(),
            remedy: "wait".to_owned(),
            retryable: true,
        }),
    ] {
        let mut wire = Vec::new();
        write_reply(&mut wire, &reply).unwrap();
        assert_eq!(read_reply(&mut Cursor::new(wire)).unwrap(), reply);
    }
}

#[test]
fn bad_requests_are_refused_by_field() {
    let good = serde_json::to_value(EnrollRequest::Enroll(enroll())).unwrap();
    let check = |pointer: &str, value: serde_json::Value, expected: &str| {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let error = decode_request(&serde_json::to_vec(&bad).unwrap()).unwrap_err();
        let FrameError::Malformed(source) = error else { panic!("{pointer}: {error}") };
        assert!(source.to_string().contains(expected), "{pointer}: {source}");
    };
    check("/request", "enrol".into(), "unknown variant");
    check("/pod", serde_json::Value::Null, "invalid type");
    check("/pod/uid", "../etc".into(), "pod uid");
    check("/pod/namespace", "Shop".into(), "namespace");
    check("/pod/name", "a/b".into(), "pod name");
    check("/pod/service_account", "a b".into(), "service account");
    check("/netns", "relative".into(), "network namespace path");
    check("/container_id", "".into(), "container id");
    check("/ips/0", "10.0.0".into(), "invalid IP address");
    check("/ips/0", "0.0.0.0".into(), "not an address of a pod");
    check("/ips/0", "127.0.0.1".into(), "not an address of a pod");
    check("/ips/0", "::ffff:127.0.0.1".into(), "not an address of a pod");
    check("/ips/0", "224.0.0.1".into(), "not an address of a pod");
    check("/ips/0", "ff02::1".into(), "not an address of a pod");
    let many: Vec<String> = (0..17).map(|last| format!("10.0.0.{last}")).collect();
    check("/ips", many.into(), "17 addresses");
    check("/nameservers/0", "224.0.0.1".into(), "not an address of a pod");
    check("/live", "yes".into(), "invalid type");
}

#[test]
fn unknown_fields_are_refused() {
    let json = br#"{"request":"list","extra":1}"#;
    // A unit variant of an internally tagged enum takes no fields; the pod's do.
    let _listed = decode_request(json);
    let mut value = serde_json::to_value(EnrollRequest::Enroll(enroll())).unwrap();
    value["pod"]["labels"] = "x".into();
    assert!(decode_request(&serde_json::to_vec(&value).unwrap()).is_err());
}

#[test]
fn broken_frames_are_refused() {
    let read = |wire: &[u8]| read_request(&mut Cursor::new(wire)).unwrap_err();
    assert!(matches!(read(b""), FrameError::Truncated));
    assert!(matches!(read(&[0, 0]), FrameError::Truncated));
    assert!(matches!(read(&[0, 0, 0, 9, b'{']), FrameError::Truncated));
    assert!(matches!(read(&[0, 0, 0, 0]), FrameError::Malformed(_)));
    assert!(matches!(read(&[0xff; 8]), FrameError::TooLong { .. }));
    assert!(matches!(read(&[0, 16, 0, 1, 0]), FrameError::TooLong { bytes: 1_048_577 }));
    assert!(matches!(read(&[0, 0, 0, 2, 0xff, 0xfe]), FrameError::Malformed(_)));
    let deep = "[".repeat(10_000);
    assert!(matches!(decode_request(deep.as_bytes()), Err(FrameError::Malformed(_))));
}

#[test]
fn a_message_that_does_not_fit_is_an_error_at_the_sender() {
    let reply = EnrollReply::Excluded { reason: "x".repeat(MAX_FRAME_BYTES) };
    assert!(matches!(encode(&reply), Err(FrameError::TooLong { .. })));
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _decoded = decode_request(&bytes);
        let _framed = read_request(&mut Cursor::new(bytes));
    }

    #[test]
    fn damaged_requests_never_panic_and_never_gain_invalid_names(
        position in 0_usize..300, byte in any::<u8>()
    ) {
        let mut json = serde_json::to_vec(&EnrollRequest::Enroll(enroll())).unwrap();
        let at = position % json.len();
        json[at] = byte;
        if let Ok(EnrollRequest::Enroll(enroll)) = decode_request(&json) {
            prop_assert!(enroll.netns.as_str().starts_with('/'));
            prop_assert!(!enroll.pod.uid.as_str().contains('/'));
        }
    }
}
