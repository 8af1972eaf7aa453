//! What a pod of this node dials.
//!
//! [`serve`] is the story. [`decide`] turns the original destination into a plain [`Hop`]: which
//! endpoint, by which carrier, allowed by whom; [`reach`] acts on it. A Service's next endpoint is
//! tried when one cannot be reached, and a node that takes no tunnels is waited for; a refusal by
//! policy is final. The one exit is in [`super::report`].

use std::{
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{SendStream, client::ResponseFuture};
use tokio::{net::TcpStream, time::sleep};

use super::{
    authz::{self, Allowed},
    conns::{Callee, Caller, Conn},
    copy::{Counted, End, Meter, Receive, Shared, SocketPump, StreamPump, Toward},
    limits::Permit,
    reason::Reason,
    report::{Refusal, Report},
    tcp::{self, TcpEnd},
    threads::{Load, Pod, Thread, canonical},
    tunnel::Route,
};
use crate::{
    datapath::Source,
    metrics::{Direction, FlowInfo, TlsStatus},
    state::{
        Mesh, Workload,
        balance::{self, Affinity},
        policy::{Client, ClientIdentity, PolicyRef},
        resolve::{Carrier, Destination, Endpoint, RefusedDestination, ServiceFrontend, resolve},
    },
};

/// Endpoints of a Service that one connection tries.
const ENDPOINT_TRIES: usize = 3;
/// Between two looks whether a node takes tunnels again: the longer, the more of the pod wait. So
/// they do not come all at once when it does, and a small machine is not kept busy by looking.
const LOOK: Duration = Duration::from_millis(200);
const LOOKERS: usize = 500;
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// Everything decided about where a connection goes next.
struct Hop {
    endpoint: Endpoint,
    /// Nobody in the mesh has the address.
    passthrough: bool,
    /// Same node only: why the callee lets it in.
    allowed: Option<Allowed>,
}

/// The far end, standing.
enum Far {
    Socket(TcpStream),
    Stream {
        response: ResponseFuture,
        send: SendStream<Bytes>,
        tunnel: Rc<dyn Counted>,
    },
}

/// A connection that can begin.
struct Standing {
    far: Far,
    meter: Meter,
    conn: Rc<Conn>,
    _load: Load,
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
    let Ok(target) = client.local_addr() else {
        return;
    };
    let mut report = Report::new(Direction::Outbound, peer, canonical(target));
    // On the heap, to be given back before the bytes flow: this part is large and short.
    let standing = Box::pin(establish(&thread, &pod, &mut report, &mut permit)).await;
    permit.established();
    match standing {
        // Dropping the client sends RST.
        Err(refusal) => report.refused(&refusal, &thread),
        Ok(Standing {
            far,
            meter,
            conn,
            _load,
        }) => {
            let shared = Shared::new(&thread, &pod.turns, permit, conn, meter);
            let (end, meter) = pump(TcpEnd::new(client), far, shared).await;
            report.ended(end, meter, &thread);
        }
    }
}

async fn pump(client: TcpEnd, far: Far, shared: Shared) -> (End, Meter) {
    match far {
        Far::Socket(server) => {
            SocketPump::new(client, TcpEnd::new(server), shared)
                .run()
                .await
        }
        Far::Stream {
            response,
            send,
            tunnel,
        } => {
            let receive = Receive::Awaiting(response);
            StreamPump::new(client, send, receive, Toward::Server, tunnel, shared)
                .run()
                .await
        }
    }
}

/// Waits for a node whose agent is away, as a SYN that is sent again would: the agents of a node that
/// has no room for two follow each other with seconds between them. And for the certificate of a
/// pod that has just come into the mesh. What is known by then counts.
async fn establish(
    thread: &Rc<Thread>,
    pod: &Rc<Pod>,
    report: &mut Report,
    permit: &mut Permit,
) -> Result<Standing, Refusal> {
    let begun = Instant::now();
    loop {
        match attempt(thread, pod, report).await {
            Err(refusal)
                if passes(thread, report, &refusal)
                    && begun.elapsed() < thread.settings.timing.away =>
            {
                let Some(waiting) = permit.wait() else {
                    return Err(refusal);
                };
                let rounds = u32::try_from(1 + waiting / LOOKERS).unwrap_or(u32::MAX);
                sleep(LOOK.saturating_mul(rounds).min(LONGEST_LOOK)).await;
            }
            done => return done,
        }
    }
}

/// May it be another answer in a moment?
fn passes(thread: &Thread, report: &Report, refusal: &Refusal) -> bool {
    let caller = report.record.src_workload.as_deref();
    let may_be_signed =
        || caller.is_some_and(|caller| !thread.identities.is_refused(&caller.identity));
    refusal.reason == Reason::TunnelFailed
        || (refusal.reason == Reason::NoCertificate && may_be_signed())
}

/// Who, where to, may it, by what: then the socket or stream.
async fn attempt(
    thread: &Rc<Thread>,
    pod: &Rc<Pod>,
    report: &mut Report,
) -> Result<Standing, Refusal> {
    let mesh = thread.mesh();
    let (peer, target) = (report.record.src_addr, report.target);
    let Some(caller) = mesh.workloads.get(pod.sockets.uid()) else {
        return Err(Refusal::new(
            Reason::UnknownPod,
            format!(
                "the calling pod {} is not in the manifests (any more)",
                pod.sockets.uid()
            ),
        ));
    };
    report.record.src_workload = Some(Arc::clone(caller));
    // Rule 8: a listener's own address is loopback; nothing captured is addressed there.
    if target.ip().is_loopback() || target.ip().is_unspecified() {
        return Err((RefusedDestination::Unroutable, target).into());
    }
    let destination = resolve(&mesh, caller, target);
    if let Destination::Service(service) = &destination {
        report.record.dst_service = Some(service.service.clone());
    }
    let mut tried = Vec::new();
    loop {
        let hop = match decide(thread, &mesh, caller, peer, &destination, &tried) {
            Ok(hop) => hop,
            Err(refused) => {
                if let Some(callee) = refused.by_callee {
                    let info = inbound_info(caller, &callee.endpoint, None, callee.server);
                    if let Some(info) = info {
                        thread.recorder.authz(&info, false);
                    }
                }
                if let Some((endpoint, workload)) = refused.toward {
                    report.record.dst_addr = endpoint;
                    report.record.dst_workload = workload;
                }
                return Err(refused.refusal);
            }
        };
        note(report, caller, &hop);
        match reach(thread, pod, &mesh, caller, report, &hop).await {
            Ok((far, tunnel)) => {
                if let Some(remote) = tunnel {
                    report.record.dst_addr = remote;
                    report.record.dst_hbone_addr = Some(hop.endpoint.addr);
                }
                return Ok(begin(thread, &mesh, caller, report, &destination, hop, far));
            }
            Err(refusal) => {
                let retry = matches!(destination, Destination::Service(_))
                    && tried.len() + 1 < ENDPOINT_TRIES;
                if !retry {
                    return Err(refusal);
                }
                tracing::debug!(endpoint = %hop.endpoint.addr, reason = refusal.reason.word(),
                    "endpoint not reached, trying another");
                tried.push(hop.endpoint.addr);
                let Destination::Service(service) = &destination else {
                    return Err(refusal);
                };
                if service
                    .endpoints
                    .iter()
                    .all(|other| tried.contains(&other.addr))
                {
                    return Err(refusal);
                }
            }
        }
    }
}

/// Why there is no hop.
struct Refused {
    refusal: Refusal,
    /// What was picked, if it came so far.
    toward: Option<(SocketAddr, Option<Arc<Workload>>)>,
    by_callee: Option<Box<ByCallee>>,
}

/// Policy of a pod of this node said no.
struct ByCallee {
    endpoint: Endpoint,
    server: Option<PolicyRef>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self {
            refusal,
            toward: None,
            by_callee: None,
        }
    }
}

