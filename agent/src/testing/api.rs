//! An API server of a few lines, at the level of HTTP: collections of objects that are listed in
//! pages and watched, definitions that come and go, and the ways in which a real one fails.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode, header::DATE};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use k8s_openapi::jiff::Timestamp;
use kube::client::{Body, Client};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Tells the time.
pub(crate) type Now = Arc<dyn Fn() -> SystemTime + Send + Sync>;

type Answer = UnsyncBoxBody<Bytes, Infallible>;

const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// Cheap to copy; all copies are the same server.
#[derive(Clone, Default)]
pub(crate) struct Api(Arc<Inner>);

#[derive(Default)]
struct Inner {
    collections: Mutex<BTreeMap<String, Collection>>,
    version: AtomicU64,
    /// Nothing answers.
    away: AtomicBool,
    /// Whose time the answers carry; the machine's if nobody's.
    clock: Mutex<Option<Now>>,
    /// Requests so far, as `VERB path`.
    log: Mutex<Vec<String>>,
    /// What was listed, and how much at once.
    pages: Mutex<Vec<(String, usize)>>,
}

#[derive(Default)]
struct Collection {
    /// By `namespace/name`.
    objects: BTreeMap<String, Value>,
    watches: Vec<mpsc::UnboundedSender<String>>,
    /// Versions before this one are forgotten: a watch from there is told 410.
    forgotten: u64,
    /// And it is the answer to the watch itself that says so.
    refuses: bool,
    /// As with a conversion that is broken: 500, whatever is asked.
    fails: bool,
}

