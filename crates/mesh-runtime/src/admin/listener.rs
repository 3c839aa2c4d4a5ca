//! Where the server listens, and who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use tokio::net::{TcpListener, UnixListener};

use super::Stream;

/// A place to listen.
#[derive(Debug)]
pub enum AdminListener {
    /// TCP on loopback: reads only, `Host` must be loopback.
    Loopback(TcpListener),
    /// TCP for others, such as kubelet and Prometheus: reads only. Serve nothing here that is not for everybody.
    Network(TcpListener),
    /// A Unix socket: reads and changes, for root and the process's own user.
    Unix(UnixListener),
}

/// A place that cannot be listened at.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A TCP address.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A path.
    #[error("cannot listen on {path:?}")]
    Unix {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that is no socket has the path.
    #[error("{path:?} exists and is no socket")]
    Occupied {
        /// The path.
        path: PathBuf,
    },
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Trusted,
    Untrusted,
    Loopback,
    Network,
}

impl AdminListener {
    /// Listens on a TCP address; [`Self::Loopback`] when it is one.
    ///
    /// # Errors
    /// [`BindError::Tcp`].
    pub async fn tcp(address: SocketAddr) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| BindError::Tcp { address, source })?;
        Ok(if address.ip().is_loopback() {
            Self::Loopback(listener)
        } else {
            Self::Network(listener)
        })
    }

    /// Listens on a Unix socket with mode 0600, in place of a socket an earlier process left there. The folder must
    /// exist.
    ///
    /// # Errors
    /// [`BindError::Occupied`], [`BindError::Unix`].
    pub fn unix(path: &Path) -> Result<Self, BindError> {
        let failed = |source| BindError::Unix { path: path.to_owned(), source };
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Ok(_) => return Err(BindError::Occupied { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self::Unix(listener))
    }

    /// A Unix socket that a predecessor opened by [`unix`](Self::unix).
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub fn unix_handed_over(fd: OwnedFd) -> io::Result<Self> {
        UnixListener::from_std(fd.into()).map(Self::Unix)
    }

    /// A TCP listener that a predecessor opened by [`tcp`](Self::tcp).
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub fn tcp_handed_over(fd: OwnedFd) -> io::Result<Self> {
        let listener = TcpListener::from_std(fd.into())?;
        let is_loopback = listener.local_addr()?.ip().is_loopback();
        Ok(if is_loopback { Self::Loopback(listener) } else { Self::Network(listener) })
    }

    /// Another descriptor of the same listener.
    ///
    /// # Errors
    /// For want of descriptors.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Loopback(listener) | Self::Network(listener) => {
                listener.as_fd().try_clone_to_owned()
            }
            Self::Unix(listener) => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// The TCP address listened on; `None` for a Unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Loopback(listener) | Self::Network(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<(Peer, Box<dyn Stream>)> {
        match self {
            Self::Loopback(listener) => Ok((Peer::Loopback, Box::new(listener.accept().await?.0))),
            Self::Network(listener) => Ok((Peer::Network, Box::new(listener.accept().await?.0))),
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                let trusted = uid == 0 || uid == geteuid().as_raw();
                let peer = if trusted { Peer::Trusted } else { Peer::Untrusted };
                Ok((peer, Box::new(stream)))
            }
        }
    }
}
