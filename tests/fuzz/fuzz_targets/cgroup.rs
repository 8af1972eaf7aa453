//! /proc/PID/cgroup of any process of the node: of which pod it is.
//!
//! A container chooses what stands behind its own cgroup's name, and nothing in front of it: what it
//! adds never makes it another pod's.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::cni::running::pod_of;

const OWN: &str = "8f4bd1ac-2f0c-4f2e-9b4e-0d6f5f7a3f11";

fuzz_target!(|text: &str| {
    if let Some(uid) = pod_of(text) {
        assert!(uid.len() == 36 || uid.len() == 32, "{uid}");
        assert!(
            uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'),
            "{uid}"
        );
    }
    let slice = OWN.replace('-', "_");
    // A line break in a cgroup's name is not possible.
    let below = text.replace('\n', "");
    for own in [
        format!("/kubepods/burstable/pod{OWN}/c"),
        format!("/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-c.scope"),
        format!("/../../pod{OWN}/c"),
    ] {
        let found = pod_of(&format!("0::{own}/{below}\n"));
        assert_eq!(found.as_deref(), Some(OWN), "{below:?}");
    }
});
