//! HTTP over the daemons' Unix sockets.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use mesh_model::error_chain;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::arguments::{Daemon, Reach};
use crate::failure::Failure;

/// Largest answer taken, bytes: the dump of a mesh with 100,000 workloads fits.
const MAX_ANSWER_BYTES: usize = 512 * 1024 * 1024;

/// The admin interface of one daemon.
#[derive(Clone, Debug)]
pub(crate) struct AdminClient {
    daemon: Daemon,
    socket: PathBuf,
    timeout: Duration,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl AdminClient {
    /// The admin interface of `daemon`.
    pub(crate) fn new(daemon: Daemon, reach: &Reach) -> Self {
        let socket = match daemon {
            Daemon::Agent => reach.run_dir.join("admin.sock"),
            Daemon::Controller => reach.controller_socket.clone(),
        };
        Self { daemon, socket, timeout: Duration::from_secs(reach.timeout_seconds) }
    }

    /// True when there is a socket, whether or not somebody listens.
    pub(crate) fn is_there(&self) -> bool {
        self.socket.exists()
    }

    /// The body of `GET target`, where `target` is a path with its query.
    ///
    /// # Errors
    /// [`Failure::Unreachable`], [`Failure::NoAnswer`]; [`Failure::Answered`] for any status but 200.
    pub(crate) fn get(&self, target: &str) -> Result<Bytes, Failure> {
        self.ask(Method::GET, target, Bytes::new())
    }

    /// The body of `POST target` with `body`.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub(crate) fn post(&self, target: &str, body: impl Into<Bytes>) -> Result<Bytes, Failure> {
        self.ask(Method::POST, target, body.into())
    }

    /// An answer's JSON as a value.
    ///
    /// # Errors
    /// [`Failure::Unreadable`].
    pub(crate) fn read<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, Failure> {
        serde_json::from_slice(body)
            .map_err(|source| Failure::Unreadable { who: self.daemon.name(), source })
    }

    fn ask(&self, method: Method, target: &str, body: Bytes) -> Result<Bytes, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| self.unreachable(source))?;
        let answered = runtime.block_on(async {
            tokio::time::timeout(self.timeout, Box::pin(self.converse(method, target, body))).await
        });
        let (status, body) = answered.map_err(|_elapsed| {
            self.no_answer(format!("none in {} s", self.timeout.as_secs()))
        })??;
        if status == StatusCode::OK { Ok(body) } else { Err(self.refusal(status, &body)) }
    }

    async fn converse(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(error))?;
        let broken = |error: &dyn std::error::Error| self.no_answer(error_chain(error));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let request = http::Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .body(Full::new(body))
            .map_err(|error| broken(&error))?;
        // Driven beside the request; its failure shows there too.
        let driven = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| broken(&*error))?
            .to_bytes();
        driven.abort();
        Ok((status, body))
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> Failure {
        let problem = match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => body.error,
            Err(_other_body) => {
                let text = String::from_utf8_lossy(body);
                let line = text.lines().next().unwrap_or_default();
                format!("{status}: {}", line.chars().take(200).collect::<String>())
            }
        };
        // A path that is there and says so does not know a name in the question.
        if status == StatusCode::NOT_FOUND && problem != "no such path" {
            let remedy = format!("culvert config --of {} lists what it knows", self.daemon.name());
            return Failure::Usage { problem, remedy };
        }
        let remedy = match status {
            StatusCode::FORBIDDEN => "ask as root, or as the user it runs as",
            StatusCode::NOT_FOUND if problem == "no such path" => {
                "use culvert and the daemons of one version"
            }
            _ => "",
        };
        Failure::Answered { who: self.daemon.name(), problem, remedy: remedy.to_owned() }
    }

    fn unreachable(&self, source: io::Error) -> Failure {
        self.daemon.unreachable(&self.socket, source)
    }

    fn no_answer(&self, problem: String) -> Failure {
        Failure::NoAnswer { who: self.daemon.name(), socket: self.socket.clone(), problem }
    }
}

impl Daemon {
    /// What it is called in sentences.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Controller => "controller",
        }
    }

    /// Why nobody was reached at `socket`, and what to do about it.
    pub(crate) fn unreachable(self, socket: &Path, source: io::Error) -> Failure {
        let elsewhere = match self {
            Self::Agent => "name its folder with --run-dir or CULVERT_RUN_DIR",
            Self::Controller => {
                "start it with --admin-socket PATH, and name that with --controller-socket or \
                 CULVERT_CONTROLLER_SOCKET"
            }
        };
        let who = self.name();
        let is = |kind| source.kind() == kind;
        let remedy = if is(io::ErrorKind::PermissionDenied) {
            "ask as root".to_owned()
        } else if is(io::ErrorKind::ConnectionRefused) {
            format!("the {who} has ended; start it again")
        } else {
            format!("see that the {who} runs on this machine, and {elsewhere}")
        };
        Failure::Unreachable { who, socket: socket.to_owned(), remedy, source }
    }
}

/// A query's `key=value`, percent-encoded.
pub(crate) fn query(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (index, (key, value)) in pairs.iter().enumerate() {
        text.push(if index == 0 { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
                text.push(char::from(byte));
            } else {
                text.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_holds_any_text() {
        let text = query(&[("from", "shop/a b"), ("to", "fd00::1&x=ä")]);
        assert_eq!(text, "?from=shop/a%20b&to=fd00%3A%3A1%26x%3D%C3%A4");
    }
}
