//! The decision, row by row: manifests, client and port in, verdict and reason out.
//!
//! Each row goes the whole way: text, conversion, `Mesh::build`, `decide`. A row reads: the
//! scenario's name, the client (`sa.ns` if proven, `-` if not, `@` its address), the port, and what
//! must come out, with the name of what let the client in.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;

use super::*;
use crate::{
    state::{
        Mesh,
        objects::{MeshSettings, OutboundDefault},
    },
    testing::manifests::{mesh, mesh_with, settings, workload},
};

/// The pod that every row calls: `shop/web` with labels `app: web, tier: front`, ports http 8080,
/// admin 9090, and dns 5353 over UDP.
fn pod(annotation: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop, uid: u, \
         labels: {{app: web, tier: front, picomesh.io/mesh: enabled}}, \
         annotations: {{{annotation}}}}}, spec: {{nodeName: n1, containers: [{{name: c, ports: [\
         {{name: http, containerPort: 8080}}, {{name: admin, containerPort: 9090}}, \
         {{name: dns, containerPort: 5353, protocol: UDP}}, \
         {{name: multi, containerPort: 7001}}]}}, {{name: d, ports: [\
         {{name: multi, containerPort: 7002}}]}}]}}, status: {{podIP: 10.1.0.1}}}}\n"
    )
}

fn server(name: &str, spec: &str) -> String {
    object("v1beta3", "Server", name, spec)
}

fn object(version: &str, kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: policy.linkerd.io/{version}, kind: {kind}, metadata: {{name: {name}, \
         namespace: shop, labels: {{app: {name}}}}}, spec: {{{spec}}}}}\n"
    )
}

fn server_authorization(name: &str, client: &str) -> String {
    let spec = format!("server: {{name: web}}, client: {{{client}}}");
    object("v1beta1", "ServerAuthorization", name, &spec)
}

fn policy(name: &str, target: &str, references: &str) -> String {
    let spec = format!("targetRef: {{{target}}}, requiredAuthenticationRefs: [{references}]");
    object("v1alpha1", "AuthorizationPolicy", name, &spec)
}

fn identities(name: &str, spec: &str) -> String {
    object("v1alpha1", "MeshTLSAuthentication", name, spec)
}

fn networks(name: &str, spec: &str) -> String {
    object(
        "v1alpha1",
        "NetworkAuthentication",
        name,
        &format!("networks: [{spec}]"),
    )
}

const WEB: &str = "podSelector: {matchLabels: {app: web}}, port: 8080";
const TO_WEB: &str = "group: policy.linkerd.io, kind: Server, name: web";
const TO_SHOP: &str = "kind: Namespace, name: shop";
const INTERNAL: &str = "group: policy.linkerd.io, kind: NetworkAuthentication, name: lan";
const FRIENDS: &str = "group: policy.linkerd.io, kind: MeshTLSAuthentication, name: friends";
const LINKERD_NAME: &str = "serviceaccount.identity.linkerd.cluster.local";

