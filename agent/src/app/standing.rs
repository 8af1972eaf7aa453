//! What the CNI plugin's callers are told of a pod: whether it is meshed the mesh says, where it is
//! captured the kernel half.
//!
//! **What was heard last of a namespace counts,** if it can be neither listed nor watched for long. To
//! answer [`Standing::Unknown`] for ever would protect nobody: the plugin would go by its file, which
//! is written from the same namespaces and lets the same pods start. And pods that are not meshed, in
//! a namespace where others have joined one by one, would not start at all until namespaces are heard
//! again. A pod whose namespace joined in that time is captured as soon as that is heard.
//!
//! **But not at once.** After a restart of the API server pods are often heard seconds before
//! namespaces are. A pod that is new in that time is [`Standing::Unknown`] until they were listed, or
//! each watch has tried again (`k8s::watch`); a little less than the server of the CNI socket waits
//! for, so that it is not the plugin's file that decides. While nothing fails, two watches may still
//! tell of a namespace a moment later than of its pods, and nothing here knows.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    cni::server::{Named, Pods, Standing},
    datapath::{Capture, Datapath},
    state::{Mesh, MeshStore, ObjectKey},
};

pub struct Known {
    pub mesh: Arc<MeshStore>,
    pub datapath: Arc<Datapath>,
    /// The mesh is being taken off, and nobody is captured any more.
    pub removed: Arc<AtomicBool>,
}

impl Pods for Known {
    fn standing(&self, uid: &str) -> Standing {
        let removed = self.removed.load(Ordering::Acquire);
        standing(removed, &self.mesh.load(), uid, |uid| {
            self.datapath.capture(uid)
        })
    }

    fn named(&self, namespace: &str, name: &str) -> Option<Named> {
        named(&self.mesh.load(), namespace, name)
    }
}

/// Two of one name: one of them is on its way out, and nothing tells which is meant.
fn named(mesh: &Mesh, namespace: &str, name: &str) -> Option<Named> {
    let called = |key: &ObjectKey| *key.namespace == *namespace && *key.name == *name;
    let mut found = mesh.local.iter().filter(|workload| called(&workload.key));
    let pod = found.next().filter(|_| found.next().is_none())?;
    Some(Named {
        uid: Arc::clone(&pod.uid),
        mirror_of: pod.mirror_of.clone(),
    })
}

