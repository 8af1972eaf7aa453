//! What a CertificateSigningRequest asks for, by every check that needs nothing but itself.
//!
//! Controller and signer both call [`Rules::read`]: the controller before it looks who runs where,
//! the signer once more before it signs, because an approval may be anybody's who holds that right.
//! Pure; a refusal is a word for counters and a sentence for people.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec, CertificateSigningRequestStatus,
};

use super::{AGENT, SIGNER};
use crate::{
    identity::csr::{Claim, RequestError, claim},
    state::Identity,
};

/// Usages as the API spells them: a workload's certificate has exactly these.
pub(super) const USAGES: [&str; 3] = ["client auth", "digital signature", "server auth"];
/// Kubernetes allows no shorter life of a certificate.
pub(super) const SHORTEST_LIFE: Duration = Duration::from_secs(600);
/// As PEM; ours have about 400 bytes.
const MAX_PEM: usize = 16 * 1024;
const PEM_LABEL: &str = "CERTIFICATE REQUEST";

/// What the API server writes of the token that asked. Since Kubernetes 1.30 it does so for every
/// token that is bound to a pod.
const EXTRA: &str = "authentication.kubernetes.io/";

/// Why a request is refused. The word stands on the object, in the log and in counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Somebody else than an agent asks.
    NotAnAgent,
    /// The token is not bound to a pod on a node.
    UnboundToken,
    Usages,
    /// Too long, too short, or not said.
    Life,
    /// The request itself does not read, or is not signed by its own key.
    Malformed,
    /// The key is not ECDSA P-256.
    Key,
    /// Anything but exactly one URI.
    Names,
    /// It wants to sign others.
    Authority,
    TrustDomain,
    /// The pod that asks is not there, or is another one by now.
    UnknownAgent,
    /// The pod that asks is of another service account or on another node than it says.
    WrongAgent,
    /// No pod of this identity is in the mesh on that node.
    NotOnNode,
    TooManyPending,
    /// The issuer has come to its end.
    IssuerExpired,
    /// The signature itself failed.
    CannotSign,
}

impl Reason {
    pub const ALL: [Self; 15] = [
        Self::NotAnAgent,
        Self::UnboundToken,
        Self::Usages,
        Self::Life,
        Self::Malformed,
        Self::Key,
        Self::Names,
        Self::Authority,
        Self::TrustDomain,
        Self::UnknownAgent,
        Self::WrongAgent,
        Self::NotOnNode,
        Self::TooManyPending,
        Self::IssuerExpired,
        Self::CannotSign,
    ];

    /// As Kubernetes wants a condition's reason.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotAnAgent => "NotAnAgent",
            Self::UnboundToken => "UnboundToken",
            Self::Usages => "WrongUsages",
            Self::Life => "WrongLife",
            Self::Malformed => "Malformed",
            Self::Key => "WrongKey",
            Self::Names => "WrongNames",
            Self::Authority => "AsksForAuthority",
            Self::TrustDomain => "WrongTrustDomain",
            Self::UnknownAgent => "UnknownAgent",
            Self::WrongAgent => "WrongAgent",
            Self::NotOnNode => "NotOnNode",
            Self::TooManyPending => "TooManyPending",
            Self::IssuerExpired => "IssuerExpired",
            Self::CannotSign => "CannotSign",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    pub message: String,
}

impl Refusal {
    pub(super) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.message)
    }
}

/// The pod whose token asked, as the API server knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    pub node: String,
    pub pod: String,
    pub uid: String,
}

/// A request that asks for nothing that is refused to everybody.
#[derive(Debug)]
pub struct Ask {
    pub claim: Claim,
    pub life: Duration,
    pub requester: Requester,
}

impl Ask {
    pub fn identity(&self) -> &Identity {
        &self.claim.identity
    }
}

/// The settings that decide.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Of the agents' service account.
    pub namespace: Arc<str>,
    pub trust_domain: Arc<str>,
    pub longest_life: Duration,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody has decided.
    Undecided,
    /// It waits for its signature.
    Approved,
    Denied,
    Failed,
    Issued,
}

impl Stage {
    pub(super) fn of(request: &CertificateSigningRequest) -> Self {
        let none = CertificateSigningRequestStatus::default();
        let status = request.status.as_ref().unwrap_or(&none);
        let has = |kind: &str| {
            let mut conditions = status.conditions.iter().flatten();
            conditions.any(|condition| condition.type_ == kind)
        };
        if has("Denied") {
            Self::Denied
        } else if has("Failed") {
            Self::Failed
        } else if status.certificate.as_ref().is_some_and(|c| !c.0.is_empty()) {
            Self::Issued
        } else if has("Approved") {
            Self::Approved
        } else {
            Self::Undecided
        }
    }
}

/// Is it ours at all?
pub(super) fn is_ours(request: &CertificateSigningRequest) -> bool {
    request.spec.signer_name == SIGNER
}

