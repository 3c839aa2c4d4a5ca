//! Layouts of other builds, which stay attached beside this one until their pods are captured here.
//!
//! Their programs know nothing of this build's maps. In a pod that they capture they refuse the agent's ports to sockets
//! without their own label, and send what the agent dials back to it: so the agent's sockets carry their label too. Once a
//! pod is captured here it is taken out of their maps, and a layout without pods is taken away. The two maps that are
//! touched have had the same shape in every layout; one where they have not is left alone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use mesh_ebpf_abi::{MapKind, MapSpec, maps as shapes};

use crate::capture::NetnsCookie;
use crate::pins::{self, Pins};
use crate::{CaptureError, sys};

/// The other layouts that were pinned when this one was loaded.
#[derive(Debug)]
pub(crate) struct ForeignLayouts(RwLock<Vec<Foreign>>);

#[derive(Debug)]
struct Foreign {
    pins: Pins,
    /// None when it is missing or of another shape.
    labels: Option<OwnedFd>,
    pods: Pods,
}

/// The map of enrolled pods.
#[derive(Debug)]
enum Pods {
    Map(OwnedFd),
    /// There is none: nothing is captured.
    Missing,
    /// It cannot be read.
    Unknown,
}

impl ForeignLayouts {
    /// Opens what is pinned beside `own`.
    pub(crate) fn open(own: &Pins) -> Result<Self, CaptureError> {
        let listed =
            own.foreign_layouts().map_err(CaptureError::kernel("listing pinned layouts"))?;
        let layouts = listed.into_iter().map(|layout| Foreign::open(own.of_layout(layout)));
        Ok(Self(RwLock::new(layouts.collect::<Result<_, _>>()?)))
    }

    /// Labels a socket as the agent's for all of them.
    pub(crate) fn label(&self, socket: BorrowedFd<'_>) -> std::io::Result<()> {
        let layouts = self.read();
        let mut labels = layouts.iter().filter_map(|layout| layout.labels.as_ref());
        labels.try_for_each(|map| sys::map_update(map.as_fd(), &sys::fd_number(socket), &1_u32))
    }

    /// The namespaces that they capture.
    pub(crate) fn captured(&self) -> Result<Vec<NetnsCookie>, CaptureError> {
        let layouts = self.read();
        layouts.iter().try_fold(Vec::new(), |mut all, layout| {
            all.extend(layout.captured()?.unwrap_or_default());
            Ok(all)
        })
    }

    /// Ends their capture of a pod. Call it once the pod is captured here, or is to be captured no more.
    pub(crate) fn release(&self, pod: NetnsCookie) -> Result<(), CaptureError> {
        self.read().iter().try_for_each(|layout| layout.release(pod))
    }

    /// Takes away those that capture nothing any more; those that stay.
    pub(crate) fn retire(&self) -> Result<Vec<u32>, CaptureError> {
        if self.read().is_empty() {
            return Ok(Vec::new());
        }
        let mut layouts = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        while let Some(layout) = layouts.get(at) {
            if layout.captured()?.is_some_and(|pods| pods.is_empty()) {
                layout.remove()?;
                layouts.remove(at);
            } else {
                at += 1;
            }
        }
        Ok(layouts.iter().map(|layout| layout.pins.layout()).collect())
    }

    /// Forgets all of them, which somebody has removed.
    pub(crate) fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Foreign>> {
        // A panic while it is written leaves fewer layouts in it, which a restart finds again.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Foreign {
    fn open(pins: Pins) -> Result<Self, CaptureError> {
        let labels = match open_map(&pins, shapes::LABELS)? {
            Found::Map(map) => Some(map),
            Found::Missing => None,
            Found::OtherShape => {
                tracing::warn!(
                    layout = pins.layout(),
                    "capture of another version is of a shape that is not known; its pods stay refused until it is gone"
                );
                None
            }
        };
        let pods = match open_map(&pins, shapes::PODS)? {
            Found::Map(map) => Pods::Map(map),
            Found::Missing => Pods::Missing,
            Found::OtherShape => Pods::Unknown,
        };
        Ok(Self { pins, labels, pods })
    }

    /// The namespaces that it captures; none when that cannot be told.
    fn captured(&self) -> Result<Option<Vec<NetnsCookie>>, CaptureError> {
        let map = match &self.pods {
            Pods::Map(map) => map.as_fd(),
            Pods::Missing => return Ok(Some(Vec::new())),
            Pods::Unknown => return Ok(None),
        };
        let mut keys: Vec<u64> = Vec::new();
        while keys.len() < shapes::PODS.max_entries as usize {
            let next = sys::map_next_key(map, keys.last())
                .map_err(CaptureError::kernel("walking a map of another layout"))?;
            let Some(next) = next else { break };
            keys.push(next);
        }
        Ok(Some(keys.into_iter().map(NetnsCookie).collect()))
    }

    /// The switch first: without its entry the programs do nothing with the pod.
    fn release(&self, pod: NetnsCookie) -> Result<(), CaptureError> {
        if let Pods::Map(map) = &self.pods {
            sys::map_delete(map.as_fd(), &pod.0)
                .map_err(CaptureError::kernel("releasing a pod of another layout"))?;
        }
        pins::remove_tree(&self.pins.pod(pod))
            .map_err(CaptureError::kernel("releasing a pod of another layout"))
    }

    fn remove(&self) -> Result<(), CaptureError> {
        self.pins.remove_layout().map_err(CaptureError::kernel("removing a pinned layout"))
    }
}

enum Found {
    Map(OwnedFd),
    Missing,
    OtherShape,
}

/// Opens a map for its keys. Values of pods are not read: they are what differs between layouts.
fn open_map(pins: &Pins, spec: MapSpec) -> Result<Found, CaptureError> {
    let pin = sys::open_pin(&pins.maps().join(spec.name))
        .map_err(CaptureError::kernel("opening a map of another layout"))?;
    let Some(map) = pin else { return Ok(Found::Missing) };
    let [kind, key_size, value_size, _entries] = sys::map_info(map.as_fd())
        .map_err(CaptureError::kernel("reading the shape of another layout's map"))?;
    let same_value = spec.kind == MapKind::Hash || value_size == spec.value_size;
    let is_known = kind == spec.kind as u32 && key_size == spec.key_size && same_value;
    Ok(if is_known { Found::Map(map) } else { Found::OtherShape })
}
