//! Whatever stands in the directory of manifests: documents to objects to a mesh.
//!
//! The same text gives the same mesh, every pod in it is under an identity that others can read,
//! and every destination has an answer.
#![no_main]

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use libfuzzer_sys::fuzz_target;
use picomesh::{
    identity::parse_spiffe_id,
    k8s::Converter,
    local,
    state::{Mesh, resolve},
    testing::manifests::settings,
};

fuzz_target!(|text: &str| {
    let settings = Arc::new(settings());
    let objects = match local::objects(text, &Converter::new(&settings)) {
        Ok(objects) => objects,
        Err(error) => {
            // To YAML a carriage return alone ends a line too, and what is missing may be missing
            // behind the last end.
            let ends = text.chars().filter(|c| ['\n', '\r'].contains(c)).count();
            let lines = ends as u64 + 1;
            assert!(
                error.line.is_some_and(|line| (1..=lines).contains(&line)),
                "{error}"
            );
            return;
        }
    };
    let mesh = Mesh::build(Arc::clone(&settings), 1, &objects);
    let again = Mesh::build(settings, 1, &objects);
    assert_eq!(mesh.problems, again.problems);
    assert_eq!(mesh.workloads.len(), again.workloads.len());

    for (ip, workload) in &mesh.by_ip {
        assert!(!workload.host_network, "an address of the node's");
        assert!(workload.ips.contains(ip));
        assert_eq!(*ip, ip.to_canonical());
    }
    let mut destinations: Vec<SocketAddr> = mesh.frontends.keys().copied().collect();
    destinations.extend(mesh.by_ip.keys().map(|ip| SocketAddr::new(*ip, 80)));
    destinations.push(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 80));
    for workload in mesh.workloads.values() {
        if workload.meshed {
            // Names that no certificate can hold would be pods that nobody can reach.
            assert_eq!(
                parse_spiffe_id(&workload.identity.to_string()).as_ref(),
                Ok(&workload.identity)
            );
        }
        assert!(workload.skip_inbound.len() <= 16 && workload.skip_outbound.len() <= 16);
        let served = workload.local && !workload.host_network;
        assert_eq!(workload.policy.is_some(), served);
        assert_eq!(workload.network.is_some(), served);
        for destination in &destinations {
            let one = format!("{:?}", resolve::resolve(&mesh, workload, *destination));
            assert!(!one.is_empty());
        }
    }
});
