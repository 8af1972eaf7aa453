//! Putting objects into [`Objects`] and taking them out, whatever their kind.

use std::{collections::BTreeMap, sync::Arc};

use super::{Object, Objects};
use crate::state::ObjectKey;

/// The kinds that are read. The order is that in which a snapshot lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Node,
    Namespace,
    Pod,
    Service,
    EndpointSlice,
    ServiceAccount,
    Server,
    ServerAuthorization,
    AuthorizationPolicy,
    MeshTlsAuthentication,
    NetworkAuthentication,
    NetworkPolicy,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceAccount => "ServiceAccount",
            Self::Server => "Server",
            Self::ServerAuthorization => "ServerAuthorization",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::MeshTlsAuthentication => "MeshTLSAuthentication",
            Self::NetworkAuthentication => "NetworkAuthentication",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }
}

impl Object {
    pub fn of(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Node,
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Server(_) => Kind::Server,
            Self::ServerAuthorization(_) => Kind::ServerAuthorization,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::MeshTlsAuthentication(_) => Kind::MeshTlsAuthentication,
            Self::NetworkAuthentication(_) => Kind::NetworkAuthentication,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
        }
    }
}

/// Does `$work` to the map of one kind; those of pods and service accounts are written out.
macro_rules! in_map {
    ($kind:expr, $objects:expr, pods: $pods:expr, accounts: $accounts:expr, $map:ident => $work:expr) => {
        match $kind {
            Kind::Pod => $pods,
            Kind::ServiceAccount => $accounts,
            Kind::Node => {
                let $map = &mut $objects.nodes;
                $work
            }
            Kind::Namespace => {
                let $map = &mut $objects.namespaces;
                $work
            }
            Kind::Service => {
                let $map = &mut $objects.services;
                $work
            }
            Kind::EndpointSlice => {
                let $map = &mut $objects.endpoint_slices;
                $work
            }
            Kind::Server => {
                let $map = &mut $objects.servers;
                $work
            }
            Kind::ServerAuthorization => {
                let $map = &mut $objects.server_authorizations;
                $work
            }
            Kind::AuthorizationPolicy => {
                let $map = &mut $objects.authorization_policies;
                $work
            }
            Kind::MeshTlsAuthentication => {
                let $map = &mut $objects.mesh_tls_authentications;
                $work
            }
            Kind::NetworkAuthentication => {
                let $map = &mut $objects.network_authentications;
                $work
            }
            Kind::NetworkPolicy => {
                let $map = &mut $objects.network_policies;
                $work
            }
        }
    };
}

impl Objects {
    /// Takes the place of an object of the same kind and key (of a pod: of the same uid). `false`:
    /// exactly this one was there already.
    pub fn insert(&mut self, object: Object) -> bool {
        match object {
            Object::Node(object) => put(&mut self.nodes, object.key.clone(), object),
            Object::Namespace(object) => put(&mut self.namespaces, object.key.clone(), object),
            Object::Pod(object) => put(&mut self.pods, Arc::clone(&object.uid), object),
            Object::Service(object) => put(&mut self.services, object.key.clone(), object),
            Object::EndpointSlice(object) => {
                put(&mut self.endpoint_slices, object.key.clone(), object)
            }
            Object::ServiceAccount(key) => self.service_accounts.insert(key, ()).is_none(),
            Object::Server(object) => put(&mut self.servers, object.key.clone(), object),
            Object::ServerAuthorization(object) => {
                put(&mut self.server_authorizations, object.key.clone(), object)
            }
            Object::AuthorizationPolicy(object) => {
                put(&mut self.authorization_policies, object.key.clone(), object)
            }
            Object::MeshTlsAuthentication(object) => put(
                &mut self.mesh_tls_authentications,
                object.key.clone(),
                object,
            ),
            Object::NetworkAuthentication(object) => put(
                &mut self.network_authentications,
                object.key.clone(),
                object,
            ),
            Object::NetworkPolicy(object) => {
                put(&mut self.network_policies, object.key.clone(), object)
            }
        }
    }

    /// Keeps those of one kind whose key passes; `true` if any went.
    pub fn retain(&mut self, kind: Kind, mut keep: impl FnMut(&ObjectKey) -> bool) -> bool {
        in_map!(
            kind, self,
            pods: {
                let before = self.pods.len();
                self.pods.retain(|_, pod| keep(&pod.key));
                self.pods.len() != before
            },
            accounts: {
                let before = self.service_accounts.len();
                self.service_accounts.retain(|key, ()| keep(key));
                self.service_accounts.len() != before
            },
            map => {
                let before = map.len();
                map.retain(|key, _| keep(key));
                map.len() != before
            }
        )
    }

    /// `true` if it was there. A pod is taken by its uid instead, from `pods`.
    pub fn remove(&mut self, kind: Kind, key: &ObjectKey) -> bool {
        in_map!(
            kind, self,
            pods: self.retain(Kind::Pod, |pod| pod != key),
            accounts: self.service_accounts.remove(key).is_some(),
            map => map.remove(key).is_some()
        )
    }

    /// All of them, one by one, kind after kind.
    pub fn each(&self) -> impl Iterator<Item = Object> + '_ {
        fn own<K, T: Clone>(map: &BTreeMap<K, Arc<T>>) -> impl Iterator<Item = T> + '_ {
            map.values().map(|object| T::clone(object))
        }
        let accounts = self.service_accounts.keys().cloned();
        own(&self.nodes)
            .map(Object::Node)
            .chain(own(&self.namespaces).map(Object::Namespace))
            .chain(own(&self.pods).map(Object::Pod))
            .chain(own(&self.services).map(Object::Service))
            .chain(own(&self.endpoint_slices).map(Object::EndpointSlice))
            .chain(accounts.map(Object::ServiceAccount))
            .chain(own(&self.servers).map(Object::Server))
            .chain(own(&self.server_authorizations).map(Object::ServerAuthorization))
            .chain(own(&self.authorization_policies).map(Object::AuthorizationPolicy))
            .chain(own(&self.mesh_tls_authentications).map(Object::MeshTlsAuthentication))
            .chain(own(&self.network_authentications).map(Object::NetworkAuthentication))
            .chain(own(&self.network_policies).map(Object::NetworkPolicy))
    }
}

fn put<K: Ord, T: PartialEq>(map: &mut BTreeMap<K, Arc<T>>, key: K, object: T) -> bool {
    if map.get(&key).is_some_and(|known| **known == object) {
        return false;
    }
    map.insert(key, Arc::new(object));
    true
}
