//! What all watches together have told: the objects, and what is wrong with those that do not read.
//!
//! Pure but for the strings it shares; the room's one writer owns it. A kind counts as known when
//! its first list is complete or its definition is known to be missing. An object that does not
//! read keeps the state it had when it last did, and is named among the faults until it reads
//! again or is gone. A policy that never read is closed ([`super::super::stand_in`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    super::{Converter, FieldError, Seen, foreign::Foreign, share::Strings, stand_in},
    follow::{Told, Watched},
};
use crate::state::{
    ObjectKey, PodUid,
    objects::{EndpointSlice, Kind, Namespace, Object, Objects, Pod, SliceEndpoint},
};

/// An object of a kind that the mesh reads, and that does not read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub kind: &'static str,
    /// Empty for an object of the whole cluster.
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub api_version: String,
    /// Names field, value and remedy.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        write!(f, "{}: {}", self.name, self.message)
    }
}

type Name = (Arc<str>, Arc<str>);

const NAMESPACES: Watched = Watched::Mesh(Kind::Namespace);

/// How long a pod that came while namespaces were not heard is neither in the mesh nor outside. Each
/// watch tries again within its longest pause; and the CNI server, which waits ten seconds to know a
/// pod, still hears what counts then.
pub(super) const EARLY: Duration = Duration::from_secs(9);

/// People mend one after the other; of more only the number is told.
const MOST_FAULTS: usize = 1000;

pub(super) struct Index {
    converter: Converter,
    node: Arc<str>,
    objects: Objects,
    strings: Strings,
    faults: BTreeMap<(Kind, Name), Fault>,
    /// More than are told in full: their names.
    more_faults: BTreeSet<(Kind, Name)>,
    /// Those that nobody has taken yet.
    new_faults: BTreeSet<(Kind, Name)>,
    /// They are not what they were when somebody last asked.
    faults_changed: bool,
    /// Policies that never read, and that something closed stands for.
    stand_ins: BTreeSet<(Kind, Name)>,
    /// Pods are kept by uid; a watch names them.
    pods: HashMap<Name, PodUid>,
    kinds: HashMap<Watched, Known>,
    foreign: Foreign,
    /// Pods, namespaces or foreign policies have changed since they were last judged.
    unjudged: bool,
    /// Slices as the API server has them, where what is in force is kinder.
    held: BTreeMap<ObjectKey, EndpointSlice>,
    /// What happens to namespaces is heard: they were listed, and nothing has failed since.
    namespaces_well: bool,
    /// Since when each pod is early, in order ([`Objects::early`]).
    early: VecDeque<(Instant, PodUid)>,
}

/// How far a kind is known.
#[derive(Default)]
struct Known {
    complete: bool,
    /// Names that the list under way has shown.
    listed: Option<BTreeSet<Name>>,
}

impl Index {
    pub(super) fn new(converter: Converter, node: Arc<str>) -> Self {
        Self {
            converter,
            node,
            objects: Objects::default(),
            strings: Strings::default(),
            faults: BTreeMap::new(),
            more_faults: BTreeSet::new(),
            new_faults: BTreeSet::new(),
            faults_changed: false,
            stand_ins: BTreeSet::new(),
            pods: HashMap::new(),
            kinds: Watched::all().map(|of| (of, Known::default())).collect(),
            foreign: Foreign::default(),
            unjudged: false,
            held: BTreeMap::new(),
            namespaces_well: false,
            early: VecDeque::new(),
        }
    }

    /// What an agent before knew: each kind counts until its own first list is complete.
    pub(super) fn begin_with(&mut self, before: Objects) {
        for object in before.each() {
            self.put(object);
        }
    }

