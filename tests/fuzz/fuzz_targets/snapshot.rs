//! What lies in the snapshot's files: the seal around them, and both bodies.
//!
//! Input: a file. Nothing is opened that was not sealed for us, and what is decoded comes out
//! again as it went in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::snapshot::{Keys, Origin, State, open, seal};

fuzz_target!(|data: &[u8]| {
    let origin = |node: &str| Origin {
        boot: "b".into(),
        node: node.into(),
        trust_domain: "cluster.local".into(),
        source: "/m".into(),
    };
    if let Ok(body) = open(data, &origin("n1")) {
        assert_eq!(open(&seal(&origin("n1"), body), &origin("n1")), Ok(body));
        assert!(open(data, &origin("n2")).is_err());
    }
    // Whatever the body is, its seal is ours and nobody else's, and holds no byte more or less.
    let sealed = seal(&origin("n1"), data);
    assert_eq!(open(&sealed, &origin("n1")), Ok(data));
    assert!(open(&sealed, &origin("n2")).is_err());
    assert!(open(&sealed[..sealed.len() - 1], &origin("n1")).is_err());

    if let Ok(state) = State::decode(data) {
        assert!(State::decode(&state.encode()).is_ok_and(|again| again == state));
    }
    if let Ok(keys) = Keys::decode(data) {
        assert!(Keys::decode(&keys.encode()).is_ok_and(|again| again == keys));
    }
});
