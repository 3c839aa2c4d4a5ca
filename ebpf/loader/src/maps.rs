//! Typed access to the pinned maps, without locks: every call is one system call.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mesh_ebpf_abi::{
    Address, ClientKey, Counter, DialledVip, DirectEvent, DirectKey, Endpoint, FlowKey, FlowState,
    LAYOUT, ListenerKey, MapSpec, NetworkKey, Pod, PortKey, VipEndpoints, VipKey, maps,
};

use crate::CaptureError;
use crate::sys::{self, Plain};

/// A map whose keys are `K` and whose values are `V`.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    spec: MapSpec,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Plain, V: Plain> Map<K, V> {
    fn open(directory: &Path, spec: MapSpec) -> Result<Self, CaptureError> {
        assert_eq!(spec.key_size as usize, size_of::<K>(), "{}", spec.name);
        assert_eq!(spec.value_size as usize, size_of::<V>(), "{}", spec.name);
        Ok(Self { fd: open_checked(directory, spec)?, spec, types: PhantomData })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// One look-up; the error is the kernel's.
    pub(crate) fn find(&self, key: &K) -> io::Result<Option<V>> {
        sys::map_lookup(self.fd(), key)
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, CaptureError> {
        self.find(key).map_err(CaptureError::kernel("looking up a map element"))
    }

    pub(crate) fn insert(&self, key: &K, value: &V) -> Result<(), CaptureError> {
        sys::map_update(self.fd(), key, value).map_err(|source| match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => CaptureError::Full { map: self.spec.name },
            _ => CaptureError::Kernel { what: "inserting a map element", source },
        })
    }

    pub(crate) fn remove(&self, key: &K) -> Result<bool, CaptureError> {
        sys::map_delete(self.fd(), key).map_err(CaptureError::kernel("removing a map element"))
    }

    /// All keys. Bounded by the map's size, since a concurrent change may restart the walk.
    pub(crate) fn keys(&self) -> Result<Vec<K>, CaptureError> {
        let mut keys: Vec<K> = Vec::new();
        while keys.len() < self.spec.max_entries as usize {
            let next = sys::map_next_key(self.fd(), keys.last())
                .map_err(CaptureError::kernel("walking a map"))?;
            let Some(next) = next else { break };
            keys.push(next);
        }
        Ok(keys)
    }

    /// All elements that are there when their key is reached.
    pub(crate) fn elements(&self) -> Result<Vec<(K, V)>, CaptureError> {
        let mut elements = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                elements.push((key, value));
            }
        }
        Ok(elements)
    }
}

/// All maps.
#[derive(Debug)]
pub(crate) struct Maps {
    pub(crate) pods: Map<u64, Pod>,
    pub(crate) addresses: Map<Address, u64>,
    pub(crate) guards: Map<u32, u64>,
    pub(crate) listeners: Map<ListenerKey, u32>,
    pub(crate) port_rules: Map<PortKey, u8>,
    pub(crate) network_rules: Map<NetworkKey, u8>,
    pub(crate) node_addresses: Map<Address, u8>,
    pub(crate) originals: Map<ClientKey, Endpoint>,
    pub(crate) resolvers: Map<ClientKey, Endpoint>,
    pub(crate) flows: Map<FlowKey, FlowState>,
    pub(crate) remains: Map<FlowKey, u8>,
    pub(crate) labels: Map<u32, u32>,
    pub(crate) direct: Map<DirectKey, u64>,
    pub(crate) direct_lease: Map<u32, u64>,
    pub(crate) vips: Map<VipKey, VipEndpoints>,
    pub(crate) vips_lease: Map<u32, u64>,
    pub(crate) dialled: Map<FlowKey, DialledVip>,
    direct_events: OwnedFd,
    counters: OwnedFd,
}

impl Maps {
    /// Opens the pins of a loaded object, and checks that they have the shape this build expects.
    pub(crate) fn open(directory: &Path) -> Result<Self, CaptureError> {
        Ok(Self {
            pods: Map::open(directory, maps::PODS)?,
            addresses: Map::open(directory, maps::ADDRESSES)?,
            guards: Map::open(directory, maps::GUARDS)?,
            listeners: Map::open(directory, maps::LISTENERS)?,
            port_rules: Map::open(directory, maps::PORT_RULES)?,
            network_rules: Map::open(directory, maps::NETWORK_RULES)?,
            node_addresses: Map::open(directory, maps::NODE_ADDRESSES)?,
            originals: Map::open(directory, maps::ORIGINALS)?,
            resolvers: Map::open(directory, maps::RESOLVERS)?,
            flows: Map::open(directory, maps::FLOWS)?,
            remains: Map::open(directory, maps::REMAINS)?,
            labels: Map::open(directory, maps::LABELS)?,
            direct: Map::open(directory, maps::DIRECT)?,
            direct_lease: Map::open(directory, maps::DIRECT_LEASE)?,
            vips: Map::open(directory, maps::VIPS)?,
            vips_lease: Map::open(directory, maps::VIPS_LEASE)?,
            dialled: Map::open(directory, maps::DIALLED)?,
            direct_events: open_checked(directory, maps::DIRECT_EVENTS)?,
            counters: open_checked(directory, maps::COUNTERS)?,
        })
    }

    /// The oldest event of a direct connection, which leaves the queue.
    pub(crate) fn next_direct_event(&self) -> Result<Option<DirectEvent>, CaptureError> {
        sys::queue_pop(self.direct_events.as_fd())
            .map_err(CaptureError::kernel("reading events of direct connections"))
    }

    /// The sum of a counter over all CPUs.
    pub(crate) fn counter(
        &self,
        counter: Counter,
        values: &mut [u64],
    ) -> Result<u64, CaptureError> {
        sys::map_lookup_per_cpu(self.counters.as_fd(), counter as u32, values)
            .map_err(CaptureError::kernel("reading a counter"))?;
        Ok(values.iter().sum())
    }
}

/// Opens a pin and compares its shape.
pub(crate) fn open_checked(directory: &Path, spec: MapSpec) -> Result<OwnedFd, CaptureError> {
    let fd = sys::open_pin(&directory.join(spec.name))
        .map_err(CaptureError::kernel("opening a pinned map"))?
        .ok_or(CaptureError::Missing { name: spec.name })?;
    check_shape(fd.as_fd(), spec)?;
    Ok(fd)
}

/// Compares a map with what this build expects. Sockmaps report the value size they were made with.
pub(crate) fn check_shape(map: BorrowedFd<'_>, spec: MapSpec) -> Result<(), CaptureError> {
    let [kind, key_size, value_size, max_entries] =
        sys::map_info(map).map_err(CaptureError::kernel("reading a map's shape"))?;
    let expected = (spec.kind as u32, spec.key_size, spec.value_size, spec.max_entries);
    if (kind, key_size, value_size, max_entries) != expected {
        return Err(CaptureError::IncompatiblePin { map: spec.name, layout: LAYOUT });
    }
    Ok(())
}