/// Where next? Asks the balancer, the caller's policies and those of a callee on this node; touches
/// nothing.
fn decide(
    thread: &Thread,
    mesh: &Mesh,
    caller: &Workload,
    peer: SocketAddr,
    destination: &Destination,
    tried: &[SocketAddr],
) -> Result<Hop, Refused> {
    let (endpoint, passthrough) = match destination {
        Destination::Service(service) => match pick(thread, service, peer.ip(), tried) {
            Some(endpoint) => (endpoint, false),
            None => {
                let detail = format!("Service {} has no endpoint left to try", service.service);
                return Err(Refusal::new(Reason::NoEndpoints, detail).into());
            }
        },
        Destination::Endpoint(endpoint) => (endpoint.clone(), false),
        Destination::Passthrough(addr) => {
            let endpoint = Endpoint {
                addr: *addr,
                workload: None,
                carrier: Carrier::Plain,
            };
            (endpoint, true)
        }
        Destination::Refused(why, dialled) => return Err(Refusal::from((*why, *dialled)).into()),
    };
    if let Err(refusal) = authz::leaves(caller, endpoint.addr, endpoint.workload.as_deref()) {
        return Err(Refused {
            refusal,
            toward: Some((endpoint.addr, endpoint.workload)),
            by_callee: None,
        });
    }
    let allowed = match (&endpoint.carrier, &endpoint.workload) {
        (Carrier::Local, Some(callee)) => {
            // Proven: the netns whose listener accepted it cannot be forged.
            let client = Client {
                ip: peer.ip(),
                pod: Some(caller.uid.clone()),
                identity: ClientIdentity::Proven(caller.identity.clone()),
            };
            match authz::decide(mesh, callee, &client, endpoint.addr.port()) {
                Ok(allowed) => Some(allowed),
                Err(denied) => {
                    return Err(Refused {
                        refusal: denied.refusal,
                        toward: Some((endpoint.addr, Some(Arc::clone(callee)))),
                        by_callee: Some(Box::new(ByCallee {
                            server: denied.server,
                            endpoint,
                        })),
                    });
                }
            }
        }
        (Carrier::Local, None) => return Err(Refusal::from(Reason::NotLocal).into()),
        (Carrier::Tunnel { .. } | Carrier::Plain, _) => None,
    };
    Ok(Hop {
        endpoint,
        passthrough,
        allowed,
    })
}

