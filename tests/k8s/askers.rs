//! Who asks for certificates in tests, and the pods for whose accounts they ask.

use std::path::Path;

use anyhow::{Context, Result, bail};
use picomesh_tests::cluster::{Kubectl, TOOLS};
use serde_json::json;

use crate::{
    ground::{self, Ground, Namespace, items},
    install::{Installed, NAMESPACE, OwnPod, Part, diagnosis, wait_captured, wait_installed},
    requests::token_of,
    talk::{SLEEP, both, identity, label},
};

/// Who asks. Those whom no token makes are an administrator who says to be an agent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Who {
    /// The agent of the near node, with its own token.
    Agent,
    Administrator,
    /// A token of the agents' account that belongs to no pod.
    Unbound,
    /// An agent's pod that is not there.
    Nobody,
    /// A pod that had the agent's name before.
    Former,
    /// The far node's agent, from the near one.
    Elsewhere,
    /// A pod of another account.
    Another,
}

/// The mesh, and pods of the accounts that rows name.
pub(crate) struct Place {
    // The first to be ended.
    _installed: Installed,
    space: Namespace,
    outside: Namespace,
}

impl Place {
    pub(crate) fn new(ground: &Ground, name: &str) -> Result<Self> {
        let cluster = ground.own()?;
        cluster.import_archive(&ground::image()?)?;
        let [near, far] = both(cluster)?;
        let space = ground.namespace(name)?;
        let outside = ground.namespace(&format!("{name}-outside"))?;
        let installed = Installed::new(ground.kubectl(), Part::All)?;
        wait_installed(ground).with_context(|| diagnosis(ground))?;
        label(&space, "enabled")?;
        let pods = [
            (&space, "self", near.name(), SLEEP),
            (&space, "away", far.name(), SLEEP),
            (&space, "ended", near.name(), &["/bin/true"]),
            (&outside, "outside", near.name(), SLEEP),
        ];
        for (space, name, node, command) in pods {
            pod(space, name, node, command)?;
        }
        for (space, name, ..) in pods {
            if name == "ended" {
                space.wait_succeeded(name)?;
            } else {
                space.wait_ready(name)?;
            }
        }
        wait_captured(ground, 2).with_context(|| diagnosis(ground))?;
        Ok(Self {
            _installed: installed,
            space,
            outside,
        })
    }

    /// What stands for each in a row.
    pub(crate) fn accounts(&self) -> [(&'static str, String); 4] {
        [
            ("SELF", identity(&self.space, "self")),
            ("AWAY", identity(&self.space, "away")),
            ("ENDED", identity(&self.space, "ended")),
            ("OUTSIDE", identity(&self.outside, "outside")),
        ]
    }
}

/// A pod with an account of its own name.
fn pod(space: &Namespace, name: &str, node: &str, command: &[&str]) -> Result<()> {
    space.apply(json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name},
    }))?;
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "serviceAccountName": name,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never", "command": command,
            }],
        },
    }))
}

/// `agents`: of the near node, and of the far one.
pub(crate) fn asker(
    ground: &Ground,
    who: Who,
    near: &str,
    agents: &[OwnPod; 2],
    scratch: &Path,
) -> Result<Kubectl> {
    let kubectl = ground.kubectl();
    let [own, other] = agents;
    let impersonating = |pod: &str, uid: &str, node: &str| {
        let extra = [
            ("authentication.kubernetes.io/node-name", node),
            ("authentication.kubernetes.io/pod-name", pod),
            ("authentication.kubernetes.io/pod-uid", uid),
        ];
        let user = format!("system:serviceaccount:{NAMESPACE}:picomesh-agent");
        kubectl.impersonating(&user, &extra, &scratch.join(format!("{who:?}")))
    };
    match who {
        Who::Agent => token_of(ground, own, scratch),
        Who::Administrator => Ok(kubectl.clone()),
        Who::Unbound => {
            let token = kubectl.text(&["create", "token", "picomesh-agent", "-n", NAMESPACE])?;
            kubectl.with_token(&token, &scratch.join("unbound"))
        }
        Who::Nobody => impersonating("picomesh-agent-nobody", &own.uid, near),
        Who::Former => impersonating(&own.name, "00000000-0000-4000-8000-000000000000", near),
        Who::Elsewhere => impersonating(&other.name, &other.uid, near),
        Who::Another => {
            let label = "-l=app.kubernetes.io/name=picomesh-controller";
            let pods = kubectl.get(&["pods", "-n", NAMESPACE, label])?;
            let pod = items(&pods).next().context("no controller runs")?;
            let words = [
                &pod["metadata"]["name"],
                &pod["metadata"]["uid"],
                &pod["spec"]["nodeName"],
            ]
            .map(|word| word.as_str().unwrap_or_default());
            match words {
                [name, uid, node] if !node.is_empty() => impersonating(name, uid, node),
                other => bail!("the controller's pod is nowhere: {other:?}"),
            }
        }
    }
}
