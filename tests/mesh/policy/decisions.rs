//! Policies as people write them, and who is served then: a table, held to real sockets.
//!
//! Four clients call two servers, one on the clients' node and one on the other, so every line is
//! decided for tunnels, for connections within a node and for plain ones of both kinds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, Pod, PodSpec, manifest,
    server::{Habit, Server},
    wait,
};
use serde_json::{Value, json};

use super::DEFAULT;
use crate::ground::{Ground, PATIENCE, PORT, served};

/// What a file changes is in force this soon.
const IN_FORCE: Duration = Duration::from_secs(2);

struct Court {
    ground: Ground,
    /// Meshed, of another account than `near`.
    stranger: Pod,
    /// Outside the cluster's networks.
    outsider: Pod,
    _servers: [Server; 2],
}

/// A policy and the initials of those it lets in: `n`ear, `s`tranger, `p`lain, `o`utsider.
struct Case {
    what: &'static str,
    objects: Vec<Value>,
    served: &'static str,
}

pub(super) fn default_modes_decide_on_every_way() -> Result<()> {
    let court = Court::open()?;
    for (mode, expected) in [
        ("all-unauthenticated", "nspo"),
        ("deny", ""),
        ("all-authenticated", "ns"),
        ("cluster-unauthenticated", "nsp"),
        ("cluster-authenticated", "ns"),
        ("audit", "nspo"),
        // Not understood: the safe sense.
        ("all-unauthentikated", ""),
    ] {
        court
            .ground
            .world
            .manifests()
            .edit("Namespace", "", "mesh", |namespace| {
                namespace["metadata"]["annotations"][DEFAULT] = mode.into();
            })?;
        court.serves(expected).context(mode)?;
    }
    // A pod's own word wins.
    for pod in ["beside", "far"] {
        court
            .ground
            .world
            .manifests()
            .edit("Pod", "mesh", pod, |pod| {
                pod["metadata"]["annotations"][DEFAULT] = "cluster-unauthenticated".into();
            })?;
    }
    court.serves("nsp").context("a pod's own word")
}

pub(super) fn servers_and_their_authorizations_decide_on_every_way() -> Result<()> {
    let by_account = json!({"meshTLS": {"serviceAccounts": [{"name": "near"}]}});
    let by_name = json!({"meshTLS": {"identities":
        ["stranger.mesh.serviceaccount.identity.linkerd.cluster.local"]}});
    let anybody_of_these = json!({
        "unauthenticated": true,
        "networks": [{"cidr": "10.244.0.0/16"}, {"cidr": "fd00:244::/32"}],
    });
    let anybody = json!({"unauthenticated": true});
    let mut by_selector = manifest::server_authorization("mesh", "grant", "", anybody);
    by_selector["spec"]["server"] = json!({"selector": {"matchLabels": {"of": "echoes"}}});
    let mut labelled = server(None);
    labelled["metadata"]["labels"] = json!({"of": "echoes"});
    let mut oldest = server(None);
    oldest["apiVersion"] = "policy.linkerd.io/v1beta1".into();
    let mut by_port_name = server(Some("all-authenticated"));
    by_port_name["spec"]["port"] = "echo".into();
    let mut other_port = server(Some("deny"));
    other_port["spec"]["port"] = (PORT + 1).into();
    let mut other_pods = server(Some("deny"));
    other_pods["spec"]["podSelector"] = json!({"matchLabels": {"role": "client"}});
    Court::open()?.hold(vec![
        Case {
            what: "a Server without a word lets nobody in",
            objects: vec![server(None)],
            served: "",
        },
        Case {
            what: "a Server of another port decides nothing",
            objects: vec![other_port],
            served: "nspo",
        },
        Case {
            what: "its accessPolicy takes the default's place",
            objects: vec![server(Some("all-authenticated"))],
            served: "ns",
        },
        Case {
            what: "a Server of other pods decides nothing",
            objects: vec![other_pods],
            served: "nspo",
        },
        Case {
            what: "a port may be named",
            objects: vec![by_port_name],
            served: "ns",
        },
        Case {
            what: "one service account",
            objects: vec![server(None), grant(by_account)],
            served: "n",
        },
        Case {
            what: "one identity in Linkerd's spelling",
            objects: vec![server(None), grant(by_name)],
            served: "s",
        },
        Case {
            what: "anybody in these networks",
            objects: vec![server(None), grant(anybody_of_these)],
            served: "nsp",
        },
        Case {
            what: "any identity",
            objects: vec![oldest, grant(json!({"meshTLS": {"identities": ["*"]}}))],
            served: "ns",
        },
        Case {
            what: "Servers chosen by label",
            objects: vec![labelled, by_selector],
            served: "nspo",
        },
    ])
}

