//! The one door to the kernel: bpf(2), setns(2) and a few socket calls, each as a safe function.
#![expect(unsafe_code, reason = "system calls that neither aya nor std offers")]

use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use mesh_ebpf_abi::{
    Address, ClientKey, DialledVip, DirectEvent, DirectKey, Endpoint, FlowKey, FlowState,
    ListenerKey, MapSpec, NetworkKey, Pod, PortKey, SocketNote, VipEndpoints, VipKey,
};

/// Plain bytes: any bit pattern is a value, and there is no padding.
///
/// # Safety
/// Both have to be true of the implementing type.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),+ $(,)?) => { $(
        // SAFETY: integers, or `repr(C)` of integers with explicit padding only (size asserted in
        // the ABI).
        unsafe impl Plain for $type {}
    )+ };
}
plain!(
    u8,
    u32,
    u64,
    Address,
    ClientKey,
    DialledVip,
    DirectEvent,
    DirectKey,
    Endpoint,
    FlowKey,
    FlowState,
    ListenerKey,
    NetworkKey,
    Pod,
    PortKey,
    SocketNote,
    VipEndpoints,
    VipKey,
);

// Commands and flags of bpf(2), include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Order of a link among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkOrder {
    /// As attached.
    Last = 0,
    /// Before those that are there.
    Before = 1 << 3,
    /// Before all that do not ask for the same.
    PreOrder = 1 << 6,
}

/// Where a link goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LinkTarget<'a> {
    /// A cgroup or a network namespace.
    Fd(BorrowedFd<'a>),
    /// An interface of the calling thread's network namespace.
    Interface(u32),
}

/// `attr` is one of the structures below, of plain integers.
fn bpf<T: ?Sized>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes at most `size` bytes at the pointer; pointers inside are
    // made from live borrows by the callers, with the sizes that the map states.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr).cast::<u8>(),
            size_of_val(attr),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element<K, V: ?Sized>(
    map: BorrowedFd<'_>,
    key: *const K,
    value: *mut V,
    flags: u64,
) -> MapElement {
    MapElement {
        map_fd: fd_number(map),
        padding: 0,
        key: key.addr() as u64,
        value: value.cast::<u8>().addr() as u64,
        flags,
    }
}

#[expect(clippy::cast_sign_loss, reason = "a borrowed descriptor is not negative")]
pub(crate) fn fd_number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Looks an element up. `K` and `V` have the sizes that the map states; [`Map`](crate::maps::Map)
/// checked that.
pub(crate) fn map_lookup<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, key, value.as_mut_ptr(), 0)) {
        // SAFETY: the kernel wrote the whole value, and any bytes are one.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks an element of a per-CPU map up; `values` has one slot per possible CPU.
pub(crate) fn map_lookup_per_cpu(
    map: BorrowedFd<'_>,
    key: u32,
    values: &mut [u64],
) -> io::Result<()> {
    bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, &raw const key, values, 0)).map(drop)
}

/// Inserts or replaces an element.
pub(crate) fn map_update<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> io::Result<()> {
    let value = std::ptr::from_ref(value).cast_mut();
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, key, value, 0)).map(drop)
}

/// Removes an element; whether it was there.
pub(crate) fn map_delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    match bpf(BPF_MAP_DELETE_ELEM, &mut element(map, key, std::ptr::null_mut::<u8>(), 0)) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the oldest element out of a queue.
pub(crate) fn queue_pop<V: Plain>(queue: BorrowedFd<'_>) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let key = std::ptr::null::<()>();
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut element(queue, key, value.as_mut_ptr(), 0)) {
        // SAFETY: the kernel wrote the whole value, and any bytes are one.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The key after `key`, or the first.
pub(crate) fn map_next_key<K: Plain>(
    map: BorrowedFd<'_>,
    key: Option<&K>,
) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::uninit();
    let key = key.map_or(std::ptr::null(), std::ptr::from_ref);
    match bpf(BPF_MAP_GET_NEXT_KEY, &mut element(map, key, next.as_mut_ptr(), 0)) {
        // SAFETY: the kernel wrote the whole key, and any bytes are one.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// Makes a map that no program of ours uses. Its name is for `bpftool map`.
pub(crate) fn map_create(shape: &MapSpec) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    let length = shape.name.len().min(name.len() - 1);
    name[..length].copy_from_slice(&shape.name.as_bytes()[..length]);
    let mut attr = MapCreate {
        kind: shape.kind as u32,
        key_size: shape.key_size,
        value_size: shape.value_size,
        max_entries: shape.max_entries,
        flags: 0,
        inner_map_fd: 0,
        numa_node: 0,
        name,
    };
    bpf(BPF_MAP_CREATE, &mut attr).and_then(owned)
}

/// Copies an element of an array out. `value` has the size that the map states.
pub(crate) fn array_read(map: BorrowedFd<'_>, index: u32, value: &mut [u8]) -> io::Result<()> {
    let value = value.as_mut_ptr();
    bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, &raw const index, value, 0)).map(drop)
}

