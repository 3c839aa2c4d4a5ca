//! The program's own pages: what of its code and constants only the start needed is let go.
//!
//! A start runs through most of the program (arguments, configuration, the eBPF object and its checks, keys, first contact
//! with the controller), and the kernel maps 64 KiB around each page that is touched. Afterwards a node at rest runs a
//! quarter of it, but the rest would stay mapped, and on the list of pages in use, for as long as memory is not scarce.

use std::fs;
use std::io;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How long after the start the program's pages are let go. A start has ended by then, with its pods enrolled.
const AFTER: Duration = Duration::from_secs(20);

/// Lets go, once, of the pages that the start has mapped.
pub(crate) async fn let_go_after_start(stop: CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(AFTER) => {}
        () = stop.cancelled() => return,
    }
    match let_go() {
        Ok(bytes) => tracing::debug!(bytes, "pages that only the start needed is let go"),
        Err(error) => tracing::warn!(%error, "pages that only the start needed stays mapped"),
    }
}

/// Unmaps what of the process is as its files have it, and says to the kernel that it is not in use. What runs on is mapped
/// again as it is touched, from the page cache: some hundred minor faults, once. Returns how much address space that was.
fn let_go() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/smaps")?;
    let mut total = 0;
    for Range { start, length } in as_on_disk(&maps) {
        advise(start, length, libc::MADV_COLD)?;
        advise(start, length, libc::MADV_DONTNEED)?;
        total += length;
    }
    Ok(total)
}

/// Octets of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    length: usize,
}

/// The mappings of files, in the text of `/proc/self/smaps`, that cannot be written and of which no page differs from the
/// file. Addresses that the loader has put right do differ, and are not among them. Source: proc(5).
fn as_on_disk(smaps: &str) -> Vec<Range> {
    let mut found = Vec::new();
    let mut read_only = None;
    for line in smaps.lines() {
        if let Some(kilobytes) = line.strip_prefix("Anonymous:") {
            found.extend(read_only.take().filter(|_| kilobytes.trim() == "0 kB"));
        } else if let Some(mapping) = Mapping::read(line) {
            read_only = mapping.is_read_only_file.then_some(mapping.range);
        }
    }
    found
}

/// The first line of a mapping.
struct Mapping {
    range: Range,
    is_read_only_file: bool,
}

impl Mapping {
    fn read(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (range, permissions) = (words.next()?, words.next()?);
        let inode = words.nth(2)?;
        let (start, end) = range.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let length = usize::from_str_radix(end, 16).ok()?.checked_sub(start)?;
        let is_read_only_file = matches!(permissions, "r-xp" | "r--p") && inode != "0";
        Some(Self { range: Range { start, length }, is_read_only_file })
    }
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper has a call on a mapping that is only known by its address"
)]
fn advise(start: usize, length: usize, advice: libc::c_int) -> io::Result<()> {
    let address = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a private mapping of a file that this process runs and never writes, so its pages are the file's;
    // a page that is let go is read from there again by whoever runs into it. Nothing unmaps a library meanwhile.
    match unsafe { libc::madvise(address, length, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_on_disk_is_let_go() {
        let smaps = "\
            55d09000-55d0a000 r--p 00000000 fe:00 1234                       /usr/local/bin/culvert-agent\n\
            Rss:                   4 kB\n\
            Anonymous:             0 kB\n\
            VmFlags: rd mr mw me sd\n\
            55d0a000-55d0c000 r-xp 00001000 fe:00 1234                       /usr/local/bin/culvert-agent\n\
            Anonymous:             0 kB\n\
            55d0c000-55d0d000 r--p 00003000 fe:00 1234                       /usr/local/bin/culvert-agent\n\
            Anonymous:             4 kB\n\
            55d0d000-55d0e000 rw-p 00004000 fe:00 1234                       /usr/local/bin/culvert-agent\n\
            Anonymous:             0 kB\n\
            7ffc0000-7ffc1000 r--s 00000000 fe:00 99 /shared\n\
            Anonymous:             0 kB\n\
            7ffc1000-7ffc3000 r-xp 00000000 00:00 0                          [vdso]\n\
            Anonymous:             0 kB\n";
        assert_eq!(
            as_on_disk(smaps),
            [
                Range { start: 0x55d0_9000, length: 0x1000 },
                Range { start: 0x55d0_a000, length: 0x2000 },
            ]
        );
        assert_eq!(as_on_disk("Anonymous: 0 kB\nno mapping"), []);
    }

    #[test]
    fn a_process_goes_on_after_letting_go() {
        let file_pages = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = file_pages();
        assert!(let_go().unwrap() > 1 << 20);
        let after = file_pages();
        assert!(after < before, "{before} kB of files were resident, now {after}");
        assert_eq!("2.5".parse::<f64>().unwrap().sqrt().to_string(), 2.5_f64.sqrt().to_string());
    }
}
