//! Parcels between two processes: bytes and descriptors over a Unix socket, in bounded messages.
//!
//! A parcel is a header (kind, bytes, descriptors), its bytes, and the descriptors in messages of at most
//! [`FDS_PER_MESSAGE`], each of which carries one byte so that none is taken apart.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use zeroize::Zeroizing;

/// Most descriptors of one message. Source: `SCM_MAX_FD`, Linux.
pub const FDS_PER_MESSAGE: usize = 253;

/// Most bytes of a parcel: an engine may hold 512 MiB for applications that do not read, and as much for tunnels.
pub const MAX_BYTES: usize = 2 << 30;

/// Most descriptors of a parcel; far above any descriptor limit.
pub const MAX_FDS: usize = 1 << 22;

/// What goes over. Its bytes may hold keys: they are wiped when it is dropped.
#[derive(Debug)]
pub struct Parcel {
    /// What it is, in the words of the two ends.
    pub kind: u8,
    /// The bytes.
    pub bytes: Zeroizing<Vec<u8>>,
    /// The descriptors, in order.
    pub fds: Vec<OwnedFd>,
}

const HEADER: usize = 9;

/// Sends a parcel; waits as long as the socket's write timeout.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::InvalidInput`] beyond the bounds. The stream is of no use any more then.
pub fn send(stream: &UnixStream, kind: u8, bytes: &[u8], fds: &[impl AsFd]) -> io::Result<()> {
    if bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let length = |value: usize| u32::try_from(value).map_err(io::Error::other);
    let mut header = [0; HEADER];
    header[0] = kind;
    header[1..5].copy_from_slice(&length(bytes.len())?.to_be_bytes());
    header[5..].copy_from_slice(&length(fds.len())?.to_be_bytes());
    let mut out = stream;
    out.write_all(&header)?;
    out.write_all(bytes)?;
    for batch in fds.chunks(FDS_PER_MESSAGE) {
        let raw: Vec<RawFd> = batch.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        loop {
            match sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(&[0])],
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_one) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Receives a parcel of at most `max_bytes`; waits as long as the socket's read timeout.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::UnexpectedEof`] when the other end has gone, [`io::ErrorKind::InvalidData`]
/// beyond the bounds or when descriptors are missing.
pub fn receive(stream: &UnixStream, max_bytes: usize) -> io::Result<Parcel> {
    let mut header = [0; HEADER];
    let mut input = stream;
    input.read_exact(&mut header)?;
    let number = |at: usize| {
        let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
    };
    let (length, count) = (number(1), number(5));
    if length > max_bytes.min(MAX_BYTES) || count > MAX_FDS {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Zeroizing::new(vec![0; length]);
    input.read_exact(&mut bytes)?;
    let mut fds = Vec::new();
    while fds.len() < count {
        let batch = receive_batch(stream)?;
        if batch.len() != (count - fds.len()).min(FDS_PER_MESSAGE) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        fds.extend(batch);
    }
    Ok(Parcel { kind: header[0], bytes, fds })
}

fn receive_batch(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; FDS_PER_MESSAGE]);
    let message = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            done => break done?,
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            #[expect(unsafe_code, reason = "the kernel has just made these descriptors for us")]
            // SAFETY: each number is a descriptor that recvmsg opened in this process and that nobody else owns.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn bytes_and_more_descriptors_than_one_message_holds_arrive_in_order() {
        let (near, far) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..FDS_PER_MESSAGE * 2 + 7)
            .map(|at| File::open(if at % 2 == 0 { "/dev/null" } else { "/dev/zero" }).unwrap())
            .collect();
        let sender = std::thread::spawn(move || {
            send(&near, 7, &[5; 300_000], &files).unwrap();
            send(&near, 8, b"", &[] as &[File]).unwrap();
        });
        let parcel = receive(&far, 300_000).unwrap();
        assert_eq!((parcel.kind, parcel.bytes.as_slice()), (7, &[5; 300_000][..]));
        assert_eq!(parcel.fds.len(), FDS_PER_MESSAGE * 2 + 7);
        let of = |path: &str| std::fs::metadata(path).unwrap().rdev();
        for (at, fd) in parcel.fds.into_iter().enumerate() {
            let expected = of(if at % 2 == 0 { "/dev/null" } else { "/dev/zero" });
            assert_eq!(File::from(fd).metadata().unwrap().rdev(), expected);
        }
        assert_eq!(receive(&far, 10).unwrap().kind, 8);
        sender.join().unwrap();
        assert_eq!(receive(&far, 10).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_too_long_is_refused_before_memory_is_taken() {
        let (near, far) = UnixStream::pair().unwrap();
        send(&near, 1, &[0; 100], &[] as &[File]).unwrap();
        assert_eq!(receive(&far, 99).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
