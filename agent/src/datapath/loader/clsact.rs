//! What hangs at an interface's clsact qdisc. aya attaches there but cannot say what is attached.
//!
//! Everything here acts on the network namespace of the calling thread.

use std::io;

use aya::programs::{TcAttachType, tc::TcHandle};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Ours, at every interface and in both directions: a restart finds the filter by these two and
/// replaces it. Priority 1, because a filter that ran before us could end the chain and with it
/// our say.
pub(super) const PRIORITY: u16 = 1;
pub(super) const HANDLE: TcHandle = TcHandle::new(0, 0x706d);

const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x001 | 0x300;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_ID: u16 = 11;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// `struct nlmsghdr` and `struct tcmsg`.
const HEADER: usize = 16;
const TCMSG: usize = 20;

/// One eBPF filter.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) priority: u16,
    pub(super) handle: TcHandle,
    pub(super) program: u32,
}

/// The eBPF filters at one direction of an interface, in no order that means anything.
pub(super) fn filters(ifindex: u32, direction: TcAttachType) -> io::Result<Vec<Filter>> {
    let parent = match direction {
        TcAttachType::Ingress => CLSACT_INGRESS,
        TcAttachType::Egress => CLSACT_EGRESS,
        TcAttachType::Custom(parent) => parent,
    };
    let mut request = Vec::with_capacity(HEADER + TCMSG);
    request.extend_from_slice(&((HEADER + TCMSG) as u32).to_ne_bytes());
    request.extend_from_slice(&RTM_GETTFILTER.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    for word in [0, ifindex, 0, parent, 0] {
        request.extend_from_slice(&word.to_ne_bytes());
    }

    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request, 0)?;
    let mut found = Vec::new();
    loop {
        let (answer, _from) = socket.recv_from_full()?;
        if parse(&answer, &mut found)? == Progress::Done {
            return Ok(found);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// Adds the filters of one datagram of the dump to `found`.
fn parse(mut datagram: &[u8], found: &mut Vec<Filter>) -> io::Result<Progress> {
    while datagram.len() >= HEADER {
        let length = word(datagram, 0)? as usize;
        let Some(message) = datagram.get(..length).filter(|_| length >= HEADER) else {
            return Err(cut_short());
        };
        match half(message, 4)? {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => {
                let errno = word(message, HEADER)?.cast_signed();
                return Err(io::Error::from_raw_os_error(-errno));
            }
            RTM_NEWTFILTER => {
                let handle = TcHandle::from(word(message, HEADER + 8)?);
                let priority = (word(message, HEADER + 16)? >> 16) as u16;
                let attributes = message.get(HEADER + TCMSG..).ok_or_else(cut_short)?;
                let is_bpf = attribute(attributes, TCA_KIND) == Some(b"bpf\0".as_slice());
                let id = attribute(attributes, TCA_OPTIONS)
                    .and_then(|options| attribute(options, TCA_BPF_ID));
                if let (true, Some(id)) = (is_bpf, id) {
                    found.push(Filter {
                        priority,
                        handle,
                        program: word(id, 0)?,
                    });
                }
            }
            _other => {}
        }
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(Progress::More)
}

/// The payload of the first attribute of `kind`.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    const NESTED_OR_BYTE_ORDER: u16 = 0xc000;
    loop {
        let length = usize::from(half(attributes, 0).ok()?);
        let found = half(attributes, 2).ok()? & !NESTED_OR_BYTE_ORDER;
        let payload = attributes.get(4..length)?;
        if found == kind {
            return Some(payload);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn half(bytes: &[u8], at: usize) -> io::Result<u16> {
    let bytes = bytes.get(at..at + 2).ok_or_else(cut_short)?;
    Ok(u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let bytes = bytes.get(at..at + 4).ok_or_else(cut_short)?;
    Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn cut_short() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the kernel's list of tc filters is cut short",
    )
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_dump_yields_bpf_filters_and_skips_others() {
        let mut datagram = filter(1, 0x706d, b"bpf\0", Some(42));
        datagram.extend(filter(2, 1, b"flower\0\0", None));
        datagram.extend(done());

        let mut found = Vec::new();
        assert_eq!(parse(&datagram, &mut found).unwrap(), Progress::Done);
        assert_eq!(
            found,
            [Filter {
                priority: 1,
                handle: HANDLE,
                program: 42
            }]
        );
    }

    #[test]
    fn a_message_longer_than_its_datagram_is_an_error() {
        let mut datagram = filter(1, 1, b"bpf\0", Some(42));
        datagram.truncate(datagram.len() - 4);
        assert!(parse(&datagram, &mut Vec::new()).is_err());
    }

    #[test]
    fn an_error_of_the_kernel_comes_through() {
        let mut datagram = message(NLMSG_ERROR, &(-nix::libc::ENODEV).to_ne_bytes());
        datagram.extend(done());
        let error = parse(&datagram, &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENODEV));
    }

    fn filter(priority: u16, handle: u32, kind: &[u8], program: Option<u32>) -> Vec<u8> {
        let mut payload = Vec::new();
        for word in [0, 7, handle, CLSACT_INGRESS, u32::from(priority) << 16] {
            payload.extend(word.to_ne_bytes());
        }
        payload.extend(encode(TCA_KIND, kind));
        if let Some(id) = program {
            payload.extend(encode(
                TCA_OPTIONS | 0x8000,
                &encode(TCA_BPF_ID, &id.to_ne_bytes()),
            ));
        }
        message(RTM_NEWTFILTER, &payload)
    }

    fn encode(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((payload.len() + 4) as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((payload.len() + HEADER) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes
    }

    fn done() -> Vec<u8> {
        message(NLMSG_DONE, &[0; 4])
    }
}