fn pick(
    thread: &Thread,
    service: &ServiceFrontend,
    client: IpAddr,
    tried: &[SocketAddr],
) -> Option<Endpoint> {
    let open = |endpoint: &Endpoint| thread.loads.open(endpoint.addr);
    let mut random = |bound: usize| fastrand::usize(0..bound.max(1));
    let now = Instant::now();
    let mut pick = |affinity: &mut Affinity| {
        balance::pick(service, client, tried, &open, affinity, &mut random, now).cloned()
    };
    if service.affinity.is_some() {
        pick(&mut thread.shared.affinity.lock())
    } else {
        pick(&mut Affinity::default())
    }
}

fn note(report: &mut Report, caller: &Workload, hop: &Hop) {
    let record = &mut report.record;
    record.dst_addr = hop.endpoint.addr;
    record.dst_workload = hop.endpoint.workload.clone();
    let proven = match hop.endpoint.carrier {
        Carrier::Local | Carrier::Tunnel { .. } => true,
        Carrier::Plain => false,
    };
    record.src_identity = proven.then(|| caller.identity.clone());
    record.dst_identity = hop
        .endpoint
        .workload
        .as_ref()
        .filter(|_| proven)
        .map(|workload| workload.identity.clone());
}

/// Acts: the socket or stream that the hop asks for.
async fn reach(
    thread: &Rc<Thread>,
    pod: &Rc<Pod>,
    mesh: &Mesh,
    caller: &Workload,
    report: &Report,
    hop: &Hop,
) -> Result<(Far, Option<SocketAddr>), Refusal> {
    let peer = report.record.src_addr;
    let addr = hop.endpoint.addr;
    let patience = thread.settings.timing.connect;
    let connected = match (&hop.endpoint.carrier, &hop.endpoint.workload) {
        (Carrier::Local, Some(callee)) => match thread.pod(&callee.uid) {
            // A pod that calls itself has the address that the callee shall see.
            Some(to) if callee.ips.contains(&peer.ip()) => {
                tcp::connect(addr, patience, || to.sockets.socket(addr, Source::Own)).await
            }
            Some(to) => {
                let source = Source::Keep { client: peer };
                tcp::connect(addr, patience, || to.sockets.socket(addr, source)).await
            }
            // Meshed and not captured (yet): policy is decided, so its own address will do.
            None => tcp::connect(addr, patience, || pod.sockets.socket(addr, Source::Own)).await,
        },
        (Carrier::Tunnel { addresses, .. }, Some(callee)) => {
            let route = Route::new(thread, pod, mesh, caller, callee, addr, addresses)?;
            let stream = thread.pool.open(thread, route, peer, addr).await?;
            let far = Far::Stream {
                response: stream.response,
                send: stream.send,
                tunnel: stream.tunnel,
            };
            return Ok((far, Some(stream.remote)));
        }
        (Carrier::Tunnel { .. } | Carrier::Local, None) => return Err(Reason::NotLocal.into()),
        (Carrier::Plain, _) => {
            tcp::connect(addr, patience, || pod.sockets.socket(addr, Source::Own)).await
        }
    };
    match connected {
        Ok(stream) => Ok((Far::Socket(stream), None)),
        Err(error) => Err(Refusal::new(error.reason(), error.to_string())),
    }
}

