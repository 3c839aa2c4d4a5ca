//! The POSIX ustar format, as much of it as image layers need.

use anyhow::bail;

/// A growing archive.
#[derive(Default)]
pub(super) struct Tar {
    bytes: Vec<u8>,
}

/// What an entry is.
pub(super) enum Kind<'a> {
    /// A regular file with these bytes.
    File(&'a [u8]),
    /// A folder.
    Folder,
    /// A symbolic link to this target.
    Link(&'a str),
}

const BLOCK: usize = 512;
/// Longest name, and longest link target, of a header without extensions.
const MAX_NAME: usize = 100;
/// Largest file: eleven octal digits.
const MAX_SIZE: u64 = 0o77_777_777_777;

impl Tar {
    pub(super) fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
        self.entry(name, mode, &Kind::File(bytes))
    }

    /// Adds an entry that belongs to root and was changed at the epoch. Fails when a name is too long.
    pub(super) fn entry(&mut self, name: &str, mode: u32, kind: &Kind<'_>) -> anyhow::Result<()> {
        let (flag, content, target): (u8, &[u8], &str) = match kind {
            Kind::File(bytes) => (b'0', bytes, ""),
            Kind::Link(target) => (b'2', &[], target),
            Kind::Folder => (b'5', &[], ""),
        };
        let size = content.len() as u64;
        if name.len() > MAX_NAME || target.len() > MAX_NAME || size > MAX_SIZE {
            bail!("{name} does not fit into a tar header");
        }
        let mut header = [0_u8; BLOCK];
        put(&mut header, 0, name.as_bytes());
        put(&mut header, 100, format!("{mode:07o}").as_bytes());
        put(&mut header, 108, b"0000000");
        put(&mut header, 116, b"0000000");
        put(&mut header, 124, format!("{size:011o}").as_bytes());
        put(&mut header, 136, b"00000000000");
        put(&mut header, 148, b"        ");
        header[156] = flag;
        put(&mut header, 157, target.as_bytes());
        put(&mut header, 257, b"ustar\x0000");
        let checksum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut header, 148, format!("{checksum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// The archive with its end mark.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 2 * BLOCK]);
        self.bytes
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(BLOCK);
        self.bytes.resize(padded, 0);
    }
}

fn put(header: &mut [u8; BLOCK], offset: usize, field: &[u8]) {
    header[offset..offset + field.len()].copy_from_slice(field);
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn tar_itself_reads_what_is_written() {
        let mut tar = Tar::default();
        tar.entry("bin", 0o755, &Kind::Folder).unwrap();
        tar.file("bin/hello", 0o755, b"hello").unwrap();
        tar.entry("bin/hi", 0o777, &Kind::Link("hello")).unwrap();
        let mut list = Command::new("tar")
            .args(["-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        list.stdin.take().unwrap().write_all(&tar.finish()).unwrap();
        let output = list.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" bin"), "{text}");
        assert!(lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 5 "), "{text}");
        assert!(lines[2].ends_with("bin/hi -> hello"), "{text}");
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        let mut tar = Tar::default();
        assert!(tar.file(&"x".repeat(101), 0o644, b"").is_err());
        assert!(tar.entry("x", 0o777, &Kind::Link(&"x".repeat(101))).is_err());
    }
}