impl Rules {
    /// Every check that needs no state.
    pub fn read(&self, request: &CertificateSigningRequest) -> Result<Ask, Refusal> {
        let spec = &request.spec;
        self.asked_by_an_agent(spec)?;
        let requester = requester(spec.extra.as_ref())?;
        usages(spec.usages.as_deref().unwrap_or_default())?;
        let life = self.life(spec.expiration_seconds)?;
        let der = unwrap_pem(&spec.request.0)?;
        let claim = claim(&der)
            .map_err(|error| Refusal::new(reason_of(&error), format!("spec.request: {error}")))?;
        if claim.identity.trust_domain != self.trust_domain {
            return Err(Refusal::new(
                Reason::TrustDomain,
                format!(
                    "spec.request names {}, whose trust domain is not {}; the same \
                     PICOMESH_TRUST_DOMAIN must be set for agents, controller and signer",
                    claim.identity, self.trust_domain
                ),
            ));
        }
        Ok(Ask {
            claim,
            life,
            requester,
        })
    }

    fn asked_by_an_agent(&self, spec: &CertificateSigningRequestSpec) -> Result<(), Refusal> {
        let agents = format!("system:serviceaccount:{}:{AGENT}", self.namespace);
        let user = spec.username.as_deref().unwrap_or_default();
        if user == agents {
            return Ok(());
        }
        Err(Refusal::new(
            Reason::NotAnAgent,
            format!("{} asks; only {agents} may", quoted(user)),
        ))
    }

    fn life(&self, seconds: Option<i32>) -> Result<Duration, Refusal> {
        let refused = |said: &str| {
            let (least, most) = (SHORTEST_LIFE.as_secs(), self.longest_life.as_secs());
            let message = format!(
                "spec.expirationSeconds is {said}, {least} to {most} are possible; \
                 PICOMESH_CERTIFICATE_LIFE of controller and signer must be at least that of the \
                 agents"
            );
            Refusal::new(Reason::Life, message)
        };
        let seconds = seconds.ok_or_else(|| refused("not given"))?;
        let life = u64::try_from(seconds).map(Duration::from_secs);
        match life {
            Ok(life) if (SHORTEST_LIFE..=self.longest_life).contains(&life) => Ok(life),
            Ok(_) | Err(_) => Err(refused(&seconds.to_string())),
        }
    }
}

/// Node, pod and uid of the token; each must be said exactly once.
fn requester(extra: Option<&BTreeMap<String, Vec<String>>>) -> Result<Requester, Refusal> {
    let one = |name: &str| {
        let key = format!("{EXTRA}{name}");
        let said = extra
            .and_then(|extra| extra.get(&key))
            .map_or(&[][..], |v| v);
        match said {
            [one] if !one.is_empty() => Ok(one.clone()),
            other => Err(Refusal::new(
                Reason::UnboundToken,
                format!(
                    "spec.extra[{key:?}] has {} values, one is needed: ask with a token that is \
                     bound to a pod (Kubernetes 1.30 or later tells its node)",
                    other.len()
                ),
            )),
        }
    };
    Ok(Requester {
        node: one("node-name")?,
        pod: one("pod-name")?,
        uid: one("pod-uid")?,
    })
}

fn usages(said: &[String]) -> Result<(), Refusal> {
    let mut sorted: Vec<_> = said.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    if sorted == USAGES {
        return Ok(());
    }
    sorted.truncate(8);
    Err(Refusal::new(
        Reason::Usages,
        format!(
            "spec.usages is {}, must be exactly {}",
            quoted(&sorted.join(", ")),
            USAGES.join(", ")
        ),
    ))
}

fn unwrap_pem(text: &[u8]) -> Result<Vec<u8>, Refusal> {
    let refused = |what: String| {
        let message = format!("spec.request {what}; one PEM block {PEM_LABEL:?} is needed");
        Refusal::new(Reason::Malformed, message)
    };
    if text.len() > MAX_PEM {
        return Err(refused(format!("has {} bytes", text.len())));
    }
    let mut blocks = pem::parse_many(text).map_err(|error| refused(format!("reads: {error}")))?;
    match (blocks.pop(), blocks.len()) {
        (Some(block), 0) if block.tag() == PEM_LABEL => Ok(block.into_contents()),
        (Some(block), 0) => Err(refused(format!("is a {}", quoted(block.tag())))),
        (None, _) => Err(refused("holds no block".into())),
        (Some(_), more) => Err(refused(format!("holds {} blocks", more + 1))),
    }
}

fn reason_of(error: &RequestError) -> Reason {
    match error {
        RequestError::Unsuitable { field, .. } => match *field {
            "key type" | "curve" | "signature algorithm" => Reason::Key,
            "subject" => Reason::Names,
            _ => Reason::Malformed,
        },
        RequestError::Names(_) | RequestError::Identity(_) => Reason::Names,
        RequestError::Authority => Reason::Authority,
        RequestError::Make(_)
        | RequestError::Key(_)
        | RequestError::Malformed(_)
        | RequestError::BadSignature => Reason::Malformed,
    }
}

/// What somebody else wrote, cut to what a condition should hold.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(128).collect();
    format!("{short:?}")
}
