//! The open connections of one data thread: who they are, and the way to end them from outside.
//!
//! A connection registers when it is decided and leaves by dropping its [`Conn`]. On every new
//! mesh the thread asks [`Conns::reconsider`], which decides again for each connection into or out
//! of a pod of this node with the same code as at its beginning and ends those now forbidden.
//! Nothing here knows bytes.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
};

use super::{authz, reason::Reason};
use crate::state::{Mesh, PodUid, policy::Client};

/// A table that had room for more than this gives it back when it is empty.
const CROWD: usize = 4096;

/// All connections of a thread.
pub(super) struct Conns {
    entries: RefCell<HashMap<u64, Weak<Conn>>>,
    /// Of each pod of this node that has any. Counted as they come and go: whoever went through a
    /// crowd to count it would hold up all others of the thread for that long.
    per_pod: RefCell<HashMap<PodUid, usize>>,
    next: Cell<u64>,
    /// Wakes the thread's drain when the last connection is gone.
    emptied: tokio::sync::Notify,
}

/// One open connection, as others see it.
pub(super) struct Conn {
    conns: Rc<Conns>,
    id: u64,
    /// The pods of this node it belongs to: the caller, the callee or both.
    caller: Option<Caller>,
    callee: Option<Callee>,
    aborted: Cell<Option<Reason>>,
    waker: RefCell<Option<Waker>>,
}

/// The local pod that dialled, and where its connection ends.
pub(super) struct Caller {
    pub(super) uid: PodUid,
    pub(super) endpoint: SocketAddr,
    /// The pod there, if it is one.
    pub(super) callee: Option<PodUid>,
}

/// The local pod a connection goes to, and who was let in.
pub(super) struct Callee {
    pub(super) uid: PodUid,
    pub(super) client: Client,
    pub(super) port: u16,
}

impl Conns {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self {
            entries: RefCell::new(HashMap::new()),
            per_pod: RefCell::new(HashMap::new()),
            next: Cell::new(0),
            emptied: tokio::sync::Notify::new(),
        })
    }

    pub(super) fn open(
        self: &Rc<Self>,
        caller: Option<Caller>,
        callee: Option<Callee>,
    ) -> Rc<Conn> {
        let id = self.next.get();
        self.next.set(id + 1);
        let conn = Rc::new(Conn {
            conns: Rc::clone(self),
            id,
            caller,
            callee,
            aborted: Cell::new(None),
            waker: RefCell::new(None),
        });
        self.entries.borrow_mut().insert(id, Rc::downgrade(&conn));
        for uid in conn.pods() {
            let mut per_pod = self.per_pod.borrow_mut();
            *per_pod.entry(PodUid::clone(uid)).or_default() += 1;
        }
        conn
    }

    pub(super) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Returns when no connection is open.
    pub(super) async fn empty(&self) {
        while self.len() > 0 {
            self.emptied.notified().await;
        }
    }

    /// Ends what `mesh` forbids, and what belongs to a pod that is no more.
    pub(super) fn reconsider(&self, mesh: &Mesh) {
        self.abort_where(|conn| conn.forbidden(mesh));
    }

    pub(super) fn abort_all(&self, reason: Reason) {
        self.abort_where(|_| Some(reason));
    }

    fn abort_where(&self, why: impl Fn(&Conn) -> Option<Reason>) {
        // Waking never runs anything here, so the borrow is safe; dropping the last reference to a
        // connection would change the table, therefore they are collected first.
        let conns: Vec<Rc<Conn>> = self
            .entries
            .borrow()
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        for conn in conns {
            if let Some(reason) = why(&conn) {
                conn.abort(reason);
            }
        }
    }

    /// Open connections per pod of this node.
    pub(super) fn per_pod(&self) -> HashMap<PodUid, usize> {
        self.per_pod.borrow().clone()
    }
}

impl Conn {
    /// The pods of this node that it belongs to.
    fn pods(&self) -> impl Iterator<Item = &PodUid> {
        let caller = self.caller.as_ref().map(|caller| &caller.uid);
        let callee = self.callee.as_ref().map(|callee| &callee.uid);
        caller.into_iter().chain(callee)
    }

    /// The mesh changed between the decision and the registration: decide again.
    pub(super) fn reconsider(&self, mesh: &Mesh) {
        if let Some(reason) = self.forbidden(mesh) {
            self.abort(reason);
        }
    }

    fn forbidden(&self, mesh: &Mesh) -> Option<Reason> {
        if let Some(callee) = &self.callee {
            let Some(workload) = mesh.workloads.get(&callee.uid) else {
                return Some(Reason::PodGone);
            };
            let (client, port) = (&callee.client, callee.port);
            // Who has left the mesh keeps what stands (rule 12), as far as Kubernetes lets it.
            let forbidden = if workload.meshed {
                authz::decide(mesh, workload, client, port).is_err()
            } else {
                authz::enters(mesh, workload, client, port).is_err()
            };
            if forbidden {
                return Some(Reason::PolicyChanged);
            }
        }
        if let Some(caller) = &self.caller {
            let Some(workload) = mesh.workloads.get(&caller.uid) else {
                return Some(Reason::PodGone);
            };
            let callee = caller.callee.as_ref();
            let callee = callee.and_then(|uid| mesh.workloads.get(uid));
            let callee = callee.map(|workload| &**workload);
            if authz::leaves(workload, caller.endpoint, callee).is_err() {
                return Some(Reason::PolicyChanged);
            }
        }
        None
    }

    fn abort(&self, reason: Reason) {
        if self.aborted.get().is_none() {
            self.aborted.set(Some(reason));
            if let Some(waker) = self.waker.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// Ready when the connection must end now. A connection lives in one task, so the waker is
    /// stored once.
    pub(super) fn poll_aborted(&self, cx: &mut Context<'_>) -> Poll<Reason> {
        if let Some(reason) = self.aborted.get() {
            return Poll::Ready(reason);
        }
        let mut waker = self.waker.borrow_mut();
        if !waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let mut per_pod = self.conns.per_pod.borrow_mut();
        for uid in self.pods() {
            if let Some(open) = per_pod.get_mut(uid) {
                *open -= 1;
                if *open == 0 {
                    per_pod.remove(uid);
                }
            }
        }
        let mut entries = self.conns.entries.borrow_mut();
        entries.remove(&self.id);
        if entries.is_empty() {
            if entries.capacity() > CROWD {
                *entries = HashMap::new();
            }
            self.conns.emptied.notify_waiters();
        }
    }
}
