//! One copy of each string. A cluster says the same few words thousands of times: namespaces,
//! nodes, accounts, labels and their values.

use std::{collections::HashSet, sync::Arc};

use crate::state::{
    ObjectKey,
    objects::{EndpointSlice, Labels, Object, Pod, Service},
};

/// Strings that nobody uses any more are looked for when so many have come since the last time.
const SWEEP_AT_LEAST: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Strings {
    known: HashSet<Arc<str>>,
    /// Sweep when there are so many.
    limit: usize,
}

impl Strings {
    fn share(&mut self, text: &mut Arc<str>) {
        if let Some(known) = self.known.get(text) {
            *text = Arc::clone(known);
            return;
        }
        if self.known.len() >= self.limit {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.limit = (2 * self.known.len()).max(SWEEP_AT_LEAST);
        }
        self.known.insert(Arc::clone(text));
    }

    fn labels(&mut self, labels: &mut Labels) {
        let own = std::mem::take(labels).into_iter();
        *labels = own
            .map(|(mut key, mut value)| {
                self.share(&mut key);
                self.share(&mut value);
                (key, value)
            })
            .collect();
    }

    /// The name is the object's own and is left alone.
    fn key(&mut self, key: &mut ObjectKey) {
        self.share(&mut key.cluster);
        self.share(&mut key.namespace);
    }

    /// Kinds of which there are few are left as they are.
    pub(super) fn object(&mut self, object: &mut Object) {
        match object {
            Object::Pod(pod) => self.pod(pod),
            Object::Service(service) => self.service(service),
            Object::EndpointSlice(slice) => self.slice(slice),
            Object::Namespace(namespace) => self.share(&mut namespace.key.name),
            Object::Node(node) => self.share(&mut node.key.name),
            Object::ServiceAccount(key) => {
                self.key(key);
                self.share(&mut key.name);
            }
            Object::Server(_)
            | Object::ServerAuthorization(_)
            | Object::AuthorizationPolicy(_)
            | Object::MeshTlsAuthentication(_)
            | Object::NetworkAuthentication(_)
            | Object::NetworkPolicy(_) => {}
        }
    }

    fn pod(&mut self, pod: &mut Pod) {
        self.key(&mut pod.key);
        // The slices of its Services name it too.
        self.share(&mut pod.uid);
        if let Some(node) = &mut pod.node {
            self.share(node);
        }
        self.share(&mut pod.service_account);
        self.labels(&mut pod.labels);
        if let Some(owner) = &mut pod.owner {
            self.share(&mut owner.kind);
            self.share(&mut owner.name);
        }
        for name in pod.ports.iter_mut().filter_map(|port| port.name.as_mut()) {
            self.share(name);
        }
    }

    fn service(&mut self, service: &mut Service) {
        self.key(&mut service.key);
        self.share(&mut service.key.name);
        if let Some(selector) = &mut service.selector {
            self.labels(selector);
        }
        for port in &mut service.ports {
            let words = [port.name.as_mut(), port.app_protocol.as_mut()];
            for word in words.into_iter().flatten() {
                self.share(word);
            }
        }
    }

    fn slice(&mut self, slice: &mut EndpointSlice) {
        self.key(&mut slice.key);
        self.share(&mut slice.service);
        for (name, _, _) in &mut slice.ports {
            if let Some(name) = name {
                self.share(name);
            }
        }
        for endpoint in &mut slice.endpoints {
            let words = [endpoint.pod.as_mut(), endpoint.node.as_mut()];
            for word in words.into_iter().flatten() {
                self.share(word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_kept_once_and_only_while_somebody_uses_it() {
        let mut strings = Strings::default();
        let (mut one, mut two): (Arc<str>, Arc<str>) = ("shop".into(), "shop".into());
        strings.share(&mut one);
        strings.share(&mut two);
        assert!(Arc::ptr_eq(&one, &two));

        for number in 0..10 * SWEEP_AT_LEAST {
            strings.share(&mut Arc::from(number.to_string()));
        }
        assert!(strings.known.len() <= SWEEP_AT_LEAST + 1);
        let mut again: Arc<str> = "shop".into();
        strings.share(&mut again);
        assert!(Arc::ptr_eq(&one, &again));
    }
}
