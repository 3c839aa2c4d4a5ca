//! Daemons that answer what they are told to.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use mesh_enroll::{
    ContainerId, EnrollReply, EnrollRequest, EnrolledPod, NetnsPath, PodPhase, PodRef,
    read_request, write_reply,
};
use serde_json::json;

/// A folder of sockets. The threads behind them end with the test's process.
pub(crate) struct Daemon {
    folder: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Answers each `GET` of a target, and each `POST` of one that is written `POST target`, with its status and body,
    /// everything else with 404.
    pub(crate) fn serve_http(&self, socket: &str, answers: &[(&str, u16, String)]) {
        let listener = UnixListener::bind(self.folder().join(socket)).expect("a socket");
        let answers: BTreeMap<String, (u16, String)> = answers
            .iter()
            .map(|(target, status, body)| ((*target).to_owned(), (*status, body.clone())))
            .collect();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let first = lines.next().unwrap_or_default();
                lines.find(String::is_empty);
                let asked =
                    first.rsplit_once(' ').map_or(first.as_str(), |(asked, _version)| asked);
                let target = asked.strip_prefix("GET ").unwrap_or(asked);
                let absent =
                    || (404, json!({ "error": format!("nothing like {target}") }).to_string());
                let (status, body) = answers.get(target).cloned().unwrap_or_else(absent);
                let length = body.len();
                write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{body}")
                    .expect("the asker reads");
            }
        });
    }

    /// Answers one enrolment request after the other, and hands out what was asked.
    pub(crate) fn serve_enrolment(&self, replies: Vec<EnrollReply>) -> Receiver<EnrollRequest> {
        let listener = UnixListener::bind(self.folder().join("agent.sock")).expect("a socket");
        let (sender, asked) = channel();
        std::thread::spawn(move || {
            for reply in replies {
                let (mut stream, _) = listener.accept().expect("a connection");
                let request = read_request(&mut stream).expect("a request");
                write_reply(&mut stream, &reply).expect("the asker reads");
                if sender.send(request).is_err() {
                    return;
                }
            }
        });
        asked
    }
}

/// A pod that is in the mesh.
pub(crate) fn pod(namespace: &str, name: &str) -> EnrolledPod {
    EnrolledPod {
        pod: PodRef::new("u-1", namespace, name, "cart").expect("names"),
        netns: NetnsPath::new("/run/netns/a").expect("a path"),
        ips: ["10.0.0.7".parse().expect("an address")].into(),
        container_id: ContainerId::new("c-1").expect("an id"),
        phase: PodPhase::Enrolled,
        detail: String::new(),
    }
}