    pub(super) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// At most [`MOST_FAULTS`].
    pub(super) fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.faults.values()
    }

    /// How many there are besides.
    pub(super) fn more_faults(&self) -> usize {
        self.more_faults.len()
    }

    /// What of [`Self::faults`] has come, or is another, since the last call.
    pub(super) fn take_new_faults(&mut self) -> Vec<Fault> {
        let new = std::mem::take(&mut self.new_faults).into_iter();
        new.filter_map(|name| self.faults.get(&name).cloned())
            .collect()
    }

    /// Every kind is known.
    pub(super) fn is_complete(&self) -> bool {
        self.kinds.values().all(|known| known.complete)
    }

    /// Those that are not known yet.
    pub(super) fn awaited(&self) -> Vec<&'static str> {
        let mut awaited: Vec<_> = self
            .kinds
            .iter()
            .filter(|(_, known)| !known.complete)
            .map(|(of, _)| of.resource().kind)
            .collect();
        awaited.sort_unstable();
        awaited
    }

    /// Takes in what a watch has told. `doubtful`: the API server may not know yet who is ready.
    /// `true`: the objects, or what is wrong with some, are not what they were.
    pub(super) fn hear(&mut self, of: Watched, told: Told, now: Instant, doubtful: bool) -> bool {
        let changed = self.take_in(of, told, now, doubtful);
        std::mem::take(&mut self.faults_changed) || changed
    }

    fn take_in(&mut self, of: Watched, told: Told, now: Instant, doubtful: bool) -> bool {
        match told {
            Told::Listing => {
                self.namespaces_well &= of != NAMESPACES;
                self.known(of).listed = Some(BTreeSet::new());
                false
            }
            Told::Listed => self.end_list(of),
            // There are none.
            Told::Absent => {
                self.known(of).listed = Some(BTreeSet::new());
                self.end_list(of)
            }
            Told::There { seen, api_version } => {
                if let Some(listed) = &mut self.known(of).listed {
                    listed.insert(name_of(&seen));
                }
                match of {
                    Watched::Mesh(kind) => self.apply(kind, &seen, &api_version, now, doubtful),
                    Watched::Foreign(kind) => {
                        self.judged_anew(|foreign| foreign.apply(kind, &seen))
                    }
                }
            }
            Told::Gone(seen) => match of {
                Watched::Mesh(kind) => {
                    let name = name_of(&seen);
                    self.reads(kind, &name);
                    self.take(kind, &name)
                }
                Watched::Foreign(kind) => self.judged_anew(|foreign| foreign.delete(kind, &seen)),
            },
            Told::Failed { .. } => {
                self.namespaces_well &= of != NAMESPACES;
                false
            }
        }
    }

    fn known(&mut self, of: Watched) -> &mut Known {
        self.kinds.entry(of).or_default()
    }

    /// Only now it is certain who is gone, and where every pod belongs that was told before.
    fn end_list(&mut self, of: Watched) -> bool {
        let decided = of == NAMESPACES && !self.objects.early.is_empty();
        if of == NAMESPACES {
            self.namespaces_well = true;
            self.early.clear();
            self.objects.early.clear();
        }
        let known = self.known(of);
        let first = !std::mem::replace(&mut known.complete, true);
        let listed = known.listed.take().unwrap_or_default();
        let changed = match of {
            Watched::Mesh(kind) => self.keep_listed(kind, &listed),
            Watched::Foreign(kind) => {
                self.judged_anew(|foreign| foreign.retain(kind, |name| listed.contains(name)))
            }
        };
        changed || first || decided
    }

    fn judged_anew(&mut self, change: impl FnOnce(&mut Foreign) -> bool) -> bool {
        let changed = change(&mut self.foreign);
        self.unjudged |= changed;
        changed
    }

    /// Finds out which pods stay outside because of a policy that only the CNI enforces.
    pub(super) fn judge(&mut self) {
        if !std::mem::take(&mut self.unjudged) {
            return;
        }
        for pod in self.objects.pods.values_mut() {
            let why = judgement(&self.foreign, &self.objects.namespaces, pod);
            if why != pod.foreign_policy {
                Arc::make_mut(pod).foreign_policy = why;
            }
        }
    }

    /// Everybody is as ready as the API server says.
    pub(super) fn release(&mut self) -> bool {
        let mut changed = false;
        for slice in std::mem::take(&mut self.held).into_values() {
            changed |= self.objects.insert(Object::EndpointSlice(slice));
        }
        changed
    }

    /// Of whom nothing more may be heard in time, what was heard last counts.
    pub(super) fn decide(&mut self, now: Instant) -> bool {
        let mut changed = false;
        while let Some((_, uid)) = self.early.pop_front_if(|(since, _)| *since + EARLY <= now) {
            changed |= self.objects.early.remove(&uid);
        }
        changed
    }

    /// When that is next.
    pub(super) fn decides_at(&self) -> Option<Instant> {
        self.early.front().map(|(since, _)| *since + EARLY)
    }

    /// One that was known before is what it was.
    fn may_be_early(&mut self, pod: &Pod, now: Instant) {
        let ours = pod.node.as_ref().is_none_or(|node| *node == self.node);
        if !self.namespaces_well && ours && !self.objects.pods.contains_key(&pod.uid) {
            self.objects.early.insert(Arc::clone(&pod.uid));
            self.early.push_back((now, Arc::clone(&pod.uid)));
        }
    }

    fn apply(
        &mut self,
        kind: Kind,
        seen: &Seen,
        api_version: &str,
        now: Instant,
        doubtful: bool,
    ) -> bool {
        let name = name_of(seen);
        match kind.read(seen, &self.converter) {
            Ok(Some(object)) => {
                self.reads(kind, &name);
                // Nothing of a pod that has ended counts any more, its addresses least of all.
                if let Object::Pod(pod) = &object
                    && pod.terminal
                {
                    return self.take(kind, &name);
                }
                if let Object::Pod(pod) = &object {
                    self.may_be_early(pod, now);
                }
                if let Object::EndpointSlice(slice) = object {
                    return self.put_slice(slice, doubtful);
                }
                self.put(object)
            }
            // It may have had a meaning before.
            Ok(None) => {
                self.reads(kind, &name);
                self.take(kind, &name)
            }
            Err(error) => {
                let changed = self.stand_in(kind, &name, seen);
                let mut fault = fault(kind, seen, api_version, &error);
                if self.stand_ins.contains(&(kind, name.clone())) {
                    let meanwhile = "; until it reads, nobody is let through where it selects";
                    fault.message.push_str(meanwhile);
                }
                self.blame((kind, name.clone()), fault);
                // Of a pod with this name and another uid nothing is left.
                let other = self.pods.get(&name).is_some_and(|uid| **uid != *seen.uid());
                changed || kind == Kind::Pod && other && self.take(kind, &name)
            }
        }
    }

    /// A policy that does not read and has no last good state is closed.
    fn stand_in(&mut self, kind: Kind, name: &Name, seen: &Seen) -> bool {
        let key = self.key(name);
        let (known, closed) = match kind {
            Kind::Server => {
                let closed = stand_in::server(&self.converter, seen);
                let known = self.objects.servers.contains_key(&key);
                (known, closed.map(Object::Server))
            }
            Kind::NetworkPolicy => {
                let closed = stand_in::network_policy(&self.converter, seen);
                let known = self.objects.network_policies.contains_key(&key);
                (known, closed.map(Object::NetworkPolicy))
            }
            // Without one of these less is allowed, or nothing of it is decided.
            Kind::Node
            | Kind::Namespace
            | Kind::Pod
            | Kind::Service
            | Kind::EndpointSlice
            | Kind::ServiceAccount
            | Kind::ServerAuthorization
            | Kind::AuthorizationPolicy
            | Kind::MeshTlsAuthentication
            | Kind::NetworkAuthentication => return false,
        };
        let of = (kind, name.clone());
        if known && !self.stand_ins.contains(&of) {
            return false;
        }
        match closed {
            Some(closed) => {
                self.stand_ins.insert(of);
                self.put(closed)
            }
            None => self.stand_ins.remove(&of) && self.take(kind, name),
        }
    }

    fn blame(&mut self, name: (Kind, Name), fault: Fault) {
        let known = self.faults.get(&name);
        if known == Some(&fault) {
            return;
        }
        self.faults_changed = true;
        if known.is_none() && self.faults.len() >= MOST_FAULTS {
            self.more_faults.insert(name);
            return;
        }
        self.new_faults.insert(name.clone());
        self.faults.insert(name, fault);
    }

    /// Nothing is wrong with it any more.
    fn reads(&mut self, kind: Kind, name: &Name) {
        let name = (kind, name.clone());
        self.faults_changed |= self.faults.remove(&name).is_some();
        self.faults_changed |= self.more_faults.remove(&name);
        self.new_faults.remove(&name);
        self.stand_ins.remove(&name);
    }

    /// In doubt, who was ready stays so unless it is being deleted or gone.
    fn put_slice(&mut self, mut slice: EndpointSlice, doubtful: bool) -> bool {
        self.held.remove(&slice.key);
        let known = self.objects.endpoint_slices.get(&slice.key).cloned();
        if let Some(known) = known.filter(|_| doubtful) {
            let told = slice.clone();
            for endpoint in &mut slice.endpoints {
                let same = |before: &&SliceEndpoint| {
                    before.pod == endpoint.pod && before.addresses == endpoint.addresses
                };
                let lives = endpoint.pod.as_ref().is_none_or(|uid| {
                    let pod = self.objects.pods.get(uid);
                    pod.is_some_and(|pod| !pod.terminating)
                });
                if let Some(before) = known.endpoints.iter().find(same)
                    && lives
                    && !endpoint.terminating
                {
                    endpoint.ready |= before.ready;
                    endpoint.serving |= before.serving;
                }
            }
            if slice != told {
                self.held.insert(told.key.clone(), told);
            }
        }
        self.put(Object::EndpointSlice(slice))
    }

    fn put(&mut self, mut object: Object) -> bool {
        if let Object::Pod(pod) = &mut object {
            if pod.node.as_ref() != Some(&self.node) {
                reduce(pod);
            }
            pod.foreign_policy = judgement(&self.foreign, &self.objects.namespaces, pod);
        }
        self.unjudged |= matches!(object, Object::Namespace(_)) && !self.foreign.is_empty();
        self.strings.object(&mut object);
        let mut changed = false;
        if let Object::Pod(pod) = &object {
            let name = (Arc::clone(&pod.key.namespace), Arc::clone(&pod.key.name));
            let before = self.pods.insert(name, Arc::clone(&pod.uid));
            if let Some(before) = before.filter(|before| *before != pod.uid) {
                changed = self.objects.pods.remove(&before).is_some();
            }
        }
        self.objects.insert(object) || changed
    }

    fn take(&mut self, kind: Kind, name: &Name) -> bool {
        if kind == Kind::Pod {
            let uid = self.pods.remove(name);
            return uid.is_some_and(|uid| self.objects.pods.remove(&uid).is_some());
        }
        let key = self.key(name);
        if kind == Kind::EndpointSlice {
            self.held.remove(&key);
        }
        self.objects.remove(kind, &key)
    }

    fn keep_listed(&mut self, kind: Kind, listed: &BTreeSet<Name>) -> bool {
        let before = (self.faults.len(), self.more_faults.len());
        let stays = |(of, name): &(Kind, Name)| *of != kind || listed.contains(name);
        self.faults.retain(|name, _| stays(name));
        self.more_faults.retain(stays);
        self.new_faults.retain(stays);
        self.stand_ins.retain(stays);
        self.faults_changed |= (self.faults.len(), self.more_faults.len()) != before;
        if kind == Kind::Pod {
            self.pods.retain(|name, _| listed.contains(name));
        }
        if kind == Kind::EndpointSlice {
            let names = |key: &ObjectKey| (Arc::clone(&key.namespace), Arc::clone(&key.name));
            self.held.retain(|key, _| listed.contains(&names(key)));
        }
        self.objects.retain(kind, |key| {
            listed.contains(&(Arc::clone(&key.namespace), Arc::clone(&key.name)))
        })
    }

    fn key(&self, (namespace, name): &Name) -> ObjectKey {
        ObjectKey {
            cluster: self.converter.cluster().into(),
            namespace: Arc::clone(namespace),
            name: Arc::clone(name),
        }
    }
}

