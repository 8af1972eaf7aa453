use std::{sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

use super::*;
use crate::{
    identity::{Bundle, SignError, Signer, csr},
    state::Identity,
    testing::api::Api,
};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const MAPS: &str = "/api/v1/namespaces/picomesh-system/configmaps";

fn identity() -> Identity {
    Identity::from_spiffe_id("spiffe://cluster.local/ns/shop/sa/web").unwrap()
}

/// A certificate's text, and its bytes.
fn certificate() -> (String, Vec<u8>) {
    let made = rcgen::generate_simple_self_signed(["x".to_owned()])
        .unwrap()
        .cert;
    (made.pem(), made.der().to_vec())
}

fn anchors() -> watch::Receiver<Arc<Bundle>> {
    let anchors = vec![CertificateDer::from(certificate().1)];
    watch::channel(Arc::new(Bundle { anchors })).1
}

/// Asks, and answers the request with `status` once it is there.
async fn asked(status: impl Fn() -> Value) -> (Result<crate::identity::Signed, SignError>, Value) {
    let api = Api::default();
    let signer = ClusterSigner::new(api.client(), Duration::from_secs(86_400), anchors());
    let request = csr::Request::new(&identity()).unwrap();
    let of = identity();
    let answering = async {
        loop {
            sleep(Duration::from_millis(300)).await;
            if let Some(mut request) = api.all(REQUESTS).pop() {
                request["status"] = status();
                api.put(REQUESTS, request.clone());
                return request;
            }
        }
    };
    let (signed, request) = tokio::join!(signer.sign(&of, request.der), answering);
    (signed, request)
}

#[tokio::test(start_paused = true)]
async fn a_request_says_what_is_wanted_and_the_certificate_is_taken() {
    let (text, der) = certificate();
    let status = json!({"certificate": base64(text.as_bytes()),
                        "conditions": [{"type": "Approved", "status": "True"}]});
    let (signed, request) = asked(|| status.clone()).await;
    assert_eq!(signed.unwrap().chain, [CertificateDer::from(der)]);
    let spec = &request["spec"];
    assert_eq!(spec["signerName"], SIGNER);
    assert_eq!(spec["expirationSeconds"], 86_400);
    assert_eq!(
        spec["usages"],
        json!(["digital signature", "client auth", "server auth"])
    );
    assert!(
        request["metadata"]["name"]
            .as_str()
            .unwrap()
            .starts_with("picomesh-")
    );
    let text = spec["request"].as_str().unwrap();
    // "-----BEGIN CERTIFICATE REQUEST-----" in base64.
    assert!(
        text.starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURSBSRVFVRVNULS0tLS0"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_denial_is_told_with_its_reason_and_a_failure_may_pass() {
    let with = |kind: &str, reason: &str| {
        json!({"conditions": [{"type": kind, "status": "True", "reason": reason,
                               "message": "no pod of shop/web runs on n1"}]})
    };
    let condition = |kind: &str| with(kind, "NotHere");
    // What a watch may not have shown to the controller is asked again in seconds, and so is what
    // has no place among the requests of this node.
    for reason in ["NotOnNode", "UnknownAgent", "TooManyPending"] {
        let (signed, _) = asked(|| with("Denied", reason)).await;
        assert!(matches!(signed.unwrap_err(), SignError::Unavailable(_)));
    }
    let (signed, _) = asked(|| condition("Denied")).await;
    let error = signed.unwrap_err();
    assert!(matches!(error, SignError::Refused { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("NotHere: no pod of shop/web runs on n1"),
        "{error}"
    );
    let (signed, _) = asked(|| condition("Failed")).await;
    assert!(matches!(signed.unwrap_err(), SignError::Unavailable(_)));
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_the_same_again_goes_on_with_the_same_request() {
    let api = Api::default();
    let signer = ClusterSigner::new(api.client(), Duration::from_secs(86_400), anchors());
    let (one, other) = (
        csr::Request::new(&identity()).unwrap().der,
        csr::Request::new(&identity()).unwrap().der,
    );
    let of = identity();
    let asked = |csr: &Vec<u8>| {
        let asking = signer.sign(&of, csr.clone());
        tokio::time::timeout(Duration::from_secs(30), asking)
    };
    for _ in 0..3 {
        assert!(asked(&one).await.is_err());
        api.set_away(true);
        let away = asked(&one).await.unwrap().unwrap_err();
        assert!(matches!(away, SignError::Unanswered(_)), "{away}");
        api.set_away(false);
    }
    let names = || -> Vec<_> {
        let all = api.all(REQUESTS).into_iter();
        all.map(|request| request["metadata"]["name"].clone())
            .collect()
    };
    let first = names();
    assert_eq!(first.len(), 1);
    assert!(asked(&other).await.is_err());
    assert_eq!(names().len(), 2, "another key is another request");

    // Gone: the next try makes it anew.
    let name = first[0].as_str().unwrap();
    api.delete(REQUESTS, &format!("/{name}"));
    assert!(asked(&one).await.is_err());
    assert_eq!(names().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_no_certificate_is_not_taken() {
    for answer in [
        "not PEM at all",
        "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----",
    ] {
        let status = json!({"certificate": base64(answer.as_bytes())});
        let (signed, _) = asked(|| status.clone()).await;
        assert!(
            matches!(signed.unwrap_err(), SignError::Unavailable(_)),
            "{answer}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_asked_while_no_answer_could_be_checked() {
    let api = Api::default();
    let none = watch::channel(Arc::new(Bundle {
        anchors: Vec::new(),
    }))
    .1;
    let signer = ClusterSigner::new(api.client(), Duration::from_secs(600), none);
    let request = csr::Request::new(&identity()).unwrap();
    let error = signer.sign(&identity(), request.der).await.unwrap_err();
    assert!(error.to_string().contains(TRUST_ROOTS), "{error}");
    assert!(api.all(REQUESTS).is_empty());
}

fn map(text: &str) -> Value {
    json!({"metadata": {"name": TRUST_ROOTS, "namespace": "picomesh-system"},
           "data": {TRUST_ROOTS_KEY: text}})
}

#[tokio::test(start_paused = true)]
async fn trust_anchors_are_followed_and_never_lost() {
    let api = Api::default();
    let (told, mut bundle) = watch::channel(Arc::new(Bundle {
        anchors: Vec::new(),
    }));
    let following = tokio::spawn(roots::follow(api.client(), "picomesh-system".into(), told));
    sleep(Duration::from_secs(5)).await;
    assert!(bundle.borrow().anchors.is_empty());

    let (old, new) = (certificate().0, certificate().0);
    api.put(MAPS, map(&old));
    bundle
        .wait_for(|bundle| bundle.anchors.len() == 1)
        .await
        .unwrap();
    api.put(MAPS, map(&format!("{old}{new}")));
    bundle
        .wait_for(|bundle| bundle.anchors.len() == 2)
        .await
        .unwrap();

    // Neither nonsense nor a deletion nor an API server that is away takes them.
    for nonsense in [
        "",
        "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----",
    ] {
        api.put(MAPS, map(nonsense));
        sleep(Duration::from_secs(5)).await;
        assert_eq!(bundle.borrow().anchors.len(), 2, "{nonsense:?}");
    }
    api.delete(MAPS, &format!("picomesh-system/{TRUST_ROOTS}"));
    api.set_away(true);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(bundle.borrow().anchors.len(), 2);
    api.put(MAPS, map(&new));
    api.set_away(false);
    bundle
        .wait_for(|bundle| bundle.anchors.len() == 1)
        .await
        .unwrap();

    // The API server has forgotten what we knew last, and answers the watch itself so.
    sleep(Duration::from_secs(5)).await;
    api.refuse_old(MAPS);
    sleep(Duration::from_secs(15)).await;
    api.put(MAPS, map(&format!("{old}{new}")));
    let both = bundle.wait_for(|bundle| bundle.anchors.len() == 2);
    let both = tokio::time::timeout(Duration::from_secs(1), both).await;
    both.expect("within a second").unwrap();
    following.abort();
}

fn base64(bytes: &[u8]) -> Value {
    serde_json::to_value(k8s_openapi::ByteString(bytes.to_vec())).unwrap()
}