/// The far end stands: count and register.
fn begin(
    thread: &Rc<Thread>,
    mesh: &Mesh,
    caller: &Arc<Workload>,
    report: &Report,
    destination: &Destination,
    hop: Hop,
    far: Far,
) -> Standing {
    let tls = match hop.endpoint.carrier {
        Carrier::Local => TlsStatus::SameNode,
        Carrier::Tunnel { .. } => TlsStatus::True,
        Carrier::Plain if hop.passthrough => TlsStatus::Passthrough,
        Carrier::Plain => TlsStatus::NotMeshed,
    };
    let service = match destination {
        Destination::Service(service) => Some((service.service.clone(), service.port)),
        Destination::Endpoint(_) | Destination::Passthrough(_) | Destination::Refused(..) => None,
    };
    let outbound = FlowInfo {
        direction: Direction::Outbound,
        workload: Arc::clone(caller),
        peer: hop.endpoint.workload.clone(),
        client_id: report.record.src_identity.clone(),
        server_id: report.record.dst_identity.clone(),
        target: report.target,
        endpoint: hop.endpoint.addr,
        service,
        tls,
        server: None,
        authz: None,
    };
    let mut inbound = None;
    let mut callee = None;
    if let (Some(allowed), Some(workload)) = (hop.allowed, &hop.endpoint.workload) {
        callee = Some(Callee {
            uid: workload.uid.clone(),
            client: Client {
                ip: report.record.src_addr.ip(),
                pod: Some(caller.uid.clone()),
                identity: ClientIdentity::Proven(caller.identity.clone()),
            },
            port: hop.endpoint.addr.port(),
        });
        inbound = inbound_info(caller, &hop.endpoint, allowed.authz, allowed.server);
        if allowed.audited {
            tracing::info!(client = %caller.identity, callee = %workload.key,
                "audit: policy would deny this connection");
        }
    }
    let from = Caller {
        uid: caller.uid.clone(),
        endpoint: hop.endpoint.addr,
        callee: hop.endpoint.workload.as_ref().map(|pod| pod.uid.clone()),
    };
    let inbound = inbound.map(|info| {
        thread.recorder.authz(&info, true);
        thread.recorder.open(&info)
    });
    Standing {
        far,
        meter: Meter {
            outbound: Some(thread.recorder.open(&outbound)),
            inbound,
            sent: 0,
            received: 0,
        },
        conn: thread.register(mesh, Some(from), callee),
        _load: Load::new(thread, hop.endpoint.addr),
    }
}

/// The callee's own series of a connection within the node.
fn inbound_info(
    caller: &Arc<Workload>,
    endpoint: &Endpoint,
    authz: Option<PolicyRef>,
    server: Option<PolicyRef>,
) -> Option<FlowInfo> {
    let callee = endpoint.workload.as_ref()?;
    Some(FlowInfo {
        direction: Direction::Inbound,
        workload: Arc::clone(callee),
        peer: Some(Arc::clone(caller)),
        client_id: Some(caller.identity.clone()),
        server_id: Some(callee.identity.clone()),
        target: endpoint.addr,
        endpoint: endpoint.addr,
        service: None,
        tls: TlsStatus::SameNode,
        server,
        authz,
    })
}