impl Api {
    pub(crate) fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.answer(request).await }
        });
        Client::new(service, "default")
    }

    /// Makes or changes an object; `collection` like `/api/v1/pods`.
    pub(crate) fn put(&self, collection: &str, mut object: Value) {
        let version = self.next();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let name = name_of(&object);
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        let known = collection.objects.insert(name, object.clone());
        let event = if known.is_some() { "MODIFIED" } else { "ADDED" };
        collection.tell(event, &object);
    }

    pub(crate) fn delete(&self, collection: &str, name: &str) {
        let version = self.next();
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        if let Some(mut object) = collection.objects.remove(name) {
            object["metadata"]["resourceVersion"] = json!(version.to_string());
            collection.tell("DELETED", &object);
        }
    }

    pub(crate) fn get(&self, collection: &str, name: &str) -> Option<Value> {
        let collections = self.0.collections.lock();
        collections.get(collection)?.objects.get(name).cloned()
    }

    pub(crate) fn all(&self, collection: &str) -> Vec<Value> {
        let collections = self.0.collections.lock();
        let objects = collections.get(collection).map(|known| &known.objects);
        objects
            .into_iter()
            .flat_map(|known| known.values().cloned())
            .collect()
    }

    /// Serves a kind that is defined, as `plural.group` in `version`.
    pub(crate) fn define(&self, plural: &str, group: &str, version: &str) {
        let served = json!({"group": group, "version": version, "plural": plural});
        let name = format!("{plural}.{group}");
        self.put(
            DEFINITIONS,
            json!({"metadata": {"name": name}, "served": served}),
        );
    }

    pub(crate) fn undefine(&self, plural: &str, group: &str) {
        self.delete(DEFINITIONS, &format!("/{plural}.{group}"));
    }

    pub(crate) fn set_clock(&self, now: Now) {
        *self.0.clock.lock() = Some(now);
    }

    /// Goes away with all its connections, or comes back.
    pub(crate) fn set_away(&self, away: bool) {
        self.0.away.store(away, Ordering::Release);
        if away {
            for collection in self.0.collections.lock().values_mut() {
                collection.watches.clear();
            }
        }
    }

    /// Forgets what happened, and tells watches so.
    pub(crate) fn forget(&self, collection: &str) {
        let version = self.next();
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        collection.forgotten = version;
        for watch in std::mem::take(&mut collection.watches) {
            let _gone = watch.send(expired());
        }
    }

    /// Forgets what happened, and refuses the watches that would go on from there.
    pub(crate) fn refuse_old(&self, collection: &str) {
        let version = self.next();
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        (collection.forgotten, collection.refuses) = (version, true);
        collection.watches.clear();
    }

    /// Fails at every request for this kind, or no longer; its watches end.
    pub(crate) fn set_failing(&self, collection: &str, fails: bool) {
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        collection.fails = fails;
        collection.watches.clear();
    }

    /// What happens to a collection while nobody is told: its watches are cut, silently.
    pub(crate) fn cut(&self, collection: &str) {
        let mut collections = self.0.collections.lock();
        let collection = collections.entry(collection.to_owned()).or_default();
        collection.watches.clear();
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.0.log.lock().clone()
    }

    pub(crate) fn largest_page(&self, collection: &str) -> Option<usize> {
        let pages = self.0.pages.lock();
        let pages = pages.iter().filter(|(of, _)| of == collection);
        pages.map(|(_, limit)| *limit).max()
    }

    fn next(&self) -> u64 {
        self.0.version.fetch_add(1, Ordering::AcqRel) + 1
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Answer>, std::io::Error> {
        if self.0.away.load(Ordering::Acquire) {
            return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        }
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        self.0.log.lock().push(format!("{} {path}", parts.method));
        let query: BTreeMap<_, _> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let body = body
            .collect()
            .await
            .map_err(std::io::Error::other)?
            .to_bytes();
        let mut answer = if parts.method == Method::GET {
            self.read(&path, &query)
        } else {
            self.write(&parts.method, &path, serde_json::from_slice(&body)?)
        };
        let date = self.date().parse().map_err(std::io::Error::other)?;
        answer.headers_mut().insert(DATE, date);
        Ok(answer)
    }

    fn date(&self) -> String {
        let clock = self.0.clock.lock().clone();
        let now = clock.map_or_else(SystemTime::now, |now| now());
        let now = Timestamp::try_from(now).unwrap_or(Timestamp::UNIX_EPOCH);
        now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
    }

    fn read(&self, path: &str, query: &BTreeMap<&str, &str>) -> Response<Answer> {
        if let Some(resources) = self.resources(path) {
            return resources;
        }
        if !self.is_served(path) {
            return status(StatusCode::NOT_FOUND, "no such kind");
        }
        let now = self.0.version.load(Ordering::Acquire);
        let mut collections = self.0.collections.lock();
        // One object: a list always has a limit.
        if query.is_empty() {
            let (parent, name) = path.rsplit_once('/').unwrap_or_default();
            let objects = collections.get(parent).map(|known| known.objects.values());
            let found = objects
                .into_iter()
                .flatten()
                .find(|object| object["metadata"]["name"] == *name);
            return found.map_or_else(|| status(StatusCode::NOT_FOUND, "not found"), json_of);
        }
        let one = query
            .get("fieldSelector")
            .and_then(|field| field.strip_prefix("metadata.name%3D"));
        let collection = collections.entry(path.to_owned()).or_default();
        if collection.fails {
            return status(
                StatusCode::INTERNAL_SERVER_ERROR,
                "conversion webhook failed",
            );
        }
        let passes = |object: &&Value| one.is_none_or(|name| object["metadata"]["name"] == *name);
        if query.contains_key("watch") {
            let from = query
                .get("resourceVersion")
                .and_then(|from| from.parse().ok());
            let from: u64 = from.unwrap_or_default();
            if from < collection.forgotten && collection.refuses {
                return status(StatusCode::GONE, "too old resource version");
            }
            if from < collection.forgotten {
                return json_body(expired());
            }
            let (tell, told) = mpsc::unbounded_channel();
            // What has happened since; deletions are not remembered, as after a cut.
            for object in collection.objects.values().filter(passes) {
                if version_of(object) > from {
                    let _new = tell.send(event("MODIFIED", object));
                }
            }
            collection.watches.push(tell);
            return streamed(told);
        }
        let limit = query.get("limit").and_then(|limit| limit.parse().ok());
        let limit: usize = limit.unwrap_or(usize::MAX);
        self.0.pages.lock().push((path.to_owned(), limit));
        let skip = query.get("continue").and_then(|at| at.parse().ok());
        let skip: usize = skip.unwrap_or_default();
        let all: Vec<_> = collection.objects.values().filter(passes).collect();
        let page: Vec<_> = all.iter().skip(skip).take(limit).collect();
        let more = skip + page.len() < all.len();
        let rest = if more {
            json!((skip + page.len()).to_string())
        } else {
            Value::Null
        };
        json_of(&json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": now.to_string(), "continue": rest},
            "items": page,
        }))
    }

    fn write(&self, method: &Method, path: &str, body: Value) -> Response<Answer> {
        if *method == Method::POST {
            return self.create(path, body);
        }
        let whole = path.trim_end_matches("/status");
        let whole = whole.trim_end_matches("/approval");
        let Some((collection, name)) = whole.rsplit_once('/') else {
            return status(StatusCode::NOT_FOUND, "not found");
        };
        let all = self.all(collection);
        let known = all.into_iter().find(|o| o["metadata"]["name"] == *name);
        let Some(mut object) = known else {
            return status(StatusCode::NOT_FOUND, "not found");
        };
        let of_deletion = &body["preconditions"]["resourceVersion"];
        for read_at in [&body["metadata"]["resourceVersion"], of_deletion] {
            if !read_at.is_null() && *read_at != object["metadata"]["resourceVersion"] {
                return status(StatusCode::CONFLICT, "it has changed since");
            }
        }
        match *method {
            Method::DELETE => {
                self.delete(collection, &name_of(&object));
                return status(StatusCode::OK, "deleted");
            }
            Method::PUT => {
                let place = object["metadata"]["namespace"].take();
                object = body;
                object["metadata"]["namespace"] = place;
            }
            // PATCH of a status or of what is kept in it.
            _ => merge(&mut object["status"], &body["status"]),
        }
        self.put(collection, object);
        self.found(collection, name)
    }

    fn create(&self, path: &str, mut object: Value) -> Response<Answer> {
        if object["metadata"]["name"].is_null() {
            let stem = object["metadata"]["generateName"]
                .as_str()
                .unwrap_or_default();
            object["metadata"]["name"] = json!(format!("{stem}{}", self.next()));
        }
        let place = path
            .split_once("/namespaces/")
            .and_then(|(_, rest)| rest.split_once('/'));
        if let Some((namespace, _)) = place {
            object["metadata"]["namespace"] = json!(namespace);
        }
        if self.get(path, &name_of(&object)).is_some() {
            return status(StatusCode::CONFLICT, EXISTS);
        }
        let name = object["metadata"]["name"].clone();
        self.put(path, object);
        self.found(path, name.as_str().unwrap_or_default())
    }

    fn found(&self, collection: &str, name: &str) -> Response<Answer> {
        let all = self.all(collection);
        let found = all.iter().find(|o| o["metadata"]["name"] == *name);
        found.map_or_else(|| status(StatusCode::NOT_FOUND, "not found"), json_of)
    }

    /// Kinds of `/apis/group/version`.
    fn resources(&self, path: &str) -> Option<Response<Answer>> {
        let (group, version) = path.strip_prefix("/apis/")?.split_once('/')?;
        if version.contains('/') {
            return None;
        }
        let served: Vec<_> = self
            .all(DEFINITIONS)
            .into_iter()
            .map(|definition| definition["served"].clone())
            .filter(|served| served["group"] == *group && served["version"] == *version)
            .map(|served| {
                json!({"name": served["plural"], "singularName": "", "namespaced": true,
                       "kind": "K", "verbs": ["list", "watch"]})
            })
            .collect();
        Some(if served.is_empty() {
            status(StatusCode::NOT_FOUND, "no such group")
        } else {
            json_of(&json!({
                "kind": "APIResourceList", "groupVersion": format!("{group}/{version}"),
                "resources": served,
            }))
        })
    }

    fn is_served(&self, path: &str) -> bool {
        let Some((group, rest)) = path
            .strip_prefix("/apis/")
            .and_then(|path| path.split_once('/'))
        else {
            return true;
        };
        if group.ends_with(".k8s.io") && group != "policy.networking.k8s.io"
            || group == "apps"
            || group == "picomesh.io"
        {
            return true;
        }
        let plural = rest.rsplit('/').next().unwrap_or_default();
        self.all(DEFINITIONS).iter().any(|definition| {
            definition["served"]["group"] == *group && definition["served"]["plural"] == *plural
        })
    }
}