fn scenarios() -> HashMap<&'static str, String> {
    let mut all = HashMap::new();
    let mut add = |name, text: String| assert!(all.insert(name, text).is_none(), "{name}");

    // Default modes, by annotation of the pod.
    for mode in DefaultPolicy::ALL {
        let annotation = format!(
            "config.linkerd.io/default-inbound-policy: {}",
            mode.as_str()
        );
        add(mode.as_str(), pod(&annotation));
    }
    let namespace = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations: \
                     {config.picomesh.io/default-inbound-policy: deny}}}\n";
    add("unsaid", pod(""));
    add("namespace denies", namespace.to_owned() + &pod(""));
    add(
        "pod over namespace",
        namespace.to_owned() + &pod("config.picomesh.io/default-inbound-policy: all-authenticated"),
    );
    add(
        "misspelt",
        pod("config.linkerd.io/default-inbound-policy: all-unauthenticate"),
    );

    // A Server alone, with each accessPolicy.
    add("closed", pod("") + &server("web", WEB));
    for (name, access) in [
        ("access all-unauthenticated", "all-unauthenticated"),
        ("access all-authenticated", "all-authenticated"),
        ("access cluster-unauthenticated", "cluster-unauthenticated"),
        ("access cluster-authenticated", "cluster-authenticated"),
        ("access deny", "deny"),
        ("access audit", "audit"),
    ] {
        add(
            name,
            pod("") + &server("web", &format!("{WEB}, accessPolicy: {access}")),
        );
    }

    // Which ports and pods a Server selects.
    let front = "podSelector: {matchLabels: {app: web, tier: front}}";
    add(
        "by name",
        pod("") + &server("web", &format!("{front}, port: http")),
    );
    add(
        "by udp name",
        pod("") + &server("web", "podSelector: {}, port: dns"),
    );
    add(
        "by unknown name",
        pod("") + &server("web", "podSelector: {}, port: grpc"),
    );
    add(
        "by name of two",
        pod("") + &server("web", "podSelector: {}, port: multi"),
    );
    add(
        "every pod",
        pod("") + &server("web", "podSelector: {}, port: 8080"),
    );
    let other = "podSelector: {matchLabels: {app: web, tier: back}}, port: 8080";
    add("other pods", pod("") + &server("web", other));
    for (name, expression) in [
        ("in", "{key: tier, operator: In, values: [back, front]}"),
        ("not in", "{key: tier, operator: NotIn, values: [front]}"),
        (
            "not in, absent",
            "{key: zone, operator: NotIn, values: [a]}",
        ),
        ("in, absent", "{key: zone, operator: In, values: [a]}"),
        ("exists", "{key: app, operator: Exists}"),
        ("exists, absent", "{key: zone, operator: Exists}"),
        ("does not exist", "{key: app, operator: DoesNotExist}"),
        (
            "does not exist, absent",
            "{key: zone, operator: DoesNotExist}",
        ),
    ] {
        let spec = format!("podSelector: {{matchExpressions: [{expression}]}}, port: 8080");
        add(name, pod("") + &server("web", &spec));
    }
    let both = "podSelector: {matchLabels: {app: web}, matchExpressions: [{key: zone, operator: \
                Exists}]}, port: 8080";
    add("labels and expression", pod("") + &server("web", both));
    let elsewhere = server("web", WEB).replace("namespace: shop", "namespace: bank");
    add("other namespace", pod("") + &elsewhere);
    add(
        "two servers",
        pod("")
            + &server(
                "zebra",
                &format!("{WEB}, accessPolicy: all-unauthenticated"),
            )
            + &server("web", WEB)
            + &server("other", "podSelector: {}, port: 9090"),
    );

    // ServerAuthorization.
    let with = |authorization: String| pod("") + &server("web", WEB) + &authorization;
    let saz = |client: &str| with(server_authorization("let-in", client));
    add("saz anybody", saz("unauthenticated: true"));
    add(
        "saz anybody of lan",
        saz("unauthenticated: true, networks: [{cidr: 192.168.0.0/16}]"),
    );
    add("saz any tls", saz("meshTLS: {unauthenticatedTLS: true}"));
    add(
        "saz account",
        saz("meshTLS: {serviceAccounts: [{name: cart}]}"),
    );
    add(
        "saz account of bank",
        saz("meshTLS: {serviceAccounts: [{name: cart, namespace: bank}]}"),
    );
    let cart = format!("cart.shop.{LINKERD_NAME}");
    add(
        "saz identity",
        saz(&format!("meshTLS: {{identities: [{cart}]}}")),
    );
    add("saz star", saz("meshTLS: {identities: [\"*\"]}"));
    add(
        "saz star of shop",
        saz(&format!(
            "meshTLS: {{identities: [\"*.shop.{LINKERD_NAME}\"]}}"
        )),
    );
    add(
        "saz star of all",
        saz(&format!("meshTLS: {{identities: [\"*.{LINKERD_NAME}\"]}}")),
    );
    add(
        "saz star of foreign",
        saz("meshTLS: {identities: [\"*.serviceaccount.identity.linkerd.elsewhere\"]}"),
    );
    add(
        "saz lan and account",
        saz(
            "networks: [{cidr: 192.168.0.0/16, except: [192.168.9.0/24]}], \
             meshTLS: {serviceAccounts: [{name: cart}]}",
        ),
    );
    add(
        "saz by selector",
        with(object(
            "v1beta1",
            "ServerAuthorization",
            "let-in",
            "server: {selector: {matchLabels: {app: web}}}, client: {unauthenticated: true}",
        )),
    );
    add(
        "saz by other selector",
        with(object(
            "v1alpha1",
            "ServerAuthorization",
            "let-in",
            "server: {selector: {matchLabels: {app: zebra}}}, client: {unauthenticated: true}",
        )),
    );
    let for_other = server_authorization("let-in", "unauthenticated: true");
    add(
        "saz of other server",
        with(for_other.replace("{name: web}", "{name: zebra}")),
    );
    let stranger = for_other.replace("namespace: shop", "namespace: bank");
    add("saz of other namespace", with(stranger));

    // AuthorizationPolicy.
    let lan = networks(
        "lan",
        "{cidr: 192.168.0.0/16, except: [192.168.9.0/24]}, {cidr: fd00::/8}",
    );
    let friends = identities("friends", &format!("identities: [{cart}]"));
    let ap = |target: &str, references: &str| {
        with(policy("let-in", target, references)) + &lan + &friends
    };
    add("ap nothing required", ap(TO_WEB, ""));
    add("ap network", ap(TO_WEB, &format!("{{{INTERNAL}}}")));
    add("ap identity", ap(TO_WEB, &format!("{{{FRIENDS}}}")));
    add(
        "ap both",
        ap(TO_WEB, &format!("{{{FRIENDS}}}, {{{INTERNAL}}}")),
    );
    add(
        "ap both, other order",
        ap(TO_WEB, &format!("{{{INTERNAL}}}, {{{FRIENDS}}}")),
    );
    add(
        "ap account",
        ap(TO_WEB, "{kind: ServiceAccount, name: cart}"),
    );
    add(
        "ap account of bank",
        ap(
            TO_WEB,
            "{kind: ServiceAccount, name: cart, namespace: bank}",
        ),
    );
    add("ap of namespace", ap(TO_SHOP, &format!("{{{FRIENDS}}}")));
    add(
        "ap of other server",
        ap(&TO_WEB.replace("web", "zebra"), ""),
    );
    add(
        "ap of route",
        ap("group: policy.linkerd.io, kind: HTTPRoute, name: web", ""),
    );
    add(
        "ap missing identity",
        ap(
            TO_WEB,
            &format!("{{{}}}", FRIENDS.replace("friends", "foes")),
        ),
    );
    add(
        "ap missing network",
        ap(TO_WEB, &format!("{{{}}}", INTERNAL.replace("lan", "wan"))),
    );
    add(
        "ap missing and network",
        ap(
            TO_WEB,
            &format!("{{{INTERNAL}}}, {{{}}}", FRIENDS.replace("friends", "foes")),
        ),
    );
    let from_bank = policy("let-in", TO_WEB, "").replace("namespace: shop", "namespace: bank");
    add("ap of other namespace", with(from_bank));
    let their = friends
        .replace("namespace: shop", "namespace: bank")
        .replace("cart.", "till.");
    let reference = format!("{{{FRIENDS}, namespace: bank}}");
    add(
        "ap identities of other namespace",
        with(policy("let-in", TO_WEB, &reference)) + &their,
    );
    let of = |spec: &str| {
        with(policy("let-in", TO_WEB, &format!("{{{FRIENDS}}}"))) + &identities("friends", spec)
    };
    add(
        "mtls refs",
        of("identityRefs: [{kind: ServiceAccount, name: cart}, {kind: Namespace, name: bank}]"),
    );
    add(
        "mtls spiffe",
        of("identities: [\"spiffe://cluster.local/ns/shop/sa/cart\"]"),
    );
    add(
        "mtls spiffe namespace",
        of("identities: [\"spiffe://cluster.local/ns/bank/sa/*\"]"),
    );
    add(
        "mtls spiffe foreign",
        of("identities: [\"spiffe://elsewhere/ns/shop/sa/*\"]"),
    );
    add(
        "rules over access",
        pod("")
            + &server(
                "web",
                &format!("{WEB}, accessPolicy: cluster-authenticated"),
            )
            + &policy("let-in", TO_WEB, &format!("{{{INTERNAL}}}, {{{FRIENDS}}}"))
            + &lan
            + &friends,
    );
    add(
        "rules over audit",
        pod("")
            + &server("web", &format!("{WEB}, accessPolicy: audit"))
            + &policy("let-in", TO_WEB, &format!("{{{FRIENDS}}}"))
            + &friends,
    );
    add(
        "two ways in",
        ap(TO_WEB, &format!("{{{FRIENDS}}}, {{{INTERNAL}}}"))
            + &server_authorization("till", "meshTLS: {serviceAccounts: [{name: till}]}"),
    );
    add(
        "namespace alone",
        pod("config.linkerd.io/default-inbound-policy: deny") + &policy("let-in", TO_SHOP, ""),
    );
    all
}

