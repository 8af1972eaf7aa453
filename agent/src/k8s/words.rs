//! Labels and annotations of pods and namespaces that speak to the mesh.
//!
//! | what | where | meaning | read as well |
//! | --- | --- | --- | --- |
//! | `picomesh.io/mesh: enabled` or `disabled` | label of a namespace; label or annotation of a pod | in the mesh or not; the pod's word wins | annotation `linkerd.io/inject: enabled`, `ingress` or `disabled`; label `linkerd.io/injection: enabled` or `disabled`; label `istio.io/dataplane-mode: ambient` or `none` |
//! | `config.picomesh.io/skip-inbound-ports: 22,4000-5000` | annotation | ports whose clients are never captured | `config.linkerd.io/skip-inbound-ports` |
//! | `config.picomesh.io/skip-outbound-ports` | annotation | destination ports never captured | `config.linkerd.io/skip-outbound-ports` |
//! | `config.picomesh.io/opaque-ports` | annotation | ports whose bytes are never looked into | `config.linkerd.io/opaque-ports` |
//! | `config.picomesh.io/default-inbound-policy` | annotation | who may reach ports without Server | `config.linkerd.io/default-inbound-policy` |
//! | `config.picomesh.io/outbound-default: allow` or `deny` | annotation | what becomes of connections to addresses nobody in the mesh has | `config.linkerd.io/outbound-default` |
//!
//! Annotations stand on a pod or on its namespace; the pod's win. Our own name wins over an alias,
//! a label over an annotation; two that contradict each other are reported.
//!
//! A value that cannot be read is reported and taken in the *safe* sense, which is not the same for
//! all: a port list counts as empty (everything is captured), a policy or outbound default as
//! `deny`. An unreadable word for or against the mesh counts as not said: a typo neither takes a
//! pod out of the mesh nor puts one in.
//!
//! `kube-system` and `picomesh-system` and pods on the node's network are never meshed, whatever
//! stands on them; `state` decides that, not this room.

use std::collections::BTreeMap;

use picomesh_common::{PortRange, pod::MAX_SKIP_RANGES};

use crate::state::objects::{DefaultPolicy, OutboundDefault, Words};

use super::field::FieldError;

const PREFIX: &str = "config.picomesh.io/";
const ALIAS_PREFIX: &str = "config.linkerd.io/";
const MESH: &str = "picomesh.io/mesh";

/// Names after [`PREFIX`]. The last two are read by later parts of the mesh.
const KNOWN: [&str; 7] = [
    "skip-inbound-ports",
    "skip-outbound-ports",
    "opaque-ports",
    "default-inbound-policy",
    "outbound-default",
    "acceleration",
    "transport",
];

type Strings = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Namespace,
    Pod,
}

/// Reads everything that stands on one object. Cannot fail: see the module's head.
pub fn read(place: Place, labels: &Strings, annotations: &Strings) -> Words {
    let mut problems = Vec::new();
    let reader = Reader {
        labels,
        annotations,
    };

    let mesh = reader.mesh(place, &mut problems);
    let mut ports = |name| reader.read(name, port_ranges, Vec::new(), &mut problems);
    let skip_inbound = ports("skip-inbound-ports");
    let skip_outbound = ports("skip-outbound-ports");
    let opaque_ports = ports("opaque-ports");
    let default_inbound_policy = reader.read(
        "default-inbound-policy",
        policy,
        DefaultPolicy::Deny,
        &mut problems,
    );
    let outbound_default = reader.read(
        "outbound-default",
        outbound,
        OutboundDefault::Deny,
        &mut problems,
    );
    reader.report_unknown(&mut problems);

    Words {
        mesh,
        default_inbound_policy,
        outbound_default,
        skip_inbound,
        skip_outbound,
        opaque_ports,
        problems,
    }
}

struct Reader<'a> {
    labels: &'a Strings,
    annotations: &'a Strings,
}

