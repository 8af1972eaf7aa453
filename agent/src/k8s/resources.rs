//! The kinds that are watched: where the API server has them, and how each is read.

use kube::core::ApiResource;

use super::{Converter, FieldError, Seen, policy::Manifest};
use crate::state::{
    objects::{Kind, Object},
    policy::POLICY_GROUP,
};

/// Where the API server has a kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resource {
    pub(super) kind: &'static str,
    /// Empty for the core group.
    pub(super) group: &'static str,
    /// Those that can be read, best first.
    pub(super) versions: &'static [&'static str],
    pub(super) plural: &'static str,
    /// It comes with a CustomResourceDefinition, which may be missing.
    pub(super) optional: bool,
}

impl Resource {
    pub(super) fn at(&self, version: &str) -> ApiResource {
        ApiResource {
            group: self.group.to_owned(),
            version: version.to_owned(),
            api_version: if self.group.is_empty() {
                version.to_owned()
            } else {
                format!("{}/{version}", self.group)
            },
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    /// Name of its CustomResourceDefinition.
    pub(super) fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }
}

impl Kind {
    pub(super) const ALL: [Self; 12] = [
        Self::Node,
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::ServiceAccount,
        Self::Server,
        Self::ServerAuthorization,
        Self::AuthorizationPolicy,
        Self::MeshTlsAuthentication,
        Self::NetworkAuthentication,
        Self::NetworkPolicy,
    ];

    pub(super) fn resource(self) -> Resource {
        let built_in = |group, plural| Resource {
            kind: self.as_str(),
            group,
            versions: &["v1"],
            plural,
            optional: false,
        };
        let policy = |versions, plural| Resource {
            kind: self.as_str(),
            group: POLICY_GROUP,
            versions,
            plural,
            optional: true,
        };
        match self {
            Self::Node => built_in("", "nodes"),
            Self::Namespace => built_in("", "namespaces"),
            Self::Pod => built_in("", "pods"),
            Self::Service => built_in("", "services"),
            Self::EndpointSlice => built_in("discovery.k8s.io", "endpointslices"),
            Self::ServiceAccount => built_in("", "serviceaccounts"),
            Self::NetworkPolicy => built_in("networking.k8s.io", "networkpolicies"),
            Self::Server => policy(&["v1beta3", "v1beta2", "v1beta1"], "servers"),
            Self::ServerAuthorization => policy(&["v1beta1"], "serverauthorizations"),
            Self::AuthorizationPolicy => policy(&["v1alpha1"], "authorizationpolicies"),
            Self::MeshTlsAuthentication => policy(&["v1alpha1"], "meshtlsauthentications"),
            Self::NetworkAuthentication => policy(&["v1alpha1"], "networkauthentications"),
        }
    }

    /// `None`: an object that has no meaning for the mesh.
    pub(super) fn read(
        self,
        seen: &Seen,
        converter: &Converter,
    ) -> Result<Option<Object>, FieldError> {
        let object = match self {
            Self::Node => Object::Node(converter.node(seen.parse()?)?),
            Self::Namespace => Object::Namespace(converter.namespace(seen.parse()?)?),
            Self::Pod => Object::Pod(converter.pod(seen.parse()?)?),
            Self::Service => Object::Service(converter.service(seen.parse()?)?),
            Self::EndpointSlice => {
                let slice = converter.endpoint_slice(seen.parse()?)?;
                return Ok(slice.map(Object::EndpointSlice));
            }
            Self::ServiceAccount => {
                Object::ServiceAccount(converter.service_account(seen.parse()?)?)
            }
            Self::NetworkPolicy => Object::NetworkPolicy(converter.network_policy(seen.parse()?)?),
            Self::Server => Object::Server(converter.server(seen.parse::<Manifest<_>>()?)?),
            Self::ServerAuthorization => Object::ServerAuthorization(
                converter.server_authorization(seen.parse::<Manifest<_>>()?)?,
            ),
            Self::AuthorizationPolicy => Object::AuthorizationPolicy(
                converter.authorization_policy(seen.parse::<Manifest<_>>()?)?,
            ),
            Self::MeshTlsAuthentication => Object::MeshTlsAuthentication(
                converter.mesh_tls_authentication(seen.parse::<Manifest<_>>()?)?,
            ),
            Self::NetworkAuthentication => Object::NetworkAuthentication(
                converter.network_authentication(seen.parse::<Manifest<_>>()?)?,
            ),
        };
        Ok(Some(object))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use serde_json::Value;

    use super::*;
    use crate::k8s::foreign::ForeignKind;

    fn strings(value: &Value) -> impl Iterator<Item = &str> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
    }

    /// A kind that is watched without the right to is never listed, and no mesh is published; a
    /// right that is not used is one too many.
    #[test]
    fn the_agents_role_lists_what_is_watched_and_nothing_else() {
        let file = "../deploy/kustomize/base/rbac-agent.yaml";
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let role: Value = serde_saphyr::from_str(text.split("\n---\n").next().unwrap()).unwrap();
        assert_eq!(role["kind"], "ClusterRole");
        let mut granted = BTreeSet::new();
        for rule in role["rules"].as_array().unwrap() {
            let verbs: BTreeSet<_> = strings(&rule["verbs"]).collect();
            assert_eq!(verbs.contains("list"), verbs.contains("watch"), "{rule}");
            for group in strings(&rule["apiGroups"]).filter(|_| verbs.contains("watch")) {
                let resources = strings(&rule["resources"]);
                granted.extend(resources.map(|name| (group.to_owned(), name.to_owned())));
            }
        }
        let mesh = Kind::ALL.map(Kind::resource).into_iter();
        let foreign = ForeignKind::ALL.map(ForeignKind::resource);
        let watched = mesh
            .chain(foreign)
            .map(|resource| (resource.group.to_owned(), resource.plural.to_owned()));
        let definitions = ("apiextensions.k8s.io", "customresourcedefinitions");
        let mut wanted: BTreeSet<_> = watched.collect();
        wanted.insert((definitions.0.into(), definitions.1.into()));
        assert_eq!(granted, wanted);
    }
}
