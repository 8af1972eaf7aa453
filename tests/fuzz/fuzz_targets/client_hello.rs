//! The first bytes on port 15008, before anybody has proven anything: a ClientHello, its SNI, and
//! the certificate that is shown for it.
#![no_main]

use std::{
    io::Cursor,
    sync::{Arc, LazyLock},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use picomesh::{
    identity::{
        Identities, Settings, Wanted,
        ca::{LIFE, LocalCa},
        clock::SystemClock,
        parse_spiffe_id, server_name,
    },
    state::Identity,
};
use rustls::{ServerConnection, server::Acceptor};
use tokio::runtime::{Builder, Runtime};

/// One identity is held; the corpus knows its name.
const HELD: &str = "spiffe://cluster.local/ns/shop/sa/cart";

struct World {
    identities: Identities,
    held: Identity,
    _runtime: Runtime,
    _dir: tempfile::TempDir,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    let held = parse_spiffe_id(HELD).expect("an identity");
    let domain: Arc<str> = held.trust_domain.clone();
    let ca = LocalCa::open(
        &dir.path().join("ca"),
        domain.clone(),
        LIFE,
        Arc::new(SystemClock),
    );
    let ca = ca.expect("an authority");
    let identities = runtime.block_on(async {
        let (identities, _driver) =
            Identities::start(ca, Settings::new(domain)).expect("a configuration");
        identities.set_wanted(Wanted::from([held.clone()]));
        while identities.client_config(&held, &held).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        identities
    });
    World {
        identities,
        held,
        _runtime: runtime,
        _dir: dir,
    }
});

fuzz_target!(|data: &[u8]| {
    let world = &*WORLD;
    let mut acceptor = Acceptor::default();
    let mut bytes = Cursor::new(data);
    while acceptor.read_tls(&mut bytes).is_ok_and(|read| read > 0) {
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                if let Some(name) = hello.server_name() {
                    // A name leads to the identity it was made of, or nowhere.
                    let found = world.identities.by_server_name(name);
                    let right = server_name(&world.held).to_str().eq_ignore_ascii_case(name);
                    assert_eq!(found, right.then(|| world.held.clone()));
                }
                break;
            }
            Ok(None) => {}
            Err(_) => break,
        }
    }

    // The same bytes through the configuration that serves: nothing but an error may come of a
    // client that shows no certificate.
    let config = world.identities.server_config();
    let mut connection = ServerConnection::new(config).expect("a connection");
    let mut bytes = Cursor::new(data);
    while connection.wants_read() && connection.read_tls(&mut bytes).is_ok_and(|read| read > 0) {
        if connection.process_new_packets().is_err() {
            break;
        }
    }
    assert!(connection.is_handshaking(), "nobody has proven anything");
});
