//! Controller and signer run twice, and whoever leads may be lost at any moment: what is asked for
//! meanwhile is signed when the other has taken the lead.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::Kubectl, load::Load, wait};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground},
    install::{
        AUTHORITIES, NAMESPACE, OwnPod, agent_on, diagnosis, end_processes, remove_by_force, scale,
        wait_installed,
    },
    requests::{Asked, Requests, token_of},
    talk::{Scene, both, identity},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "leaders::a_lost_leader_delays_a_renewal_by_the_time_of_its_lease_at_most",
    needs: &[Need::Nodes, Need::Image],
    run: a_lost_leader_delays_a_renewal_by_the_time_of_its_lease_at_most,
}];

/// Within it a holder that is lost is replaced.
const LEASE: Duration = Duration::from_secs(15);
/// What a request may take where everybody is there.
const USUAL: Duration = Duration::from_secs(5);

fn a_lost_leader_delays_a_renewal_by_the_time_of_its_lease_at_most() -> Result<()> {
    let ground = ground()?;
    let [near, _] = both(ground.own()?)?;
    let scene = Scene::new(&ground, "leaders")?;
    let scratch = tempfile::tempdir()?;
    let agent = token_of(&ground, &agent_on(&ground, near.name())?, scratch.path())?;
    let mut requests = Requests::new(&ground);
    let asked = Asked {
        names: format!("URI:{}", identity(&scene.space, "default")),
        ..Asked::default()
    };
    let undisturbed = Load::of_connections(&scene.pods[0], scene.at[1])?;

    // The control: it is the loss that takes its time.
    let begun = Instant::now();
    let usual = requests.make(&agent, "usual", &asked)?;
    requests.wait_issued(&usual, USUAL)?;
    let usual = begun.elapsed();

    // Deleted, a leader may still let go of its Lease; killed before, it keeps it.
    for (name, killed) in [("deleted", false), ("killed", true)] {
        let [controller, signer] = AUTHORITIES;
        let lost = [
            Leader::of(&ground, controller)?,
            Leader::of(&ground, signer)?,
        ];
        let begun = Instant::now();
        for leader in &lost {
            if killed {
                let ended = end_processes(&ground, &leader.pod)?;
                ensure!(ended > 0, "{} had no process to kill", leader.pod.name);
            }
            remove_by_force(&ground, &leader.pod)?;
        }
        let request = requests.make(&agent, name, &asked)?;
        if killed {
            // The control: nobody has let go, and nobody has taken it yet.
            for leader in &lost {
                let holder = holder(ground.kubectl(), leader.lease)?;
                ensure!(
                    holder == leader.holder,
                    "{} was held by {} and is by {holder}",
                    leader.lease,
                    leader.holder
                );
            }
        }
        let issued = requests.wait_issued(&request, PATIENCE);
        let took = begun.elapsed();
        issued.with_context(|| diagnosis(&ground))?;
        eprintln!("leaders {name}: signed after {took:?}, else after {usual:?}");
        ensure!(
            took < LEASE + USUAL,
            "leaders {name}: a renewal took {took:?}\n{}",
            diagnosis(&ground)
        );
        for leader in &lost {
            let holder = holder(ground.kubectl(), leader.lease)?;
            ensure!(
                holder != leader.holder && !holder.is_empty(),
                "{} is still held by {}",
                leader.lease,
                leader.holder
            );
        }
        wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    }

    // The control: without anybody a request waits, and then it is answered after all.
    for authority in AUTHORITIES {
        scale(&ground, authority, 0)?;
    }
    let request = requests.make(&agent, "by-nobody", &asked)?;
    let early = requests.wait_issued(&request, USUAL);
    ensure!(early.is_err(), "without controller and signer it is signed");
    for authority in AUTHORITIES {
        scale(&ground, authority, 2)?;
    }
    requests
        .wait_issued(&request, PATIENCE)
        .with_context(|| diagnosis(&ground))?;
    undisturbed
        .stop_unharmed()
        .context("a connection while leaders were lost")?;
    Ok(())
}

/// Who holds a Lease.
struct Leader {
    lease: &'static str,
    /// As it stands there: the pod's name, and what tells two processes of one pod apart.
    holder: String,
    pod: OwnPod,
}

impl Leader {
    fn of(ground: &Ground, lease: &'static str) -> Result<Self> {
        let kubectl = ground.kubectl();
        let what = format!("somebody holds {lease} who runs");
        wait::for_value(&what, PATIENCE, || {
            let holder = holder(kubectl, lease)?;
            let (name, _) = holder.rsplit_once('_').context("nobody")?;
            let get = ["get", "pod", name, "-n", NAMESPACE];
            let uid = kubectl.text(&[&get[..], &["-o=jsonpath={.metadata.uid}"]].concat())?;
            let pod = OwnPod {
                name: name.to_owned(),
                uid,
            };
            Ok(Some(Self { lease, holder, pod }))
        })
    }
}

fn holder(kubectl: &Kubectl, lease: &str) -> Result<String> {
    let get = ["get", "lease", lease, "-n", NAMESPACE];
    kubectl.text(&[&get[..], &["-o=jsonpath={.spec.holderIdentity}"]].concat())
}
