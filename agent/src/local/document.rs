//! The text of one file to objects: splits it into documents, looks at `apiVersion` and `kind`, and
//! hands each to the conversion. Every error knows its line.
//!
//! A document is read twice: first its head alone, then as the kind it says it is, so that the
//! parser itself can point at the line where something does not fit. Only where the conversion
//! finds a fault in a field that parsed well is the text read a third time, to find that field.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{
    Deserialize,
    de::{DeserializeOwned, Error as _},
};
use serde_json::Value;
use serde_saphyr::Spanned;

use crate::{
    k8s::{
        Converter, FieldError, network_policy,
        policy::{self, Known, Manifest, PolicyKind},
    },
    state::{objects::Object, policy::POLICY_GROUP},
};

use super::{LoadError, locate};

/// A pod's network namespace; read here alone.
const NETNS: &str = "picomesh.io/netns";

pub(super) enum Document {
    Object(Box<Loaded>),
    /// A kind we do not read.
    Ignored {
        api_version: String,
        kind: String,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Loaded {
    pub(super) object: Object,
    /// Of a pod that has one.
    pub(super) netns: Option<PathBuf>,
    /// Where its document begins, from 1.
    pub(super) line: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) line: u64,
    pub(super) object: Option<String>,
    pub(super) message: String,
}

impl Wrong {
    pub(super) fn in_file(self, file: &Path) -> LoadError {
        LoadError {
            file: file.to_owned(),
            line: Some(self.line),
            object: self.object,
            message: self.message,
        }
    }
}

/// All documents of a file, in order. Stops at nothing; the caller may.
pub(super) fn read<'a>(
    text: &'a str,
    converter: &'a Converter,
) -> impl Iterator<Item = Result<Document, Wrong>> + 'a {
    split(text)
        .into_iter()
        .flat_map(|part| read_part(&part, converter))
}

/// What every document needs.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
    /// Name and namespace, for messages about what comes later.
    #[serde(default)]
    metadata: ObjectMeta,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Spanned<Value>>,
}

/// A piece of a file between two separators.
struct Part<'a> {
    text: &'a str,
    /// Number of its first line in the file, from 1.
    first_line: u64,
}

/// A line that begins with `---` or `...` ends a document wherever it stands, also within a quoted
/// or block scalar: so says YAML.
fn split(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let mut at = 0;
    for (number, line) in (1..).zip(lines(text)) {
        let marker = line
            .strip_prefix("---")
            .or_else(|| line.strip_prefix("..."));
        let separates =
            marker.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if separates && at > start && !is_directive(&text[start..at]) {
            parts.push(Part {
                text: &text[start..at],
                first_line,
            });
            (start, first_line) = (at, number);
        }
        at += line.len();
    }
    parts.push(Part {
        text: &text[start..],
        first_line,
    });
    parts
}

/// `%YAML` and the like belong to the document that the next `---` begins.
fn is_directive(text: &str) -> bool {
    text.starts_with('%')
        && lines(text).all(|line| line.trim().is_empty() || line.starts_with(['%', '#']))
}

/// As YAML counts them: LF, CR LF and CR alone each end one. With their ends.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let length = match rest.find(['\n', '\r']) {
            _ if rest.is_empty() => return None,
            None => rest.len(),
            Some(at) if rest[at..].starts_with("\r\n") => at + 2,
            Some(at) => at + 1,
        };
        let (line, after) = rest.split_at(length);
        rest = after;
        Some(line)
    })
}

fn read_part(part: &Part<'_>, converter: &Converter) -> Vec<Result<Document, Wrong>> {
    let head: Option<Head> = match parse(part.text) {
        Ok(head) => head,
        Err(error) => return vec![Err(part.wrong(None, error))],
    };
    // Nothing but comments.
    let Some(head) = head else { return Vec::new() };
    let (api_version, kind) = match (&head.api_version, &head.kind) {
        (Some(api_version), Some(kind)) => (api_version.clone(), kind.clone()),
        (api_version, _) => {
            let field = if api_version.is_none() {
                "apiVersion"
            } else {
                "kind"
            };
            let error = FieldError::missing(field, "every Kubernetes object says it");
            return vec![Err(part.misfit(&head, error))];
        }
    };
    let Some(of_items) = kind
        .strip_suffix("List")
        .filter(|_| head.metadata.name.is_none())
    else {
        return vec![read_object(part, &api_version, &kind, &head, converter)];
    };

    let list: List = match parse(part.text) {
        Ok(list) => list,
        Err(error) => return vec![Err(part.wrong(Some(kind), error))],
    };
    let items = list.items.into_iter();
    items
        .map(|item| {
            let line = part.first_line + item.referenced.line().saturating_sub(1);
            read_item(item.value, line, &api_version, of_items, converter)
        })
        .collect()
}

