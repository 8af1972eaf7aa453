//! The few calls of bpf(2) that aya keeps to itself or makes only through `&mut`.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::libc;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
pub(super) const ATTACH_SK_LOOKUP: u32 = 36;
/// `BPF_CGROUP_SOCK_OPS` of the same.
pub(super) const ATTACH_SOCK_OPS: u32 = 3;

/// Programs that one hook can report; the kernel allows 64 on every hook we use.
const QUERY_ROOM: usize = 64;

#[repr(C)]
struct MapElem {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgQuery {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    _pad: u32,
}

#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct GetId {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_prog_info`, as far as we read it.
#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    xlated_len: u32,
    jited: u64,
    xlated: u64,
    load_time: u64,
    created_by_uid: u32,
    map_count: u32,
    map_ids: u64,
}

/// The beginning of `struct bpf_link_info`, for a link to a network namespace.
#[repr(C)]
#[derive(Default)]
struct NetnsLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    /// 0: the namespace is gone.
    netns_inode: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// # Safety
/// `attr` must be the variant of `union bpf_attr` that `command` takes, and the addresses in it
/// must stay valid for the call and fit what the kernel reads or writes there.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the size is that of the attribute itself; the rest is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // An open descriptor is never negative.
    fd.as_raw_fd().cast_unsigned()
}

/// Sets the storage of `socket` in the sk_storage map `map`.
pub(super) fn set_storage(
    map: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    value: u32,
) -> io::Result<()> {
    let key = socket.as_raw_fd();
    let mut attr = MapElem {
        map_fd: raw(map),
        _pad: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the map's key is an i32 and its value a u32 (checked when the maps were opened);
    // both live until the call returns.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr)? };
    Ok(())
}

/// What a map with keys and values of four bytes holds: a socket's storage (the key is its
/// descriptor), or the id of a program in an array of programs.
pub(super) fn lookup(map: BorrowedFd<'_>, key: i32) -> io::Result<Option<u32>> {
    let mut value = 0u32;
    let mut attr = MapElem {
        map_fd: raw(map),
        _pad: 0,
        key: (&raw const key) as u64,
        value: (&raw mut value) as u64,
        flags: 0,
    };
    // SAFETY: as in `set_storage`, and the same of the array (its shape is checked); the kernel
    // writes one u32 to `value`.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ids of the programs attached to `target` (a network namespace or a cgroup) at `attach_type`.
pub(super) fn attached_programs(target: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; QUERY_ROOM];
    let mut attr = ProgQuery {
        target_fd: raw(target),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        count: QUERY_ROOM as u32,
        _pad: 0,
    };
    // SAFETY: `ids` has room for the `count` numbers that the kernel may write.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr)? };
    Ok(ids[..(attr.count as usize).min(QUERY_ROOM)].to_vec())
}

/// Puts `program` in the place of whatever `link` runs, without a packet in between.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: no addresses in this attribute.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr)? };
    Ok(())
}

/// Takes the program off the hook at once. Closing the last descriptor and the pin would do it too,
/// a little later.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = raw(link);
    // SAFETY: the attribute is the descriptor alone, without addresses.
    unsafe { bpf(BPF_LINK_DETACH, &mut link)? };
    Ok(())
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: `path` is a C string that lives until the call returns.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr)? };
    // SAFETY: BPF_OBJ_GET answers with a new descriptor.
    unsafe { owned(fd) }
}

/// Pins a map at `path`.
pub(super) fn pin(map: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet {
        pathname: path.as_ptr() as u64,
        bpf_fd: raw(map),
        file_flags: 0,
    };
    // SAFETY: `path` is a C string that lives until the call returns.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr)? };
    Ok(())
}

/// Inode of the network namespace that a link of sk_lookup is attached to; 0 when it is gone.
pub(super) fn netns_of_link(link: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = NetnsLinkInfo::default();
    let mut attr = GetInfo {
        fd: raw(link),
        length: size_of::<NetnsLinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(info.netns_inode)
}

/// Ids of the maps that a program uses.
pub(super) fn maps_of(program: u32) -> io::Result<Vec<u32>> {
    let mut attr = GetId {
        id: program,
        next_id: 0,
        open_flags: 0,
    };
    // SAFETY: no addresses in this attribute.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attr)? };
    // SAFETY: BPF_PROG_GET_FD_BY_ID answers with a new descriptor.
    let fd = unsafe { owned(fd)? };
    let mut ids = [0u32; QUERY_ROOM];
    let mut info = ProgInfo {
        map_count: QUERY_ROOM as u32,
        map_ids: ids.as_mut_ptr() as u64,
        ..ProgInfo::default()
    };
    let mut attr = GetInfo {
        fd: raw(fd.as_fd()),
        length: size_of::<ProgInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes `length` bytes to `info` and at most `map_count` numbers to `ids`.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(ids[..(info.map_count as usize).min(QUERY_ROOM)].to_vec())
}

/// # Safety
/// `fd` must be the answer of a call that made a new descriptor.
unsafe fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: nobody else owns it, says the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
