//! An object as the API server sent it: its text, and what of its metadata a watch needs.
//!
//! One type for all kinds, so that watching, listing and recovering are compiled once and not for
//! every type that Kubernetes knows; and one object that does not fit its type does not spoil the
//! list that it stands in. What is kept of an object is what the conversion makes of the text.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, core::ApiResource, core::DynamicResourceScope};
use serde::{Deserialize, Deserializer, de::DeserializeOwned, de::Error as _};
use serde_json::value::RawValue;

use super::{
    FieldError,
    read::{self, Misfit},
};

/// An object may have a megabyte and a half, many come at once, and whoever may write a pod writes
/// as much of it. Ours have some kilobytes, and all annotations together at most 256. A policy may be
/// as long as the API server lets it: not read, it would protect nobody.
const MAX_TEXT: usize = 512 * 1024;

#[derive(Clone, Debug)]
pub struct Seen {
    /// Name, namespace, uid, resource version; nothing else.
    metadata: ObjectMeta,
    text: Text,
}

#[derive(Clone, Debug)]
enum Text {
    Kept(Box<RawValue>),
    /// Longer than [`MAX_TEXT`]: so many bytes.
    Dropped(usize),
}

/// All of it may be missing as far as this is concerned: it is the conversion that judges.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    metadata: HeadMeta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMeta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
}

impl Seen {
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Empty for an object of the whole cluster.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    pub fn resource_version(&self) -> &str {
        self.metadata
            .resource_version
            .as_deref()
            .unwrap_or_default()
    }

    /// Drops a text that is too long: before it waits for somebody, and for kinds that are no policy.
    pub fn bounded(mut self) -> Self {
        if let Text::Kept(text) = &self.text
            && text.get().len() > MAX_TEXT
        {
            self.text = Text::Dropped(text.get().len());
        }
        self
    }

    /// Its text as a type of Kubernetes or of our own.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FieldError> {
        let text = match &self.text {
            Text::Kept(text) => text.get(),
            Text::Dropped(length) => {
                let problem = format!("is {length} bytes long, at most {MAX_TEXT} are read");
                return Err(FieldError::misfit("the object".into(), problem));
            }
        };
        let document = serde_json::from_str(text)
            .map_err(|error| FieldError::misfit("the object".into(), error.to_string()))?;
        match read::read(&document) {
            Ok((object, _unknown)) => Ok(object),
            Err(Misfit { path, message }) => Err(FieldError::misfit(path, message)),
        }
    }
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(from)?;
        let Head { metadata: head } = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
        let metadata = ObjectMeta {
            name: head.name,
            namespace: head.namespace,
            uid: head.uid,
            resource_version: head.resource_version,
            ..ObjectMeta::default()
        };
        Ok(Self {
            metadata,
            text: Text::Kept(text),
        })
    }
}

impl Resource for Seen {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(of: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&of.kind)
    }

    fn group(of: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&of.group)
    }

    fn version(of: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&of.version)
    }

    fn plural(of: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&of.plural)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::core::{ObjectList, WatchEvent};

    use super::*;

    #[test]
    fn an_object_that_fits_no_type_does_not_spoil_its_list() {
        let list: ObjectList<Seen> = serde_json::from_str(
            r#"{"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"},
                "items": [{"metadata": {"name": "a", "namespace": "n"}, "spec": 7},
                          {"metadata": {"name": "b", "uid": "u", "resourceVersion": "5"}}]}"#,
        )
        .unwrap();
        let [bad, good] = &list.items[..] else {
            panic!("{list:?}")
        };
        assert_eq!((bad.namespace(), bad.name()), ("n", "a"));
        assert_eq!((good.uid(), good.resource_version()), ("u", "5"));
        let error = bad.parse::<Pod>().unwrap_err();
        assert_eq!(error.field, "spec");
        assert!(good.parse::<Pod>().is_ok());
    }

    #[test]
    fn a_watch_event_gives_the_text_too() {
        let event: WatchEvent<Seen> = serde_json::from_str(
            r#"{"type": "ADDED", "object": {"metadata": {"name": "a"}, "x": [1]}}"#,
        )
        .unwrap();
        let WatchEvent::Added(seen) = event else {
            panic!("{event:?}")
        };
        assert_eq!(seen.name(), "a");
        assert_eq!(seen.parse::<serde_json::Value>().unwrap()["x"][0], 1);
    }

    #[test]
    fn of_an_object_that_is_too_long_only_its_name_is_kept() {
        let text = |length| {
            let filler = "x".repeat(length);
            format!(r#"{{"metadata": {{"name": "a", "annotations": {{"x": "{filler}"}}}}}}"#)
        };
        let fits: Seen = serde_json::from_str(&text(MAX_TEXT - 100)).unwrap();
        assert!(fits.bounded().parse::<Pod>().is_ok());
        let long: Seen = serde_json::from_str(&text(MAX_TEXT)).unwrap();
        // Unless it is of a kind that must be read.
        assert!(long.parse::<Pod>().is_ok());
        let long = long.bounded();
        assert_eq!(long.name(), "a");
        let error = long.parse::<Pod>().unwrap_err().to_string();
        assert!(error.contains("at most 524288 are read"), "{error}");
    }

    #[test]
    fn what_the_parser_says_of_a_text_is_bounded() {
        let text = format!(r#"{{"metadata": {{}}, "spec": "{}"}}"#, "x".repeat(100_000));
        let seen: Seen = serde_json::from_str(&text).unwrap();
        let error = seen.parse::<Pod>().unwrap_err().to_string();
        assert!(error.len() < 1000, "{} bytes", error.len());
    }
}
