//! Who somebody is: certificates, names, addresses and namespaces that are not theirs, each
//! refused with a reason in log and metric. The control of each is the honest version of the same.

mod annotations;
mod attacker;

use std::{fmt, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use http::Method;
use picomesh::identity::{parse_spiffe_id, server_name};
use picomesh_tests::{
    Agent, Node, Pod, PodSpec, ServiceSpec, World,
    agent::TUNNEL_PORT,
    client,
    server::{Habit, Server},
    wait,
};
use rcgen::{DistinguishedName, DnType, SanType};

use self::attacker::{Answer, Authority, Call, Credentials, IMPOSTOR_SAYS, Impostor, Life};
use crate::harness::{Need, Test};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "identity_attacks::certificates_that_prove_nothing_open_no_tunnel",
        needs: &[Need::Mesh],
        run: certificates_that_prove_nothing_open_no_tunnel,
    },
    Test {
        name: "identity_attacks::a_tunnel_reaches_only_the_pods_it_is_for",
        needs: &[Need::Mesh],
        run: a_tunnel_reaches_only_the_pods_it_is_for,
    },
    Test {
        name: "identity_attacks::a_tunnel_speaks_only_for_its_own_pods",
        needs: &[Need::Mesh],
        run: a_tunnel_speaks_only_for_its_own_pods,
    },
    Test {
        name: "identity_attacks::a_tunnel_to_a_pods_address_is_held_to_the_same",
        needs: &[Need::Mesh],
        run: a_tunnel_to_a_pods_address_is_held_to_the_same,
    },
    Test {
        name: "identity_attacks::a_node_with_anothers_certificate_is_not_believed",
        needs: &[Need::Mesh],
        run: a_node_with_anothers_certificate_is_not_believed,
    },
    Test {
        name: "identity_attacks::an_annotation_gives_nobody_anothers_namespace",
        needs: &[Need::Mesh],
        run: annotations::an_annotation_gives_nobody_anothers_namespace,
    },
];

/// The port that servers listen on.
const PORT: u16 = 8080;
/// A port of the node itself.
const NODE_PORT: u16 = 9999;
const PATIENCE: Duration = Duration::from_secs(5);
const GREETING: &str = "the-application-speaks";

/// An agent on node 1, and somebody who owns node 0 and every certificate that the world's
/// authority would sign.
struct Ground {
    agent: Agent,
    authority: Authority,
    /// Meshed, node 0: the attacker's own pod.
    near: Pod,
    /// Meshed, node 0, of another identity.
    other: Pod,
    /// Meshed, node 1, of the same identity as `near`.
    twin: Pod,
    /// Meshed and strict, node 1: the victim.
    far: Pod,
    /// Meshed, node 1, of another identity.
    third: Pod,
    /// Not meshed, node 1.
    plain: Pod,
    /// A machine on the wire that is no node.
    outsider: Pod,
    application: Server,
    /// A service of node 1 itself, on all its addresses.
    of_node: Server,
    world: World,
}

impl Ground {
    fn new() -> Result<Self> {
        let world = World::new(2)?;
        world.namespace("mesh", Some("enabled"))?;
        let near = world.pod(&PodSpec::new("near"))?;
        let other = world.pod(&PodSpec::new("other"))?;
        let twin = world.pod(&PodSpec::new("twin").on(1).account("near"))?;
        let strict = "config.picomesh.io/default-inbound-policy";
        let far = PodSpec::new("far")
            .on(1)
            .annotation(strict, "all-authenticated");
        let far = world.pod(&far)?;
        let third = world.pod(&PodSpec::new("third").on(1))?;
        let plain = world.pod(&PodSpec::new("plain").on(1).unmeshed())?;
        let outsider = world.outsider()?;
        let application = Server::start(far.netns(), PORT, Habit::SpeaksFirst(GREETING))?;
        let node = world.node(1)?;
        let of_node = Server::start(node.netns(), NODE_PORT, Habit::SpeaksFirst(GREETING))?;
        let agent = world.start_agent(&node)?;
        agent.wait_captured(&far, 4 * PATIENCE)?;
        agent.wait_captured(&third, 4 * PATIENCE)?;
        let authority = Authority::of_world(&world.ca_dir())?;
        Ok(Self {
            agent,
            authority,
            near,
            other,
            twin,
            far,
            third,
            plain,
            outsider,
            application,
            of_node,
            world,
        })
    }

