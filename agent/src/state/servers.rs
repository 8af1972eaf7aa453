//! Which Server and which authorizations bear on which port of which pod: builds the
//! [`InboundPolicy`] of each local pod from the policy objects. Called by `Mesh::build` alone.
//!
//! Two Servers must not select the same port of a pod. Which of them is the older one is not known
//! here (manifests on disk carry no creation time), so the first by name is taken, the same one on
//! every node, and the other is reported: its authorizations do not apply to that port.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    Identity, ObjectKey, Problem,
    objects::{
        AuthenticationRef, AuthorizationPolicy, ClientMatch, DefaultPolicy, IdentityPattern,
        MeshSettings, Objects, Pod, PolicyTarget, Protocol, Server, ServerAuthorization, ServerRef,
        TargetPort,
    },
    policy::{Authorization, Condition, InboundPolicy, PolicyRef, ServerPolicy},
};

/// All Servers with their authorizations, ready to be looked up per pod.
pub(super) struct Servers<'a> {
    /// By namespace; in a namespace by name.
    by_namespace: HashMap<&'a str, Vec<(&'a Server, Arc<ServerPolicy>)>>,
    cluster_networks: Arc<[IpNet]>,
    /// Overlaps that were reported: once per pair and port, not once per pod.
    overlaps: BTreeSet<(&'a ObjectKey, &'a ObjectKey, u16)>,
}

impl<'a> Servers<'a> {
    pub(super) fn build(
        settings: &MeshSettings,
        objects: &'a Objects,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let server_authorizations: Vec<_> = objects
            .server_authorizations
            .values()
            .map(|authorization| {
                (
                    &**authorization,
                    resolve_server_authorization(authorization),
                )
            })
            .collect();
        let authorization_policies: Vec<_> = objects
            .authorization_policies
            .values()
            .map(|policy| {
                (
                    &**policy,
                    resolve_policy(settings, objects, policy, problems),
                )
            })
            .collect();

        for authorization in objects.server_authorizations.values() {
            let ServerRef::Name(name) = &authorization.server else {
                continue;
            };
            let server = ObjectKey {
                name: Arc::clone(name),
                ..authorization.key.clone()
            };
            if !objects.servers.contains_key(&server) {
                problems.push(Problem {
                    kind: "ServerAuthorization",
                    object: authorization.key.clone(),
                    message: format!(
                        "spec.server.name: there is no Server {server}; create it or name another"
                    ),
                });
            }
        }

        let mut by_namespace: HashMap<&str, Vec<_>> = HashMap::new();
        for server in objects.servers.values() {
            let here = |key: &ObjectKey| key.namespace == server.key.namespace;
            let policies = authorization_policies
                .iter()
                .filter(|(policy, _)| here(&policy.key) && targets(policy, server))
                .map(|(policy, conditions)| Authorization {
                    authz: PolicyRef::of_object("authorizationpolicy", &policy.key.name),
                    conditions: conditions.clone(),
                });
            let older_kind = server_authorizations
                .iter()
                .filter(|(older, _)| here(&older.key) && refers_to(older, server))
                .map(|(older, conditions)| Authorization {
                    authz: PolicyRef::of_object("serverauthorization", &older.key.name),
                    conditions: conditions.clone(),
                });
            let policy = ServerPolicy {
                server: PolicyRef::of_object("server", &server.key.name),
                access: server.access_policy,
                access_ref: PolicyRef::of_default(server.access_policy),
                authorizations: policies.chain(older_kind).collect(),
            };
            by_namespace
                .entry(&server.key.namespace)
                .or_default()
                .push((&**server, Arc::new(policy)));
        }
        Self {
            by_namespace,
            cluster_networks: settings.cluster_networks.as_slice().into(),
            overlaps: BTreeSet::new(),
        }
    }

    /// The policy of one pod, given the default that holds for it.
    pub(super) fn of_pod(
        &mut self,
        pod: &Pod,
        default: DefaultPolicy,
        problems: &mut Vec<Problem>,
    ) -> InboundPolicy {
        let mut servers = BTreeMap::new();
        let mut taken: BTreeMap<u16, &ObjectKey> = BTreeMap::new();
        for (server, policy) in self
            .by_namespace
            .get(&*pod.key.namespace)
            .into_iter()
            .flatten()
        {
            if !server.pod_selector.matches(&pod.labels) {
                continue;
            }
            for port in ports_of(server, pod) {
                match taken.get(&port) {
                    None => {
                        taken.insert(port, &server.key);
                        servers.insert(port, Arc::clone(policy));
                    }
                    Some(first) => {
                        if self.overlaps.insert((first, &server.key, port)) {
                            problems.push(overlap(server, first, port, pod));
                        }
                    }
                }
            }
        }
        InboundPolicy {
            default,
            default_ref: PolicyRef::of_default(default),
            servers,
            cluster_networks: Arc::clone(&self.cluster_networks),
        }
    }
}

