//! NetworkPolicy is asked on every way, about the endpoint and about the pod that calls.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use picomesh_common::PortRange;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{
    attacks::{Attack, HONEST},
    policy::expect_reset,
    world::*,
};
use crate::{
    proxy::ProxySettings,
    state::{
        ObjectKey,
        objects::{
            DefaultPolicy, NetworkMatch, NetworkPeer, NetworkPolicy, NetworkPort, NetworkPorts,
            NetworkRule, Protocol, Selector,
        },
    },
};

const SOON: Duration = Duration::from_secs(1);
/// Nobody in the mesh has it.
const OUTSIDE: &str = "10.9.7.7";

/// The one policy of the world, for pods whose label `app` is `of`, or for all.
fn set(world: &mut World, of: Option<&str>, ingress: Option<&str>, egress: Option<NetworkRule>) {
    let ingress = ingress.map(|app| {
        vec![NetworkRule {
            peers: vec![NetworkPeer::Pods {
                namespaces: None,
                pods: labelled(app),
            }],
            ports: Vec::new(),
        }]
    });
    let policy = NetworkPolicy {
        key: ObjectKey {
            cluster: "test".into(),
            namespace: "shop".into(),
            name: "only".into(),
        },
        pod_selector: of.map_or_else(Selector::default, labelled),
        ingress,
        egress: egress.map(|rule| vec![rule]),
    };
    let key = policy.key.clone();
    world.objects.network_policies.insert(key, Arc::new(policy));
}

fn labelled(app: &str) -> Selector {
    Selector {
        match_labels: [("app".into(), app.into())].into(),
        ..Selector::default()
    }
}

/// To one address and port.
fn to(endpoint: SocketAddr) -> NetworkRule {
    let port = endpoint.port();
    NetworkRule {
        peers: vec![NetworkPeer::Block(NetworkMatch {
            cidr: endpoint.ip().into(),
            except: Vec::new(),
        })],
        ports: vec![NetworkPort {
            protocol: Protocol::Tcp,
            ports: NetworkPorts::Range(PortRange {
                first: port,
                last: port,
            }),
        }],
    }
}

fn label(world: &mut World, pod: &str, app: &str) {
    let pod = world.objects.pods.get_mut(pod).unwrap();
    let labels = &mut Arc::make_mut(pod).labels;
    labels.insert("app".into(), app.into());
}

async fn open(listener: &TcpListener, from: &str, to: SocketAddr) -> (TcpStream, TcpStream) {
    let mut client = dial(from, to).await;
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    server.read_exact(&mut [0]).await.unwrap();
    (client, server)
}

