//! Our entry in a network configuration, put in and taken out as text: whatever else stands in the
//! file stays byte by byte, also how it is written.
//!
//! Pure. What others wrote is bounded and checked first; what the runtime could not read either is
//! reported and never touched.

use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::cni::{
    PLUGIN,
    plugin::configuration::{VERSIONS, Version},
    shortened,
};

/// No network configuration comes near.
pub const MAX_BYTES: usize = 1024 * 1024;
const MAX_PLUGINS: usize = 64;

/// Why a file is left alone.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("has more than {MAX_BYTES} bytes")]
    TooLong,
    #[error("is no network configuration: {0}")]
    Garbage(String),
    #[error("has no plugins")]
    NoPlugins,
    #[error("has {0} plugins, at most {MAX_PLUGINS} make sense")]
    TooMany(usize),
    #[error("plugin {0} has no type")]
    NoType(usize),
    #[error(
        "has cniVersion {0:?}, in which {PLUGIN} cannot be chained; use a network plugin that writes \
         one of {known}", known = VERSIONS.map(Version::name).join(", ")
    )]
    Version(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct List<'a> {
    cni_version: Option<String>,
    #[serde(borrow)]
    plugins: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Plugin {
    cni_version: Option<String>,
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// One plugin of the list, where it stands in the text.
struct Place {
    at: Range<usize>,
    kind: String,
}

/// The list with `entry` as its last plugin, and nowhere else. `None`: it is so already. Only where
/// runtimes may ask the plugin if it knows the list's version.
pub fn with_entry(text: &str, entry: &str) -> Result<Option<String>, Malformed> {
    let plugins = places(text)?;
    chainable(parse::<List<'_>>(text)?.cni_version)?;
    let ours = |place: &&Place| place.kind == PLUGIN;
    let mut found = plugins.iter().filter(ours);
    if let (Some(only), None) = (found.next(), found.next())
        && text[only.at.clone()] == *entry
        && plugins.last().is_some_and(|last| last.at == only.at)
        && plugins.len() > 1
    {
        return Ok(None);
    }
    let mut text = without_entry(text)?.unwrap_or_else(|| text.to_owned());
    let plugins = places(&text)?;
    let last = plugins.last().ok_or(Malformed::NoPlugins)?;
    // As others are parted from each other, so is ours.
    let gap = match plugins.len() {
        0 | 1 => before(&text, &last.at).map_or_else(
            || " ".to_owned(),
            |gap| {
                if gap.contains('\n') { gap } else { " ".into() }
            },
        ),
        n => text[plugins[n - 2].at.end..last.at.start].replace(',', ""),
    };
    text.insert_str(last.at.end, &format!(",{gap}{entry}"));
    Ok(Some(text))
}

/// The list without any entry of ours, whatever its version. `None`: there is none. A list that would be empty is not
/// possible: ours alone makes no interfaces, so nobody runs it.
pub fn without_entry(text: &str) -> Result<Option<String>, Malformed> {
    let plugins = places(text)?;
    if plugins.iter().all(|place| place.kind != PLUGIN) {
        return Ok(None);
    }
    // Those in front of everybody else's go with what parts them from the first of these.
    let Some(first) = plugins.iter().position(|place| place.kind != PLUGIN) else {
        return Err(Malformed::NoPlugins);
    };
    let mut text = text.to_owned();
    // From behind, so that what is in front stays where it stands.
    for n in (first + 1..plugins.len()).rev() {
        if plugins[n].kind == PLUGIN {
            text.replace_range(plugins[n - 1].at.end..plugins[n].at.end, "");
        }
    }
    text.replace_range(plugins[0].at.start..plugins[first].at.start, "");
    Ok(Some(text))
}

/// A list of one single plugin's configuration (`.conf`), and `entry` behind it.
pub fn from_single(text: &str, entry: &str) -> Result<String, Malformed> {
    program(text)?;
    let single: Plugin = parse(text)?;
    let version = chainable(single.cni_version)?;
    // Both were text in JSON, so they are again.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let name = quoted(&single.name.unwrap_or_default());
    let version = quoted(&version);
    let text = text.trim();
    Ok(format!(
        "{{\"cniVersion\": {version}, \"name\": {name}, \"plugins\": [\n{text},\n{entry}\n]}}\n"
    ))
}

/// The programs that a list needs, ours left out.
pub fn programs(text: &str) -> Result<Vec<String>, Malformed> {
    let others = places(text)?.into_iter().map(|place| place.kind);
    Ok(others.filter(|kind| kind != PLUGIN).collect())
}

/// The program that a single configuration needs.
pub fn program(text: &str) -> Result<String, Malformed> {
    let single: Plugin = parse(text)?;
    match single.kind {
        None => Err(Malformed::NoType(0)),
        Some(kind) if kind.is_empty() => Err(Malformed::NoType(0)),
        // Ours makes no interface.
        Some(kind) if kind == PLUGIN => Err(Malformed::NoPlugins),
        Some(kind) => Ok(kind),
    }
}

fn places(text: &str) -> Result<Vec<Place>, Malformed> {
    let list: List<'_> = parse(text)?;
    let plugins = list.plugins.unwrap_or_default();
    if plugins.is_empty() {
        return Err(Malformed::NoPlugins);
    }
    if plugins.len() > MAX_PLUGINS {
        return Err(Malformed::TooMany(plugins.len()));
    }
    let mut places = Vec::new();
    for (n, raw) in plugins.into_iter().enumerate() {
        let plugin: Plugin = parse(raw.get())?;
        let kind = plugin.kind.filter(|kind| !kind.is_empty());
        // Borrowed from `text`, so this is where it stands.
        let start = raw.get().as_ptr().addr() - text.as_ptr().addr();
        places.push(Place {
            at: start..start + raw.get().len(),
            kind: kind.ok_or(Malformed::NoType(n))?,
        });
    }
    Ok(places)
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Malformed> {
    if text.len() > MAX_BYTES {
        return Err(Malformed::TooLong);
    }
    if !text.trim_start().starts_with('{') {
        return Err(Malformed::Garbage("it is no JSON object".into()));
    }
    let garbage = |error: serde_json::Error| Malformed::Garbage(shortened(error.to_string(), 256));
    serde_json::from_str(text).map_err(garbage)
}

/// A runtime may ask each plugin for the versions it knows, and drop the whole list for one that
/// does not know the list's own. Before 0.3.0 a plugin is not told the result of the one before.
fn chainable(version: Option<String>) -> Result<String, Malformed> {
    let version = version.unwrap_or_default();
    if VERSIONS.iter().any(|known| known.name() == version) {
        Ok(version)
    } else {
        Err(Malformed::Version(shortened(version, 64)))
    }
}

/// The white space before a plugin.
fn before(text: &str, at: &Range<usize>) -> Option<String> {
    let before = &text[..at.start];
    let gap = &before[before.trim_end().len()..];
    (!gap.is_empty()).then(|| gap.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = r#"{"type":"picomesh-cni","runDir":"/run/picomesh"}"#;
    const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": { "isDefaultGateway": true, "big": 12345678901234567890123 }
    },
    {
      "type": "portmap",
      "capabilities": { "portMappings": true }
    }
  ]
}
"#;

    fn others(text: &str) -> Vec<String> {
        programs(text).unwrap()
    }

    #[test]
    fn what_is_put_in_and_taken_out_leaves_every_byte_as_it_was() {
        for list in [
            FLANNEL,
            r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}"#,
            r#"{"plugins" : [ {"type":"bridge"} , {"type":"portmap"} ],"cniVersion":"1.1.0"}"#,
            "{\"cniVersion\":\"1.0.0\",\"plugins\":[\n\t{\"type\":\"bridge\"}\n]}",
        ] {
            let with = with_entry(list, ENTRY).unwrap().unwrap();
            assert_eq!(places(&with).unwrap().last().unwrap().kind, PLUGIN);
            assert_eq!(others(&with), others(list));
            assert_eq!(with_entry(&with, ENTRY).unwrap(), None, "{with}");
            assert_eq!(without_entry(&with).unwrap().as_deref(), Some(list));
        }
        let with = with_entry(FLANNEL, ENTRY).unwrap().unwrap();
        assert!(
            with.contains(&format!("    }},\n    {ENTRY}\n  ]")),
            "{with}"
        );
    }

    #[test]
    fn what_others_have_changed_meanwhile_stays_changed() {
        let with = with_entry(FLANNEL, ENTRY).unwrap().unwrap();
        let changed = with
            .replace("\"isDefaultGateway\": true", "\"mtu\": 1400")
            .replace("\n  ]\n", ",\n    {\"type\": \"bandwidth\"}\n  ]\n");
        let without = without_entry(&changed).unwrap().unwrap();
        assert_eq!(others(&without), ["flannel", "portmap", "bandwidth"]);
        assert!(without.contains("\"mtu\": 1400"));
        // And it is put back behind what was added.
        let again = with_entry(&changed, ENTRY).unwrap().unwrap();
        assert_eq!(places(&again).unwrap().last().unwrap().kind, PLUGIN);
        assert_eq!(again.matches(PLUGIN).count(), 1);
    }

    #[test]
    fn entries_of_other_builds_and_doubles_become_one() {
        let old = r#"{"type":"picomesh-cni","runDir":"/run/old"}"#;
        let doubled = format!(
            r#"{{"cniVersion":"1.0.0","plugins":[{old},{{"type":"bridge"}},{ENTRY},{old}]}}"#
        );
        let with = with_entry(&doubled, ENTRY).unwrap().unwrap();
        assert_eq!(
            with,
            format!(r#"{{"cniVersion":"1.0.0","plugins":[{{"type":"bridge"}}, {ENTRY}]}}"#)
        );
        let without = without_entry(&doubled).unwrap().unwrap();
        assert_eq!(
            without,
            r#"{"cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#
        );
        assert_eq!(without_entry(&without).unwrap(), None);
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let single = "{\"cniVersion\":\"0.4.0\",\"name\":\"my\\\"net\",\"type\":\"bridge\"}\n";
        let list = from_single(single, ENTRY).unwrap();
        assert_eq!(others(&list), ["bridge"]);
        assert_eq!(with_entry(&list, ENTRY).unwrap(), None, "{list}");
        let value: serde_json::Value = serde_json::from_str(&list).unwrap();
        assert_eq!(value["name"], "my\"net");
        assert_eq!(value["cniVersion"], "0.4.0");
        assert_eq!(program(single).unwrap(), "bridge");
    }

    #[test]
    fn what_the_runtime_could_not_read_either_is_refused() {
        let refused = |text: &str| with_entry(text, ENTRY).unwrap_err();
        assert!(matches!(refused(""), Malformed::Garbage(_)));
        assert!(matches!(refused("{\"plugins\":"), Malformed::Garbage(_)));
        assert!(matches!(refused("[]"), Malformed::Garbage(_)));
        assert_eq!(refused("{}"), Malformed::NoPlugins);
        assert_eq!(refused(r#"{"plugins":[]}"#), Malformed::NoPlugins);
        let no_type = r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"},{}]}"#;
        assert_eq!(refused(no_type), Malformed::NoType(1));
        let alone = format!(r#"{{"cniVersion":"1.0.0","plugins":[{ENTRY},{ENTRY}]}}"#);
        assert_eq!(refused(&alone), Malformed::NoPlugins);
        let only = format!(r#"{{"cniVersion":"1.0.0","plugins":[{ENTRY}]}}"#);
        assert_eq!(refused(&only), Malformed::NoPlugins);
        let others = [
            "\"0.2.0\"",
            "\"\"",
            "\"x\"",
            "null",
            "\"1.0\"",
            "\"1.2.0\"",
            "\"2.0.0\"",
        ];
        for other in others {
            let list = format!(r#"{{"cniVersion":{other},"plugins":[{{"type":"a"}}]}}"#);
            let why = refused(&list);
            assert!(matches!(why, Malformed::Version(_)), "{other}");
            assert!(why.to_string().contains("0.4.0, 1.0.0, 1.1.0"), "{why}");
            let single = format!(r#"{{"cniVersion":{other},"type":"a"}}"#);
            assert_eq!(from_single(&single, ENTRY), Err(why), "{other}");
            // What an agent before has put in is taken out all the same.
            let with = format!(r#"{{"cniVersion":{other},"plugins":[{{"type":"a"}},{ENTRY}]}}"#);
            assert_eq!(without_entry(&with), Ok(Some(list)));
        }
        let many = vec![r#"{"type":"a"}"#; MAX_PLUGINS + 1].join(",");
        let many = format!(r#"{{"cniVersion":"1.0.0","plugins":[{many}]}}"#);
        assert_eq!(refused(&many), Malformed::TooMany(MAX_PLUGINS + 1));
        assert_eq!(refused(&" ".repeat(MAX_BYTES + 1)), Malformed::TooLong);
        let untyped = from_single(r#"{"cniVersion":"1.0.0"}"#, ENTRY);
        assert_eq!(untyped, Err(Malformed::NoType(0)));
        let ours = format!(r#"{{"cniVersion":"1.0.0",{}"#, &ENTRY[1..]);
        assert_eq!(from_single(&ours, ENTRY), Err(Malformed::NoPlugins));
    }
}
