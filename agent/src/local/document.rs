//! The text of one file to objects: splits it into documents, looks at `apiVersion` and `kind`, and
//! hands each to the conversion. Every error knows its line.
//!
//! A document is parsed once, for its head and then as the kind it says it is. Only where that, or
//! the conversion, finds a fault in a field is the text read again, to find that field's line.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use serde_saphyr::Spanned;

use crate::{
    k8s::{
        Converter, FieldError, network_policy,
        policy::{self, Known, Manifest, PolicyKind},
        read::{self, Misfit, UnknownField},
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
    #[serde(default)]
    metadata: HeadMeta,
}

/// For messages about what comes later.
#[derive(Default, Deserialize)]
struct HeadMeta {
    name: Option<String>,
    namespace: Option<String>,
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

/// A piece that says what it is.
struct Written<'a> {
    part: &'a Part<'a>,
    value: Value,
    head: Head,
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
    let value: Value = match parse(part.text) {
        // Nothing but comments.
        Ok(Value::Null) => return Vec::new(),
        Ok(value) => value,
        Err(error) => return vec![Err(part.unreadable(None, &error))],
    };
    let head: Head = match read::read(&value) {
        Ok((head, _rest)) => head,
        Err(misfit) => return vec![Err(part.misread(None, &misfit))],
    };
    let written = Written { part, value, head };
    let head = &written.head;
    let (Some(api_version), Some(kind)) = (&head.api_version, &head.kind) else {
        let field = if head.api_version.is_none() {
            "apiVersion"
        } else {
            "kind"
        };
        let error = FieldError::missing(field, "every Kubernetes object says it");
        return vec![Err(written.misfit(error))];
    };
    let of_items = kind.strip_suffix("List");
    let Some(of_items) = of_items.filter(|_| head.metadata.name.is_none()) else {
        return vec![read_object(&written, api_version, kind, converter)];
    };

    let list: List = match parse(part.text) {
        Ok(list) => list,
        Err(error) => return vec![Err(part.unreadable(Some(kind.clone()), &error))],
    };
    let items = list.items.into_iter();
    items
        .map(|item| {
            let line = part.first_line + item.referenced.line().saturating_sub(1);
            read_item(item.value, line, api_version, of_items, converter)
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
    written: &Written<'_>,
    api_version: &str,
    kind: &str,
    converter: &Converter,
) -> Result<Document, Wrong> {
    let misfit = |error: FieldError| written.misfit(error);
    let line = written.part.first_content_line();
    let loaded = |object| {
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
            converter.node(written.object()?).map_err(misfit)?,
        )),
        ("v1", "Namespace") => loaded(Object::Namespace(
            converter.namespace(written.object()?).map_err(misfit)?,
        )),
        ("v1", "ServiceAccount") => loaded(Object::ServiceAccount(
            converter
                .service_account(written.object()?)
                .map_err(misfit)?,
        )),
        ("v1", "Service") => loaded(Object::Service(
            converter.service(written.object()?).map_err(misfit)?,
        )),
        ("v1", "Pod") => {
            let mut pod: core::Pod = written.object()?;
            let netns = complete(&mut pod, converter).map_err(misfit)?;
            let object = Object::Pod(converter.pod(pod).map_err(misfit)?);
            Ok(Document::Object(Box::new(Loaded {
                object,
                netns,
                line,
            })))
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            let slice: discovery::EndpointSlice = written.object()?;
            match converter.endpoint_slice(slice).map_err(misfit)? {
                Some(slice) => loaded(Object::EndpointSlice(slice)),
                None => ignored(),
            }
        }
        (version, "NetworkPolicy") if network_policy::is_kubernetes_own(version) => {
            network_policy::known(version).map_err(misfit)?;
            let (policy, unknown) = written.object_and_unknown()?;
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
                Known::Read(kind) => loaded(read_policy(written, kind, converter)?),
            }
        }
    }
}

fn read_policy(
    written: &Written<'_>,
    kind: PolicyKind,
    converter: &Converter,
) -> Result<Object, Wrong> {
    let object = match kind {
        PolicyKind::Server => converter
            .server(written.policy::<Manifest<_>>(kind)?)
            .map(Object::Server),
        PolicyKind::ServerAuthorization => converter
            .server_authorization(written.policy::<Manifest<_>>(kind)?)
            .map(Object::ServerAuthorization),
        PolicyKind::AuthorizationPolicy => converter
            .authorization_policy(written.policy::<Manifest<_>>(kind)?)
            .map(Object::AuthorizationPolicy),
        PolicyKind::MeshTlsAuthentication => converter
            .mesh_tls_authentication(written.policy::<Manifest<_>>(kind)?)
            .map(Object::MeshTlsAuthentication),
        PolicyKind::NetworkAuthentication => converter
            .network_authentication(written.policy::<Manifest<_>>(kind)?)
            .map(Object::NetworkAuthentication),
    };
    object.map_err(|error| written.misfit(error))
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

impl Written<'_> {
    /// As one of the kinds that decide.
    fn policy<T: DeserializeOwned>(&self, kind: PolicyKind) -> Result<T, Wrong> {
        self.object().map_err(|wrong| match self.misplaced(kind) {
            Some(misplaced) => self.misfit(misplaced),
            None => wrong,
        })
    }

    /// A field that is none, where we know what its author means.
    fn misplaced(&self, kind: PolicyKind) -> Option<FieldError> {
        let spec = self.value.get("spec")?;
        policy::misplaced(kind).iter().find_map(|misplaced| {
            let written = spec.get(misplaced.field)?;
            Some(misplaced.error(written.as_str().unwrap_or("…")))
        })
    }

    /// As one of Kubernetes' kinds. Fields that it does not have are passed over.
    fn object<T: DeserializeOwned>(&self) -> Result<T, Wrong> {
        self.object_and_unknown().map(|(object, _)| object)
    }

    /// The same, and the fields that it does not have.
    fn object_and_unknown<T: DeserializeOwned>(&self) -> Result<(T, Vec<UnknownField>), Wrong> {
        read::read(&self.value).map_err(|misfit| self.part.misread(self.head.name(), &misfit))
    }

    /// It parsed, and what stands in a field is not right.
    fn misfit(&self, error: FieldError) -> Wrong {
        let part = self.part;
        let line = locate::line_of(part.text, &error.field);
        let line = line.map_or(part.first_content_line(), |line| part.first_line + line - 1);
        Wrong {
            line,
            object: self.head.name(),
            message: error.to_string(),
        }
    }
}

impl Part<'_> {
    /// The parser stumbled.
    fn unreadable(&self, object: Option<String>, error: &serde_saphyr::Error) -> Wrong {
        let line = error.location().map_or(1, |location| location.line());
        self.wrong_at(line, object, message_of(error))
    }

    /// It is YAML, and not what it says it is.
    fn misread(&self, object: Option<String>, misfit: &Misfit) -> Wrong {
        let line = locate::line_of(self.text, &misfit.path).unwrap_or(1);
        self.wrong_at(line, object, misfit.message.clone())
    }

    fn wrong_at(&self, line: u64, object: Option<String>, message: String) -> Wrong {
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
    serde_saphyr::from_str_with_options(
        text,
        serde_saphyr::options! { with_snippet: false, strict_booleans: true },
    )
}

/// The parser's own words, without its idea of the line: it counts from the document's beginning.
fn message_of(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    match text.find(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
