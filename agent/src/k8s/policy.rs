//! The kinds of `policy.linkerd.io` that decide about connections, to plain types.
//!
//! Unknown fields are errors here. The API server drops a field that a kind does not have and
//! keeps the rest, so a policy would quietly mean something else than its author wrote; the same
//! holds for kinds and versions that popular guides made up. They are refused, with the right
//! spelling in the message.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::{
    apis::meta::v1::{LabelSelector, ObjectMeta},
    util::intstr::IntOrString,
};
use serde::{Deserialize, de::IgnoredAny};

use crate::state::{
    Identity,
    objects::{
        AuthenticationRef, AuthorizationPolicy, ClientMatch, DefaultPolicy, IdentityPattern,
        MeshTlsAuthentication, NetworkAuthentication, NetworkMatch, Operator, PolicyTarget,
        ProxyProtocol, Requirement, Selector, Server, ServerAuthorization, ServerRef,
    },
    policy::POLICY_GROUP,
};

use super::{
    convert::{self, Converter},
    field::{self, FieldError},
};

/// A kind that decides about connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    Server,
    ServerAuthorization,
    AuthorizationPolicy,
    MeshTlsAuthentication,
    NetworkAuthentication,
}

/// What becomes of a kind of this group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    Read(PolicyKind),
    /// A real kind of Linkerd's that has no bearing on connections: named once and ignored.
    Ignored,
}

/// Kinds of Linkerd's that speak of requests or of the way out.
const IGNORED: [&str; 7] = [
    "HTTPRoute",
    "GRPCRoute",
    "HTTPLocalRateLimitPolicy",
    "HTTPLoadBalancerPolicy",
    "HTTPLocalConcurrencyLimitPolicy",
    "HTTPRetryFilter",
    "EgressNetwork",
];

/// Looks a kind of `policy.linkerd.io` up, before its fields are read.
pub fn known(kind: &str, version: &str) -> Result<Known, FieldError> {
    let (found, versions): (_, &[&str]) = match kind {
        "Server" => (PolicyKind::Server, &["v1beta1", "v1beta2", "v1beta3"]),
        "ServerAuthorization" => (PolicyKind::ServerAuthorization, &["v1alpha1", "v1beta1"]),
        "AuthorizationPolicy" => (PolicyKind::AuthorizationPolicy, &["v1alpha1"]),
        "MeshTLSAuthentication" => (PolicyKind::MeshTlsAuthentication, &["v1alpha1"]),
        "NetworkAuthentication" => (PolicyKind::NetworkAuthentication, &["v1alpha1"]),
        kind if IGNORED.contains(&kind) => return Ok(Known::Ignored),
        kind => {
            let remedy = instead_of(kind);
            let problem = format!("is no kind of {POLICY_GROUP}");
            return Err(FieldError::new("kind", kind, problem, remedy));
        }
    };
    if versions.contains(&version) {
        return Ok(Known::Read(found));
    }
    let newest = versions.last().copied().unwrap_or_default();
    let mut remedy = format!("write {POLICY_GROUP}/{newest}");
    if found == PolicyKind::AuthorizationPolicy {
        remedy.push_str(&format!("; {RULES_INSTEAD}"));
    }
    let problem = format!("is no version of {kind}");
    Err(FieldError::new(
        "apiVersion",
        format!("{POLICY_GROUP}/{version}"),
        problem,
        remedy,
    ))
}

const RULES_INSTEAD: &str = "it has no rules or from: name the Server in spec.targetRef, and in \
    spec.requiredAuthenticationRefs a MeshTLSAuthentication (identities), NetworkAuthentication \
    (networks) or ServiceAccount";