/// An item of a list. Within it lines are not known, so all of its errors name its first.
fn read_item(
    mut item: Value,
    line: u64,
    api_version: &str,
    kind: &str,
    converter: &Converter,
) -> Result<Document, Wrong> {
    let whole = |wrong: Wrong| Wrong { line, ..wrong };
    // In a PodList the items need not say that they are Pods.
    if let Some(fields) = item.as_object_mut().filter(|_| !kind.is_empty()) {
        fields
            .entry("apiVersion")
            .or_insert_with(|| api_version.into());
        fields.entry("kind").or_insert_with(|| kind.into());
    }
    let text = item.to_string();
    let part = Part {
        text: &text,
        first_line: line,
    };
    let mut read = read_part(&part, converter);
    match read.pop() {
        Some(document) if read.is_empty() => document
            .map(|document| match document {
                Document::Object(mut loaded) => {
                    loaded.line = line;
                    Document::Object(loaded)
                }
                Document::Ignored { .. } => document,
            })
            .map_err(whole),
        Some(_) | None => Err(Wrong {
            line,
            object: Some("List".into()),
            message: "an item is empty or a list itself; write the objects one by one".into(),
        }),
    }
}

fn read_object(
    part: &Part<'_>,
    api_version: &str,
    kind: &str,
    head: &Head,
    converter: &Converter,
) -> Result<Document, Wrong> {
    let misfit = |error: FieldError| part.misfit(head, error);
    let loaded = |object| {
        let line = part.first_content_line();
        Ok(Document::Object(Box::new(Loaded {
            object,
            netns: None,
            line,
        })))
    };
    let ignored = || {
        Ok(Document::Ignored {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
        })
    };
    match (api_version, kind) {
        ("v1", "Node") => loaded(Object::Node(
            converter.node(part.kubernetes(head)?).map_err(misfit)?,
        )),
        ("v1", "Namespace") => loaded(Object::Namespace(
            converter
                .namespace(part.kubernetes(head)?)
                .map_err(misfit)?,
        )),
        ("v1", "ServiceAccount") => loaded(Object::ServiceAccount(
            converter
                .service_account(part.kubernetes(head)?)
                .map_err(misfit)?,
        )),
        ("v1", "Service") => loaded(Object::Service(
            converter.service(part.kubernetes(head)?).map_err(misfit)?,
        )),
        ("v1", "Pod") => {
            let mut pod: core::Pod = part.kubernetes(head)?;
            let netns = complete(&mut pod, converter).map_err(misfit)?;
            let object = Object::Pod(converter.pod(pod).map_err(misfit)?);
            let line = part.first_content_line();
            Ok(Document::Object(Box::new(Loaded {
                object,
                netns,
                line,
            })))
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            let slice: discovery::EndpointSlice = part.kubernetes(head)?;
            match converter.endpoint_slice(slice).map_err(misfit)? {
                Some(slice) => loaded(Object::EndpointSlice(slice)),
                None => ignored(),
            }
        }
        (version, "NetworkPolicy") if network_policy::is_kubernetes_own(version) => {
            network_policy::known(version).map_err(misfit)?;
            let (policy, unknown) = part.kubernetes_and_unknown(head)?;
            let policy: networking::NetworkPolicy = policy;
            for (within, name) in &unknown {
                network_policy::unknown_field(within, name).map_err(misfit)?;
            }
            loaded(Object::NetworkPolicy(
                converter.network_policy(policy).map_err(misfit)?,
            ))
        }
        _ => {
            let policy = api_version.strip_prefix(POLICY_GROUP);
            let Some(version) = policy.and_then(|rest| rest.strip_prefix('/')) else {
                return ignored();
            };
            match policy::known(kind, version).map_err(misfit)? {
                Known::Ignored => ignored(),
                Known::Read(kind) => loaded(read_policy(part, kind, head, converter)?),
            }
        }
    }
}