    fn thief(&self) -> Result<Node> {
        self.world.node(0)
    }

    /// What the agent of node 0 would ask when `near` calls `far`.
    fn honest<'a>(&self, credentials: &'a Credentials) -> Result<Call<'a>> {
        Ok(Call {
            to: (self.world.node(1)?.v4(), TUNNEL_PORT).into(),
            server_name: Some(sni(&self.far)?),
            credentials: Some(credentials),
            method: Method::CONNECT,
            target: self.far.at(PORT).to_string(),
            forwarded: vec![format!("for=\"{}\"", self.near.at(40_000))],
        })
    }

    /// The honest request is served: the attacks differ from it in one thing each.
    fn control(&self, call: &Call<'_>) -> Result<()> {
        let answer = call.place(self.thief()?.netns())?;
        ensure!(
            answer
                == Answer::Open {
                    said: GREETING.into()
                },
            "control: the honest request is answered {answer:?}"
        );
        Ok(())
    }

    /// Makes the call from `from` and demands that it is refused for `refusal`, in the answer, the
    /// log and the metrics, and that no application heard of it.
    fn refused(&self, what: &str, from: &Pod, call: &Call<'_>, refusal: Refusal) -> Result<()> {
        self.refused_in(what, from.netns(), call, refusal)
    }

    fn refused_in(
        &self,
        what: &str,
        from: &picomesh_tests::Netns,
        call: &Call<'_>,
        refusal: Refusal,
    ) -> Result<()> {
        let attempt = || -> Result<()> {
            let word = refusal.word();
            let (metric, labels) = refusal.metric();
            let counted = self.agent.metrics()?.sum(metric, &labels);
            let logged = self.lines_with(word);
            let accepted = self.application.accepted() + self.of_node.accepted();

            let answer = call.place(from)?;
            match (refusal, &answer) {
                (Refusal::Handshake(_), Answer::NoTunnel(_)) => {}
                (Refusal::Request(word), Answer::Refused { reason, .. }) if reason == word => {}
                (Refusal::Handshake(_) | Refusal::Request(_), _) => {
                    anyhow::bail!("the answer is {answer:?}, not {refusal}")
                }
            }
            self.agent
                .wait_metric(metric, &labels, PATIENCE, |now| now > counted)?;
            wait::until(&format!("a log line says {word}"), PATIENCE, || {
                self.lines_with(word) > logged
            })?;
            ensure!(
                self.application.accepted() + self.of_node.accepted() == accepted,
                "an application was called"
            );
            Ok(())
        };
        attempt().with_context(|| what.to_owned())
    }

    fn lines_with(&self, word: &str) -> usize {
        self.agent
            .log()
            .lines()
            .filter(|line| line.contains(word))
            .count()
    }
}

/// Where a refusal shows, and its word.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// No tunnel comes about.
    Handshake(&'static str),
    /// The tunnel stands, its request is refused.
    Request(&'static str),
}

impl Refusal {
    fn word(self) -> &'static str {
        match self {
            Self::Handshake(word) | Self::Request(word) => word,
        }
    }

    fn metric(self) -> (&'static str, Vec<(&'static str, &'static str)>) {
        match self {
            Self::Handshake(word) => (
                "picomesh_handshakes_total",
                vec![("side", "server"), ("result", word)],
            ),
            Self::Request(word) => ("inbound_tcp_errors_total", vec![("error", word)]),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handshake(word) => write!(f, "a failed handshake ({word})"),
            Self::Request(word) => write!(f, "a refused request ({word})"),
        }
    }
}

