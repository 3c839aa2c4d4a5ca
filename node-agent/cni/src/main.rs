//! The chained CNI plugin: asks the node's agent to capture a pod, and lets the pod start only when it is.
//!
//! What is asked and answered is decided in [`mesh_enroll::cni`]; this program is its environment, standard input,
//! standard output and socket.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mesh_enroll::cni::config::MAX_CONFIG_BYTES;
use mesh_enroll::cni::{AskError, CniError, Code, Config, Environment, Plan, Question};
use mesh_enroll::cni::{conclude, plan};
use mesh_enroll::{EnrollReply, FrameError, call};
use serde_json::Value;

fn main() -> ExitCode {
    let mut stdin = Vec::new();
    let outcome = read_stdin(&mut stdin).and_then(|()| run(&stdin));
    let (printed, code) = match outcome {
        Ok(printed) => (printed, ExitCode::SUCCESS),
        Err(error) => (Some(error.to_json(&Config::version_of(&stdin))), ExitCode::FAILURE),
    };
    match printed.map(|value| print(&value)) {
        None | Some(Ok(())) => code,
        // Nobody reads: the runtime sees the exit code and the missing result.
        Some(Err(_closed)) => ExitCode::FAILURE,
    }
}

fn run(stdin: &[u8]) -> Result<Option<Value>, CniError> {
    let environment = Environment::read(|name| std::env::var(name).ok());
    match plan(&environment, stdin)? {
        Plan::Answer(value) => Ok(value),
        Plan::Ask(question) => {
            let answer = ask(&question);
            conclude(question.ending, answer)
        }
    }
}

fn ask(question: &Question) -> Result<EnrollReply, AskError> {
    let mut stream = connect(&question.socket, question.connect_for).map_err(AskError::Away)?;
    let within = Some(question.answer_within);
    stream
        .set_read_timeout(within)
        .and_then(|()| stream.set_write_timeout(within))
        .map_err(|error| AskError::NoAnswer(FrameError::Io(error)))?;
    call(&mut stream, &question.request).map_err(AskError::NoAnswer)
}

/// Connects, again and again for as long as `patience` lasts: an agent that restarts is back in a moment.
fn connect(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() + RETRY_INTERVAL > deadline => return Err(error),
            Err(_not_there_yet) => std::thread::sleep(RETRY_INTERVAL),
        }
    }
}

/// Between two tries to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

fn read_stdin(into: &mut Vec<u8>) -> Result<(), CniError> {
    let limit = u64::try_from(MAX_CONFIG_BYTES).unwrap_or(u64::MAX);
    let failed = |what: String| Err(CniError::new(Code::Io, "standard input cannot be read", what));
    match io::stdin().lock().take(limit + 1).read_to_end(into) {
        Err(error) => failed(error.to_string()),
        Ok(_) if into.len() > MAX_CONFIG_BYTES => {
            into.clear();
            failed(format!("more than {MAX_CONFIG_BYTES} bytes"))
        }
        Ok(_) => Ok(()),
    }
}

fn print(value: &Value) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value)?;
    stdout.write_all(b"\n")?;
    stdout.flush()
}
