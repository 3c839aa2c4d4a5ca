//! The agent's own listeners: opened by the first process, handed from process to process, so that none is ever closed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use mesh_runtime::{AdminListener, BindError};
use tokio::time::Instant;

use crate::config::Settings;
use crate::enrolment::server;

/// How long a port may be taken, and how often it is looked at.
const PORT_PATIENCE: Duration = Duration::from_secs(3);
const PORT_INTERVAL: Duration = Duration::from_millis(100);

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

    /// Opens the door for successors alone: an agent that starts at the same time waits there instead of serving the same pods.
    ///
    /// # Errors
    /// When another agent was faster.
    pub(crate) fn open_to_successors(&mut self, settings: &Settings) -> anyhow::Result<()> {
        self.open_socket(Door::HandOver, &settings.handover_socket())
    }

    /// Opens what is missing, or listens elsewhere than the settings say. With `hold_on` a place that is taken is told, and
    /// left: connections that were taken over are worth more than a page of metrics.
    ///
    /// # Errors
    /// When a place is taken.
    pub(crate) async fn complete(
        &mut self,
        settings: &Settings,
        hold_on: bool,
    ) -> anyhow::Result<()> {
        for door in Door::ALL {
            let opened = match door {
                Door::Enrolment => self.open_socket(door, &settings.enrolment_socket()),
                Door::HandOver => self.open_socket(door, &settings.handover_socket()),
                Door::AdminSocket => self.open_admin_socket(&settings.admin_socket()),
                Door::Admin => self.open_address(door, settings.admin_address.0).await,
                Door::Ready => self.open_address(door, settings.ready_address.0).await,
                Door::Metrics => self.open_address(door, settings.metrics_address.0).await,
            };
            match opened {
                Err(error) if hold_on => {
                    let error = format!("{error:#}");
                    tracing::error!(
                        door = door.name(),
                        error,
                        "not opened; everything else goes on"
                    );
                }
                opened => opened?,
            }
        }
        Ok(())
    }

    fn open_socket(&mut self, door: Door, path: &Path) -> anyhow::Result<()> {
        if let Entry::Vacant(missing) = self.0.entry(door) {
            let listener = server::listen(path)
                .with_context(|| format!("opening the socket {}", path.display()))?;
            missing.insert(listener.as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }

    fn open_admin_socket(&mut self, path: &Path) -> anyhow::Result<()> {
        if let Entry::Vacant(missing) = self.0.entry(Door::AdminSocket) {
            missing.insert(AdminListener::unix(path)?.duplicate()?);
        }
        Ok(())
    }

    async fn open_address(
        &mut self,
        door: Door,
        address: Option<SocketAddr>,
    ) -> anyhow::Result<()> {
        if self.address(door) == address {
            return Ok(());
        }
        self.0.remove(&door);
        if let Some(address) = address {
            let listener = listen(address).await?;
            self.0.insert(door, listener.duplicate()?);
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

/// Waits a moment for a port that is about to be let go, by an agent that has left the node or by one that ends.
async fn listen(address: SocketAddr) -> Result<AdminListener, BindError> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        match AdminListener::tcp(address).await {
            Err(BindError::Tcp { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline =>
            {
                tokio::time::sleep(PORT_INTERVAL).await;
            }
            outcome => return outcome,
        }
    }
}