fn certificates_that_prove_nothing_open_no_tunnel() -> Result<()> {
    let ground = Ground::new()?;
    let near = ground.near.spiffe_id();
    let thief = ground.thief()?;
    let good = ground.authority.identify(&[&near])?;
    let honest = ground.honest(&good)?;
    ground.control(&honest)?;

    let uri = |uri: &str| -> Result<SanType> { Ok(SanType::URI(uri.try_into()?)) };
    let mut familiar = DistinguishedName::new();
    familiar.push(DnType::CommonName, "picomesh");
    let sign = |authority: &Authority, names: Vec<SanType>, life| authority.certify(names, life);
    let own = &ground.authority;
    let foreign = Authority::foreign(DistinguishedName::new())?;
    let namesake = Authority::foreign(familiar)?;
    let spoiled = [
        (
            "a foreign CA",
            sign(&foreign, vec![uri(&near)?], Life::Now)?,
            "certificate_unknown_issuer",
        ),
        (
            "a foreign CA with a familiar name",
            sign(&namesake, vec![uri(&near)?], Life::Now)?,
            "certificate_unknown_issuer",
        ),
        (
            "expired",
            sign(own, vec![uri(&near)?], Life::Over)?,
            "certificate_expired",
        ),
        (
            "not yet valid",
            sign(own, vec![uri(&near)?], Life::NotYet)?,
            "certificate_expired",
        ),
        (
            "two URI names",
            sign(
                own,
                vec![uri(&near)?, uri(&ground.other.spiffe_id())?],
                Life::Now,
            )?,
            "certificate_invalid",
        ),
        (
            "no URI name",
            sign(
                own,
                vec![SanType::DnsName("near.mesh".try_into()?)],
                Life::Now,
            )?,
            "certificate_invalid",
        ),
        (
            "a name that is no workload's",
            sign(own, vec![uri("spiffe://cluster.local/near")?], Life::Now)?,
            "certificate_invalid",
        ),
        (
            "another trust domain",
            sign(
                own,
                vec![uri("spiffe://elsewhere/ns/mesh/sa/near")?],
                Life::Now,
            )?,
            "certificate_invalid",
        ),
    ];
    for (what, credentials, word) in &spoiled {
        let call = Call {
            credentials: Some(credentials),
            ..honest.clone()
        };
        ground.refused_in(what, thief.netns(), &call, Refusal::Handshake(word))?;
    }
    let without = Call {
        credentials: None,
        ..honest.clone()
    };
    ground.refused_in(
        "no certificate",
        thief.netns(),
        &without,
        Refusal::Handshake("certificate_missing"),
    )?;
    for (what, name) in [
        ("no server name", None),
        (
            "a server name that nobody has",
            Some("web.example".to_owned()),
        ),
        (
            "the name of a pod of another node",
            Some(sni(&ground.other)?),
        ),
    ] {
        let call = Call {
            server_name: name,
            ..honest.clone()
        };
        ground.refused_in(
            what,
            thief.netns(),
            &call,
            Refusal::Handshake("unknown_server_name"),
        )?;
    }
    ground.control(&honest)
}

