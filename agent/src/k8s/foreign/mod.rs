//! Policies that only the CNI can enforce: Calico's, Cilium's, and the AdminNetworkPolicy family.
//!
//! Tunnels leave from the node's address, so the CNI no longer sees who talks to whom. Kubernetes'
//! own NetworkPolicy we evaluate ourselves; of these kinds we only find out whom they select, and
//! those pods stay outside of the mesh. Nobody's policy gets weaker by joining it.
//!
//! All agents must agree on who is meshed, so every one of them looks at all pods. Where we cannot
//! tell (a selector we cannot read, a label we do not know) a pod counts as selected.

mod expression;

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::Deserialize;

use super::{FieldError, Seen, resources::Resource};
use crate::state::objects::{Labels, Pod};

use expression::{Expression, Label};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ForeignKind {
    /// As Calico stores them in CustomResourceDefinitions of its own.
    StoredCalico,
    StoredCalicoGlobal,
    /// As users write them, where Calico keeps them so.
    Calico,
    CalicoGlobal,
    Cilium,
    CiliumClusterwide,
    Admin,
    BaselineAdmin,
    ClusterNetwork,
}

/// The languages of their selectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Calico,
    Cilium,
    Admin,
}

impl ForeignKind {
    pub(super) const ALL: [Self; 9] = [
        Self::StoredCalico,
        Self::StoredCalicoGlobal,
        Self::Calico,
        Self::CalicoGlobal,
        Self::Cilium,
        Self::CiliumClusterwide,
        Self::Admin,
        Self::BaselineAdmin,
        Self::ClusterNetwork,
    ];

    pub(super) fn resource(self) -> Resource {
        let of = |kind, group, versions, plural| Resource {
            kind,
            group,
            versions,
            plural,
            optional: true,
        };
        let stored = "crd.projectcalico.org";
        let calico = "projectcalico.org";
        let admin = "policy.networking.k8s.io";
        match self {
            Self::StoredCalico => of("NetworkPolicy", stored, &["v1"], "networkpolicies"),
            Self::StoredCalicoGlobal => of(
                "GlobalNetworkPolicy",
                stored,
                &["v1"],
                "globalnetworkpolicies",
            ),
            Self::Calico => of("NetworkPolicy", calico, &["v3"], "networkpolicies"),
            Self::CalicoGlobal => of(
                "GlobalNetworkPolicy",
                calico,
                &["v3"],
                "globalnetworkpolicies",
            ),
            Self::Cilium => of(
                "CiliumNetworkPolicy",
                "cilium.io",
                &["v2"],
                "ciliumnetworkpolicies",
            ),
            Self::CiliumClusterwide => of(
                "CiliumClusterwideNetworkPolicy",
                "cilium.io",
                &["v2"],
                "ciliumclusterwidenetworkpolicies",
            ),
            Self::Admin => of(
                "AdminNetworkPolicy",
                admin,
                &["v1alpha1"],
                "adminnetworkpolicies",
            ),
            Self::BaselineAdmin => of(
                "BaselineAdminNetworkPolicy",
                admin,
                &["v1alpha1"],
                "baselineadminnetworkpolicies",
            ),
            Self::ClusterNetwork => of(
                "ClusterNetworkPolicy",
                admin,
                &["v1alpha2"],
                "clusternetworkpolicies",
            ),
        }
    }

    fn family(self) -> Family {
        match self {
            Self::StoredCalico | Self::StoredCalicoGlobal | Self::Calico | Self::CalicoGlobal => {
                Family::Calico
            }
            Self::Cilium | Self::CiliumClusterwide => Family::Cilium,
            Self::Admin | Self::BaselineAdmin | Self::ClusterNetwork => Family::Admin,
        }
    }