fn standing(
    removed: bool,
    mesh: &Mesh,
    uid: &str,
    capture: impl FnOnce(&str) -> Option<Capture>,
) -> Standing {
    // Whatever the mesh still says: who waited for a capture would wait in vain.
    if removed {
        return Standing::NotMeshed;
    }
    let Some(workload) = mesh.workloads.get(uid).filter(|workload| workload.local) else {
        return Standing::Unknown;
    };
    // Watched apart from its namespace, a pod may be told first. To call it plain then would let a
    // meshed one start before it is captured.
    if workload.undecided {
        return Standing::Unknown;
    }
    if !workload.meshed || workload.host_network {
        return Standing::NotMeshed;
    }
    match capture(uid) {
        Some(Capture::At { netns }) => Standing::Captured { netns },
        Some(Capture::Not { reason }) => Standing::Awaited { reason },
        None => Standing::Awaited { reason: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cni::intent::{Annotations, Intent, Verdict, judge},
        testing::manifests::{mesh, meshed_namespace, pod},
    };

    #[test]
    fn what_the_plugin_would_go_by_knows_no_more_of_a_namespace_than_the_mesh() {
        let plain = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n";
        let own = "labels: {picomesh.io/mesh: enabled}";
        let alone = plain.to_owned() + &pod("shop/pod", "n1", &["10.0.0.1"], "");
        let beside = alone.clone() + &pod("shop/own", "n1", &["10.0.0.2"], own);
        for (manifests, opted_in, starts) in [(alone, None, true), (beside, Some(true), false)] {
            let mesh = mesh(&manifests);
            assert_eq!(
                standing(false, &mesh, "uid-pod", |_| None),
                Standing::NotMeshed
            );
            let pods = [("shop", opted_in), ("shop", None)];
            let intent = Intent::of(&Intent::default(), [("shop", false)], pods, false);
            // Where it would be another answer, it would hold up a pod that is not meshed.
            let verdict = judge(&Ok(intent), "shop", &Annotations::new());
            assert_eq!(matches!(verdict, Verdict::Starts), starts);
        }
    }

    #[test]
    fn a_pod_that_is_heard_of_before_its_namespace_is_not_called_plain() {
        let out = "labels: {picomesh.io/mesh: disabled}";
        let own = "labels: {picomesh.io/mesh: enabled}";
        let pods = pod("shop/pod", "n1", &["10.0.0.1"], "")
            + &pod("shop/out", "n1", &["10.0.0.2"], out)
            + &pod("shop/own", "n1", &["10.0.0.3"], own)
            + &pod("kube-system/dns", "n1", &["10.0.0.4"], "");
        let early = mesh(&pods);
        let of = |mesh: &Mesh, uid: &str| standing(false, mesh, uid, |_| None);
        assert_eq!(of(&early, "uid-pod"), Standing::Unknown);
        // Whatever its namespace says.
        assert_eq!(of(&early, "uid-out"), Standing::NotMeshed);
        assert_eq!(of(&early, "uid-own"), Standing::Awaited { reason: None });
        assert_eq!(of(&early, "uid-dns"), Standing::NotMeshed);

        let meshed = mesh(&(meshed_namespace("shop", "") + &pods));
        assert_eq!(of(&meshed, "uid-pod"), Standing::Awaited { reason: None });
        let plain = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n";
        let plain = mesh(&(plain.to_owned() + &pods));
        assert_eq!(of(&plain, "uid-pod"), Standing::NotMeshed);
    }

    #[test]
    fn while_the_mesh_is_taken_off_nobody_waits_for_a_capture() {
        let mesh = mesh(&(meshed_namespace("shop", "") + &pod("shop/in", "n1", &["10.0.0.1"], "")));
        let of = |removed, uid| standing(removed, &mesh, uid, |_| None);
        assert_eq!(of(false, "uid-in"), Standing::Awaited { reason: None });
        assert_eq!(of(true, "uid-in"), Standing::NotMeshed);
        // Nor to be heard of.
        assert_eq!(of(false, "uid-new"), Standing::Unknown);
        assert_eq!(of(true, "uid-new"), Standing::NotMeshed);
    }

    #[test]
    fn the_mesh_says_whether_and_the_kernel_half_says_where() {
        let out = "labels: {picomesh.io/mesh: disabled}";
        let mesh = mesh(
            &(meshed_namespace("shop", "")
                + &pod("shop/in", "n1", &["10.0.0.1"], "")
                + &pod("shop/out", "n1", &["10.0.0.2"], out)
                + &pod("shop/far", "n2", &["10.0.0.3"], "")),
        );
        let of = |uid: &str, capture: Option<Capture>| standing(false, &mesh, uid, |_| capture);
        let netns = 7;
        let at = Some(Capture::At { netns });
        assert_eq!(of("uid-nobody", at.clone()), Standing::Unknown);
        assert_eq!(of("uid-far", at.clone()), Standing::Unknown);
        assert_eq!(of("uid-out", at.clone()), Standing::NotMeshed);
        assert_eq!(of("uid-in", at), Standing::Captured { netns });
        assert_eq!(of("uid-in", None), Standing::Awaited { reason: None });
        let reason = Some("no_slot".to_owned());
        let not = Some(Capture::Not {
            reason: reason.clone(),
        });
        assert_eq!(of("uid-in", not), Standing::Awaited { reason });
    }
    #[test]
    fn a_pod_of_this_node_is_found_by_its_name() {
        let mirror = "annotations: {kubernetes.io/config.mirror: 5e1f}";
        let mesh = mesh(
            &(meshed_namespace("shop", "")
                + &pod("shop/static", "n1", &["10.0.0.1"], mirror)
                + &pod("shop/in", "n1", &["10.0.0.2"], "")
                + &pod("shop/far", "n2", &["10.0.0.3"], "")),
        );
        let found = |name| named(&mesh, "shop", name).map(|found| (found.uid, found.mirror_of));
        let uid = |name: &str| Arc::<str>::from(name);
        assert_eq!(found("in"), Some((uid("uid-in"), None)));
        assert_eq!(
            found("static"),
            Some((uid("uid-static"), Some(uid("5e1f"))))
        );
        assert_eq!(found("far"), None);
        assert_eq!(named(&mesh, "bank", "in"), None);
    }
}