fn a_tunnel_reaches_only_the_pods_it_is_for() -> Result<()> {
    let ground = Ground::new()?;
    let thief = ground.thief()?;
    let node = ground.world.node(1)?;
    let good = ground.authority.identify(&[&ground.near.spiffe_id()])?;
    let honest = ground.honest(&good)?;
    ground.control(&honest)?;

    let wrong = Call {
        server_name: Some(sni(&ground.third)?),
        ..honest.clone()
    };
    let refusal = Refusal::Request("wrong_identity");
    ground.refused_in("SNI for another local pod", thief.netns(), &wrong, refusal)?;

    let service = ground.world.service(&ServiceSpec::new("far", PORT, PORT))?;
    let (bad, away) = ("bad_target", "not_local");
    let at = |ip: &str| format!("{ip}:{NODE_PORT}");
    for (target, word) in [
        (at("127.0.0.1"), bad),
        (at("[::1]"), bad),
        (at("[::ffff:127.0.0.1]"), bad),
        (at("0.0.0.0"), bad),
        (at("[::]"), bad),
        (at("169.254.1.1"), bad),
        (at("[fe80::1]"), bad),
        (at("224.0.0.1"), bad),
        (at(&node.v4().to_string()), bad),
        (at(&format!("[{}]", node.v6())), bad),
        // The node's address among its pods; no manifest tells of it.
        (at(&node.gateway().to_string()), away),
        (ground.near.at(PORT).to_string(), away),
        (ground.other.at(PORT).to_string(), away),
        (ground.outsider.at(PORT).to_string(), away),
        (service.at().to_string(), away),
        (ground.plain.at(PORT).to_string(), "not_meshed"),
        (ground.third.at(PORT).to_string(), "wrong_identity"),
        (ground.far.at(0).to_string(), bad),
        (format!("far.mesh.svc:{PORT}"), bad),
        (format!("localhost:{NODE_PORT}"), bad),
    ] {
        let call = Call {
            target: target.clone(),
            ..honest.clone()
        };
        let what = format!("CONNECT to {target}");
        ground.refused_in(&what, thief.netns(), &call, Refusal::Request(word))?;
    }
    let get = Call {
        method: Method::GET,
        target: format!("http://{}/", ground.far.at(PORT)),
        ..honest.clone()
    };
    let refusal = Refusal::Request("bad_request");
    ground.refused_in("GET", thief.netns(), &get, refusal)?;
    ensure!(ground.of_node.accepted() == 0, "the node was called");
    ground.control(&honest)
}

fn a_tunnel_speaks_only_for_its_own_pods() -> Result<()> {
    let ground = Ground::new()?;
    let thief = ground.thief()?;
    let good = ground.authority.identify(&[&ground.near.spiffe_id()])?;
    let other = ground.authority.identify(&[&ground.other.spiffe_id()])?;
    let honest = ground.honest(&good)?;
    ground.control(&honest)?;

    let claims = |ip: &dyn fmt::Display| vec![format!("for=\"{ip}\"")];
    let forged = Refusal::Request("claimed_source");
    for (what, forwarded) in [
        ("a pod of another identity", claims(&ground.other.v4())),
        ("the callee itself", claims(&ground.far.v4())),
        (
            "a pod of the identity on another node",
            claims(&ground.twin.v4()),
        ),
        ("a pod outside the mesh", claims(&ground.plain.v4())),
        ("a node", claims(&thief.v4())),
        ("a stranger", claims(&ground.outsider.v4())),
        ("loopback", claims(&"127.0.0.1")),
    ] {
        let call = Call {
            forwarded,
            ..honest.clone()
        };
        ground.refused_in(&format!("claims {what}"), thief.netns(), &call, forged)?;
    }
    let stolen = Call {
        credentials: Some(&other),
        ..honest.clone()
    };
    let what = "a right certificate of the wrong identity";
    ground.refused_in(what, thief.netns(), &stolen, forged)?;
    // Everything is right but the machine that it comes from.
    ground.refused("from no node", &ground.outsider, &honest, forged)?;
    let elsewhere = ground.world.node(1)?;
    ground.refused_in("from another node", elsewhere.netns(), &honest, forged)?;

    for (what, forwarded) in [
        ("no claim", Vec::new()),
        (
            "two headers",
            vec![
                format!("for=\"{}\"", ground.near.v4()),
                format!("for=\"{}\"", ground.other.v4()),
            ],
        ),
        (
            "a list",
            vec![format!(
                "for={}, for={}",
                ground.near.v4(),
                ground.other.v4()
            )],
        ),
        ("a word", vec!["for=unknown".to_owned()]),
    ] {
        let call = Call {
            forwarded,
            ..honest.clone()
        };
        let refusal = Refusal::Request("bad_request");
        ground.refused_in(what, thief.netns(), &call, refusal)?;
    }
    ground.control(&honest)
}

