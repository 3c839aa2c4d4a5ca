//! The agent's own listeners: opened by the first process, handed from process to process, so that none is ever closed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;

use anyhow::Context as _;
use mesh_runtime::AdminListener;

use crate::config::Settings;
use crate::enrolment::server;

/// A place where the agent listens for its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Door {
    /// `agent.sock`: enrolment.
    Enrolment,
    /// `handover.sock`: successors.
    HandOver,
    /// `admin.sock`.
    AdminSocket,
    /// The admin interface on loopback.
    Admin,
    /// Readiness.
    Ready,
    /// Metrics.
    Metrics,
}

impl Door {
    const ALL: [Self; 6] = [
        Self::Enrolment,
        Self::HandOver,
        Self::AdminSocket,
        Self::Admin,
        Self::Ready,
        Self::Metrics,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Enrolment => "enrolment",
            Self::HandOver => "handover",
            Self::AdminSocket => "admin-socket",
            Self::Admin => "admin",
            Self::Ready => "ready",
            Self::Metrics => "metrics",
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|door| door.name() == name)
    }
}

/// The doors of this agent.
#[derive(Debug, Default)]
pub(crate) struct Doors(BTreeMap<Door, OwnedFd>);

impl Doors {
    /// Those that a predecessor has handed over.
    pub(super) fn handed_over(handed: impl IntoIterator<Item = (Door, OwnedFd)>) -> Self {
        Self(handed.into_iter().collect())
    }

    /// Opens what is missing, or listens elsewhere than the settings say.
    ///
    /// # Errors
    /// When a place is taken.
    pub(crate) async fn complete(&mut self, settings: &Settings) -> anyhow::Result<()> {
        for (door, path) in [
            (Door::Enrolment, settings.enrolment_socket()),
            (Door::HandOver, settings.handover_socket()),
        ] {
            if let Entry::Vacant(missing) = self.0.entry(door) {
                let listener = server::listen(&path)
                    .with_context(|| format!("opening the socket {}", path.display()))?;
                missing.insert(listener.as_fd().try_clone_to_owned()?);
            }
        }
        if let Entry::Vacant(missing) = self.0.entry(Door::AdminSocket) {
            let listener = AdminListener::unix(&settings.admin_socket())?;
            missing.insert(listener.duplicate()?);
        }
        for (door, address) in [
            (Door::Admin, settings.admin_address.0),
            (Door::Ready, settings.ready_address.0),
            (Door::Metrics, settings.metrics_address.0),
        ] {
            let same = self.address(door) == address;
            if same {
                continue;
            }
            self.0.remove(&door);
            if let Some(address) = address {
                let listener = AdminListener::tcp(address).await?;
                self.0.insert(door, listener.duplicate()?);
            }
        }
        Ok(())
    }

    fn address(&self, door: Door) -> Option<SocketAddr> {
        let duplicate = self.0.get(&door)?.try_clone().ok()?;
        std::net::TcpListener::from(duplicate).local_addr().ok()
    }

    /// A descriptor of a Unix socket among the doors, to accept from.
    ///
    /// # Errors
    /// For want of descriptors, or when it was not opened.
    pub(crate) fn unix(&self, door: Door) -> io::Result<UnixListener> {
        let fd = self.0.get(&door).ok_or(io::ErrorKind::NotFound)?;
        Ok(UnixListener::from(fd.try_clone()?))
    }

    /// Where the admin server accepts from; none where the settings say `none`.
    ///
    /// # Errors
    /// For want of descriptors.
    pub(crate) fn admin(&self, door: Door) -> io::Result<Option<AdminListener>> {
        let Some(fd) = self.0.get(&door) else { return Ok(None) };
        let fd = fd.try_clone()?;
        match door {
            Door::AdminSocket => AdminListener::unix_handed_over(fd).map(Some),
            Door::Enrolment | Door::HandOver | Door::Admin | Door::Ready | Door::Metrics => {
                AdminListener::tcp_handed_over(fd).map(Some)
            }
        }
    }

    /// Names and duplicates of all, for a successor.
    ///
    /// # Errors
    /// For want of descriptors.
    pub(super) fn duplicates(&self) -> io::Result<(Vec<String>, Vec<OwnedFd>)> {
        let mut names = Vec::new();
        let mut fds = Vec::new();
        for (door, fd) in &self.0 {
            names.push(door.name().to_owned());
            fds.push(fd.try_clone()?);
        }
        Ok((names, fds))
    }
}