fn judgement(
    foreign: &Foreign,
    namespaces: &BTreeMap<ObjectKey, Arc<Namespace>>,
    pod: &Pod,
) -> Option<Arc<str>> {
    if foreign.is_empty() {
        return None;
    }
    let namespace = namespaces.get(&ObjectKey {
        cluster: Arc::clone(&pod.key.cluster),
        namespace: "".into(),
        name: Arc::clone(&pod.key.namespace),
    });
    let labels = namespace.map(|namespace| &namespace.labels);
    foreign.selecting(pod, labels).map(Arc::from)
}

fn name_of(seen: &Seen) -> Name {
    (seen.namespace().into(), seen.name().into())
}

/// A pod of another node: what its own agent looks after goes. Ports stay where somebody may ask
/// for them by name, or where the node gives its own to them.
fn reduce(pod: &mut Pod) {
    pod.ports
        .retain(|port| port.name.is_some() || port.host_port.is_some());
    pod.ports.shrink_to_fit();
    pod.words.problems = Vec::new();
    pod.words.skip_outbound = None;
    pod.words.opaque_ports = None;
}

fn fault(kind: Kind, seen: &Seen, api_version: &str, error: &FieldError) -> Fault {
    Fault {
        kind: kind.as_str(),
        namespace: seen.namespace().to_owned(),
        name: seen.name().to_owned(),
        uid: seen.uid().to_owned(),
        api_version: api_version.to_owned(),
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::manifests::settings;

    fn service(number: usize, address: &str) -> Seen {
        serde_json::from_value(json!({
            "metadata": {"name": format!("web-{number:05}"), "namespace": "shop"},
            "spec": {"clusterIP": address},
        }))
        .unwrap()
    }

    #[test]
    fn each_fault_is_new_once_and_only_so_many_are_named() {
        let mut index = Index::new(Converter::new(&settings()), "n1".into());
        let of = Watched::Mesh(Kind::Service);
        let hear = |index: &mut Index, seen| {
            let told = Told::There {
                seen,
                api_version: "v1".into(),
            };
            index.hear(of, told, Instant::now(), false)
        };
        for number in 0..MOST_FAULTS + 5 {
            assert!(hear(&mut index, service(number, "nowhere")));
        }
        assert_eq!(index.take_new_faults().len(), MOST_FAULTS);
        assert_eq!(
            (index.faults().count(), index.more_faults()),
            (MOST_FAULTS, 5)
        );
        assert!(index.take_new_faults().is_empty());

        // The same again is nothing new; another word is.
        assert!(!hear(&mut index, service(1, "nowhere")));
        assert!(hear(&mut index, service(1, "somewhere")));
        let new = index.take_new_faults();
        assert!(new.len() == 1 && new[0].message.contains("somewhere"));
        // One of those that are only counted reads again, then a named one makes room.
        hear(&mut index, service(MOST_FAULTS + 1, "10.0.0.1"));
        hear(&mut index, service(2, "10.0.0.2"));
        assert_eq!(
            (index.faults().count(), index.more_faults()),
            (MOST_FAULTS - 1, 4)
        );
        index.hear(of, Told::Listing, Instant::now(), false);
        index.hear(of, Told::Listed, Instant::now(), false);
        assert_eq!((index.faults().count(), index.more_faults()), (0, 0));
    }
}
