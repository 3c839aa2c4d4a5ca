//! Network namespaces: opened once, entered for the few microseconds it takes to make a socket.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

/// One network namespace, kept alive by the descriptor held here.
///
/// Sockets made inside stay inside, whichever thread uses them later.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    cookie: u64,
    inode: u64,
}

thread_local! {
    /// The namespace this thread came from; opened the first time it leaves.
    static HOME: OnceCell<OwnedFd> = const { OnceCell::new() };
}

const CURRENT: &str = "/proc/thread-self/ns/net";

impl Netns {
    /// Opens the namespace behind `path`, such as `/run/netns/cni-1234` or `/proc/77/ns/net`.
    ///
    /// # Errors
    /// When the path cannot be opened, or is no network namespace, or may not be entered.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new(CURRENT))
    }

    /// Takes over an open descriptor of a namespace.
    ///
    /// # Errors
    /// When it is no network namespace, or may not be entered.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let inode = file.metadata()?.ino();
        let mut netns = Self { fd: file.into(), cookie: 0, inode };
        netns.cookie = netns.enter(netns_cookie)??;
        Ok(netns)
    }

    /// The kernel's name for it, never reused while the machine runs: the key of the eBPF maps.
    ///
    /// Source: `SO_NETNS_COOKIE`, Linux 5.14.
    #[must_use]
    pub const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The inode in nsfs, as `ip netns` and `/proc/PID/ns/net` show it. Reused after the namespace is gone.
    #[must_use]
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` with the calling thread inside the namespace and comes back.
    ///
    /// `work` must not wait: no `await`, no blocking call. About 1.4 µs there and back.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `work` has not run then.
    ///
    /// # Panics
    /// Never. A thread that cannot come back would make sockets in the wrong pod, so the process is aborted.
    pub fn enter<R>(&self, work: impl FnOnce() -> R) -> io::Result<R> {
        HOME.with(|home| {
            if home.get().is_none() {
                // Only this thread fills its own cell, so it is still empty.
                home.get_or_init(|| match File::open(CURRENT) {
                    Ok(file) => file.into(),
                    Err(error) => leave_process("the thread's own network namespace", &error),
                });
            }
            let Some(home) = home.get() else { unreachable!("filled above") };
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            let _back = Back(home.as_fd());
            Ok(work())
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns to the home namespace when dropped, also when the work unwinds.
struct Back<'a>(BorrowedFd<'a>);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Err(errno) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            leave_process("return to the network namespace", &errno.into());
        }
    }
}

fn leave_process(what: &str, error: &io::Error) -> ! {
    tracing::error!(%error, "cannot open or {what}; aborting rather than act in a wrong pod");
    std::process::abort()
}

/// The cookie of the calling thread's namespace.
fn netns_cookie() -> io::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    #[expect(unsafe_code, reason = "no crate here wraps SO_NETNS_COOKIE")]
    // SAFETY: both pointers are to live locals, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entering_gives_another_namespace_and_comes_back() {
        let lab = crate::testing::Lab::new("nsa");
        let home = Netns::current().unwrap();
        assert_ne!(lab.netns().cookie(), home.cookie());
        assert_ne!(lab.netns().inode(), home.inode());
        let inside = lab.netns().enter(|| Netns::current().unwrap().cookie()).unwrap();
        assert_eq!(inside, lab.netns().cookie());
        assert_eq!(Netns::current().unwrap().cookie(), home.cookie());
    }

    #[test]
    fn a_panic_inside_comes_back_too() {
        let lab = crate::testing::Lab::new("nsb");
        let home = Netns::current().unwrap().cookie();
        let result = std::panic::catch_unwind(|| lab.netns().enter(|| panic!("on purpose")));
        assert!(result.is_err());
        assert_eq!(Netns::current().unwrap().cookie(), home);
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        assert!(Netns::open(Path::new("/etc/hostname")).is_err());
        assert!(Netns::open(Path::new("/nonexistent")).is_err());
    }
}