fn read_policy(
    part: &Part<'_>,
    kind: PolicyKind,
    head: &Head,
    converter: &Converter,
) -> Result<Object, Wrong> {
    let object = match kind {
        PolicyKind::Server => converter
            .server(part.typed::<Manifest<_>>(kind, head)?)
            .map(Object::Server),
        PolicyKind::ServerAuthorization => converter
            .server_authorization(part.typed::<Manifest<_>>(kind, head)?)
            .map(Object::ServerAuthorization),
        PolicyKind::AuthorizationPolicy => converter
            .authorization_policy(part.typed::<Manifest<_>>(kind, head)?)
            .map(Object::AuthorizationPolicy),
        PolicyKind::MeshTlsAuthentication => converter
            .mesh_tls_authentication(part.typed::<Manifest<_>>(kind, head)?)
            .map(Object::MeshTlsAuthentication),
        PolicyKind::NetworkAuthentication => converter
            .network_authentication(part.typed::<Manifest<_>>(kind, head)?)
            .map(Object::NetworkAuthentication),
    };
    object.map_err(|error| part.misfit(head, error))
}

/// What a cluster would have written into a pod: see the head of the room. Gives its netns.
fn complete(pod: &mut core::Pod, converter: &Converter) -> Result<Option<PathBuf>, FieldError> {
    let annotations = pod.metadata.annotations.as_ref();
    let netns = annotations
        .and_then(|annotations| annotations.get(NETNS))
        .cloned();
    if let Some(path) = netns.as_ref().filter(|path| !path.starts_with('/')) {
        return Err(FieldError::new(
            format!("metadata.annotations[{NETNS}]"),
            path,
            "is a relative path",
            "write the whole path, like /run/netns/web",
        ));
    }
    let spec = pod.spec.get_or_insert_default();
    if spec.node_name.as_deref().is_none_or(str::is_empty) {
        let remedy = "name the node that runs the pod: nothing schedules it here";
        return Err(FieldError::missing("spec.nodeName", remedy));
    }

    let account = spec.service_account_name.get_or_insert_default();
    if account.is_empty() {
        "default".clone_into(account);
    }

    if pod.metadata.uid.as_deref().is_none_or(str::is_empty) {
        pod.metadata.uid = Some(converter.derived_uid(&pod.metadata, netns.as_deref()));
    }
    let status = pod.status.get_or_insert_default();
    let conditions = status.conditions.get_or_insert_default();
    let runs = matches!(status.phase.as_deref(), None | Some("" | "Running"));
    if runs
        && !conditions
            .iter()
            .any(|condition| condition.type_ == "Ready")
    {
        conditions.push(core::PodCondition {
            type_: "Ready".into(),
            status: "True".into(),
            ..core::PodCondition::default()
        });
    }
    Ok(netns.map(PathBuf::from))
}

impl Converter {
    /// The same for the same pod in every agent and after every restart; another one when the pod
    /// moves to another network namespace. In the form of a UUID.
    fn derived_uid(&self, metadata: &ObjectMeta, netns: Option<&str>) -> String {
        let namespace = metadata
            .namespace
            .as_deref()
            .filter(|namespace| !namespace.is_empty());
        let words = [
            self.cluster(),
            namespace.unwrap_or("default"),
            metadata.name.as_deref().unwrap_or_default(),
            netns.unwrap_or_default(),
        ];
        let mut context = digest::Context::new(&digest::SHA256);
        for word in words {
            context.update(word.as_bytes());
            // No name and no path has it.
            context.update(&[0]);
        }
        let hash = context.finish();
        let hex: String = hash.as_ref()[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        ]
        .join("-")
    }
}

