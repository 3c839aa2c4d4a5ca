//! What a service manager is told, by the protocol of systemd (sd_notify(3)): datagrams to the socket that `NOTIFY_SOCKET`
//! names. Without one nothing is told.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// A word for the service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Start-up is over.
    Ready,
    /// This process is the service from now on, its predecessor may end.
    Succeeded,
    /// The process ends.
    Stopping,
}

/// Tells the service manager, if there is one.
///
/// # Errors
/// When the socket is named and cannot be written to.
pub fn notify(notice: Notice) -> io::Result<()> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(socket) => send(&socket, notice),
        None => Ok(()),
    }
}

fn send(socket: &OsStr, notice: Notice) -> io::Result<()> {
    let address = match socket.as_bytes().split_first() {
        // A name without a file: the kernel's abstract names begin with a zero byte, shown as `@`.
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let word = match notice {
        Notice::Ready => "READY=1".to_owned(),
        Notice::Succeeded => format!("MAINPID={}", std::process::id()),
        Notice::Stopping => "STOPPING=1".to_owned(),
    };
    UnixDatagram::unbound()?.send_to_addr(word.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_hears_each_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let own = format!("MAINPID={}", std::process::id());
        for (notice, word) in [
            (Notice::Ready, "READY=1"),
            (Notice::Succeeded, own.as_str()),
            (Notice::Stopping, "STOPPING=1"),
        ] {
            send(path.as_os_str(), notice).unwrap();
            let mut heard = [0; 64];
            let length = manager.recv(&mut heard).unwrap();
            assert_eq!(heard.get(..length), Some(word.as_bytes()));
        }
        drop(manager);
        assert!(send(path.as_os_str(), Notice::Ready).is_err());
    }

    #[test]
    fn a_name_without_a_file_is_found() {
        let name = format!("culvert-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        send(OsStr::new(&format!("@{name}")), Notice::Ready).unwrap();
        let mut heard = [0; 16];
        assert_eq!(manager.recv(&mut heard).unwrap(), "READY=1".len());
    }
}
