//! Whole packets between processes of one machine, with the open files that travel beside them
//! (SOCK_SEQPACKET and SCM_RIGHTS).
//!
//! Files are taken out of a packet before anything in it is looked at, so that whatever is wrong
//! with it, they are closed. Whether a call blocks is the socket's own setting. What packets mean,
//! those know who call here: `handover`, and both ends of `cni`. The end that waits for calls is
//! [`Listener`].

#[cfg(feature = "agent")]
mod listener;

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

#[cfg(feature = "agent")]
pub use listener::{Listener, packet_socket, watched};

/// What the kernel carries at most beside one packet.
const KERNELS_FILES: usize = 253;

/// One packet. Without bytes: the other side is gone.
pub struct Packet {
    pub bytes: Vec<u8>,
    pub files: Vec<OwnedFd>,
    /// It was longer than what the caller allowed.
    pub cut: bool,
    /// Some files did not fit under this process's limit of open files.
    pub files_lost: bool,
}

pub fn write(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(KERNELS_FILES))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other(format!(
            "{} files are more than one packet carries",
            files.len()
        )));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut beside,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// At most `longest` bytes of one packet; the rest of a longer one is gone.
pub fn read(socket: impl AsFd, longest: usize) -> io::Result<Packet> {
    let mut bytes = vec![0; longest];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(KERNELS_FILES))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut beside,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut files = Vec::new();
    for message in beside.drain() {
        // Credentials were not asked for, so nothing else comes.
        if let RecvAncillaryMessage::ScmRights(more) = message {
            files.extend(more);
        }
    }
    bytes.truncate(received.bytes);
    Ok(Packet {
        bytes,
        files,
        cut: received.flags.contains(ReturnFlags::TRUNC),
        files_lost: received.flags.contains(ReturnFlags::CTRUNC),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        socketpair(family, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn a_packet_arrives_whole_with_its_files_and_a_closed_end_is_seen() {
        let (here, there) = pair();
        let file = File::open("/proc/self/stat").unwrap();
        write(&here, b"one", &[file.as_fd()]).unwrap();
        write(&here, b"two", &[]).unwrap();
        let one = read(&there, 16).unwrap();
        assert_eq!((one.bytes.as_slice(), one.files.len()), (&b"one"[..], 1));
        let mut text = String::new();
        let mut carried = File::from(one.files.into_iter().next().unwrap());
        carried.read_to_string(&mut text).unwrap();
        assert!(text.starts_with(&std::process::id().to_string()));
        assert_eq!(read(&there, 16).unwrap().bytes, b"two");
        drop(here);
        assert!(read(&there, 16).unwrap().bytes.is_empty());
    }

    #[test]
    fn what_is_longer_than_allowed_is_cut_and_said() {
        let (here, there) = pair();
        write(&here, &[7; 100], &[]).unwrap();
        write(&here, &[8; 10], &[]).unwrap();
        let long = read(&there, 10).unwrap();
        assert!(long.cut);
        assert_eq!(long.bytes.len(), 10);
        let fits = read(&there, 10).unwrap();
        assert!(!fits.cut);
        assert_eq!(fits.bytes, [8; 10]);
    }

    #[test]
    fn more_files_than_the_kernel_carries_are_refused() {
        let (here, _there) = pair();
        let files: Vec<_> = (0..254).map(|_| here.as_fd()).collect();
        assert!(write(&here, b"x", &files).is_err());
    }
}
