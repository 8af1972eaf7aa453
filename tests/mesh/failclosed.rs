//! Fail closed: nothing leaves in plain, nobody is let in, whatever is sent and whoever dies.
//!
//! Each attack is first seen to succeed with the mesh off (or with the one rule off that holds it
//! back): a search that finds nothing proves nothing unless the same search finds something.

mod applications;
mod frames;
mod killed;
mod strangers;

use std::{net::IpAddr, time::Duration};

use anyhow::Result;
use picomesh_tests::{Agent, Pod, PodSpec, World, capture::Seen};

use crate::harness::{Need, Test};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "failclosed::frames_of_any_shape_reach_no_strict_pod",
        needs: &[Need::Mesh],
        run: frames::frames_of_any_shape_reach_no_strict_pod,
    },
    Test {
        name: "failclosed::options_and_extension_headers_of_an_application_leave_nothing_plain",
        needs: &[Need::Mesh],
        run: applications::options_and_extension_headers_leave_nothing_plain,
    },
    Test {
        name: "failclosed::a_forged_mark_sends_nothing_plain",
        needs: &[Need::Mesh],
        run: applications::a_forged_mark_sends_nothing_plain,
    },
    Test {
        name: "failclosed::a_killed_agent_leaves_nothing_plain",
        needs: &[Need::Mesh],
        run: killed::a_killed_agent_leaves_nothing_plain,
    },
    Test {
        name: "failclosed::lost_resets_after_a_kill_leave_nothing_plain",
        needs: &[Need::Mesh, Need::Program("nft")],
        run: killed::lost_resets_after_a_kill_leave_nothing_plain,
    },
    Test {
        name: "failclosed::without_an_agent_an_enrolled_pod_is_closed_and_waits",
        needs: &[Need::Mesh],
        run: strangers::without_an_agent_an_enrolled_pod_is_closed_and_waits,
    },
    Test {
        name: "failclosed::masqueraded_strangers_are_no_probes",
        needs: &[Need::Mesh, Need::Program("nft")],
        run: strangers::masqueraded_strangers_are_no_probes,
    },
    Test {
        name: "failclosed::a_flood_of_syn_cookies_lets_nobody_past_policy",
        needs: &[Need::Mesh],
        run: strangers::a_flood_of_syn_cookies_lets_nobody_past_policy,
    },
];

/// The port that servers listen on.
const PORT: u16 = 8080;
/// Long enough for a slow machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// The annotation that lets only proven identities in.
const STRICT: (&str, &str) = (
    "config.picomesh.io/default-inbound-policy",
    "all-authenticated",
);

/// A meshed client, a strict server on another node, and those who have no business with it.
struct Ground {
    agents: Vec<Agent>,
    /// Meshed, node 0.
    near: Pod,
    /// Meshed and strict, node 1.
    far: Pod,
    /// Not meshed, on the bridge of `far`.
    neighbour: Pod,
    world: World,
}

impl Ground {
    fn new() -> Result<Self> {
        let world = World::new(2)?;
        world.namespace("mesh", Some("enabled"))?;
        let near = world.pod(&PodSpec::new("near"))?;
        let far = world.pod(&PodSpec::new("far").on(1).annotation(STRICT.0, STRICT.1))?;
        let neighbour = world.pod(&PodSpec::new("neighbour").on(1).unmeshed())?;
        Ok(Self {
            agents: Vec::new(),
            near,
            far,
            neighbour,
            world,
        })
    }

    fn mesh(&mut self) -> Result<()> {
        self.agents = self.world.start_mesh(&[&self.near, &self.far])?;
        Ok(())
    }

    /// The agent of `far`.
    fn guard(&self) -> Result<&Agent> {
        self.agents
            .get(1)
            .ok_or_else(|| anyhow::anyhow!("the mesh was not started"))
    }

    /// TCP packets that name one of the meshed pods: inside a tunnel nobody sees them.
    fn bare_packets(&self, seen: &Seen) -> usize {
        let pods: [IpAddr; 4] = [
            self.near.v4().into(),
            self.near.v6().into(),
            self.far.v4().into(),
            self.far.v6().into(),
        ];
        seen.tcp()
            .filter(|t| pods.contains(&t.src.ip()) || pods.contains(&t.dst.ip()))
            .count()
    }
}