impl Reader<'_> {
    fn mesh(&self, place: Place, problems: &mut Vec<String>) -> Option<bool> {
        let ours: &[(&str, bool)] = &[("enabled", true), ("disabled", false)];
        let linkerds: &[(&str, bool)] =
            &[("enabled", true), ("ingress", true), ("disabled", false)];
        let istios: &[(&str, bool)] = &[("ambient", true), ("none", false)];
        let annotation = self.annotations.get(MESH);
        let own_annotation = match place {
            Place::Pod => annotation,
            Place::Namespace => {
                if let Some(value) = annotation {
                    problems.push(
                        FieldError::new(
                            annotation_field(MESH),
                            value,
                            "has no effect on a namespace",
                            format!("set it as a label: metadata.labels[{MESH}]"),
                        )
                        .to_string(),
                    );
                }
                None
            }
        };
        // The strongest first.
        let sources = [
            (label_field(MESH), self.labels.get(MESH), ours),
            (annotation_field(MESH), own_annotation, ours),
            (
                annotation_field("linkerd.io/inject"),
                self.annotations.get("linkerd.io/inject"),
                linkerds,
            ),
            (
                label_field("linkerd.io/injection"),
                self.labels.get("linkerd.io/injection"),
                ours,
            ),
            (
                label_field("istio.io/dataplane-mode"),
                self.labels.get("istio.io/dataplane-mode"),
                istios,
            ),
        ];

        let mut said: Option<(String, bool)> = None;
        for (field, value, meanings) in sources {
            let Some(value) = value else { continue };
            let Some((_, meshed)) = meanings.iter().find(|(word, _)| word == value) else {
                let words: Vec<_> = meanings.iter().map(|(word, _)| *word).collect();
                let remedy = format!("write one of {}", words.join(", "));
                let problem = "is not understood and counts as not said";
                problems.push(FieldError::new(field, value, problem, remedy).to_string());
                continue;
            };
            match &said {
                None => said = Some((field, *meshed)),
                Some((_, stronger)) if stronger == meshed => {}
                Some((stronger, _)) => {
                    let problem = format!("contradicts {stronger}, which wins");
                    problems.push(FieldError::new(field, value, problem, "remove one").to_string());
                }
            }
        }
        said.map(|(_, meshed)| meshed)
    }

    /// One `config.` annotation under our name or its alias.
    fn read<T>(
        &self,
        name: &str,
        parse: fn(&str) -> Result<T, (String, String)>,
        safe: T,
        problems: &mut Vec<String>,
    ) -> Option<T> {
        let own = format!("{PREFIX}{name}");
        let alias = format!("{ALIAS_PREFIX}{name}");
        let (key, value) = match (self.annotations.get(&own), self.annotations.get(&alias)) {
            (Some(value), other) => {
                if let Some(other) = other.filter(|other| *other != value) {
                    let problem = format!("contradicts {}, which wins", annotation_field(&own));
                    problems.push(
                        FieldError::new(annotation_field(&alias), other, problem, "remove one")
                            .to_string(),
                    );
                }
                (own, value)
            }
            (None, Some(value)) => (alias, value),
            (None, None) => return None,
        };
        Some(parse(value).unwrap_or_else(|(problem, remedy)| {
            problems
                .push(FieldError::new(annotation_field(&key), value, problem, remedy).to_string());
            safe
        }))
    }

    /// A misspelt name would leave a port open without a word.
    fn report_unknown(&self, problems: &mut Vec<String>) {
        for (key, value) in self.annotations {
            let Some(name) = key.strip_prefix(PREFIX) else {
                continue;
            };
            if !KNOWN.contains(&name) {
                let remedy = format!("{PREFIX} knows {}", KNOWN.join(", "));
                problems.push(
                    FieldError::new(annotation_field(key), value, "has no meaning", remedy)
                        .to_string(),
                );
            }
        }
    }
}

fn label_field(key: &str) -> String {
    format!("metadata.labels[{key}]")
}

fn annotation_field(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}

/// `22,3306,4000-5000`. The error is (what is wrong, what to do).
fn port_ranges(list: &str) -> Result<Vec<PortRange>, (String, String)> {
    let remedy = || "write ports and ranges like 22,3306,4000-5000".to_owned();
    if list.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut ranges = Vec::new();
    for item in list.split(',').map(str::trim) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => ranges.push(PortRange { first, last }),
            (Some(_), Some(_)) => {
                let problem = format!("has the range {item}, which ends before it starts");
                return Err((format!("{problem}, and counts as empty"), remedy()));
            }
            (None, _) | (_, None) => {
                let problem = format!("has {item:?}, which is no port, and counts as empty");
                return Err((problem, remedy()));
            }
        }
    }
    if ranges.len() > MAX_SKIP_RANGES {
        let problem = format!("has {} ports and ranges, and counts as empty", ranges.len());
        let remedy = format!("merge neighbours into ranges: {MAX_SKIP_RANGES} are possible");
        return Err((problem, remedy));
    }
    Ok(ranges)
}

fn policy(word: &str) -> Result<DefaultPolicy, (String, String)> {
    DefaultPolicy::from_word(word).ok_or_else(|| {
        let words = DefaultPolicy::ALL.map(DefaultPolicy::as_str).join(", ");
        (
            "is no policy and counts as deny".into(),
            format!("write one of {words}"),
        )
    })
}