impl Part<'_> {
    /// As one of the kinds that decide.
    fn typed<T: DeserializeOwned>(&self, kind: PolicyKind, head: &Head) -> Result<T, Wrong> {
        parse(self.text).map_err(|error| match self.misplaced(kind) {
            Some(misplaced) => self.misfit(head, misplaced),
            None => self.wrong(head.name(), error),
        })
    }

    /// A field that is none, where we know what its author means.
    fn misplaced(&self, kind: PolicyKind) -> Option<FieldError> {
        let document: Value = parse(self.text).ok()?;
        let spec = document.get("spec")?;
        policy::misplaced(kind).iter().find_map(|misplaced| {
            let written = spec.get(misplaced.field)?;
            Some(misplaced.error(written.as_str().unwrap_or("…")))
        })
    }

    /// As one of Kubernetes' kinds. Fields that it does not have are passed over.
    fn kubernetes<T: DeserializeOwned>(&self, head: &Head) -> Result<T, Wrong> {
        self.kubernetes_and_unknown(head).map(|(object, _)| object)
    }

    /// The same, and the fields that it does not have: where each stands, and its name.
    fn kubernetes_and_unknown<T: DeserializeOwned>(
        &self,
        head: &Head,
    ) -> Result<(T, Vec<UnknownField>), Wrong> {
        parse_kubernetes(self.text).map_err(|fault| {
            let line = fault
                .path
                .and_then(|path| locate::line_of(self.text, &path));
            let line = line.or(fault.error.location().map(|location| location.line()));
            self.wrong_at(line.unwrap_or(1), head.name(), &fault.error)
        })
    }

    /// The parser stumbled.
    fn wrong(&self, object: Option<String>, error: serde_saphyr::Error) -> Wrong {
        let line = error.location().map_or(1, |location| location.line());
        self.wrong_at(line, object, &error)
    }

    fn wrong_at(&self, line: u64, object: Option<String>, error: &serde_saphyr::Error) -> Wrong {
        let message = message_of(error);
        let text = lines(self.text).nth(usize::try_from(line - 1).unwrap_or(usize::MAX));
        let message = match text.map(str::trim).filter(|text| !text.is_empty()) {
            Some(text) if text.len() <= 120 => format!("{message}, in `{text}`"),
            Some(_) | None => message,
        };
        Wrong {
            line: self.first_line + line - 1,
            object,
            message,
        }
    }

    /// It parsed, and what stands in a field is not right.
    fn misfit(&self, head: &Head, error: FieldError) -> Wrong {
        let line = locate::line_of(self.text, &error.field);
        let line = line.map_or(self.first_content_line(), |line| self.first_line + line - 1);
        Wrong {
            line,
            object: head.name(),
            message: error.to_string(),
        }
    }

    /// The first line that is neither separator nor comment nor empty.
    fn first_content_line(&self) -> u64 {
        let skipped = lines(self.text).take_while(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line.starts_with("---")
        });
        self.first_line + skipped.count() as u64
    }
}

impl Head {
    fn name(&self) -> Option<String> {
        let kind = self.kind.as_deref()?;
        let name = self.metadata.name.as_deref()?;
        Some(match self.metadata.namespace.as_deref() {
            Some(namespace) => format!("{kind} {namespace}/{name}"),
            None => format!("{kind} {name}"),
        })
    }
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    serde_saphyr::from_str_with_options(text, serde_saphyr::options! { with_snippet: false })
}

/// [`parse`] for Kubernetes' own types, through an erased deserializer: otherwise the compiler makes
/// a parser for every type that a Pod can contain, megabytes of code that every node would hold in
/// memory. The erasure loses the parser's line; the path to the value finds it again.
fn parse_kubernetes<T: DeserializeOwned>(
    text: &str,
) -> Result<(T, Vec<UnknownField>), Box<FieldFault>> {
    let options = serde_saphyr::options! { with_snippet: false };
    let mut fault = None;
    let mut unknown = Vec::new();
    let parsed =
        serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
            let mut note = |path: serde_ignored::Path<'_>| unknown.extend(unknown_field(&path));
            let deserializer = serde_ignored::Deserializer::new(deserializer, &mut note);
            let mut erased = <dyn erased_serde::Deserializer<'_>>::erase(deserializer);
            let erased: &mut dyn erased_serde::Deserializer<'_> = &mut erased;
            serde_path_to_error::deserialize(erased).map_err(|error| {
                let path = error.path().to_string();
                let message = error.into_inner().to_string();
                fault = Some(path);
                serde_saphyr::Error::custom(message)
            })
        });
    match parsed {
        Ok(object) => Ok((object, unknown)),
        Err(error) => Err(Box::new(FieldFault { path: fault, error })),
    }
}

/// Where a field stands that its object does not have, and its name.
type UnknownField = (String, String);

fn unknown_field(path: &serde_ignored::Path<'_>) -> Option<UnknownField> {
    use serde_ignored::Path;
    match path {
        Path::Map { parent, key } => Some((spelled(parent), key.clone())),
        // Nothing but a field is passed over.
        Path::Root
        | Path::Seq { .. }
        | Path::Some { .. }
        | Path::NewtypeStruct { .. }
        | Path::NewtypeVariant { .. } => None,
    }
}

/// A path as in every other error: `spec.ingress[0].from`.
fn spelled(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", spelled(parent)),
        Path::Map { parent, key } => match spelled(parent) {
            within if within.is_empty() => key.clone(),
            within => format!("{within}.{key}"),
        },
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => spelled(parent),
    }
}

/// What does not fit, and the path to it if the parser got that far.
struct FieldFault {
    path: Option<String>,
    error: serde_saphyr::Error,
}

/// The parser's own words, without its idea of the line: it counts from the document's beginning.
fn message_of(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    match text.find(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
