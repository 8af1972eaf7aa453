//! The trust anchors: a ConfigMap that the signer keeps and everybody follows.
//!
//! What cannot be read, or is gone, changes nothing: the last anchors stay in force. No anchors at
//! all would cut every tunnel of the node.

use std::sync::Arc;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, core::ApiResource, runtime::watcher::Event};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{TRUST_ROOTS, TRUST_ROOTS_KEY};
use crate::{
    identity::Bundle,
    k8s::{Seen, watch as watches},
};

/// While anchors are changed there are two or three.
const MAX_ANCHORS: usize = 64;

/// Follows the anchors of `namespace` until nobody listens to `told`.
pub async fn follow(client: Client, namespace: String, told: watch::Sender<Arc<Bundle>>) {
    let maps =
        Api::<Seen>::namespaced_with(client, &namespace, &ApiResource::erase::<ConfigMap>(&()));
    let only = watches::config().fields(&format!("metadata.name={TRUST_ROOTS}"));
    let mut events = watches::endless(maps, only);
    let mut listed = false;
    let mut complained = false;
    while let Some(event) = events.next().await {
        if told.is_closed() {
            return;
        }
        match event {
            Ok(Event::Init) => listed = false,
            Ok(Event::InitApply(seen) | Event::Apply(seen)) => {
                listed = true;
                take(&seen, &namespace, &told);
            }
            Ok(Event::InitDone) => {
                if !listed {
                    warn!(
                        namespace,
                        "there is no ConfigMap {TRUST_ROOTS}; the signer makes it"
                    );
                }
            }
            Ok(Event::Delete(_)) => {
                warn!(
                    namespace,
                    "the ConfigMap {TRUST_ROOTS} was deleted; the last trust anchors \
                       stay in force"
                );
            }
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    warn!(%error, namespace, "the ConfigMap {TRUST_ROOTS} cannot be watched");
                }
                continue;
            }
        }
        complained = false;
    }
}

fn take(seen: &Seen, namespace: &str, told: &watch::Sender<Arc<Bundle>>) {
    let bundle = seen
        .parse::<ConfigMap>()
        .map_err(|error| error.to_string())
        .and_then(|map| read(&map));
    match bundle {
        Ok(bundle) => {
            told.send_if_modified(|known| {
                let changed = **known != bundle;
                if changed {
                    info!(anchors = bundle.anchors.len(), "trust anchors");
                    *known = Arc::new(bundle);
                }
                changed
            });
        }
        Err(error) => {
            warn!(
                namespace,
                error,
                "the ConfigMap {TRUST_ROOTS} cannot be used; the last trust \
                   anchors stay in force"
            );
        }
    }
}

pub(super) fn read(map: &ConfigMap) -> Result<Bundle, String> {
    let text = map.data.as_ref().and_then(|data| data.get(TRUST_ROOTS_KEY));
    let Some(text) = text else {
        return Err(format!(
            "data[{TRUST_ROOTS_KEY:?}] is missing; write PEM there"
        ));
    };
    let anchors = CertificateDer::pem_slice_iter(text.as_bytes())
        .take(MAX_ANCHORS + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("data[{TRUST_ROOTS_KEY:?}] is not PEM: {error}"))?;
    match anchors.len() {
        0 => Err(format!("data[{TRUST_ROOTS_KEY:?}] holds no certificate")),
        1..=MAX_ANCHORS => Ok(Bundle { anchors }),
        _ => Err(format!(
            "data[{TRUST_ROOTS_KEY:?}] holds more than {MAX_ANCHORS} certificates; leave out those \
             that nobody uses"
        )),
    }
}
