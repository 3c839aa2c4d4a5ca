//! A sniffer: tcpdump on an interface, and what may not be in its capture.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;

use crate::process::{Process, in_namespace, run};
use crate::wait::{PATIENCE, until};

/// A capture that runs until [`Sniffer::finish`].
#[derive(Debug)]
pub struct Sniffer {
    process: Process,
    file: PathBuf,
}

/// A finished capture.
#[derive(Debug)]
pub struct Capture {
    file: PathBuf,
}

impl Sniffer {
    /// Captures whole packets on `interface` in `namespace` into `<folder>/<name>.pcap`.
    ///
    /// # Errors
    /// When tcpdump does not start listening.
    pub fn start(
        namespace: &str,
        interface: &str,
        folder: &Path,
        name: &str,
    ) -> anyhow::Result<Self> {
        let file = folder.join(format!("{name}.pcap"));
        let mut command = in_namespace(Some(namespace), "tcpdump");
        command
            .args(["-i", interface, "--immediate-mode", "-U", "-n", "-s", "0", "-B", "65536", "-w"])
            .arg(&file);
        let process = Process::start(&format!("sniff-{name}"), &mut command, folder)?;
        until("tcpdump listening", PATIENCE, || {
            Ok(process.log().contains("listening on").then_some(()))
        })?;
        Ok(Self { process, file })
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// When tcpdump failed or dropped packets, so that the capture proves nothing.
    pub fn finish(mut self) -> anyhow::Result<Capture> {
        // What is already in the kernel's buffer belongs to the capture.
        std::thread::sleep(Duration::from_millis(200));
        self.process.signal(Signal::SIGINT)?;
        until("tcpdump ending", PATIENCE, || Ok((!self.process.running()).then_some(())))?;
        let log = self.process.log();
        let count = |what: &str| {
            let line = log.lines().find(|line| line.contains(what))?;
            line.split(' ').next()?.parse::<u64>().ok()
        };
        let received = count("received by filter");
        let whole = received.is_some() && received == count("captured");
        if !whole || !log.contains("0 packets dropped by kernel") {
            bail!("the capture is incomplete: {log}");
        }
        Ok(Capture { file: self.file })
    }
}

impl Capture {
    /// One line per packet that matches the pcap `filter`.
    ///
    /// # Errors
    /// When tcpdump cannot read the capture or the filter is wrong.
    pub fn packets(&self, filter: &str) -> anyhow::Result<Vec<String>> {
        let mut command = in_namespace(None, "tcpdump");
        command.args(["-n", "-r"]).arg(&self.file).arg(filter);
        let text = run(&mut command, PATIENCE)?.output().context("reading the capture")?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// True when the bytes `needle` stand anywhere in the capture.
    ///
    /// # Errors
    /// When the capture cannot be read.
    pub fn contains(&self, needle: &[u8]) -> anyhow::Result<bool> {
        let bytes = std::fs::read(&self.file)?;
        Ok(bytes.windows(needle.len()).any(|window| window == needle))
    }
}