    /// Whom it selects. One that does not read selects whomever it may.
    fn read(self, seen: &Seen) -> Vec<Subject> {
        let read = match self.family() {
            Family::Calico => calico(seen),
            Family::Cilium => cilium(seen),
            Family::Admin => admin(seen),
        };
        read.unwrap_or_else(|_| vec![Subject::EVERYBODY])
    }
}

/// All of it must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Subject {
    pods: Expression,
    namespaces: Expression,
}

impl Subject {
    const EVERYBODY: Self = Self {
        pods: Expression::All,
        namespaces: Expression::All,
    };
}

#[derive(Deserialize)]
struct Written<Spec> {
    spec: Option<Spec>,
    #[serde(default = "Vec::new")]
    specs: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CalicoSpec {
    selector: Option<String>,
    namespace_selector: Option<String>,
    /// Of accounts' labels we know nothing: whom it selects, it may.
    #[serde(rename = "serviceAccountSelector")]
    _service_account_selector: Option<String>,
}

fn calico(seen: &Seen) -> Result<Vec<Subject>, FieldError> {
    let written: Written<CalicoSpec> = seen.parse()?;
    let read = |text: Option<String>| {
        let text = text.unwrap_or_default();
        Expression::of_calico(&text).unwrap_or(Expression::All)
    };
    let specs = written.spec.into_iter();
    Ok(specs
        .map(|spec| Subject {
            pods: read(spec.selector),
            namespaces: read(spec.namespace_selector),
        })
        .collect())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CiliumSpec {
    /// Without it the rule is the host's, by nodeSelector.
    endpoint_selector: Option<LabelSelector>,
}

fn cilium(seen: &Seen) -> Result<Vec<Subject>, FieldError> {
    let written: Written<CiliumSpec> = seen.parse()?;
    let specs = written.spec.into_iter().chain(written.specs);
    Ok(specs
        .filter_map(|spec| spec.endpoint_selector)
        .map(|selector| Subject {
            pods: Expression::of_labels(selector),
            namespaces: Expression::All,
        })
        .collect())
}

#[derive(Deserialize)]
struct AdminSpec {
    subject: AdminSubject,
}

#[derive(Deserialize)]
struct AdminSubject {
    namespaces: Option<LabelSelector>,
    pods: Option<AdminPods>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AdminPods {
    namespace_selector: LabelSelector,
    pod_selector: LabelSelector,
}

fn admin(seen: &Seen) -> Result<Vec<Subject>, FieldError> {
    let written: Written<AdminSpec> = seen.parse()?;
    let specs = written.spec.into_iter();
    Ok(specs
        .map(|spec| match (spec.subject.namespaces, spec.subject.pods) {
            (Some(namespaces), None) => Subject {
                pods: Expression::All,
                namespaces: Expression::of_labels(namespaces),
            },
            (None, Some(pods)) => Subject {
                pods: Expression::of_labels(pods.pod_selector),
                namespaces: Expression::of_labels(pods.namespace_selector),
            },
            // A kind of subject that did not exist when this was written.
            (None, None) | (Some(_), Some(_)) => Subject::EVERYBODY,
        })
        .collect())
}

/// Namespace (empty for those of the whole cluster) and name.
type Name = (Arc<str>, Arc<str>);

/// All of these policies there are.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    policies: BTreeMap<(ForeignKind, Name), Vec<Subject>>,
}

impl Foreign {
    pub(super) fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// `true` here and below: not everything is as it was.
    pub(super) fn apply(&mut self, kind: ForeignKind, seen: &Seen) -> bool {
        let subjects = kind.read(seen);
        let before = self.policies.insert((kind, name(seen)), subjects.clone());
        before.is_none_or(|before| before != subjects)
    }

    pub(super) fn delete(&mut self, kind: ForeignKind, seen: &Seen) -> bool {
        self.policies.remove(&(kind, name(seen))).is_some()
    }

    pub(super) fn retain(&mut self, kind: ForeignKind, keep: impl Fn(&Name) -> bool) -> bool {
        let before = self.policies.len();
        self.policies
            .retain(|(of, name), _| *of != kind || keep(name));
        self.policies.len() != before
    }

    /// Why the pod stays outside of the mesh; the same one each time.
    pub(super) fn selecting(&self, pod: &Pod, namespace: Option<&Labels>) -> Option<String> {
        let of = |((kind, name), subjects): (&(ForeignKind, Name), &Vec<Subject>)| {
            let (place, own) = name;
            let here = place.is_empty() || *place == pod.key.namespace;
            let asked = Asked {
                family: kind.family(),
                pod,
                namespace,
            };
            let selected = here && subjects.iter().any(|subject| asked.may_be(subject));
            selected.then(|| {
                let resource = kind.resource();
                let (kind, group) = (resource.kind, resource.group);
                let slash = if place.is_empty() { "" } else { "/" };
                format!(
                    "{kind} {place}{slash}{own} of {group} selects it, and only the CNI enforces \
                     that; write it as a NetworkPolicy of networking.k8s.io/v1 instead, or leave \
                     the pod outside"
                )
            })
        };
        self.policies.iter().find_map(of)
    }
}

/// One pod, in the words of one family.
struct Asked<'a> {
    family: Family,
    pod: &'a Pod,
    /// `None`: it is not known yet.
    namespace: Option<&'a Labels>,
}

impl<'a> Asked<'a> {
    fn may_be(&self, subject: &Subject) -> bool {
        let pods = subject.pods.holds(&|key| self.label(key));
        let namespaces = subject.namespaces.holds(&|key| self.namespace_label(key));
        pods != Some(false) && namespaces != Some(false)
    }

