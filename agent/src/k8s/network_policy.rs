//! NetworkPolicy of `networking.k8s.io/v1` to plain types, with the defaults that the API server
//! fills in and the refusals that it makes.
//!
//! An unknown field matters here more than elsewhere: a misspelt `from` is a rule for everybody, a
//! misspelt `podSelector` selects all pods. Conversion begins behind the parser and never sees one,
//! so whoever parses decides. Manifests are what a person wrote, and nobody else checks them: there
//! it is an error, and [`unknown_field`] says which. What an API server gives out has passed its
//! check, and may have fields of a newer Kubernetes: there it is passed over.

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::{
    api::networking::v1 as networking, apimachinery::pkg::util::intstr::IntOrString,
};
use picomesh_common::PortRange;

use crate::state::{
    network_policy::NETWORK_POLICY_GROUP,
    objects::{
        NetworkMatch, NetworkPeer, NetworkPolicy, NetworkPort, NetworkPorts, NetworkRule, Selector,
        TargetPort,
    },
};

use super::{
    convert::{self, Converter},
    field::{self, FieldError},
    policy,
};

/// Looks at the version of a NetworkPolicy before its fields are read. A policy that nobody reads
/// protects nobody, so one of another version is refused and not ignored.
pub fn known(api_version: &str) -> Result<(), FieldError> {
    if api_version == format!("{NETWORK_POLICY_GROUP}/v1") {
        return Ok(());
    }
    Err(FieldError::new(
        "apiVersion",
        api_version,
        "is no version of NetworkPolicy",
        format!("write {NETWORK_POLICY_GROUP}/v1"),
    ))
}

/// Is a `NetworkPolicy` of this version Kubernetes' own, now or in the past? Calico, Cilium and
/// others have kinds of the same name.
pub fn is_kubernetes_own(api_version: &str) -> bool {
    let group = api_version.split_once('/').map(|(group, _)| group);
    matches!(group, Some(NETWORK_POLICY_GROUP | "extensions"))
}

/// Looks at a field that no NetworkPolicy has: its name, and where it stands (like
/// `spec.ingress[0]`; empty for the object itself).
pub fn unknown_field(within: &str, name: &str) -> Result<(), FieldError> {
    // Older clusters gave it one; it decides nothing.
    if (within, name) == ("", "status") {
        return Ok(());
    }
    let parent = within.rsplit('.').next().unwrap_or_default();
    let parent = parent.split('[').next().unwrap_or_default();
    let fields = match parent {
        "" => "apiVersion, kind, metadata, spec",
        "spec" => "podSelector, policyTypes, ingress, egress",
        "ingress" => "from, ports",
        "egress" => "to, ports",
        "from" | "to" => "podSelector, namespaceSelector, ipBlock",
        "ports" => "protocol, port, endPort",
        "ipBlock" => "cidr, except",
        "podSelector" | "namespaceSelector" => "matchLabels, matchExpressions",
        "matchExpressions" => "key, operator, values",
        // Metadata has many.
        _ => "those that Kubernetes defines",
    };
    let separator = if within.is_empty() { "" } else { "." };
    Err(FieldError::new(
        format!("{within}{separator}{name}"),
        name,
        "is no field here",
        format!("correct its spelling or leave it out; the fields are {fields}"),
    ))
}

impl Converter {
    pub fn network_policy(
        &self,
        policy: networking::NetworkPolicy,
    ) -> Result<NetworkPolicy, FieldError> {
        let key = self.key(&policy.metadata)?;
        let spec = policy.spec.unwrap_or_default();
        let (from, to) = (
            spec.ingress.unwrap_or_default(),
            spec.egress.unwrap_or_default(),
        );
        let types = policy_types(spec.policy_types, !to.is_empty())?;

        let mut ingress = Vec::new();
        for (index, written) in from.into_iter().enumerate() {
            let path = format!("spec.ingress[{index}]");
            ingress.push(NetworkRule {
                peers: peers(&path, "from", written.from.unwrap_or_default())?,
                ports: ports(&path, &written.ports.unwrap_or_default())?,
            });
        }
        let mut egress = Vec::new();
        for (index, written) in to.into_iter().enumerate() {
            let path = format!("spec.egress[{index}]");
            egress.push(NetworkRule {
                peers: peers(&path, "to", written.to.unwrap_or_default())?,
                ports: ports(&path, &written.ports.unwrap_or_default())?,
            });
        }
        let pod_selector = spec.pod_selector.map(|written| {
            let written = policy::SelectorSpec::from(written);
            policy::selector("spec.podSelector", written)
        });
        Ok(NetworkPolicy {
            key,
            pod_selector: pod_selector.transpose()?.unwrap_or_default(),
            ingress: types.ingress.then_some(ingress),
            egress: types.egress.then_some(egress),
        })
    }
}

/// The directions that a policy isolates in.
pub(super) struct Types {
    pub(super) ingress: bool,
    pub(super) egress: bool,
}

/// Not said: always ingress, and egress if a rule for it stands there. So `egress: []` alone does
/// not isolate; that is Kubernetes' default, too.
pub(super) fn policy_types(
    written: Option<Vec<String>>,
    egress_rules: bool,
) -> Result<Types, FieldError> {
    let written = written.unwrap_or_default();
    if written.is_empty() {
        return Ok(Types {
            ingress: true,
            egress: egress_rules,
        });
    }
    let mut types = Types {
        ingress: false,
        egress: false,
    };
    for (index, word) in written.iter().enumerate() {
        match word.as_str() {
            "Ingress" => types.ingress = true,
            "Egress" => types.egress = true,
            other => {
                return Err(FieldError::new(
                    format!("spec.policyTypes[{index}]"),
                    other,
                    "is no direction",
                    "write Ingress or Egress",
                ));
            }
        }
    }
    Ok(types)
}

