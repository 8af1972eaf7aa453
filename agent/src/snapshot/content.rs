//! What is in the two files, as plain types and as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::sealed::hex;
use crate::state::objects::{Object, Objects};

/// What was in force: of the two only the one that its source gives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The manifests as they were when last good, by the name of their file.
    #[serde(default)]
    pub manifests: BTreeMap<String, String>,
    /// The objects of a cluster.
    #[serde(default)]
    pub objects: Vec<Object>,
}

/// Who we are. Not `Debug`: these are private keys.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// The trust bundle, DER.
    pub anchors: Vec<Der>,
    pub held: Vec<HeldKey>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldKey {
    /// As a SPIFFE ID.
    pub identity: String,
    /// Leaf first, DER.
    pub chain: Vec<Der>,
    /// PKCS#8, DER.
    pub key: Der,
}

/// Bytes, written as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Der(pub Vec<u8>);

impl State {
    pub fn encode(&self) -> Vec<u8> {
        // Maps of strings cannot fail to become JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The same of a cluster's objects alone, without a copy of all of them at once.
    pub fn encode_objects(objects: &Objects) -> Vec<u8> {
        #[derive(Serialize)]
        struct OfObjects<'a> {
            #[serde(serialize_with = "one_by_one")]
            objects: &'a Objects,
        }
        serde_json::to_vec(&OfObjects { objects }).unwrap_or_default()
    }

    pub fn decode(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body)
    }
}

fn one_by_one<S: Serializer>(objects: &&Objects, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(objects.each())
}

impl Keys {
    pub fn encode(&self) -> Vec<u8> {
        // Strings cannot fail to become JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn decode(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body)
    }
}

impl Serialize for Der {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Der {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let digits = |pair: &[u8]| {
            let high = (pair[0] as char).to_digit(16)?;
            let low = (pair[1] as char).to_digit(16)?;
            u8::try_from(high * 16 + low).ok()
        };
        if !text.len().is_multiple_of(2) {
            return Err(D::Error::custom("an odd number of hexadecimal digits"));
        }
        text.as_bytes()
            .chunks_exact(2)
            .map(digits)
            .collect::<Option<Vec<u8>>>()
            .map(Self)
            .ok_or_else(|| D::Error::custom("a character that is no hexadecimal digit"))
    }
}
