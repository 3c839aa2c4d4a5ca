//! Connections of a pod to one of the lab's peers that are open while something else happens.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::lab::Lab;
use crate::pod::Pod;
use crate::wait::{PATIENCE, until};

/// A peer's client that has said `first`.
fn start(
    lab: &Lab,
    pod: &Pod,
    arguments: &[String],
    first: &str,
) -> anyhow::Result<(Child, BufReader<ChildStdout>)> {
    let program = lab.bin_dir().join("culvert-lab-peer");
    let mut child = pod
        .command(&program.to_string_lossy())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut said = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    if line.trim() == first {
        return Ok((child, said));
    }
    // It has ended, or never comes to it.
    child.kill()?;
    let output = child.wait_with_output()?;
    anyhow::bail!("the client said {line:?} {}", String::from_utf8_lossy(&output.stderr))
}

/// Quiet connections; they end with the value.
#[derive(Debug)]
pub struct Held {
    child: Child,
}

impl Held {
    /// Opens `count` connections of `pod` to `target`.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open(lab: &Lab, pod: &Pod, target: SocketAddr, count: u32) -> anyhow::Result<Self> {
        let arguments =
            ["idle".to_owned(), target.to_string(), count.to_string(), "--hold".to_owned()];
        let (child, _said) = start(lab, pod, &arguments, &format!("open {count}"))?;
        Ok(Self { child })
    }

    /// Uses each of the connections; what became of that, and what the program said.
    ///
    /// # Errors
    /// When the program cannot be told, or does not end.
    pub fn use_all(mut self) -> anyhow::Result<Result<(), String>> {
        self.child.stdin.take().context("no input")?.write_all(b"\n")?;
        until("the held connections being used", PATIENCE + Duration::from_secs(5), || {
            Ok(self.child.try_wait()?.map(drop))
        })?;
        let mut said = String::new();
        self.child.stderr.take().context("no errors")?.read_to_string(&mut said)?;
        Ok(if self.child.wait()?.success() { Ok(()) } else { Err(said) })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // One that has ended already is only waited for.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("ending held connections: {error}");
        }
    }
}

/// Connections of every kind, in use until [`finish`](Self::finish).
#[derive(Debug)]
pub struct Live {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Live {
    /// Begins them, from `pod` to the peer and the web server (on port `http`) at each of `server`; the quiet ones are open
    /// when this returns.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn start(lab: &Lab, pod: &Pod, http: u16, server: [IpAddr; 2]) -> anyhow::Result<Self> {
        let [first, second] = server.map(|ip| ip.to_string());
        let arguments = ["live".to_owned(), first, http.to_string(), second];
        let (child, said) = start(lab, pod, &arguments, "live")?;
        Ok(Self { child, said })
    }

    /// Ends the connections; gives `pings transfers connections requests longest-ping-µs`.
    ///
    /// # Errors
    /// When one was not whole, or one kind did nothing.
    pub fn finish(mut self) -> anyhow::Result<String> {
        drop(self.child.stdin.take());
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        let output = self.child.wait_with_output()?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "a connection was disturbed: {complaint}");
        ensure!(!line.split_whitespace().any(|count| count == "0"), "nothing was done: {line}");
        Ok(line.trim().to_owned())
    }
}
