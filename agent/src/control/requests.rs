//! One certificate: a CertificateSigningRequest is made, and looked at until it is answered.
//!
//! The request carries the identity for whoever decides; who asks and from which node the API
//! server writes beside it, out of the agent's own token.
//!
//! Its name is made of what it asks for. Who has not heard the answer, or not even that the request
//! was made, asks the same again, and looks at the one that is there.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{Api, Client, api::ObjectMeta, api::PostParams};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{sync::watch, time::sleep};
use tracing::debug;

use super::{SIGNER, TRUST_ROOTS, ask::Reason};
use crate::{
    identity::{Bundle, SignError, Signed, Signer, authority::fingerprint},
    state::Identity,
};

/// Kubernetes allows no shorter life of a certificate.
const SHORTEST_LIFE: Duration = Duration::from_secs(600);
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Denied for what the controller has not seen, which it may see in a moment, or for want of a place,
/// which the next answer makes.
const PASSING: [Reason; 3] = [
    Reason::NotOnNode,
    Reason::UnknownAgent,
    Reason::TooManyPending,
];
/// Ours have one leaf and one issuer.
const MAX_CHAIN: usize = 8;

/// Asks the cluster's signer.
pub struct ClusterSigner {
    requests: Api<CertificateSigningRequest>,
    /// Asked for; the signer bounds it.
    life: Duration,
    bundle: watch::Receiver<Arc<Bundle>>,
}

impl ClusterSigner {
    /// `bundle` as [`super::roots`] follows it.
    pub fn new(client: Client, life: Duration, bundle: watch::Receiver<Arc<Bundle>>) -> Arc<Self> {
        Arc::new(Self {
            requests: Api::all(client),
            life: life.max(SHORTEST_LIFE),
            bundle,
        })
    }

    async fn ask(&self, identity: &Identity, csr: Vec<u8>) -> Result<Signed, SignError> {
        if self.bundle.borrow().anchors.is_empty() {
            return Err(SignError::Unavailable(format!(
                "the ConfigMap {TRUST_ROOTS} is not there yet, so no answer could be checked; the \
                 signer makes it"
            )));
        }
        let name = name_of(&csr);
        let request = CertificateSigningRequest {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem(&csr)),
                signer_name: SIGNER.into(),
                expiration_seconds: i32::try_from(self.life.as_secs()).ok(),
                usages: Some(
                    ["digital signature", "client auth", "server auth"]
                        .map(str::to_owned)
                        .into(),
                ),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let unanswered =
            |doing| move |error: kube::Error| SignError::Unanswered(format!("{doing}: {error}"));
        match self.requests.create(&PostParams::default(), &request).await {
            Ok(_) => debug!(%identity, request = name, "a certificate is asked for"),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                debug!(%identity, request = name, "a certificate has been asked for");
            }
            Err(error) => return Err(unanswered("making a CertificateSigningRequest")(error)),
        }

        // Whoever waits for us gives up by dropping this.
        let mut pause = FIRST_LOOK;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            let now = self
                .requests
                .get_opt(&name)
                .await
                .map_err(unanswered("reading the CertificateSigningRequest"))?;
            let Some(now) = now else {
                return Err(SignError::Unavailable(format!(
                    "the CertificateSigningRequest {name} was deleted before it was answered"
                )));
            };
            if let Some(answer) = answer(identity, &name, now) {
                return answer;
            }
        }
    }
}

impl Signer for ClusterSigner {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        csr: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>> {
        Box::pin(self.ask(identity, csr))
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.clone()
    }
}

/// `None`: there is none yet.
fn answer(
    identity: &Identity,
    name: &str,
    request: CertificateSigningRequest,
) -> Option<Result<Signed, SignError>> {
    let status = request.status.unwrap_or_default();
    for condition in status.conditions.unwrap_or_default() {
        let said = || {
            let message = condition.message.clone().unwrap_or_default();
            let reason = condition.reason.clone().unwrap_or_default();
            match (reason.as_str(), message.as_str()) {
                ("", "") => format!("{name}: no reason given"),
                (one, "") | ("", one) => format!("{name}: {one}"),
                (reason, message) => format!("{name}: {reason}: {message}"),
            }
        };
        match condition.type_.as_str() {
            "Denied" => {
                let reason = condition.reason.as_deref().unwrap_or_default();
                return Some(Err(if PASSING.iter().any(|own| own.as_str() == reason) {
                    SignError::Unavailable(said())
                } else {
                    SignError::Refused {
                        identity: identity.clone(),
                        reason: said(),
                    }
                }));
            }
            "Failed" => return Some(Err(SignError::Unavailable(said()))),
            // Approved: the signer comes after the approver.
            _ => {}
        }
    }
    let certificate = status.certificate.filter(|pem| !pem.0.is_empty())?;
    let chain = CertificateDer::pem_slice_iter(&certificate.0)
        .take(MAX_CHAIN + 1)
        .collect::<Result<Vec<_>, _>>();
    Some(match chain {
        Ok(chain) if (1..=MAX_CHAIN).contains(&chain.len()) => Ok(Signed { chain }),
        Ok(chain) => Err(SignError::Unavailable(format!(
            "{name}: status.certificate holds {} certificates, 1 to {MAX_CHAIN} are expected",
            chain.len()
        ))),
        Err(error) => Err(SignError::Unavailable(format!(
            "{name}: status.certificate is not PEM: {error}"
        ))),
    })
}

/// Nobody else has this key, so nobody else has this name.
fn name_of(csr: &[u8]) -> String {
    format!("picomesh-{}", fingerprint(csr))
}

fn pem(csr: &[u8]) -> Vec<u8> {
    let block = pem::Pem::new("CERTIFICATE REQUEST", csr);
    let unix = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&block, unix).into_bytes()
}