/// It is refused, and the application hears nothing of it.
async fn refused(listener: &TcpListener, from: &str, to: SocketAddr) {
    // The RST may come before or after the client's `connect` returns.
    match try_dial(from, to).await {
        Ok(mut client) => expect_reset(&mut client, Duration::from_secs(5)).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    let accepted = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
    assert!(accepted.is_err(), "{to} was reached");
}

#[test]
fn ingress_is_decided_by_the_pod_that_calls_on_every_way() {
    world(|mut world| async move {
        world.capture_all().await;
        label(&mut world, CALLER, "friend");
        set(&mut world, None, Some("friend"), None);
        world.publish().await;
        let far = world.serve(at(CALLEE, PORT));
        let near = world.serve(at(NEIGHBOUR, PORT));
        let plain = world.serve(at(CALLEE, 9090));
        let mut through = open(&far, CALLER, at(SERVICE, 80)).await;
        let mut beside = open(&near, CALLER, at(NEIGHBOUR, PORT)).await;
        refused(&plain, UNMESHED, at(CALLEE, 9090)).await;
        let words = [
            "inbound",
            "network_policy_ingress",
            "NetworkPolicy shop/only",
            UNMESHED,
        ];
        world.two.logged(&words).await;
        let counted = ["inbound_tcp_errors_total", "network_policy_ingress"];
        world.two.counted(&counted, 1.0).await;

        // An unmeshed pod is a pod: its label counts, too. The others are now strangers.
        label(&mut world, UNMESHED, "friend");
        label(&mut world, CALLER, "stranger");
        world.publish().await;
        expect_reset(&mut through.0, SOON).await;
        expect_reset(&mut through.1, SOON).await;
        expect_reset(&mut beside.0, SOON).await;
        world.two.logged(&["inbound", "policy_changed"]).await;
        refused(&far, CALLER, at(SERVICE, 80)).await;
        refused(&near, CALLER, at(NEIGHBOUR, PORT)).await;
        let _served = open(&plain, UNMESHED, at(CALLEE, 9090)).await;
        // The caller's agent can say why, whoever decided.
        for endpoint in [at(CALLEE, PORT), at(NEIGHBOUR, PORT)] {
            let words = ["outbound", "network_policy_ingress", &endpoint.to_string()];
            world.one.logged(&words).await;
        }
        world.objects.network_policies.clear();
        world.publish().await;
        open(&far, CALLER, at(SERVICE, 80)).await;
    });
}

#[test]
fn egress_is_decided_by_the_endpoint_that_was_picked() {
    world(|mut world| async move {
        let dialled = [at(SERVICE, 80), at(NEIGHBOUR, PORT), at(OUTSIDE, 443)];
        world.capture(&world.one, CALLER, &dialled, &[]).await;
        world.capture(&world.one, NEIGHBOUR, &[], &[]).await;
        world.capture(&world.two, CALLEE, &[], &[]).await;
        let far = world.serve(at(CALLEE, PORT));
        let near = world.serve(at(NEIGHBOUR, PORT));
        let outside = world.serve(at(OUTSIDE, 443));
        label(&mut world, CALLER, "caller");

        // The endpoint's port is allowed; the Service's is another.
        set(&mut world, Some("caller"), None, Some(to(at(CALLEE, PORT))));
        world.publish().await;
        let mut through = open(&far, CALLER, at(SERVICE, 80)).await;
        refused(&near, CALLER, at(NEIGHBOUR, PORT)).await;
        refused(&outside, CALLER, at(OUTSIDE, 443)).await;
        let neighbour = ["outbound", "network_policy_egress", "shop/neighbour"];
        world.one.logged(&neighbour).await;
        let outsider = ["outbound", "network_policy_egress", "10.9.7.7:443"];
        world.one.logged(&outsider).await;
        let counted = ["outbound_tcp_errors_total", "network_policy_egress"];
        world.one.counted(&counted, 2.0).await;

        // The Service's own address and port are not what it is about.
        set(&mut world, Some("caller"), None, Some(to(at(SERVICE, 80))));
        world.publish().await;
        expect_reset(&mut through.0, SOON).await;
        world.one.logged(&["outbound", "policy_changed"]).await;
        refused(&far, CALLER, at(SERVICE, 80)).await;

        set(&mut world, Some("caller"), None, Some(to(at(OUTSIDE, 443))));
        world.publish().await;
        let mut passed = open(&outside, CALLER, at(OUTSIDE, 443)).await;
        set(
            &mut world,
            Some("caller"),
            None,
            Some(to(at(NEIGHBOUR, PORT))),
        );
        world.publish().await;
        expect_reset(&mut passed.0, SOON).await;
        open(&near, CALLER, at(NEIGHBOUR, PORT)).await;
    });
}

#[test]
fn both_kinds_of_policy_must_allow() {
    world(|mut world| async move {
        world.capture_all().await;
        let far = world.serve(at(CALLEE, PORT));
        label(&mut world, CALLER, "friend");
        set(&mut world, None, Some("friend"), None);
        world.set_default(DefaultPolicy::Deny);
        world.publish().await;
        refused(&far, CALLER, at(SERVICE, 80)).await;
        world.two.logged(&["inbound", "default_deny"]).await;
        world.set_default(DefaultPolicy::AllUnauthenticated);
        label(&mut world, CALLER, "stranger");
        world.publish().await;
        refused(&far, CALLER, at(SERVICE, 80)).await;
        world
            .two
            .logged(&["inbound", "network_policy_ingress"])
            .await;
        label(&mut world, CALLER, "friend");
        world.publish().await;
        open(&far, CALLER, at(SERVICE, 80)).await;
    });
}

/// Who leaves the mesh keeps what stands, and Kubernetes' policy still holds for it.
#[test]
fn a_pod_that_has_left_the_mesh_is_still_isolated_in_what_we_carry() {
    world(|mut world| async move {
        world.capture_all().await;
        let far = world.serve(at(CALLEE, PORT));
        let (mut client, mut server) = open(&far, CALLER, at(SERVICE, 80)).await;
        let callee = world.objects.pods.get_mut(CALLEE).unwrap();
        Arc::make_mut(callee).words.mesh = Some(false);
        world.publish().await;
        client.write_all(b"?").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        set(&mut world, None, Some("friend"), None);
        world.publish().await;
        expect_reset(&mut client, SOON).await;
    });
}

/// Two pods of one identity on one node share a tunnel, and policy still tells them apart: by the
/// address that is claimed, which must be the identity's on that node. Whose address is not proven
/// to be its own is no pod at all.
#[test]
fn pods_of_one_identity_are_told_apart() {
    const TWIN: &str = "10.9.1.3";
    world(|mut world| async move {
        let mut twin = (*world.objects.pods[CALLER]).clone();
        twin.uid = TWIN.into();
        twin.key.name = "twin".into();
        twin.ips = vec![TWIN.parse().unwrap()];
        world.objects.pods.insert(TWIN.into(), Arc::new(twin));
        label(&mut world, CALLER, "friend");
        label(&mut world, NEIGHBOUR, "friend");
        label(&mut world, TWIN, "stranger");
        set(&mut world, None, Some("friend"), None);
        world.publish().await;
        world.capture_all().await;
        let _listener = world.serve(at(CALLEE, PORT));

        let by_pod = Attack {
            from: CALLER,
            to: CALLEE,
            client: None,
            ..HONEST
        };
        let cases = [
            ("the friend", 200, "", HONEST),
            (
                "its twin",
                403,
                "network_policy_ingress",
                Attack {
                    client: Some("10.9.1.3:4567"),
                    ..HONEST
                },
            ),
            (
                "nobody",
                400,
                "bad_request",
                Attack {
                    client: None,
                    ..HONEST
                },
            ),
            (
                "a friend of another identity",
                403,
                "claimed_source",
                Attack {
                    client: Some("10.9.1.2:4567"),
                    ..HONEST
                },
            ),
            ("the friend, to the pod itself", 200, "", by_pod),
            (
                "its twin, to the pod itself",
                403,
                "network_policy_ingress",
                Attack {
                    from: TWIN,
                    ..by_pod
                },
            ),
            (
                "from a friend's address as somebody else",
                403,
                "network_policy_ingress",
                Attack {
                    from: NEIGHBOUR,
                    ..by_pod
                },
            ),
            (
                "from a friend's address as that friend",
                200,
                "",
                Attack {
                    from: NEIGHBOUR,
                    source: "neighbour",
                    ..by_pod
                },
            ),
        ];
        for (who, status, reason, attack) in cases {
            let wanted = (status, reason.to_owned());
            assert_eq!(attack.run(&world).await, wanted, "{who}");
        }
    });
}

/// A tunnel may speak for a pod that its node has heard of before we have. What we hear meanwhile
/// counts, also about the pod that is called.
#[test]
fn a_policy_that_comes_with_the_news_of_a_client_holds_for_it() {
    const NEW: &str = "10.9.1.3";
    let patient = |settings: &mut ProxySettings| {
        settings.timing.unknown_source = Duration::from_secs(5);
    };
    world_with(patient, |mut world| async move {
        world.capture_all().await;
        let _listener = world.serve(at(CALLEE, PORT));
        let new = Attack {
            client: Some("10.9.1.3:4567"),
            ..HONEST
        };
        let mut pod = (*world.objects.pods[CALLER]).clone();
        pod.uid = NEW.into();
        pod.key.name = "new".into();
        pod.ips = vec![NEW.parse().unwrap()];
        world.objects.pods.insert(NEW.into(), Arc::new(pod));
        set(&mut world, None, Some("friend"), None);
        let news = async {
            tokio::time::sleep(SOON).await;
            world.publish().await;
        };
        let (answer, ()) = tokio::join!(new.run(&world), news);
        assert_eq!(answer, (403, "network_policy_ingress".to_owned()));

        label(&mut world, NEW, "friend");
        world.publish().await;
        assert_eq!(new.run(&world).await, (200, String::new()), "the control");
    });
}