/// `sa.ns@address`, or `-@address`.
fn client(text: &str) -> Client {
    let (who, ip) = text.split_once('@').unwrap();
    let identity = match who.split_once('.') {
        None => ClientIdentity::None,
        Some((account, namespace)) => {
            let (namespace, trust_domain) = namespace
                .split_once('/')
                .unwrap_or((namespace, "cluster.local"));
            ClientIdentity::Proven(Identity {
                trust_domain: trust_domain.into(),
                namespace: namespace.into(),
                service_account: account.into(),
            })
        }
    };
    Client {
        pod: None,
        ip: ip.parse().unwrap(),
        identity,
    }
}

/// What a row calls the answer: `allow <authz>`, `audit <authz>` or `deny <reason>`.
fn spell(decision: &Decision) -> String {
    let authz = decision.authz.as_ref().map(|authz| authz.name.to_string());
    match decision.verdict {
        Verdict::Allow => format!("allow {}", authz.unwrap()),
        Verdict::Audit => format!("audit {}", authz.unwrap()),
        Verdict::Deny(reason) => {
            assert_eq!(authz, None, "nothing lets in who is denied");
            format!("deny {}", reason.as_str())
        }
    }
}

#[rustfmt::skip]
const ROWS: &[(&str, &str, u16, &str)] = &[
    // The six modes: inside and outside the cluster's networks, proven or not.
    ("all-unauthenticated", "-@10.1.2.3", 80, "allow all-unauthenticated"),
    ("all-unauthenticated", "-@8.8.8.8", 80, "allow all-unauthenticated"),
    ("all-unauthenticated", "cart.shop@10.1.2.3", 80, "allow all-unauthenticated"),
    ("all-authenticated", "-@10.1.2.3", 80, "deny unauthenticated"),
    ("all-authenticated", "-@8.8.8.8", 80, "deny unauthenticated"),
    ("all-authenticated", "cart.shop@10.1.2.3", 80, "allow all-authenticated"),
    ("all-authenticated", "cart.shop@8.8.8.8", 80, "allow all-authenticated"),
    ("all-authenticated", "cart.shop/elsewhere@8.8.8.8", 80, "allow all-authenticated"),
    ("cluster-unauthenticated", "-@10.1.2.3", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@8.8.8.8", 80, "deny network"),
    ("cluster-unauthenticated", "cart.shop@10.1.2.3", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "cart.shop@8.8.8.8", 80, "deny network"),
    ("cluster-authenticated", "-@10.1.2.3", 80, "deny unauthenticated"),
    ("cluster-authenticated", "-@8.8.8.8", 80, "deny unauthenticated"),
    ("cluster-authenticated", "cart.shop@10.1.2.3", 80, "allow cluster-authenticated"),
    ("cluster-authenticated", "cart.shop@8.8.8.8", 80, "deny network"),
    ("deny", "-@10.1.2.3", 80, "deny default_deny"),
    ("deny", "cart.shop@10.1.2.3", 80, "deny default_deny"),
    ("audit", "-@8.8.8.8", 80, "audit audit"),
    ("audit", "cart.shop@10.1.2.3", 80, "audit audit"),

    // The edges of the private ranges, which are the cluster's networks by default.
    ("cluster-unauthenticated", "-@10.0.0.0", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@10.255.255.255", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@9.255.255.255", 80, "deny network"),
    ("cluster-unauthenticated", "-@11.0.0.0", 80, "deny network"),
    ("cluster-unauthenticated", "-@172.15.255.255", 80, "deny network"),
    ("cluster-unauthenticated", "-@172.16.0.0", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@172.31.255.255", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@172.32.0.0", 80, "deny network"),
    ("cluster-unauthenticated", "-@192.167.255.255", 80, "deny network"),
    ("cluster-unauthenticated", "-@192.168.0.0", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@192.169.0.0", 80, "deny network"),
    ("cluster-unauthenticated", "-@100.63.255.255", 80, "deny network"),
    ("cluster-unauthenticated", "-@100.64.0.0", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@100.127.255.255", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@100.128.0.0", 80, "deny network"),
    ("cluster-unauthenticated", "-@fd00::1", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@fdff::1", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@fc00::1", 80, "deny network"),
    ("cluster-unauthenticated", "-@2001:db8::1", 80, "deny network"),
    ("cluster-unauthenticated", "-@::ffff:10.1.2.3", 80, "allow cluster-unauthenticated"),
    ("cluster-unauthenticated", "-@::ffff:8.8.8.8", 80, "deny network"),

    // Whose word counts.
    ("unsaid", "-@8.8.8.8", 80, "allow all-unauthenticated"),
    ("namespace denies", "-@10.1.2.3", 80, "deny default_deny"),
    ("namespace denies", "cart.shop@10.1.2.3", 80, "deny default_deny"),
    ("pod over namespace", "-@10.1.2.3", 80, "deny unauthenticated"),
    ("pod over namespace", "cart.shop@10.1.2.3", 80, "allow all-authenticated"),
    ("misspelt", "cart.shop@10.1.2.3", 80, "deny default_deny"),

    // A Server closes its port and no other.
    ("closed", "-@10.1.2.3", 8080, "deny default_deny"),
    ("closed", "cart.shop@10.1.2.3", 8080, "deny default_deny"),
    ("closed", "-@10.1.2.3", 8079, "allow all-unauthenticated"),
    ("closed", "-@10.1.2.3", 8081, "allow all-unauthenticated"),
    ("access all-unauthenticated", "-@8.8.8.8", 8080, "allow all-unauthenticated"),
    ("access all-authenticated", "-@10.1.2.3", 8080, "deny unauthenticated"),
    ("access all-authenticated", "cart.shop@8.8.8.8", 8080, "allow all-authenticated"),
    ("access cluster-unauthenticated", "-@10.1.2.3", 8080, "allow cluster-unauthenticated"),
    ("access cluster-unauthenticated", "-@8.8.8.8", 8080, "deny network"),
    ("access cluster-authenticated", "-@10.1.2.3", 8080, "deny unauthenticated"),
    ("access cluster-authenticated", "cart.shop@10.1.2.3", 8080, "allow cluster-authenticated"),
    ("access cluster-authenticated", "cart.shop@8.8.8.8", 8080, "deny network"),
    ("access deny", "cart.shop@10.1.2.3", 8080, "deny default_deny"),
    ("access audit", "-@8.8.8.8", 8080, "audit audit"),
    ("access audit", "cart.shop@8.8.8.8", 8080, "audit audit"),

    // Which pods and ports it selects.
    ("by name", "-@10.1.2.3", 8080, "deny default_deny"),
    ("by name", "-@10.1.2.3", 9090, "allow all-unauthenticated"),
    ("by udp name", "-@10.1.2.3", 5353, "allow all-unauthenticated"),
    ("by unknown name", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("by name of two", "-@10.1.2.3", 7001, "deny default_deny"),
    ("by name of two", "-@10.1.2.3", 7002, "deny default_deny"),
    ("by name of two", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("every pod", "-@10.1.2.3", 8080, "deny default_deny"),
    ("other pods", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("in", "-@10.1.2.3", 8080, "deny default_deny"),
    ("in, absent", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("not in", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("not in, absent", "-@10.1.2.3", 8080, "deny default_deny"),
    ("exists", "-@10.1.2.3", 8080, "deny default_deny"),
    ("exists, absent", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("does not exist", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("does not exist, absent", "-@10.1.2.3", 8080, "deny default_deny"),
    ("labels and expression", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("other namespace", "-@10.1.2.3", 8080, "allow all-unauthenticated"),
    ("two servers", "-@10.1.2.3", 8080, "deny default_deny"),
    ("two servers", "-@10.1.2.3", 9090, "deny default_deny"),

    // ServerAuthorization.
    ("saz anybody", "-@8.8.8.8", 8080, "allow let-in"),
    ("saz anybody", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("saz anybody of lan", "-@192.168.1.1", 8080, "allow let-in"),
    ("saz anybody of lan", "-@10.1.2.3", 8080, "deny network"),
    ("saz any tls", "-@192.168.1.1", 8080, "deny unauthenticated"),
    ("saz any tls", "till.bank/elsewhere@8.8.8.8", 8080, "allow let-in"),
    ("saz account", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("saz account", "cart.bank@8.8.8.8", 8080, "deny unauthorized"),
    ("saz account", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("saz account", "cart.shop/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("saz account", "-@8.8.8.8", 8080, "deny unauthenticated"),
    ("saz account of bank", "cart.bank@8.8.8.8", 8080, "allow let-in"),
    ("saz account of bank", "cart.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("saz identity", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("saz identity", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star", "till.bank/elsewhere@8.8.8.8", 8080, "allow let-in"),
    ("saz star", "-@8.8.8.8", 8080, "deny unauthenticated"),
    ("saz star of shop", "till.shop@8.8.8.8", 8080, "allow let-in"),
    ("saz star of shop", "till.bank@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star of shop", "till.workshop@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star of shop", "till.shop/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star of all", "till.bank@8.8.8.8", 8080, "allow let-in"),
    ("saz star of all", "till.bank/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star of foreign", "till.bank@8.8.8.8", 8080, "deny unauthorized"),
    ("saz star of foreign", "till.bank/elsewhere@8.8.8.8", 8080, "allow let-in"),
    ("saz lan and account", "cart.shop@192.168.1.1", 8080, "allow let-in"),
    ("saz lan and account", "cart.shop@10.1.2.3", 8080, "deny network"),
    ("saz lan and account", "cart.shop@192.168.8.255", 8080, "allow let-in"),
    ("saz lan and account", "cart.shop@192.168.9.0", 8080, "deny network"),
    ("saz lan and account", "cart.shop@192.168.10.0", 8080, "allow let-in"),
    ("saz lan and account", "till.shop@192.168.1.1", 8080, "deny unauthorized"),
    ("saz lan and account", "till.shop@10.1.2.3", 8080, "deny unauthorized"),
    ("saz lan and account", "-@192.168.1.1", 8080, "deny unauthenticated"),
    ("saz lan and account", "-@10.1.2.3", 8080, "deny unauthenticated"),
    ("saz by selector", "-@8.8.8.8", 8080, "allow let-in"),
    ("saz by other selector", "-@8.8.8.8", 8080, "deny default_deny"),
    ("saz of other server", "-@8.8.8.8", 8080, "deny default_deny"),
    ("saz of other namespace", "-@8.8.8.8", 8080, "deny default_deny"),
    ("saz anybody", "-@8.8.8.8", 9090, "allow all-unauthenticated"),

    // AuthorizationPolicy and what it refers to.
    ("ap nothing required", "-@8.8.8.8", 8080, "allow let-in"),
    ("ap network", "-@192.168.1.1", 8080, "allow let-in"),
    ("ap network", "-@fd00::7", 8080, "allow let-in"),
    ("ap network", "-@192.168.9.1", 8080, "deny network"),
    ("ap network", "cart.shop@8.8.8.8", 8080, "deny network"),
    ("ap network", "-@::ffff:192.168.1.1", 8080, "allow let-in"),
    ("ap identity", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("ap identity", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("ap identity", "-@192.168.1.1", 8080, "deny unauthenticated"),
    ("ap both", "cart.shop@192.168.1.1", 8080, "allow let-in"),
    ("ap both", "cart.shop@8.8.8.8", 8080, "deny network"),
    ("ap both", "till.shop@192.168.1.1", 8080, "deny unauthorized"),
    ("ap both", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("ap both", "-@192.168.1.1", 8080, "deny unauthenticated"),
    ("ap both, other order", "cart.shop@192.168.1.1", 8080, "allow let-in"),
    ("ap both, other order", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("ap account", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("ap account", "cart.bank@8.8.8.8", 8080, "deny unauthorized"),
    ("ap account", "cart.shop/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("ap account", "-@8.8.8.8", 8080, "deny unauthenticated"),
    ("ap account of bank", "cart.bank@8.8.8.8", 8080, "allow let-in"),
    ("ap account of bank", "cart.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("ap of namespace", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("ap of namespace", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("ap of namespace", "till.shop@8.8.8.8", 9090, "allow all-unauthenticated"),
    ("ap of other server", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
    ("ap of route", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
    ("ap missing identity", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
    ("ap missing network", "-@192.168.1.1", 8080, "deny default_deny"),
    ("ap missing and network", "cart.shop@192.168.1.1", 8080, "deny default_deny"),
    ("ap missing and network", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
    ("ap of other namespace", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
    ("ap identities of other namespace", "till.shop@8.8.8.8", 8080, "allow let-in"),
    ("ap identities of other namespace", "cart.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("mtls refs", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("mtls refs", "anyone.bank@8.8.8.8", 8080, "allow let-in"),
    ("mtls refs", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("mtls refs", "anyone.bank/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("mtls spiffe", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("mtls spiffe", "cart.shop/elsewhere@8.8.8.8", 8080, "deny unauthorized"),
    ("mtls spiffe namespace", "anyone.bank@8.8.8.8", 8080, "allow let-in"),
    ("mtls spiffe namespace", "anyone.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("mtls spiffe foreign", "anyone.shop/elsewhere@8.8.8.8", 8080, "allow let-in"),
    ("mtls spiffe foreign", "anyone.shop@8.8.8.8", 8080, "deny unauthorized"),

    // Several at once: any of them lets in; then the Server's own mode; the nearest reason is told.
    ("rules over access", "cart.shop@192.168.1.1", 8080, "allow let-in"),
    ("rules over access", "till.shop@10.1.2.3", 8080, "allow cluster-authenticated"),
    ("rules over access", "till.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("rules over access", "cart.shop@8.8.8.8", 8080, "deny network"),
    ("rules over access", "-@8.8.8.8", 8080, "deny unauthenticated"),
    ("rules over audit", "cart.shop@8.8.8.8", 8080, "allow let-in"),
    ("rules over audit", "till.shop@8.8.8.8", 8080, "audit audit"),
    ("rules over audit", "-@8.8.8.8", 8080, "audit audit"),
    ("two ways in", "till.shop@8.8.8.8", 8080, "allow till"),
    ("two ways in", "cart.shop@192.168.1.1", 8080, "allow let-in"),
    ("two ways in", "cart.shop@8.8.8.8", 8080, "deny network"),
    ("two ways in", "maid.shop@8.8.8.8", 8080, "deny unauthorized"),
    ("two ways in", "-@192.168.1.1", 8080, "deny unauthenticated"),
    // Without a Server nothing that authorises applies.
    ("namespace alone", "cart.shop@8.8.8.8", 8080, "deny default_deny"),
];

fn decide(mesh: &Mesh, client_text: &str, port: u16) -> Decision {
    let policy = workload(mesh, "shop/web").policy.clone().unwrap();
    policy.decide(&client(client_text), port)
}

#[test]
fn every_row_of_the_table_holds() {
    let meshes: HashMap<_, _> = scenarios()
        .into_iter()
        .map(|(name, text)| (name, mesh(&text)))
        .collect();
    let mut wrong = Vec::new();
    for (scenario, client_text, port, wanted) in ROWS {
        let got = spell(&decide(&meshes[scenario], client_text, *port));
        if got != *wanted {
            wrong.push(format!(
                "{scenario}: {client_text} to {port}: {got}, not {wanted}"
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} rows:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    for scenario in meshes.keys() {
        assert!(
            ROWS.iter().any(|row| row.0 == *scenario),
            "{scenario} is in no row"
        );
    }
}

#[test]
fn decisions_are_named_as_linkerd_names_them() {
    let scenarios = scenarios();
    let reference = |group: &str, kind: &str, name: &str| PolicyRef {
        group: group.into(),
        kind: kind.into(),
        name: name.into(),
    };
    let group = "policy.linkerd.io";

    let decision = decide(&mesh(&scenarios["audit"]), "-@8.8.8.8", 80);
    assert_eq!(decision.server, reference("", "default", "audit"));
    assert_eq!(decision.authz, Some(reference("", "default", "audit")));
    let decision = decide(&mesh(&scenarios["deny"]), "-@8.8.8.8", 80);
    assert_eq!(
        (decision.server, decision.authz),
        (reference("", "default", "deny"), None)
    );

    let decision = decide(&mesh(&scenarios["saz anybody"]), "-@8.8.8.8", 8080);
    assert_eq!(decision.server, reference(group, "server", "web"));
    assert_eq!(
        decision.authz,
        Some(reference(group, "serverauthorization", "let-in"))
    );
    let decision = decide(&mesh(&scenarios["ap nothing required"]), "-@8.8.8.8", 8080);
    assert_eq!(
        decision.authz,
        Some(reference(group, "authorizationpolicy", "let-in"))
    );
    let decision = decide(&mesh(&scenarios["access audit"]), "-@8.8.8.8", 8080);
    assert_eq!(decision.server, reference(group, "server", "web"));
    assert_eq!(decision.authz, Some(reference("", "default", "audit")));
}

#[test]
fn the_mesh_wide_mode_holds_where_nobody_says_otherwise() {
    for mode in DefaultPolicy::ALL {
        let strict = MeshSettings {
            default_inbound_policy: mode,
            ..settings()
        };
        let decision = decide(&mesh_with(strict.clone(), &pod("")), "-@8.8.8.8", 80);
        assert_eq!(&*decision.server.name, mode.as_str());
        let said = pod("config.picomesh.io/default-inbound-policy: audit");
        let decision = decide(&mesh_with(strict, &said), "-@8.8.8.8", 80);
        assert_eq!(decision.verdict, Verdict::Audit);
    }
    let nowhere = MeshSettings {
        default_inbound_policy: DefaultPolicy::ClusterUnauthenticated,
        cluster_networks: vec!["8.8.8.0/24".parse().unwrap()],
        outbound_default: OutboundDefault::Deny,
        ..settings()
    };
    let mesh = mesh_with(nowhere, &pod(""));
    assert_eq!(
        spell(&decide(&mesh, "-@8.8.8.8", 80)),
        "allow cluster-unauthenticated"
    );
    assert_eq!(spell(&decide(&mesh, "-@10.1.2.3", 80)), "deny network");
}

#[test]
fn what_does_not_fit_is_reported_and_what_fits_is_not() {
    let problems = |scenario: &str| -> Vec<String> {
        mesh(&scenarios()[scenario])
            .problems
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    assert_eq!(
        problems("two servers"),
        [
            "Server shop/zebra: Server shop/web selects port 8080 of pod shop/web too and is used \
          for it, being the first by name; let only one Server select the port"
        ]
    );
    assert_eq!(
        problems("ap missing identity"),
        [
            "AuthorizationPolicy shop/let-in: spec.requiredAuthenticationRefs: there is no \
          MeshTLSAuthentication shop/foes, so the policy allows nobody; create it or correct the \
          reference"
        ]
    );
    assert_eq!(
        problems("ap missing network"),
        [
            "AuthorizationPolicy shop/let-in: spec.requiredAuthenticationRefs: there is no \
          NetworkAuthentication shop/wan, so the policy allows nobody; create it or correct the \
          reference"
        ]
    );
    assert_eq!(
        problems("ap of other server"),
        [
            "AuthorizationPolicy shop/let-in: spec.targetRef: there is no Server shop/zebra; create \
          it or name another"
        ]
    );
    assert_eq!(
        problems("saz of other server"),
        [
            "ServerAuthorization shop/let-in: spec.server.name: there is no Server shop/zebra; create \
          it or name another"
        ]
    );
    assert_eq!(
        problems("ap of route"),
        [
            "AuthorizationPolicy shop/let-in: spec.targetRef: HTTPRoute web is not evaluated, because \
          requests are not looked into: the connections it would allow stay denied; target the \
          Server to allow them"
        ]
    );
    assert!(
        problems("misspelt")[0].contains("counts as deny"),
        "{:?}",
        problems("misspelt")
    );
    for scenario in [
        "by name of two",
        "ap both",
        "two ways in",
        "saz star",
        "pod over namespace",
    ] {
        assert_eq!(problems(scenario), [""; 0], "{scenario}");
    }
}

#[test]
fn servers_are_listed_by_port() {
    let mesh = mesh(&scenarios()["two servers"]);
    let policy = workload(&mesh, "shop/web").policy.clone().unwrap();
    let listed: Vec<_> = policy
        .servers()
        .map(|(port, server)| (port, &*server.name))
        .collect();
    assert_eq!(listed, [(8080, "web"), (9090, "other")]);
}
