//! Work inside a network namespace, on a thread of its own that ends there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::capture::NetnsCookie;
use crate::{CaptureError, sys};

/// Runs `work` in a namespace. The thread is new and is not used afterwards, so no thread of the
/// caller ever is in the wrong namespace.
pub(crate) fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    on_new_thread(move || {
        sys::set_network_namespace(namespace)?;
        Ok(work())
    })
}

/// Runs `work` in a new, empty namespace.
pub(crate) fn inside_new<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_new_thread(move || {
        sys::new_network_namespace()?;
        Ok(work())
    })
}

fn on_new_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Opens a namespace by its path.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, CaptureError> {
    File::open(path)
        .map(OwnedFd::from)
        .map_err(|source| CaptureError::Netns { path: path.to_owned(), source })
}

/// The cookie of an open namespace.
pub(crate) fn cookie(namespace: &OwnedFd, path: &Path) -> Result<NetnsCookie, CaptureError> {
    inside(namespace.as_fd(), sys::network_namespace_cookie)
        .and_then(|cookie| cookie)
        .map(NetnsCookie)
        .map_err(|source| CaptureError::Netns { path: path.to_owned(), source })
}