pub(super) fn authorization_policies_decide_on_every_way() -> Result<()> {
    let court = Court::open()?;
    let near = manifest::mesh_tls_authentication(
        "mesh",
        "who",
        &["near.mesh.serviceaccount.identity.linkerd.cluster.local"],
    );
    let all = manifest::mesh_tls_authentication("mesh", "who", &["*"]);
    let mut by_reference = manifest::mesh_tls_authentication("mesh", "who", &[]);
    by_reference["spec"] =
        json!({"identityRefs": [{"kind": "ServiceAccount", "name": "stranger"}]});
    let cluster = ["10.244.0.0/16", "fd00:244::/32"];
    let inside = manifest::network_authentication("mesh", "where", &cluster);
    let mut but_plain = inside.clone();
    let plain = &court.ground.plain;
    but_plain["spec"]["networks"] = json!([
        {"cidr": cluster[0], "except": [format!("{}/32", plain.v4())]},
        {"cidr": cluster[1], "except": [format!("{}/128", plain.v6())]},
    ]);
    let stranger = &court.stranger;
    let addresses = [
        format!("{}/32", stranger.v4()),
        format!("{}/128", stranger.v6()),
    ];
    let strangers =
        manifest::network_authentication("mesh", "where", &[&addresses[0], &addresses[1]]);
    let who = [("MeshTLSAuthentication", "who")];
    let place = [("NetworkAuthentication", "where")];
    let both = [who[0], place[0]];
    let account = [("ServiceAccount", "near")];
    court.hold(vec![
        Case {
            what: "one identity",
            objects: vec![server(None), policy("echoes", &who), near.clone()],
            served: "n",
        },
        Case {
            what: "an account that a MeshTLSAuthentication refers to",
            objects: vec![server(None), policy("echoes", &who), by_reference],
            served: "s",
        },
        Case {
            what: "any identity",
            objects: vec![server(None), policy("echoes", &who), all.clone()],
            served: "ns",
        },
        Case {
            what: "networks",
            objects: vec![server(None), policy("echoes", &place), inside],
            served: "nsp",
        },
        Case {
            what: "networks with exceptions",
            objects: vec![server(None), policy("echoes", &place), but_plain],
            served: "ns",
        },
        Case {
            what: "both are required, and one client has both",
            objects: vec![
                server(None),
                policy("echoes", &both),
                all,
                strangers.clone(),
            ],
            served: "s",
        },
        Case {
            what: "both are required, and nobody has both",
            objects: vec![
                server(None),
                policy("echoes", &both),
                near.clone(),
                strangers,
            ],
            served: "",
        },
        Case {
            what: "an account itself",
            objects: vec![server(None), policy("echoes", &account)],
            served: "n",
        },
        Case {
            what: "a policy for the namespace holds for its Servers",
            objects: vec![server(None), policy("", &who), near],
            served: "n",
        },
        Case {
            what: "an authentication that nobody wrote",
            objects: vec![server(None), policy("echoes", &who)],
            served: "",
        },
    ])
}

pub(super) fn audit_lets_in_and_tells() -> Result<()> {
    let court = Court::open()?;
    court.serves("nspo").context("without a policy")?;
    for agent in &court.ground.agents {
        ensure!(!agent.log().contains("audit"), "audit is told of already");
    }
    court
        .ground
        .world
        .manifests()
        .apply(&server(Some("audit")))?;
    for agent in &court.ground.agents {
        wait::for_value("audit is told", PATIENCE, || {
            court.serves("nspo")?;
            Ok(agent.log().contains("audit").then_some(()))
        })?;
        let labels = [("direction", "inbound"), ("srv_name", "echoes")];
        agent.wait_metric("inbound_tcp_authz_allow_total", &labels, PATIENCE, |n| {
            n > 0.0
        })?;
        let denied = agent.metrics()?.sum("inbound_tcp_authz_deny_total", &[]);
        ensure!(denied == 0.0, "{denied} are counted as denied");
    }
    Ok(())
}

/// For both servers' one port.
fn server(access: Option<&str>) -> Value {
    manifest::server("mesh", "echoes", &[("role", "server")], PORT, access)
}

fn grant(client: Value) -> Value {
    manifest::server_authorization("mesh", "grant", "echoes", client)
}

fn policy(server: &str, required: &[(&str, &str)]) -> Value {
    manifest::authorization_policy("mesh", "policy", server, required)
}

impl Court {
    /// Both servers serve everybody.
    fn open() -> Result<Self> {
        fn serving(spec: PodSpec) -> PodSpec {
            spec.label("role", "server").port("echo", PORT)
        }
        let mut ground = Ground::with(serving)?;
        let stranger = ground.world.pod(&PodSpec::new("stranger"))?;
        let outsider = ground.world.outsider()?;
        let servers = [
            Server::start(ground.beside.netns(), PORT, Habit::Echo)?,
            Server::start(ground.far.netns(), PORT, Habit::Echo)?,
        ];
        let networks = "10.244.0.0/16,fd00:244::/32";
        ground.mesh_with(&AgentOptions::default().arg("--cluster-networks", networks))?;
        ground.agent(0)?.wait_captured(&stranger, PATIENCE)?;
        Ok(Self {
            ground,
            stranger,
            outsider,
            _servers: servers,
        })
    }

    /// Each case for itself, from nothing to nothing.
    fn hold(&self, cases: Vec<Case>) -> Result<()> {
        self.serves("nspo").context("before the first case")?;
        for case in cases {
            // One file, so that no policy is in force by half.
            let manifests = self.ground.world.manifests();
            manifests.write("case.yaml", &case.objects)?;
            self.serves(case.served).context(case.what)?;
        }
        Ok(())
    }

    /// Waits until exactly these clients are served, by both servers over both families; and they
    /// still are when asked again.
    fn serves(&self, expected: &str) -> Result<()> {
        let ground = &self.ground;
        let servers = [
            ("beside", ground.beside.at(PORT)),
            ("beside", ground.beside.at6(PORT)),
            ("far", ground.far.at(PORT)),
            ("far", ground.far.at6(PORT)),
        ];
        let clients = [
            ('n', &ground.near),
            ('s', &self.stranger),
            ('p', &ground.plain),
            ('o', &self.outsider),
        ];
        let as_expected = || -> Result<()> {
            for (name, to) in servers {
                let let_in: String = clients
                    .iter()
                    .filter(|(_, client)| served(client, to))
                    .map(|(initial, _)| *initial)
                    .collect();
                ensure!(
                    let_in == expected,
                    "{name} at {to} serves {let_in:?} instead of {expected:?}"
                );
            }
            Ok(())
        };
        wait::for_value("the policy is in force", IN_FORCE, || {
            as_expected().map(Some)
        })?;
        as_expected()
    }
}