/// Overwrites an element of an array in its place. `value` has the size that the map states.
pub(crate) fn array_write(map: BorrowedFd<'_>, index: u32, value: &[u8]) -> io::Result<()> {
    let value = value.as_ptr().cast_mut();
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, &raw const index, value, 0)).map(drop)
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Pins a map, program or link.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr().addr() as u64, fd: fd_number(fd), flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pin; `None` when there is none.
pub(crate) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    match bpf(BPF_OBJ_GET, &mut attr) {
        Ok(fd) => Ok(Some(owned(fd)?)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for the caller (close-on-exec).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct LinkCreate {
    program_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    padding: u32,
    expected_revision: u64,
}

/// Attaches a program.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: u32,
    order: LinkOrder,
) -> io::Result<OwnedFd> {
    let target = match target {
        LinkTarget::Fd(fd) => fd_number(fd),
        LinkTarget::Interface(index) => index,
    };
    let mut attr = LinkCreate {
        program_fd: fd_number(program),
        target,
        attach_type,
        flags: order as u32,
        relative_fd: 0,
        padding: 0,
        expected_revision: 0,
    };
    bpf(BPF_LINK_CREATE, &mut attr).and_then(owned)
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

/// Replaces the program of a link, atomically.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: fd_number(link),
        program_fd: fd_number(program),
        flags: 0,
        old_program_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link at once. Closing the last descriptor does so too, but only some time later, and
/// until then the same program cannot be attached there again.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = fd_number(link);
    bpf(BPF_LINK_DETACH, &mut attr).map(drop)
}

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

/// Whether the link is attached to something that still exists: the first field of the info of
/// network namespace links (inode) and tcx links (interface) becomes 0 with its target.
pub(crate) fn link_is_attached(link: BorrowedFd<'_>) -> io::Result<bool> {
    // struct bpf_link_info: type, id, prog_id, (padding), then the kind's own fields from 16 on.
    let mut info = [0_u32; 32];
    info_by_fd(link, &mut info)?;
    Ok(info[4] != 0)
}

/// Kind, key size, value size and bound of a map.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<[u32; 4]> {
    // struct bpf_map_info: type, id, key_size, value_size, max_entries …
    let mut info = [0_u32; 32];
    info_by_fd(map, &mut info)?;
    Ok([info[0], info[2], info[3], info[4]])
}

fn info_by_fd(fd: BorrowedFd<'_>, info: &mut [u32; 32]) -> io::Result<()> {
    let mut attr =
        InfoRequest { fd: fd_number(fd), length: 128, info: info.as_mut_ptr().addr() as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// Moves the calling thread into a network namespace.
pub(crate) fn set_network_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Moves the calling thread into a new network namespace.
pub(crate) fn new_network_namespace() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

/// The cookie of the calling thread's network namespace (`SO_NETNS_COOKIE`, Linux 5.14).
pub(crate) fn network_namespace_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .or_else(|_| UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0))))?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    })?;
    Ok(cookie)
}

/// Whether a directory is on a bpffs.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(file_system(path)? == libc::BPF_FS_MAGIC)
}

/// Whether a directory is on a cgroup2 file system.
pub(crate) fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(file_system(path)? == libc::CGROUP2_SUPER_MAGIC)
}

fn file_system(path: &Path) -> io::Result<i64> {
    let path = c_path(path)?;
    let mut facts = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a terminated path, and room for the answer.
    check(unsafe { libc::statfs(path.as_ptr(), facts.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it is filled.
    Ok(unsafe { facts.assume_init() }.f_type)
}

/// The clock that the programs stamp with (`CLOCK_MONOTONIC`).
pub(crate) fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the answer; this clock always exists.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    assert_eq!(result, 0, "every Linux has a monotonic clock");
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The name of an interface of the calling thread's network namespace.
pub(crate) fn interface_name(index: u32) -> io::Result<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the call requires.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    let length = name.iter().position(|octet| *octet == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

/// A route netlink socket of the calling thread's network namespace.
pub(crate) fn route_socket() -> io::Result<OwnedFd> {
    netlink_socket(libc::NETLINK_ROUTE)
}

/// A sock_diag netlink socket of the calling thread's network namespace.
pub(crate) fn diag_socket() -> io::Result<OwnedFd> {
    netlink_socket(libc::NETLINK_SOCK_DIAG)
}

fn netlink_socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, family) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    owned(fd.into())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
