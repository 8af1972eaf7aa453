//! Network namespaces: open one by path, know which one it is, do something inside.
//!
//! A namespace is known by its cookie, which the kernel never gives twice in one boot; a path or
//! an inode number may come to mean another one. Two ways inside: [`NetNs::run`] for work that
//! takes its time (a thread of its own, so that nothing can be left behind), and
//! [`NetNs::enter`] for a single system call on a data thread.
//!
//! Called by the rest of the room only. Knows neither pods nor programs.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    libc,
    sched::{CloneFlags, setns},
    sys::statfs::fstatfs,
};

/// `SO_NETNS_COOKIE` of asm-generic/socket.h, since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("netns {path}: cannot be opened: {source}; is the pod's sandbox gone?")]
    Missing { path: PathBuf, source: io::Error },
    #[error("netns {path}: is not a network namespace; name a path like /run/netns/NAME")]
    NotANetns { path: PathBuf },
    #[error("netns {path}: cannot be entered: {source}; the agent needs CAP_SYS_ADMIN")]
    Enter { path: PathBuf, source: io::Error },
}

impl NetnsError {
    /// The fixed word for metrics and status.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "netns_missing",
            Self::NotANetns { .. } => "netns_invalid",
            Self::Enter { .. } => "netns_entry",
        }
    }
}

/// An open network namespace. As long as it is open, the kernel keeps the namespace alive.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    cookie: u64,
    /// (device, inode) of the namespace's file, to compare with what a path names now.
    inode: (u64, u64),
    /// Where [`NetNs::enter`] goes back to.
    home: Arc<Home>,
}

/// The namespace that the agent itself works in: its node.
#[derive(Debug)]
pub struct Home {
    file: File,
    cookie: u64,
}

impl Home {
    /// The namespace of the calling thread. Called before anything leaves it.
    pub fn of_this_thread() -> io::Result<Arc<Self>> {
        let file = File::open("/proc/thread-self/ns/net")?;
        Ok(Arc::new(Self {
            file,
            cookie: current_cookie()?,
        }))
    }

    pub fn cookie(&self) -> u64 {
        self.cookie
    }
}

impl NetNs {
    pub fn open(path: &Path, home: &Arc<Home>) -> Result<Self, NetnsError> {
        let missing = |source| NetnsError::Missing {
            path: path.into(),
            source,
        };
        // Not blocking: whoever wrote the path may have named a FIFO.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(missing)?;
        let is_nsfs =
            fstatfs(&file).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::NSFS_MAGIC);
        if !is_nsfs {
            return Err(NetnsError::NotANetns { path: path.into() });
        }
        let metadata = file.metadata().map_err(missing)?;
        let mut netns = Self {
            file,
            cookie: 0,
            inode: (metadata.dev(), metadata.ino()),
            home: Arc::clone(home),
        };
        // A namespace of another kind (mnt, pid) is on nsfs too; setns tells them apart.
        netns.cookie = match netns.run(current_cookie) {
            Ok(Ok(cookie)) => cookie,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(NetnsError::NotANetns { path: path.into() });
            }
            Ok(Err(source)) | Err(source) => {
                return Err(NetnsError::Enter {
                    path: path.into(),
                    source,
                });
            }
        };
        Ok(netns)
    }

    /// The namespace of this inode, where its path is not known: wherever it is mounted, or by a
    /// process in it. `None`: only somebody's open file leads there.
    pub fn find(inode: u64, home: &Arc<Home>) -> Option<Self> {
        let name = format!("net:[{inode}]");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| {
            // … root, mount point …
            let mut fields = line.split(' ').skip(3);
            (fields.next()? == name).then(|| fields.next().map(PathBuf::from))?
        });
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let of_process = processes.filter_map(|process| {
            let path = process.path().join("ns/net");
            (fs::read_link(&path).ok()?.as_os_str() == name.as_str()).then_some(path)
        });
        mounted
            .chain(of_process)
            .filter_map(|path| Self::open(&path, home).ok())
            .find(|found| found.inode() == inode)
    }

    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Inode of the namespace, as the kernel shows it in what is attached there.
    pub fn inode(&self) -> u64 {
        self.inode.1
    }

    /// Does `path` lead here? `None`: it leads nowhere.
    pub fn is_at(&self, path: &Path) -> Option<bool> {
        let found = fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()) == self.inode)
    }

    /// Runs `work` on a thread of its own inside the namespace, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("in-netns".into())
                .spawn_scoped(scope, || {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                    Ok(work())
                })?;
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs `call` on this thread inside the namespace: two system calls more, no thread. For a
    /// `socket()` and what cannot block. If the way back fails, the process ends: a data thread
    /// that stays in a pod's namespace would make the next pod's sockets there.
    pub fn enter<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        struct WayBack<'a>(&'a Home);
        impl Drop for WayBack<'_> {
            fn drop(&mut self) {
                if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "cannot return to the node's network namespace");
                    std::process::abort();
                }
            }
        }
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let _way_back = WayBack(&self.home);
        call()
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Cookie of the calling thread's namespace.
fn current_cookie() -> io::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to live locals of the size that `length` tells.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_own_namespace_has_one_cookie_whoever_asks() {
        let here = Home::of_this_thread().unwrap().cookie();
        let there = thread::spawn(|| Home::of_this_thread().unwrap().cookie())
            .join()
            .unwrap();
        assert_ne!(here, 0);
        assert_eq!(here, there);
    }

    #[test]
    fn a_namespace_is_known_by_whatever_path_leads_to_it() {
        let home = Home::of_this_thread().unwrap();
        let netns = NetNs::open(Path::new("/proc/thread-self/ns/net"), &home).unwrap();
        let process = format!("/proc/{}/ns/net", std::process::id());
        assert_eq!(netns.is_at(Path::new(&process)), Some(true));
        assert_eq!(netns.is_at(Path::new("/proc/self/ns/uts")), Some(false));
        assert_eq!(netns.is_at(Path::new("/run/netns/no-such-netns")), None);
    }

    #[test]
    fn a_path_that_is_not_there_is_missing() {
        let home = Home::of_this_thread().unwrap();
        let error = NetNs::open(Path::new("/run/netns/no-such-netns"), &home).unwrap_err();
        assert_eq!(error.reason(), "netns_missing");
    }

    #[test]
    fn a_file_and_a_fifo_are_no_namespaces_and_do_not_block() {
        let home = Home::of_this_thread().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [file, fifo] {
            let error = NetNs::open(&path, &home).unwrap_err();
            assert_eq!(error.reason(), "netns_invalid", "{}", path.display());
        }
    }
}