fn a_tunnel_to_a_pods_address_is_held_to_the_same() -> Result<()> {
    let ground = Ground::new()?;
    let good = ground.authority.identify(&[&ground.near.spiffe_id()])?;
    let foreign = Authority::foreign(DistinguishedName::new())?;
    let foreign = foreign.identify(&[&ground.near.spiffe_id()])?;
    let honest = Call {
        to: ground.far.at(TUNNEL_PORT),
        ..ground.honest(&good)?
    };
    ground.control(&honest)?;

    let spoiled = Call {
        credentials: Some(&foreign),
        ..honest.clone()
    };
    let refusal = Refusal::Handshake("certificate_unknown_issuer");
    ground.refused("a foreign CA", &ground.near, &spoiled, refusal)?;
    for (target, word) in [
        (format!("127.0.0.1:{PORT}"), "bad_target"),
        (
            format!("{}:{NODE_PORT}", ground.world.node(1)?.v4()),
            "bad_target",
        ),
        (ground.third.at(PORT).to_string(), "wrong_identity"),
        (ground.near.at(PORT).to_string(), "not_local"),
    ] {
        let call = Call {
            target: target.clone(),
            ..honest.clone()
        };
        let what = format!("CONNECT to {target}");
        ground.refused(&what, &ground.near, &call, Refusal::Request(word))?;
    }
    ground.control(&honest)
}

fn a_node_with_anothers_certificate_is_not_believed() -> Result<()> {
    let world = World::new(2)?;
    world.namespace("mesh", Some("enabled"))?;
    let near = world.pod(&PodSpec::new("near"))?;
    let far = world.pod(&PodSpec::new("far").on(1))?;
    let other = world.pod(&PodSpec::new("other").on(1))?;
    let agent = world.start_agent(&world.node(0)?)?;
    agent.wait_captured(&near, 4 * PATIENCE)?;
    let authority = Authority::of_world(&world.ca_dir())?;
    let node = world.node(1)?;
    let at: SocketAddr = (node.v4(), TUNNEL_PORT).into();
    let call = || near.run(|| client::exchange(far.at(PORT), b"a secret", 2 * PATIENCE));

    // A valid certificate of the right authority, for somebody else.
    let wrong = authority.identify(&[&other.spiffe_id()])?;
    let foreign = Authority::foreign(DistinguishedName::new())?.identify(&[&far.spiffe_id()])?;
    let both = authority.identify(&[&far.spiffe_id(), &other.spiffe_id()])?;
    for (what, credentials, words) in [
        ("another identity", &wrong, "was called"),
        ("a foreign CA", &foreign, "trust bundle"),
        ("two URI names", &both, "has 2 URI names"),
    ] {
        let attempt = || -> Result<()> {
            let impostor = Impostor::start(node.netns(), at, credentials)?;
            let handshakes = [("side", "client"), ("result", "tunnel_identity")];
            let name = "picomesh_handshakes_total";
            let before = agent.metrics()?.sum(name, &handshakes);
            let failed = agent.metrics()?.sum("outbound_tcp_errors_total", &[]);
            let answer = call();
            ensure!(
                answer.as_ref().is_err() || answer.as_ref().is_ok_and(Vec::is_empty),
                "the application was answered {answer:?}"
            );
            ensure!(impostor.callers() > 0, "the impostor was not even called");
            ensure!(impostor.requests() == 0, "the impostor was believed");
            agent.wait_metric(name, &handshakes, PATIENCE, |now| now > before)?;
            agent.wait_metric("outbound_tcp_errors_total", &[], PATIENCE, |now| {
                now > failed
            })?;
            agent.wait_log(&["tunnel_identity", words], PATIENCE)?;
            Ok(())
        };
        attempt().with_context(|| format!("an impostor with {what}"))?;
    }

    // The certificate alone makes the difference.
    let right = authority.identify(&[&far.spiffe_id()])?;
    let impostor = Impostor::start(node.netns(), at, &right)?;
    wait::until(
        "the one with the right certificate is believed",
        4 * PATIENCE,
        || call().is_ok_and(|answer| answer == IMPOSTOR_SAYS),
    )?;
    ensure!(impostor.requests() > 0, "somebody else has answered");
    Ok(())
}

/// What a caller of the pod's identity asks for in TLS.
fn sni(pod: &Pod) -> Result<String> {
    Ok(server_name(&parse_spiffe_id(&pod.spiffe_id())?)
        .to_str()
        .into_owned())
}
