//! What a cluster of the largest size that is promised costs an agent's memory. A part of it is
//! made here, of the same proportions; the whole stands in the tier `k8s`.

use super::{super::index::Index, *};
use crate::{
    k8s::Seen,
    snapshot::State,
    state::objects::Kind,
    testing::{counted, large, manifests::settings},
};

const PART: usize = 10;
/// What all that is known of the whole may take.
const STATE: isize = 40_000_000;

/// As the API server lists it. Gives the length of all texts.
fn list(index: &mut Index, kind: Kind, objects: impl Iterator<Item = Value>) -> usize {
    let of = follow::Watched::Mesh(kind);
    index.hear(of, Told::Listing, Instant::now(), false);
    let lengths = objects.map(|object| {
        let text = large::stored(object).to_string();
        let seen: Seen = serde_json::from_str(&text).unwrap();
        let there = Told::There {
            seen,
            api_version: "v1".into(),
        };
        index.hear(of, there, Instant::now(), false);
        text.len()
    });
    let length = lengths.sum();
    index.hear(of, Told::Listed, Instant::now(), false);
    length
}

/// With addresses, as the API server gives them.
fn service(number: usize) -> Value {
    let mut service = large::service(number);
    service["spec"]["clusterIPs"] = json!([
        format!("10.96.1.{}", number + 1),
        format!("fd00:96::1:{:x}", number + 1),
    ]);
    service
}

/// Two meshes are there whenever one takes the place of the other, and the snapshot is written
/// beside them.
#[test]
fn what_is_known_of_five_thousand_pods_fits_in_forty_megabytes() {
    let settings = Arc::new(settings());
    let begun = counted::held();
    let held = || counted::held() - begun;
    let mut index = Index::new(Converter::new(&settings), settings.node.clone());
    let (services, pods) = (large::SERVICES / PART, large::PODS / PART);
    let namespaces = 0..large::NAMESPACES / PART;
    let mut texts = list(&mut index, Kind::Node, (0..large::NODES).map(large::node));
    texts += list(
        &mut index,
        Kind::Namespace,
        namespaces.map(large::namespace),
    );
    texts += list(
        &mut index,
        Kind::ServiceAccount,
        (0..services).map(large::account),
    );
    texts += list(&mut index, Kind::Pod, (0..pods).map(large::pod));
    texts += list(&mut index, Kind::Service, (0..services).map(service));
    let slices = (0..services).flat_map(large::slices);
    texts += list(&mut index, Kind::EndpointSlice, slices);
    assert_eq!(
        (index.faults().count(), index.objects().pods.len()),
        (0, pods)
    );
    let known = held();
    let told = Arc::new(index.objects().clone());

    let mesh = Mesh::build(settings.clone(), 1, index.objects());
    assert_eq!((mesh.workloads.len(), &mesh.problems[..]), (pods, &[][..]));
    // Two ports in two families.
    assert_eq!(mesh.frontends.len(), 4 * services);
    let one = held();
    counted::most();
    let next = Mesh::build(settings, 2, index.objects());
    let snapshot = State::encode_objects(&told);
    let most = counted::most() - begun;
    assert_eq!(
        State::decode(&snapshot).unwrap().objects.len(),
        told.each().count()
    );
    drop((mesh, next));

    let whole = |bytes: isize| (bytes * PART as isize) as f64 / 1e6;
    eprintln!(
        "of the whole: {:.1} MB known and one mesh {:.1} MB, of {:.1} MB of text; at most {:.1} MB",
        whole(known),
        whole(one - known),
        whole(texts as isize),
        whole(most)
    );
    assert!(most < STATE / PART as isize, "{most} bytes");
}
