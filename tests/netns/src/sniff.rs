//! A sniffer: tcpdump on an interface, and what may not be in its capture.

use std::path::{Path, PathBuf};

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
    /// Captures whole packets on `interface` (`any`: on each) in `namespace` into `<folder>/<name>.pcap`.
    ///
    /// # Errors
    /// When tcpdump does not start listening.
    pub fn start(
        namespace: &str,
        interface: &str,
        folder: &Path,
        name: &str,
    ) -> anyhow::Result<Self> {
        Self::start_for(namespace, interface, folder, name, "")
    }

    /// As [`start`](Self::start), for packets that match `filter` alone: under bulk traffic nobody could keep up with all.
    ///
    /// # Errors
    /// When tcpdump does not start listening.
    pub fn start_for(
        namespace: &str,
        interface: &str,
        folder: &Path,
        name: &str,
        filter: &str,
    ) -> anyhow::Result<Self> {
        let file = folder.join(format!("{name}.pcap"));
        let mut command = in_namespace(Some(namespace), "tcpdump");
        command
            .args(["-i", interface, "--immediate-mode", "-U", "-n", "-s", "0", "-B", "65536", "-w"])
            .arg(&file)
            .args(filter.split_whitespace());
        let process = Process::start(&format!("sniff-{name}"), &mut command, folder)?;
        until("tcpdump listening", PATIENCE, || {
            Ok(process.log().contains("listening on").then_some(()))
        })?;
        Ok(Self { process, file })
    }

    /// Ends the capture, once everything is written that arrived before the call.
    ///
    /// # Errors
    /// When tcpdump failed or dropped packets, so that the capture proves nothing.
    pub fn finish(mut self) -> anyhow::Result<Capture> {
        let before = self.process.log().len();
        self.process.signal(Signal::SIGUSR1)?;
        let mut arrived = None;
        until("tcpdump writing what arrived", PATIENCE, || {
            let log = self.process.log();
            let Some(now) = log.get(before..).and_then(last_counts) else { return Ok(None) };
            if now.captured >= *arrived.get_or_insert(now.received) {
                return Ok(Some(()));
            }
            self.process.signal(Signal::SIGUSR1)?;
            Ok(None)
        })?;
        self.process.signal(Signal::SIGINT)?;
        until("tcpdump ending", PATIENCE, || Ok((!self.process.running()).then_some(())))?;
        let log = self.process.log();
        let counts =
            last_counts(&log).with_context(|| format!("tcpdump counted nothing: {log}"))?;
        if counts.dropped > 0 {
            bail!("the capture is incomplete: {log}");
        }
        Ok(Capture { file: self.file })
    }
}

/// What tcpdump says of itself.
struct Counts {
    captured: u64,
    received: u64,
    dropped: u64,
}

/// The last counts that are complete in its log: on one line when asked, on three at the end.
fn last_counts(log: &str) -> Option<Counts> {
    let last = |what: &str| {
        let before = &log[..log.rfind(what)?];
        before.trim_end().rsplit([' ', '\n']).find(|word| !word.starts_with("packet"))?.parse().ok()
    };
    Some(Counts {
        captured: last("captured")?,
        received: last("received by filter")?,
        dropped: last("dropped by kernel")?,
    })
}

/// One frame of a [`Capture`].
#[derive(Debug)]
pub struct Frame {
    /// Index of the interface, in a capture of all of them.
    pub interface: Option<u32>,
    /// It went out by the interface, as far as the capture knows.
    pub outgoing: bool,
    /// What it holds, with the capture's own header.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// True when `needle` stands in it.
    #[must_use]
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.bytes.windows(needle.len()).any(|window| window == needle)
    }
}

impl Capture {
    /// One line per packet that matches the pcap `filter`, which begins with the time in seconds since 1970.
    ///
    /// # Errors
    /// When tcpdump cannot read the capture or the filter is wrong.
    pub fn packets(&self, filter: &str) -> anyhow::Result<Vec<String>> {
        let mut command = in_namespace(None, "tcpdump");
        command.args(["-n", "-tt", "-r"]).arg(&self.file).arg(filter);
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

    /// Every frame, in order (pcap file format, LINKTYPE_LINUX_SLL2 for captures of all interfaces).
    ///
    /// # Errors
    /// When the file is not such a capture.
    pub fn frames(&self) -> anyhow::Result<Vec<Frame>> {
        const ALL_INTERFACES: u32 = 276;
        const OUTGOING: u8 = 4;
        let bytes = std::fs::read(&self.file)?;
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        if word(0) != Some(0xa1b2_c3d4) {
            bail!("{} is not a capture", self.file.display());
        }
        let of_all = word(20) == Some(ALL_INTERFACES);
        let mut frames = Vec::new();
        let mut at = 24;
        while at < bytes.len() {
            let length = word(at + 8).context("half a record")? as usize;
            let frame = bytes.get(at + 16..at + 16 + length).context("half a frame")?;
            let index = frame.get(4..8).and_then(|index| index.try_into().ok());
            frames.push(Frame {
                interface: index.filter(|_| of_all).map(u32::from_be_bytes),
                outgoing: of_all && frame.get(10) == Some(&OUTGOING),
                bytes: frame.to_vec(),
            });
            at += 16 + length;
        }
        Ok(frames)
    }
}
