//! From a document to a type, of Kubernetes or of our own.
//!
//! One parser for all kinds and both sources, YAML and JSON: the compiler makes one for every type
//! that a Pod can contain, and another source of its own would cost each node megabytes of code.

use serde::de::DeserializeOwned;
use serde_ignored::Path;
use serde_json::Value;

/// A document that is not of the type.
#[derive(Debug)]
pub struct Misfit {
    /// Where, e.g. `spec.ports[0].port`; a dot if nobody knows.
    pub path: String,
    pub message: String,
}

/// Where a field stands that its object does not have, and its name.
pub type UnknownField = (String, String);

/// The document as the type, and what it says beyond that.
pub fn read<T: DeserializeOwned>(document: &Value) -> Result<(T, Vec<UnknownField>), Misfit> {
    let mut unknown = Vec::new();
    let mut note = |path: Path<'_>| unknown.extend(unknown_field(&path));
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(document, &mut track);
    match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note)) {
        Ok(object) => Ok((object, unknown)),
        Err(error) => Err(Misfit {
            path: track.path().to_string(),
            message: error.to_string(),
        }),
    }
}

fn unknown_field(path: &Path<'_>) -> Option<UnknownField> {
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
fn spelled(path: &Path<'_>) -> String {
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