fn peers(
    rule: &str,
    name: &str,
    written: Vec<networking::NetworkPolicyPeer>,
) -> Result<Vec<NetworkPeer>, FieldError> {
    let mut peers = Vec::new();
    for (index, written) in written.into_iter().enumerate() {
        let path = format!("{rule}.{name}[{index}]");
        let read = |part: &str, written| {
            let written = policy::SelectorSpec::from(written);
            policy::selector(&format!("{path}.{part}"), written)
        };
        let pods = written
            .pod_selector
            .map(|written| read("podSelector", written))
            .transpose()?;
        let namespaces = written
            .namespace_selector
            .map(|written| read("namespaceSelector", written))
            .transpose()?;
        peers.push(match (written.ip_block, pods, namespaces) {
            (Some(block), None, None) => NetworkPeer::Block(ip_block(&path, &block)?),
            (Some(block), _, _) => {
                return Err(FieldError::new(
                    format!("{path}.ipBlock"),
                    block.cidr,
                    "stands beside a selector",
                    "write it as a peer of its own",
                ));
            }
            (None, None, None) => {
                let remedy = format!(
                    "write podSelector, namespaceSelector or ipBlock; leave {name} out to mean \
                     everybody"
                );
                return Err(FieldError::missing(path, remedy));
            }
            (None, pods, namespaces) => NetworkPeer::Pods {
                namespaces,
                // A namespaceSelector alone means all pods there.
                pods: pods.unwrap_or_else(Selector::default),
            },
        });
    }
    Ok(peers)
}

fn ip_block(peer: &str, written: &networking::IPBlock) -> Result<NetworkMatch, FieldError> {
    let cidr = network(format!("{peer}.ipBlock.cidr"), &written.cidr)?;
    let mut except = Vec::new();
    for (index, text) in written.except.iter().flatten().enumerate() {
        let path = format!("{peer}.ipBlock.except[{index}]");
        let hole = network(path.clone(), text)?;
        if !cidr.contains(&hole) || hole == cidr {
            return Err(FieldError::new(
                path,
                text,
                format!("is no part of {cidr}"),
                "write a smaller network within ipBlock.cidr",
            ));
        }
        except.push(hole);
    }
    Ok(NetworkMatch { cidr, except })
}

/// A network, never a bare address.
fn network(path: String, text: &str) -> Result<IpNet, FieldError> {
    sloppy(text)
        .map(|network| plain(network.trunc()))
        .ok_or_else(|| {
            FieldError::new(
                path,
                text,
                "is not a network",
                "write one like 10.0.0.0/8 or fd00::/8; one address is 10.0.0.1/32",
            )
        })
}

/// Policies of old that Kubernetes lets stand have zeros in front of decimal numbers.
fn sloppy(text: &str) -> Option<IpNet> {
    let decimal = |digits: &str| match digits.trim_start_matches('0') {
        "" if !digits.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let (address, length) = text.split_once('/')?;
    // Of an IPv6 address only an IPv4 one at its end is decimal.
    let (six, four) = address.split_at(address.rfind(':').map_or(0, |colon| colon + 1));
    let four = if four.contains('.') {
        four.split('.').map(decimal).collect::<Vec<_>>().join(".")
    } else {
        four.to_owned()
    };
    format!("{six}{four}/{}", decimal(length)).parse().ok()
}

/// An IPv4 network in IPv6's clothes is what is in them, as for Kubernetes: as it stands it would
/// match nothing, which is dangerous in `except`.
fn plain(network: IpNet) -> IpNet {
    let IpNet::V6(six) = network else {
        return network;
    };
    let four = six.addr().to_ipv4_mapped();
    let four = four.zip(six.prefix_len().checked_sub(96));
    let four = four.and_then(|(address, length)| Ipv4Net::new(address, length).ok());
    four.map_or(network, IpNet::V4)
}

fn ports(
    rule: &str,
    written: &[networking::NetworkPolicyPort],
) -> Result<Vec<NetworkPort>, FieldError> {
    let mut ports = Vec::new();
    for (index, written) in written.iter().enumerate() {
        let path = format!("{rule}.ports[{index}]");
        ports.push(NetworkPort {
            protocol: convert::protocol(&format!("{path}.protocol"), written.protocol.as_deref())?,
            ports: which_ports(&path, written.port.as_ref(), written.end_port)?,
        });
    }
    Ok(ports)
}

fn which_ports(
    path: &str,
    port: Option<&IntOrString>,
    end: Option<i32>,
) -> Result<NetworkPorts, FieldError> {
    let first = port
        .map(|port| convert::target_port(&format!("{path}.port"), port))
        .transpose()?;
    let end_path = || format!("{path}.endPort");
    match (first, end) {
        (None, None) => Ok(NetworkPorts::All),
        (Some(TargetPort::Name(name)), None) => Ok(NetworkPorts::Name(name)),
        (Some(TargetPort::Number(first)), None) => {
            Ok(NetworkPorts::Range(PortRange { first, last: first }))
        }
        (Some(TargetPort::Number(first)), Some(end)) => {
            let last = field::port(end_path(), end)?;
            if last < first {
                let problem = format!("is less than port {first}");
                let remedy = "write the range's last port";
                return Err(FieldError::new(end_path(), end, problem, remedy));
            }
            Ok(NetworkPorts::Range(PortRange { first, last }))
        }
        (None | Some(TargetPort::Name(_)), Some(end)) => Err(FieldError::new(
            end_path(),
            end,
            "has no number to begin at",
            "write the range's first port as a number in port",
        )),
    }
}

#[cfg(test)]
mod tests;
