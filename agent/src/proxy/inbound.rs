//! What comes to a pod of this node past the mesh: plain connections, and HBONE for the pod's own
//! address (ztunnel's way), which [`super::tunnel::server`] takes.
//!
//! The client of a plain connection has proven nothing, whatever its address says.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use tokio::net::TcpStream;

use super::{
    TUNNEL_PORT, authz,
    conns::{Callee, Conn},
    copy::{Meter, Shared, SocketPump},
    limits::Permit,
    reason::Reason,
    report::{Refusal, Report},
    tcp::{self, TcpEnd},
    threads::{Pod, Thread, canonical},
    tunnel::{Port, server},
};
use crate::{
    datapath::{PodSockets, Source},
    metrics::{Direction, FlowInfo, TlsStatus},
    state::{
        policy::{Client, ClientIdentity},
        resolve::RefusedDestination,
    },
};

/// The client holds a port towards the pod; no socket of ours may take it meanwhile (rule 7).
pub(super) struct Hold {
    sockets: Arc<dyn PodSockets>,
    client: SocketAddr,
}

impl Hold {
    pub(super) fn new(pod: &Pod, client: SocketAddr) -> Self {
        pod.sockets.hold(client);
        Self {
            sockets: Arc::clone(&pod.sockets),
            client,
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.sockets.release(self.client);
    }
}

/// A connection that can begin.
struct Standing {
    server: TcpStream,
    meter: Meter,
    conn: Rc<Conn>,
}

/// One connection, from accept to its record.
pub(super) async fn serve(
    thread: Rc<Thread>,
    pod: Rc<Pod>,
    client: TcpStream,
    peer: SocketAddr,
    mut permit: Permit,
) {
    // An error means that the client is gone already.
    let Ok(target) = client.local_addr().map(canonical) else {
        return;
    };
    // Of a pod it is always HBONE's own port, whatever `--tunnel-port` is.
    if target.port() == TUNNEL_PORT {
        permit.established();
        return Box::pin(server::serve(thread, client, peer, Port::Pod(pod))).await;
    }
    let _hold = Hold::new(&pod, peer);
    let mut report = Report::new(Direction::Inbound, peer, target);
    let standing = Box::pin(establish(&thread, &pod, &mut report)).await;
    permit.established();
    match standing {
        // Dropping the client sends RST.
        Err(refusal) => report.refused(&refusal, &thread),
        Ok(Standing {
            server,
            meter,
            conn,
        }) => {
            let shared = Shared::new(&thread, &pod.turns, permit, conn, meter);
            let pump = SocketPump::new(TcpEnd::new(client), TcpEnd::new(server), shared);
            let (end, meter) = pump.run().await;
            report.ended(end, meter, &thread);
        }
    }
}

async fn establish(
    thread: &Rc<Thread>,
    pod: &Rc<Pod>,
    report: &mut Report,
) -> Result<Standing, Refusal> {
    let mesh = thread.mesh();
    let (peer, target) = (report.record.src_addr, report.target);
    let Some(callee) = mesh.workloads.get(pod.sockets.uid()) else {
        return Err(Refusal::new(
            Reason::UnknownPod,
            format!(
                "the pod {} is not in the manifests (any more)",
                pod.sockets.uid()
            ),
        ));
    };
    report.record.src_workload = mesh.by_ip.get(&peer.ip()).cloned();
    report.record.dst_workload = Some(Arc::clone(callee));
    // Rule 8: a listener's own address is loopback; nothing captured is addressed there.
    if target.ip().is_loopback() || target.ip().is_unspecified() {
        return Err((RefusedDestination::Unroutable, target).into());
    }
    let client = Client {
        ip: peer.ip(),
        pod: report
            .record
            .src_workload
            .as_ref()
            .map(|pod| pod.uid.clone()),
        identity: ClientIdentity::None,
    };
    let mut info = FlowInfo {
        direction: Direction::Inbound,
        workload: Arc::clone(callee),
        peer: report.record.src_workload.clone(),
        client_id: None,
        server_id: None,
        target,
        endpoint: target,
        service: None,
        tls: TlsStatus::NotMeshed,
        server: None,
        authz: None,
    };
    match authz::decide(&mesh, callee, &client, target.port()) {
        Ok(allowed) => {
            info.server = allowed.server;
            info.authz = allowed.authz;
            thread.recorder.authz(&info, true);
            if allowed.audited {
                tracing::info!(client = %peer, callee = %callee.key,
                    "audit: policy would deny this connection");
            }
        }
        Err(denied) => {
            info.server = denied.server;
            thread.recorder.authz(&info, false);
            return Err(denied.refusal);
        }
    }
    let source = Source::Keep { client: peer };
    let server = tcp::connect(target, thread.settings.timing.connect, || {
        pod.sockets.socket(target, source)
    })
    .await
    .map_err(|error| Refusal::new(error.reason(), error.to_string()))?;
    let callee = Callee {
        uid: callee.uid.clone(),
        client,
        port: target.port(),
    };
    Ok(Standing {
        server,
        meter: Meter {
            outbound: None,
            inbound: Some(thread.recorder.open(&info)),
            sent: 0,
            received: 0,
        },
        conn: thread.register(&mesh, None, Some(callee)),
    })
}