impl Collection {
    fn tell(&mut self, what: &str, object: &Value) {
        let line = event(what, object);
        self.watches
            .retain(|watch| watch.send(line.clone()).is_ok());
    }
}

/// As JSON Merge Patch says it.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (field, value) in patch {
        if value.is_null() {
            into.as_object_mut().map(|fields| fields.remove(field));
        } else {
            merge(&mut into[field], value);
        }
    }
}

fn name_of(object: &Value) -> String {
    let part = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    format!("{}/{}", part("namespace"), part("name"))
}

fn version_of(object: &Value) -> u64 {
    let version = object["metadata"]["resourceVersion"].as_str();
    version
        .and_then(|version| version.parse().ok())
        .unwrap_or_default()
}

fn event(what: &str, object: &Value) -> String {
    // As a real one writes it: what it is comes first.
    format!("{{\"type\":\"{what}\",\"object\":{object}}}\n")
}

const EXISTS: &str = "already exists";

fn expired() -> String {
    let status = json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410,
                        "message": "too old resource version"});
    event("ERROR", &status)
}

/// With the words that Kubernetes has for such a code.
fn status(code: StatusCode, message: &str) -> Response<Answer> {
    let (status, reason) = match code {
        StatusCode::OK => ("Success", ""),
        StatusCode::NOT_FOUND => ("Failure", "NotFound"),
        StatusCode::GONE => ("Failure", "Expired"),
        StatusCode::CONFLICT if message == EXISTS => ("Failure", "AlreadyExists"),
        StatusCode::CONFLICT => ("Failure", "Conflict"),
        _ => ("Failure", "InternalError"),
    };
    let body = json!({"kind": "Status", "status": status, "reason": reason,
                      "message": message, "code": code.as_u16()});
    let mut response = json_of(&body);
    *response.status_mut() = code;
    response
}

fn json_of(value: &Value) -> Response<Answer> {
    json_body(value.to_string())
}

fn json_body(text: String) -> Response<Answer> {
    Response::new(Full::new(Bytes::from(text)).boxed_unsync())
}

fn streamed(told: mpsc::UnboundedReceiver<String>) -> Response<Answer> {
    let frames = stream::unfold(told, |mut told| async {
        let line = told.recv().await?;
        let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(line)));
        Some((frame, told))
    });
    Response::new(StreamBody::new(frames).boxed_unsync())
}