/// Each once: two containers may give a port of one name the same number.
fn ports_of(server: &Server, pod: &Pod) -> BTreeSet<u16> {
    match &server.port {
        TargetPort::Number(port) => BTreeSet::from([*port]),
        TargetPort::Name(name) => pod
            .ports
            .iter()
            .filter(|port| port.protocol == Protocol::Tcp && port.name.as_ref() == Some(name))
            .map(|port| port.port)
            .collect(),
    }
}

fn overlap(server: &Server, first: &ObjectKey, port: u16, pod: &Pod) -> Problem {
    Problem {
        kind: "Server",
        object: server.key.clone(),
        message: format!(
            "Server {first} selects port {port} of pod {} too and is used for it, being the first \
             by name; let only one Server select the port",
            pod.key
        ),
    }
}

fn refers_to(authorization: &ServerAuthorization, server: &Server) -> bool {
    match &authorization.server {
        ServerRef::Name(name) => *name == server.key.name,
        ServerRef::Selector(selector) => selector.matches(&server.labels),
    }
}

fn targets(policy: &AuthorizationPolicy, server: &Server) -> bool {
    match &policy.target {
        PolicyTarget::Server(name) => *name == server.key.name,
        PolicyTarget::Namespace => true,
        PolicyTarget::Route { .. } => false,
    }
}

fn resolve_server_authorization(authorization: &ServerAuthorization) -> Vec<Condition> {
    let mut conditions = Vec::new();
    if !authorization.networks.is_empty() {
        conditions.push(Condition::Networks(authorization.networks.clone()));
    }
    match &authorization.client {
        ClientMatch::Unauthenticated => {}
        ClientMatch::AnyTls => conditions.push(Condition::Identities(vec![IdentityPattern::Any])),
        ClientMatch::Identities(patterns) => {
            conditions.push(Condition::Identities(patterns.clone()));
        }
    }
    conditions
}

/// What a policy demands, its references looked up. What it refers to and is not there holds for
/// nobody: a policy must not get weaker because an object is missing.
fn resolve_policy(
    settings: &MeshSettings,
    objects: &Objects,
    policy: &AuthorizationPolicy,
    problems: &mut Vec<Problem>,
) -> Vec<Condition> {
    let mut problem = |message| {
        problems.push(Problem {
            kind: "AuthorizationPolicy",
            object: policy.key.clone(),
            message,
        });
    };
    let key = |namespace: &Arc<str>, name: &Arc<str>| ObjectKey {
        cluster: Arc::clone(&policy.key.cluster),
        namespace: Arc::clone(namespace),
        name: Arc::clone(name),
    };

    match &policy.target {
        PolicyTarget::Namespace => {}
        PolicyTarget::Server(name) => {
            if !objects
                .servers
                .contains_key(&key(&policy.key.namespace, name))
            {
                problem(format!(
                    "spec.targetRef: there is no Server {}/{name}; create it or name another",
                    policy.key.namespace
                ));
            }
        }
        PolicyTarget::Route { kind, name } => problem(format!(
            "spec.targetRef: {kind} {name} is not evaluated, because requests are not looked into: \
             the connections it would allow stay denied; target the Server to allow them"
        )),
    }

    let missing = |field: &str, namespace: &Arc<str>, name: &Arc<str>| {
        format!(
            "spec.requiredAuthenticationRefs: there is no {field} {namespace}/{name}, so the policy \
             allows nobody; create it or correct the reference"
        )
    };
    policy
        .required
        .iter()
        .map(|reference| match reference {
            AuthenticationRef::MeshTls { namespace, name } => {
                match objects.mesh_tls_authentications.get(&key(namespace, name)) {
                    Some(found) => Condition::Identities(found.identities.clone()),
                    None => {
                        problem(missing("MeshTLSAuthentication", namespace, name));
                        Condition::Never
                    }
                }
            }
            AuthenticationRef::Network { namespace, name } => {
                match objects.network_authentications.get(&key(namespace, name)) {
                    Some(found) => Condition::Networks(found.networks.clone()),
                    None => {
                        problem(missing("NetworkAuthentication", namespace, name));
                        Condition::Never
                    }
                }
            }
            // Not looked up: an account without object is one that no client can prove.
            AuthenticationRef::ServiceAccount { namespace, name } => {
                Condition::Identities(vec![IdentityPattern::Exact(Identity {
                    trust_domain: Arc::clone(&settings.trust_domain),
                    namespace: Arc::clone(namespace),
                    service_account: Arc::clone(name),
                })])
            }
        })
        .collect()
}
