//! Who runs where, as far as an approval needs it: pods that have not ended, and what namespaces
//! say.
//!
//! Read by the conversion that the agents use, and judged by their rule ([`is_meshed`]). One thing
//! is not looked at here: policies that only the CNI can enforce keep a pod out of the mesh at its
//! agent, and this does not know them. Such a pod asks for the mesh and runs on that node, so its
//! certificate would be one that the node may hold; its agent asks for none.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;
use tracing::warn;

use crate::{
    control::feed::Told,
    k8s::{Converter, Seen},
    state::{
        Identity,
        mesh::is_meshed,
        objects::{Namespace, Pod, Words},
    },
};

/// Namespace and name; a namespace's own is under "".
type Name = (Arc<str>, Arc<str>);

pub(super) struct Pods {
    converter: Converter,
    /// The namespace of the mesh's own objects.
    own: Arc<str>,
    pods: Kind<Pod>,
    namespaces: Kind<Words>,
}

/// Objects by namespace and name.
struct Kind<T> {
    known: HashMap<Arc<str>, HashMap<Arc<str>, Known<T>>>,
    /// What the list under way has shown.
    listed: Option<BTreeSet<Name>>,
    complete: bool,
    /// Since when everything that happens is heard. `None`: it is not.
    well: Option<Instant>,
}

struct Known<T> {
    uid: Box<str>,
    object: T,
}

impl<T> Default for Kind<T> {
    fn default() -> Self {
        Self {
            known: HashMap::new(),
            listed: None,
            complete: false,
            well: None,
        }
    }
}

impl Pods {
    pub(super) fn new(converter: Converter, own: Arc<str>) -> Self {
        Self {
            converter,
            own,
            pods: Kind::default(),
            namespaces: Kind::default(),
        }
    }

    /// Both kinds were listed once.
    pub(super) fn is_complete(&self) -> bool {
        self.pods.complete && self.namespaces.complete
    }

    /// Since when nothing that happens is missed. `None`: somebody may run whom we do not see.
    pub(super) fn well_since(&self) -> Option<Instant> {
        Some(self.pods.well?.max(self.namespaces.well?))
    }

    pub(super) fn hear_pod(&mut self, told: Told, now: Instant) {
        let converter = &self.converter;
        self.pods.hear(told, now, |seen| {
            let pod = converter.pod(seen.parse()?)?;
            // Nothing of one that has ended counts, and of the others next to nothing.
            Ok((!pod.terminal).then(|| Pod {
                labels: Vec::new().into_iter().collect(),
                ips: Vec::new(),
                ports: Vec::new(),
                owner: None,
                words: Words {
                    mesh: pod.words.mesh,
                    ..Words::default()
                },
                ..pod
            }))
        });
    }

    pub(super) fn hear_namespace(&mut self, told: Told, now: Instant) {
        let converter = &self.converter;
        self.namespaces.hear(told, now, |seen| {
            let Namespace { words, .. } = converter.namespace(seen.parse()?)?;
            Ok(Some(Words {
                mesh: words.mesh,
                ..Words::default()
            }))
        });
    }

    pub(super) fn pod(&self, namespace: &str, name: &str) -> Option<&Pod> {
        Some(&self.pods.known.get(namespace)?.get(name)?.object)
    }

    /// Does a pod of `identity`, in the mesh and not ended, run on `node`?
    pub(super) fn runs(&self, identity: &Identity, node: &str) -> bool {
        let unsaid = Words::default();
        let namespace = self.namespaces.known.get("");
        let namespace = namespace.and_then(|all| all.get(&identity.namespace));
        let words = namespace.map_or(&unsaid, |known| &known.object);
        let pods = self.pods.known.get(&identity.namespace);
        pods.into_iter().flat_map(HashMap::values).any(|known| {
            let pod = &known.object;
            pod.node.as_deref() == Some(node)
                && pod.service_account == identity.service_account
                && is_meshed(pod, words, &self.own)
        })
    }
}

impl<T> Kind<T> {
    fn hear(
        &mut self,
        told: Told,
        now: Instant,
        read: impl FnOnce(&Seen) -> Result<Option<T>, crate::k8s::FieldError>,
    ) {
        match told {
            Told::Failed => self.well = None,
            Told::Listing => self.listed = Some(BTreeSet::new()),
            Told::Listed => {
                self.complete = true;
                self.well.get_or_insert(now);
                let listed = self.listed.take().unwrap_or_default();
                for (namespace, known) in &mut self.known {
                    known.retain(|name, _| {
                        listed.contains(&(Arc::clone(namespace), Arc::clone(name)))
                    });
                }
                self.known.retain(|_, known| !known.is_empty());
            }
            Told::There(seen) => {
                let (namespace, name) = name_of(&seen);
                if let Some(listed) = &mut self.listed {
                    listed.insert((Arc::clone(&namespace), Arc::clone(&name)));
                }
                match read(&seen) {
                    Ok(Some(object)) => {
                        let uid = seen.uid().into();
                        let all = self.known.entry(namespace).or_default();
                        all.insert(name, Known { uid, object });
                    }
                    Ok(None) => self.forget(&namespace, &name),
                    Err(error) => {
                        warn!(namespace = &*namespace, name = &*name, %error, "does not read; what \
                              was good before counts");
                        // But nothing of another object that had the same name.
                        let all = self.known.get(&namespace);
                        let known = all.and_then(|all| all.get(&name));
                        if known.is_some_and(|known| *known.uid != *seen.uid()) {
                            self.forget(&namespace, &name);
                        }
                    }
                }
            }
            Told::Gone(seen) => {
                let (namespace, name) = name_of(&seen);
                self.forget(&namespace, &name);
            }
        }
    }

    fn forget(&mut self, namespace: &str, name: &str) {
        if let Some(known) = self.known.get_mut(namespace) {
            known.remove(name);
        }
    }
}

fn name_of(seen: &Seen) -> Name {
    (seen.namespace().into(), seen.name().into())
}