fn outbound(word: &str) -> Result<OutboundDefault, (String, String)> {
    match word {
        "allow" => Ok(OutboundDefault::Allow),
        "deny" => Ok(OutboundDefault::Deny),
        _ => Err((
            "is not understood and counts as deny".into(),
            "write allow or deny".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn strings(pairs: &[(&str, &str)]) -> Strings {
        pairs
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect()
    }

    fn of_pod(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Words {
        read(Place::Pod, &strings(labels), &strings(annotations))
    }

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn every_alias_of_the_mesh_word_is_read() {
        let own = "picomesh.io/mesh";
        type Pairs<'a> = &'a [(&'a str, &'a str)];
        let rows: &[(Pairs<'_>, Pairs<'_>, Option<bool>)] = &[
            (&[], &[], None),
            (&[(own, "enabled")], &[], Some(true)),
            (&[(own, "disabled")], &[], Some(false)),
            (&[], &[(own, "enabled")], Some(true)),
            (&[], &[(own, "disabled")], Some(false)),
            (&[], &[("linkerd.io/inject", "enabled")], Some(true)),
            (&[], &[("linkerd.io/inject", "ingress")], Some(true)),
            (&[], &[("linkerd.io/inject", "disabled")], Some(false)),
            (&[("linkerd.io/injection", "enabled")], &[], Some(true)),
            (&[("linkerd.io/injection", "disabled")], &[], Some(false)),
            (&[("istio.io/dataplane-mode", "ambient")], &[], Some(true)),
            (&[("istio.io/dataplane-mode", "none")], &[], Some(false)),
            // Names that nobody defines say nothing.
            (&[("linkerd.io/inject", "enabled")], &[], None),
            (&[], &[("istio.io/dataplane-mode", "ambient")], None),
        ];
        for (labels, annotations, wanted) in rows {
            let words = of_pod(labels, annotations);
            assert_eq!(words.mesh, *wanted, "{labels:?} {annotations:?}");
            assert_eq!(words.problems, [""; 0], "{labels:?} {annotations:?}");
        }
    }

    #[test]
    fn a_contradiction_is_reported_and_the_stronger_word_wins() {
        let words = of_pod(
            &[("picomesh.io/mesh", "disabled")],
            &[("picomesh.io/mesh", "enabled")],
        );
        assert_eq!(words.mesh, Some(false));
        assert_eq!(
            words.problems,
            [
                "metadata.annotations[picomesh.io/mesh]: \"enabled\" contradicts \
              metadata.labels[picomesh.io/mesh], which wins; remove one"
            ]
        );

        let words = of_pod(
            &[("istio.io/dataplane-mode", "none")],
            &[
                ("linkerd.io/inject", "enabled"),
                ("picomesh.io/mesh", "enabled"),
            ],
        );
        assert_eq!(words.mesh, Some(true));
        assert_eq!(words.problems.len(), 1);
        assert!(words.problems[0].starts_with("metadata.labels[istio.io/dataplane-mode]"));
    }

    #[test]
    fn an_unreadable_mesh_word_counts_as_not_said() {
        let words = of_pod(&[("picomesh.io/mesh", "enable")], &[]);
        assert_eq!(words.mesh, None);
        assert_eq!(
            words.problems,
            [
                "metadata.labels[picomesh.io/mesh]: \"enable\" is not understood and counts as not \
              said; write one of enabled, disabled"
            ]
        );
        // A weaker word that can be read still counts.
        let words = of_pod(
            &[("picomesh.io/mesh", "yes")],
            &[("linkerd.io/inject", "enabled")],
        );
        assert_eq!((words.mesh, words.problems.len()), (Some(true), 1));
    }

    #[test]
    fn the_mesh_annotation_of_a_namespace_is_reported_and_not_read() {
        let annotations = strings(&[("picomesh.io/mesh", "enabled")]);
        let words = read(Place::Namespace, &Strings::new(), &annotations);
        assert_eq!(words.mesh, None);
        assert!(
            words.problems[0].contains("set it as a label"),
            "{:?}",
            words.problems
        );
        let labels = strings(&[("picomesh.io/mesh", "enabled")]);
        let words = read(Place::Namespace, &labels, &Strings::new());
        assert_eq!((words.mesh, words.problems.len()), (Some(true), 0));
    }

    #[test]
    fn port_lists_are_read_under_both_names() {
        let words = of_pod(
            &[],
            &[
                (
                    "config.picomesh.io/skip-inbound-ports",
                    "22, 3306 ,4000-5000",
                ),
                ("config.linkerd.io/skip-outbound-ports", "1-65535"),
                ("config.linkerd.io/opaque-ports", ""),
            ],
        );
        assert_eq!(
            words.skip_inbound,
            Some(vec![range(22, 22), range(3306, 3306), range(4000, 5000)])
        );
        assert_eq!(words.skip_outbound, Some(vec![range(1, 65535)]));
        assert_eq!(words.opaque_ports, Some(vec![]));
        assert_eq!(words.problems, [""; 0]);
        assert_eq!(of_pod(&[], &[]).skip_inbound, None);
    }

    #[test]
    fn an_unreadable_port_list_skips_nothing_and_is_reported() {
        for bad in [
            "0",
            "65536",
            "http",
            "22,",
            ",22",
            "22;23",
            "5000-4000",
            "-1",
            "1-",
            "1-2-3",
        ] {
            let words = of_pod(&[], &[("config.linkerd.io/skip-inbound-ports", bad)]);
            assert_eq!(words.skip_inbound, Some(vec![]), "{bad}");
            assert_eq!(words.problems.len(), 1, "{bad}");
            let problem = &words.problems[0];
            let start =
                format!("metadata.annotations[config.linkerd.io/skip-inbound-ports]: {bad:?}");
            assert!(problem.starts_with(&start), "{problem}");
            assert!(problem.contains("counts as empty; write"), "{problem}");
        }
    }

    #[test]
    fn sixteen_ranges_fit_and_seventeen_are_refused() {
        let list = |count: u16| {
            (1..=count)
                .map(|n| n.to_string())
                .collect::<Vec<_>>()
                .join(",")
        };
        let key = "config.picomesh.io/skip-outbound-ports";
        let words = of_pod(&[], &[(key, &list(16))]);
        assert_eq!(words.skip_outbound.unwrap().len(), 16);
        let words = of_pod(&[], &[(key, &list(17))]);
        assert_eq!(words.skip_outbound, Some(vec![]));
        assert!(
            words.problems[0].contains("16 are possible"),
            "{:?}",
            words.problems
        );
    }

    #[test]
    fn policy_and_outbound_words_are_read_and_unreadable_ones_deny() {
        for policy in DefaultPolicy::ALL {
            let words = of_pod(
                &[],
                &[("config.linkerd.io/default-inbound-policy", policy.as_str())],
            );
            assert_eq!(words.default_inbound_policy, Some(policy));
            assert_eq!(words.problems, [""; 0]);
        }
        let words = of_pod(
            &[],
            &[
                (
                    "config.picomesh.io/default-inbound-policy",
                    "all-authenticate",
                ),
                ("config.picomesh.io/outbound-default", "no"),
            ],
        );
        assert_eq!(words.default_inbound_policy, Some(DefaultPolicy::Deny));
        assert_eq!(words.outbound_default, Some(OutboundDefault::Deny));
        assert_eq!(words.problems.len(), 2);
        assert!(words.problems[0].contains("write one of all-unauthenticated"));
        assert!(words.problems[1].ends_with("write allow or deny"));
        let words = of_pod(&[], &[("config.picomesh.io/outbound-default", "allow")]);
        assert_eq!(words.outbound_default, Some(OutboundDefault::Allow));
    }

    #[test]
    fn our_own_annotation_wins_over_its_alias() {
        let words = of_pod(
            &[],
            &[
                ("config.picomesh.io/default-inbound-policy", "deny"),
                ("config.linkerd.io/default-inbound-policy", "audit"),
            ],
        );
        assert_eq!(words.default_inbound_policy, Some(DefaultPolicy::Deny));
        assert_eq!(words.problems.len(), 1);
        let words = of_pod(
            &[],
            &[
                ("config.picomesh.io/default-inbound-policy", "deny"),
                ("config.linkerd.io/default-inbound-policy", "deny"),
            ],
        );
        assert_eq!(words.problems, [""; 0]);
    }

    #[test]
    fn a_misspelt_annotation_of_ours_is_reported_and_a_foreign_one_is_not() {
        let words = of_pod(
            &[],
            &[
                ("config.picomesh.io/default-inbound-polcy", "deny"),
                ("config.picomesh.io/acceleration", "enabled"),
                ("config.linkerd.io/proxy-cpu-request", "100m"),
            ],
        );
        assert_eq!(words.problems.len(), 1);
        assert!(
            words.problems[0].contains("default-inbound-polcy]"),
            "{:?}",
            words.problems
        );
        assert!(
            words.problems[0].contains("default-inbound-policy"),
            "{:?}",
            words.problems
        );
    }
}
