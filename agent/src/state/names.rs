//! Names: of objects, of pods, of identities.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// Uid of a pod; the only key by which a pod is ever meant.
pub type PodUid = Arc<str>;

/// `cluster` is there so that more than one fits later; it is the configured cluster name today.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey {
    pub cluster: Arc<str>,
    /// Empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}", self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// A workload's identity: its service account within a trust domain. Displays as a SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    pub trust_domain: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl Identity {
    /// The same identity as Linkerd spells it; in policies and in metrics' `client_id`.
    pub fn linkerd_name(&self) -> String {
        format!(
            "{}.{}.serviceaccount.identity.linkerd.{}",
            self.service_account, self.namespace, self.trust_domain
        )
    }

    /// Reads [`Self::linkerd_name`]. A namespace has no dot in its name, a service account may.
    pub fn from_linkerd_name(name: &str) -> Option<Self> {
        let (account, trust_domain) = name.rsplit_once(".serviceaccount.identity.linkerd.")?;
        let (service_account, namespace) = account.rsplit_once('.')?;
        Self::checked(trust_domain, namespace, service_account)
    }

    /// Reads a SPIFFE ID of the one form that workloads have.
    pub fn from_spiffe_id(uri: &str) -> Option<Self> {
        let (trust_domain, path) = uri.strip_prefix("spiffe://")?.split_once('/')?;
        let (namespace, service_account) = path.strip_prefix("ns/")?.split_once("/sa/")?;
        Self::checked(trust_domain, namespace, service_account)
    }

    fn checked(trust_domain: &str, namespace: &str, service_account: &str) -> Option<Self> {
        let account = is_object_name(service_account);
        (is_subdomain(trust_domain) && is_label(namespace) && account).then(|| Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }
}

/// RFC 1123 label: the name of a namespace.
pub fn is_label(name: &str) -> bool {
    name.len() <= 63 && is_part(name)
}

/// RFC 1123 subdomain, labels with dots between them: what DNS can hold.
pub fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

/// The name of an object. Kubernetes calls it a subdomain, and bounds the whole but no part of it.
pub fn is_object_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_part)
}

fn is_part(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.bytes().all(|byte| inner(byte) || byte == b'-')
        && name.bytes().next().is_some_and(inner)
        && name.bytes().next_back().is_some_and(inner)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn identity(trust_domain: &str, namespace: &str, service_account: &str) -> Identity {
        Identity {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    #[test]
    fn both_spellings_of_an_identity_read_back_to_it() {
        for wanted in [
            identity("cluster.local", "shop", "web"),
            identity("td", "kube-public", "a.b.c"),
            identity("a.b", "s", "x.y.serviceaccount.identity.linkerd.evil"),
            identity("td", "s", &"x".repeat(253)),
        ] {
            assert_eq!(
                Identity::from_linkerd_name(&wanted.linkerd_name()),
                Some(wanted.clone())
            );
            assert_eq!(Identity::from_spiffe_id(&wanted.to_string()), Some(wanted));
        }
    }

    #[test]
    fn what_is_no_workload_identity_is_not_read_as_one() {
        for uri in [
            "",
            "spiffe://cluster.local",
            "spiffe:///ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/more",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/sh.op/sa/web",
            "https://cluster.local/ns/shop/sa/web",
            "spiffe://Cluster.local/ns/shop/sa/web",
            &format!("spiffe://{}/ns/shop/sa/web", "x".repeat(64)),
            &format!("spiffe://cluster.local/ns/shop/sa/{}", "x".repeat(254)),
        ] {
            assert_eq!(Identity::from_spiffe_id(uri), None, "{uri}");
        }
        for name in [
            "web.shop.serviceaccount.identity.linkerd.",
            "shop.serviceaccount.identity.linkerd.cluster.local",
            ".shop.serviceaccount.identity.linkerd.cluster.local",
            "web..serviceaccount.identity.linkerd.cluster.local",
            "web.shop.serviceaccount.identity.istio.cluster.local",
        ] {
            assert_eq!(Identity::from_linkerd_name(name), None, "{name}");
        }
    }

    #[test]
    fn names_are_checked_as_kubernetes_checks_them() {
        for name in ["a", "a1", "1-a", &"x".repeat(63)] {
            assert!(is_label(name), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a_b", "a.b", &"x".repeat(64)] {
            assert!(!is_label(name), "{name}");
        }
        assert!(is_subdomain("a.b-c.d"));
        let longest = format!("{0}.{0}.{0}.{1}", "x".repeat(63), "y".repeat(61));
        assert_eq!(longest.len(), 253);
        assert!(is_subdomain(&longest));
        for name in ["", ".", "a.", ".a", "a..b", &format!("{longest}y")] {
            assert!(!is_subdomain(name), "{name}");
            assert!(!is_object_name(name), "{name}");
        }
        // Of an object no part is bounded.
        for name in ["x".repeat(64), "x".repeat(253), "x".repeat(100) + ".y"] {
            assert!(is_object_name(&name), "{name}");
            assert!(!is_subdomain(&name), "{name}");
        }
        assert!(is_object_name(&longest));
        for name in ["a_b", "A", "a.-b", "a-.b", &"x".repeat(254)] {
            assert!(!is_object_name(name), "{name}");
        }
    }
}