/// What somebody wants who writes a kind that does not exist.
fn instead_of(kind: &str) -> String {
    match kind {
        "NetworkPolicy" => "NetworkPolicy is of networking.k8s.io/v1; to deny by default use the \
            annotation config.linkerd.io/default-inbound-policy: deny"
            .into(),
        "RetryPolicy" => "retries are annotations of a Service (retry.linkerd.io/http, \
            retry.linkerd.io/limit) or of gateway.networking.k8s.io/v1 HTTPRoute"
            .into(),
        "BackendPolicy" => {
            "limits are HTTPLocalRateLimitPolicy, circuit breaking is the annotation \
            balancer.linkerd.io/failure-accrual of a Service"
                .into()
        }
        "TrafficSplit" => "TrafficSplit is of split.smi-spec.io, with spec.service and \
            spec.backends[].service; better: gateway.networking.k8s.io/v1 HTTPRoute with weights"
            .into(),
        _ => {
            let kinds = [
                "Server",
                "ServerAuthorization",
                "AuthorizationPolicy",
                "MeshTLSAuthentication",
                "NetworkAuthentication",
            ];
            let kinds = kinds.iter().chain(&IGNORED);
            match kinds.clone().find(|known| known.eq_ignore_ascii_case(kind)) {
                Some(known) => format!("write {known}"),
                None => format!(
                    "the kinds are {}",
                    kinds.copied().collect::<Vec<_>>().join(", ")
                ),
            }
        }
    }
}

/// Fields of `spec` that people write and that decide nothing here, with the right word. They are
/// no fields below, so that no list of fields offers them; whoever parses asks for them when an
/// object does not parse.
pub fn misplaced(kind: PolicyKind) -> &'static [Misplaced] {
    match kind {
        PolicyKind::Server => &[
            Misplaced {
                field: "protocol",
                problem: "is no field",
                remedy: "write proxyProtocol: unknown, HTTP/1, HTTP/2, gRPC, opaque or TLS",
            },
            Misplaced {
                field: "externalWorkloadSelector",
                problem: "selects workloads outside the cluster, which do not exist here",
                remedy: "write podSelector",
            },
        ],
        PolicyKind::AuthorizationPolicy => &[Misplaced {
            field: "rules",
            problem: "is no field",
            remedy: RULES_INSTEAD,
        }],
        PolicyKind::ServerAuthorization
        | PolicyKind::MeshTlsAuthentication
        | PolicyKind::NetworkAuthentication => &[],
    }
}

/// One of [`misplaced`].
#[derive(Debug)]
pub struct Misplaced {
    pub field: &'static str,
    problem: &'static str,
    remedy: &'static str,
}

impl Misplaced {
    pub fn error(&self, value: &str) -> FieldError {
        let field = format!("spec.{}", self.field);
        FieldError::new(field, value, self.problem, self.remedy)
    }
}