    fn label(&self, key: &str) -> Label<'a> {
        let pod = self.pod;
        match self.family {
            Family::Admin => of(&pod.labels, key),
            Family::Calico => match key {
                "projectcalico.org/namespace" => Label::Is(&pod.key.namespace),
                "projectcalico.org/orchestrator" => Label::Is("k8s"),
                "projectcalico.org/serviceaccount" => Label::Is(&pod.service_account),
                _ => match key.strip_prefix("pcns.") {
                    Some(key) => self.namespace_label(key),
                    None if key.starts_with("pcsa.") => Label::Unknown,
                    None => of(&pod.labels, key),
                },
            },
            Family::Cilium => {
                // The source of a label may stand before it; pods' labels are Kubernetes'.
                let (source, key) = key.split_once(':').unwrap_or(("any", key));
                match (source, key) {
                    ("reserved", _) => Label::Absent,
                    ("k8s" | "any", "io.kubernetes.pod.namespace") => Label::Is(&pod.key.namespace),
                    ("k8s" | "any", "io.cilium.k8s.policy.serviceaccount") => {
                        Label::Is(&pod.service_account)
                    }
                    ("k8s" | "any", key) => {
                        match key.strip_prefix("io.cilium.k8s.namespace.labels.") {
                            Some(key) => self.namespace_label(key),
                            None if key.starts_with("io.cilium.") => Label::Unknown,
                            None => of(&pod.labels, key),
                        }
                    }
                    _ => Label::Unknown,
                }
            }
        }
    }

    fn namespace_label(&self, key: &str) -> Label<'a> {
        match key {
            "kubernetes.io/metadata.name" => Label::Is(&self.pod.key.namespace),
            "projectcalico.org/name" if self.family == Family::Calico => {
                Label::Is(&self.pod.key.namespace)
            }
            _ => match self.namespace {
                Some(labels) => of(labels, key),
                None => Label::Unknown,
            },
        }
    }
}

fn of<'a>(labels: &'a Labels, key: &str) -> Label<'a> {
    match labels.get(key) {
        Some(value) => Label::Is(value),
        None => Label::Absent,
    }
}

fn name(seen: &Seen) -> Name {
    (seen.namespace().into(), seen.name().into())
}

#[cfg(test)]
mod tests;