/// An object of this group as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Manifest<Spec> {
    /// `group/version`; [`known`] has passed it.
    api_version: String,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: ObjectMeta,
    spec: Spec,
    /// Written by controllers, of no interest here.
    #[serde(default, rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServerSpec {
    pod_selector: Option<SelectorSpec>,
    port: Option<IntOrString>,
    proxy_protocol: Option<String>,
    access_policy: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct SelectorSpec {
    match_labels: Option<std::collections::BTreeMap<String, String>>,
    match_expressions: Option<Vec<RequirementSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequirementSpec {
    key: String,
    operator: String,
    #[serde(default)]
    values: Option<Vec<String>>,
}

/// A selector within one of Kubernetes' own kinds.
impl From<LabelSelector> for SelectorSpec {
    fn from(written: LabelSelector) -> Self {
        let requirements = written.match_expressions.map(|requirements| {
            let requirements = requirements.into_iter();
            requirements.map(|written| RequirementSpec {
                key: written.key,
                operator: written.operator,
                values: written.values,
            })
        });
        Self {
            match_labels: written.match_labels,
            match_expressions: requirements.map(Iterator::collect),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerAuthorizationSpec {
    server: ServerRefSpec,
    client: ClientSpec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerRefSpec {
    name: Option<String>,
    selector: Option<SelectorSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ClientSpec {
    networks: Option<Vec<NetworkSpec>>,
    #[serde(default)]
    unauthenticated: bool,
    #[serde(rename = "meshTLS")]
    mesh_tls: Option<MeshTlsSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct MeshTlsSpec {
    #[serde(default, rename = "unauthenticatedTLS")]
    unauthenticated_tls: bool,
    identities: Option<Vec<String>>,
    service_accounts: Option<Vec<AccountSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountSpec {
    name: String,
    namespace: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkSpec {
    cidr: String,
    except: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    target_ref: Option<RefSpec>,
    required_authentication_refs: Option<Vec<RefSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RefSpec {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
    namespace: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MeshTlsAuthenticationSpec {
    identities: Option<Vec<String>>,
    identity_refs: Option<Vec<RefSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkAuthenticationSpec {
    networks: Vec<NetworkSpec>,
}

impl Converter {
    pub fn server(&self, manifest: Manifest<ServerSpec>) -> Result<Server, FieldError> {
        let Manifest {
            api_version,
            metadata,
            spec,
            ..
        } = manifest;
        let proxy_protocol = match spec.proxy_protocol.as_deref() {
            None | Some("unknown") => ProxyProtocol::Unknown,
            Some("HTTP/1") => ProxyProtocol::Http1,
            Some("HTTP/2") => ProxyProtocol::Http2,
            Some("gRPC") => ProxyProtocol::Grpc,
            Some("opaque") => ProxyProtocol::Opaque,
            Some("TLS") => ProxyProtocol::Tls,
            Some(other) => {
                let remedy = match other.to_ascii_lowercase().as_str() {
                    "http" | "http1" | "http/1.1" => "write HTTP/1",
                    "http2" | "h2" => "write HTTP/2",
                    "tcp" => "write opaque",
                    _ => "write unknown, HTTP/1, HTTP/2, gRPC, opaque or TLS",
                };
                let problem = "is not understood";
                return Err(FieldError::new(
                    "spec.proxyProtocol",
                    other,
                    problem,
                    remedy,
                ));
            }
        };
        // The API server drops accessPolicy from the older versions: what was meant to open the
        // port would close it.
        let access_policy = match spec.access_policy {
            None => DefaultPolicy::Deny,
            Some(word) if !api_version.ends_with("/v1beta3") => {
                let problem = format!("is no field of {api_version}");
                let remedy = format!("write apiVersion: {POLICY_GROUP}/v1beta3");
                return Err(FieldError::new("spec.accessPolicy", word, problem, remedy));
            }
            Some(word) => DefaultPolicy::from_word(&word).ok_or_else(|| {
                let words = DefaultPolicy::ALL.map(DefaultPolicy::as_str).join(", ");
                let remedy = format!("write one of {words}");
                FieldError::new("spec.accessPolicy", word, "is no policy", remedy)
            })?,
        };
        let pod_selector = spec.pod_selector.ok_or_else(|| {
            FieldError::missing(
                "spec.podSelector",
                "write {} to select every pod of the namespace",
            )
        })?;
        let port = spec
            .port
            .ok_or_else(|| FieldError::missing("spec.port", "write one port's number or name"))?;
        Ok(Server {
            key: self.key(&metadata)?,
            pod_selector: selector("spec.podSelector", pod_selector)?,
            port: convert::target_port("spec.port", &port)?,
            proxy_protocol,
            access_policy,
            labels: convert::labels(metadata.labels),
        })
    }

    pub fn server_authorization(
        &self,
        manifest: Manifest<ServerAuthorizationSpec>,
    ) -> Result<ServerAuthorization, FieldError> {
        let key = self.key(&manifest.metadata)?;
        let ServerAuthorizationSpec { server, client } = manifest.spec;
        let server = match (server.name, server.selector) {
            (Some(name), None) => ServerRef::Name(name.into()),
            (None, Some(written)) => {
                ServerRef::Selector(selector("spec.server.selector", written)?)
            }
            (Some(name), Some(_)) => {
                let problem = "stands beside a selector";
                let remedy = "write name or selector, not both";
                return Err(FieldError::new("spec.server.name", name, problem, remedy));
            }
            (None, None) => {
                return Err(FieldError::missing("spec.server", "write name or selector"));
            }
        };
        let networks = match client.networks {
            None => Vec::new(),
            Some(networks) if networks.is_empty() => {
                return Err(FieldError::new(
                    "spec.client.networks",
                    "[]",
                    "would allow every address, not none",
                    "leave it out to allow every address; to deny all, delete this object: a \
                     Server without authorization denies",
                ));
            }
            Some(networks) => read_networks("spec.client.networks", networks)?,
        };

        let path = "spec.client.meshTLS";
        let client = match (client.unauthenticated, client.mesh_tls) {
            (true, None) => ClientMatch::Unauthenticated,
            (true, Some(_)) => {
                return Err(FieldError::new(
                    "spec.client.unauthenticated",
                    "true",
                    "makes meshTLS meaningless",
                    "write one of the two",
                ));
            }
            (false, None) => {
                let remedy = "write meshTLS, or unauthenticated: true to allow anybody";
                return Err(FieldError::missing("spec.client", remedy));
            }
            (false, Some(tls)) => {
                let mut patterns = Vec::new();
                for (index, text) in tls.identities.iter().flatten().enumerate() {
                    patterns.push(pattern(&format!("{path}.identities[{index}]"), text)?);
                }
                for (index, account) in tls.service_accounts.into_iter().flatten().enumerate() {
                    let path = format!("{path}.serviceAccounts[{index}]");
                    patterns.push(self.account(
                        &path,
                        account.namespace.as_deref().unwrap_or(&key.namespace),
                        &account.name,
                    )?);
                }
                match (tls.unauthenticated_tls, patterns.is_empty()) {
                    (true, true) => ClientMatch::AnyTls,
                    (false, false) => ClientMatch::Identities(patterns),
                    (true, false) => {
                        return Err(FieldError::new(
                            format!("{path}.unauthenticatedTLS"),
                            "true",
                            "makes identities and serviceAccounts meaningless",
                            "write one of them",
                        ));
                    }
                    (false, true) => {
                        let remedy = "write identities or serviceAccounts with at least one entry";
                        return Err(FieldError::missing(path, remedy));
                    }
                }
            }
        };
        Ok(ServerAuthorization {
            key,
            server,
            networks,
            client,
        })
    }

    pub fn authorization_policy(
        &self,
        manifest: Manifest<AuthorizationPolicySpec>,
    ) -> Result<AuthorizationPolicy, FieldError> {
        let key = self.key(&manifest.metadata)?;
        let spec = manifest.spec;
        let target = spec.target_ref.ok_or_else(|| {
            FieldError::missing(
                "spec.targetRef",
                "name a Server, or the policy's own Namespace",
            )
        })?;
        if let Some(namespace) = target.namespace.filter(|other| **other != *key.namespace) {
            return Err(FieldError::new(
                "spec.targetRef.namespace",
                namespace,
                "is another namespace",
                "a policy stands in the namespace of its target",
            ));
        }
        let target = match (target.group.as_str(), target.kind.as_str()) {
            (POLICY_GROUP, "Server") => PolicyTarget::Server(target.name.into()),
            ("" | "core", "Namespace") if *target.name == *key.namespace => PolicyTarget::Namespace,
            ("" | "core", "Namespace") => {
                let problem = "is another namespace";
                let remedy = format!("a policy of {0} can only target {0}", key.namespace);
                return Err(FieldError::new(
                    "spec.targetRef.name",
                    target.name,
                    problem,
                    remedy,
                ));
            }
            (POLICY_GROUP | "gateway.networking.k8s.io", "HTTPRoute" | "GRPCRoute") => {
                PolicyTarget::Route {
                    kind: target.kind.into(),
                    name: target.name.into(),
                }
            }
            (group, kind) => {
                return Err(FieldError::new(
                    "spec.targetRef",
                    format!("{group}/{kind}"),
                    "cannot be targeted",
                    format!(
                        "write group: {POLICY_GROUP} with kind: Server, or group: \"\" with kind: \
                         Namespace"
                    ),
                ));
            }
        };

        // Left out it would read like an empty list, which allows anybody.
        let references = spec.required_authentication_refs.ok_or_else(|| {
            let remedy = "name what clients must prove; write [] to allow anybody";
            FieldError::missing("spec.requiredAuthenticationRefs", remedy)
        })?;
        let mut required = Vec::new();
        for (index, reference) in references.into_iter().enumerate() {
            let namespace: Arc<str> = match reference.namespace {
                Some(namespace) => namespace.into(),
                None => Arc::clone(&key.namespace),
            };
            let name: Arc<str> = reference.name.into();
            required.push(match (reference.group.as_str(), reference.kind.as_str()) {
                (POLICY_GROUP, "MeshTLSAuthentication") => {
                    AuthenticationRef::MeshTls { namespace, name }
                }
                (POLICY_GROUP, "NetworkAuthentication") => {
                    AuthenticationRef::Network { namespace, name }
                }
                ("" | "core", "ServiceAccount") => {
                    AuthenticationRef::ServiceAccount { namespace, name }
                }
                (group, kind) => {
                    return Err(FieldError::new(
                        format!("spec.requiredAuthenticationRefs[{index}]"),
                        format!("{group}/{kind}"),
                        "proves nothing about a client",
                        format!(
                            "write group: {POLICY_GROUP} with kind: MeshTLSAuthentication or \
                             NetworkAuthentication, or group: \"\" with kind: ServiceAccount"
                        ),
                    ));
                }
            });
        }
        Ok(AuthorizationPolicy {
            key,
            target,
            required,
        })
    }

    pub fn mesh_tls_authentication(
        &self,
        manifest: Manifest<MeshTlsAuthenticationSpec>,
    ) -> Result<MeshTlsAuthentication, FieldError> {
        let key = self.key(&manifest.metadata)?;
        let spec = manifest.spec;
        let mut identities = Vec::new();
        for (index, text) in spec.identities.iter().flatten().enumerate() {
            identities.push(pattern(&format!("spec.identities[{index}]"), text)?);
        }
        for (index, reference) in spec.identity_refs.into_iter().flatten().enumerate() {
            let path = format!("spec.identityRefs[{index}]");
            let namespace = reference.namespace.as_deref().unwrap_or(&key.namespace);
            identities.push(match (reference.group.as_str(), reference.kind.as_str()) {
                ("" | "core", "ServiceAccount") => {
                    self.account(&path, namespace, &reference.name)?
                }
                ("" | "core", "Namespace") => IdentityPattern::Namespace {
                    trust_domain: Arc::clone(&self.trust_domain),
                    namespace: reference.name.into(),
                },
                (group, kind) => {
                    return Err(FieldError::new(
                        path,
                        format!("{group}/{kind}"),
                        "has no identity",
                        "write group: \"\" with kind: ServiceAccount or Namespace",
                    ));
                }
            });
        }
        if identities.is_empty() {
            let remedy = "write identities or identityRefs with at least one entry";
            return Err(FieldError::missing("spec.identities", remedy));
        }
        Ok(MeshTlsAuthentication { key, identities })
    }

    pub fn network_authentication(
        &self,
        manifest: Manifest<NetworkAuthenticationSpec>,
    ) -> Result<NetworkAuthentication, FieldError> {
        let key = self.key(&manifest.metadata)?;
        let networks = read_networks("spec.networks", manifest.spec.networks)?;
        if networks.is_empty() {
            return Err(FieldError::missing(
                "spec.networks",
                "write at least one network",
            ));
        }
        Ok(NetworkAuthentication { key, networks })
    }

    fn account(
        &self,
        path: &str,
        namespace: &str,
        name: &str,
    ) -> Result<IdentityPattern, FieldError> {
        let spelled = format!("spiffe://{}/ns/{namespace}/sa/{name}", self.trust_domain);
        Identity::from_spiffe_id(&spelled)
            .map(IdentityPattern::Exact)
            .ok_or_else(|| {
                let value = format!("{namespace}/{name}");
                let remedy = "write the names of a namespace and of a service account in it";
                FieldError::new(path, value, "is no service account", remedy)
            })
    }
}

pub(super) fn selector(path: &str, written: SelectorSpec) -> Result<Selector, FieldError> {
    let mut match_expressions = Vec::new();
    for (index, written) in written.match_expressions.into_iter().flatten().enumerate() {
        let path = format!("{path}.matchExpressions[{index}]");
        let values: Vec<Arc<str>> = written
            .values
            .into_iter()
            .flatten()
            .map(Arc::from)
            .collect();
        let operator = match (written.operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn", true) => {
                let remedy = format!("{} needs at least one value", written.operator);
                return Err(FieldError::missing(format!("{path}.values"), remedy));
            }
            ("Exists" | "DoesNotExist", false) => {
                let problem = format!("have no meaning with {}", written.operator);
                let values = values.join(", ");
                let remedy = "leave them out, or write In or NotIn";
                return Err(FieldError::new(
                    format!("{path}.values"),
                    values,
                    problem,
                    remedy,
                ));
            }
            (other, _) => {
                let remedy = "write In, NotIn, Exists or DoesNotExist";
                let problem = "is no operator";
                return Err(FieldError::new(
                    format!("{path}.operator"),
                    other,
                    problem,
                    remedy,
                ));
            }
        };
        match_expressions.push(Requirement {
            key: written.key.into(),
            operator,
        });
    }
    Ok(Selector {
        match_labels: convert::labels(written.match_labels),
        match_expressions,
    })
}

fn read_networks(path: &str, written: Vec<NetworkSpec>) -> Result<Vec<NetworkMatch>, FieldError> {
    let mut networks = Vec::new();
    for (index, written) in written.into_iter().enumerate() {
        let cidr = field::network(format!("{path}[{index}].cidr"), &written.cidr)?;
        let except = written.except.unwrap_or_default();
        let except = except.iter().enumerate();
        let except = except
            .map(|(at, hole)| field::network(format!("{path}[{index}].except[{at}]"), hole))
            .collect::<Result<_, _>>()?;
        networks.push(NetworkMatch { cidr, except });
    }
    Ok(networks)
}

/// One entry of `identities`: a name as Linkerd spells it, `*` or `*.` and the end of such a name;
/// a SPIFFE ID, or one of a namespace with `*` for the account.
fn pattern(path: &str, text: &str) -> Result<IdentityPattern, FieldError> {
    let parsed = if text == "*" {
        Some(IdentityPattern::Any)
    } else if text.starts_with("spiffe://") {
        match text.strip_suffix("/sa/*") {
            // Any account's name will do to have the rest checked.
            Some(namespace) => {
                Identity::from_spiffe_id(&format!("{namespace}/sa/any")).map(|any| {
                    IdentityPattern::Namespace {
                        trust_domain: any.trust_domain,
                        namespace: any.namespace,
                    }
                })
            }
            None => Identity::from_spiffe_id(text).map(IdentityPattern::Exact),
        }
    } else if let Some(suffix) = text.strip_prefix('*') {
        let rest = suffix
            .strip_prefix('.')
            .filter(|rest| crate::state::names::is_object_name(rest));
        rest.map(|_| IdentityPattern::LinkerdSuffix(suffix.into()))
    } else {
        Identity::from_linkerd_name(text).map(IdentityPattern::Exact)
    };
    parsed.ok_or_else(|| {
        FieldError::new(
            path,
            text,
            "is no identity",
            "write <account>.<namespace>.serviceaccount.identity.linkerd.<trust-domain>, \
             spiffe://<trust-domain>/ns/<namespace>/sa/<account>, *.<end of the former> or *",
        )
    })
}

#[cfg(test)]
mod tests;
