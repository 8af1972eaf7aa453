//! The list that is ours, made of a configuration of somebody else's: as text, so that whatever stands
//! in that one stands in ours byte by byte, also numbers and words that nobody here understands.
//!
//! Pure. What others wrote is bounded and checked first; of what the runtime could not read either no
//! list is made.

use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use super::LIST;
use crate::cni::{
    PLUGIN,
    plugin::configuration::{VERSIONS, Version},
    shortened,
};

/// No network configuration comes near.
pub const MAX_BYTES: usize = 1024 * 1024;
const MAX_PLUGINS: usize = 64;

/// Why no list is made of a file.
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
        "leads back to {LIST}, which would be made of it; let it call the network plugin's own list \
         by name, or name it so that it comes before {LIST}"
    )]
    Circle,
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
    /// Of our entry only.
    made_of: Option<String>,
}

/// One plugin of the list, where it stands in the text.
struct Place {
    at: Range<usize>,
    kind: String,
}

/// A list like `text` with `entry` as its last plugin, and nowhere else. Its name stays too: what
/// network plugins keep of a pod they keep under that. Only where runtimes may ask the plugin if it
/// knows the list's version.
pub fn from_list(text: &str, entry: &str) -> Result<String, Malformed> {
    places(text)?;
    chainable(parse::<List<'_>>(text)?.cni_version)?;
    let mut text = without_entry(text)?.unwrap_or_else(|| text.to_owned());
    leads_on(&text)?;
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
    // One too many is too many with ours, too.
    places(&text)?;
    Ok(text)
}

/// The list without any entry of ours, which somebody may have copied. `None`: there is none. A list
/// that would be empty is not possible: ours alone makes no interfaces, so nobody runs it.
fn without_entry(text: &str) -> Result<Option<String>, Malformed> {
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
    leads_on(text)?;
    let single: Plugin = parse(text)?;
    let version = chainable(single.cni_version)?;
    // Both were text in JSON, so they are again.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let name = quoted(&single.name.unwrap_or_default());
    let version = quoted(&version);
    let text = text.trim();
    let list = format!(
        "{{\"cniVersion\": {version}, \"name\": {name}, \"plugins\": [\n{text},\n{entry}\n]}}\n"
    );
    places(&list)?;
    Ok(list)
}

/// The file that a list of ours says it was made of.
pub fn made_of(text: &str) -> Option<String> {
    let list: List<'_> = parse(text).ok()?;
    let plugins = list.plugins.unwrap_or_default().into_iter();
    let mut plugins = plugins.filter_map(|raw| parse::<Plugin>(raw.get()).ok());
    plugins
        .find(|plugin| plugin.kind.as_deref() == Some(PLUGIN))?
        .made_of
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

/// What calls ours, or has a copy of it inside, would be called by ours in turn.
fn leads_on(text: &str) -> Result<(), Malformed> {
    if text.contains(PLUGIN) || text.contains(LIST) {
        Err(Malformed::Circle)
    } else {
        Ok(())
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
    fn a_list_becomes_one_that_differs_by_our_entry_at_its_end_alone() {
        for list in [
            FLANNEL,
            r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}"#,
            r#"{"plugins" : [ {"type":"bridge"} , {"type":"portmap"} ],"cniVersion":"1.1.0"}"#,
            "{\"cniVersion\":\"1.0.0\",\"plugins\":[\n\t{\"type\":\"bridge\"}\n]}",
        ] {
            let with = from_list(list, ENTRY).unwrap();
            assert_eq!(places(&with).unwrap().last().unwrap().kind, PLUGIN);
            assert_eq!(others(&with), others(list));
            assert_eq!(from_list(&with, ENTRY).unwrap(), with);
            assert_eq!(without_entry(&with).unwrap().as_deref(), Some(list));
        }
        let with = from_list(FLANNEL, ENTRY).unwrap();
        assert!(
            with.contains(&format!("    }},\n    {ENTRY}\n  ]")),
            "{with}"
        );
    }

    #[test]
    fn entries_of_ours_that_somebody_has_copied_become_one() {
        let old = r#"{"type":"picomesh-cni","runDir":"/run/old"}"#;
        let doubled = format!(
            r#"{{"cniVersion":"1.0.0","plugins":[{old},{{"type":"bridge"}},{ENTRY},{old}]}}"#
        );
        assert_eq!(
            from_list(&doubled, ENTRY).unwrap(),
            format!(r#"{{"cniVersion":"1.0.0","plugins":[{{"type":"bridge"}}, {ENTRY}]}}"#)
        );
    }

    #[test]
    fn a_list_of_ours_says_what_it_was_made_of() {
        let entry = r#"{"type":"picomesh-cni","madeOf":"10-a.conflist"}"#;
        let list = from_list(FLANNEL, entry).unwrap();
        assert_eq!(made_of(&list).as_deref(), Some("10-a.conflist"));
        for other in [FLANNEL, "", "[]", &list.replace("madeOf", "x")] {
            assert_eq!(made_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let single = "{\"cniVersion\":\"0.4.0\",\"name\":\"my\\\"net\",\"type\":\"bridge\"}\n";
        let list = from_single(single, ENTRY).unwrap();
        assert_eq!(others(&list), ["bridge"]);
        assert_eq!(from_list(&list, ENTRY).unwrap(), list);
        let value: serde_json::Value = serde_json::from_str(&list).unwrap();
        assert_eq!(value["name"], "my\"net");
        assert_eq!(value["cniVersion"], "0.4.0");
        assert_eq!(program(single).unwrap(), "bridge");
    }

    #[test]
    fn what_the_runtime_could_not_read_either_is_refused() {
        let refused = |text: &str| from_list(text, ENTRY).unwrap_err();
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
        }
        for back in [
            "\"x\":[{\"type\":\"picomesh-cni\"}]",
            "\"x\":\"/etc/00-picomesh.conflist\"",
        ] {
            let meta = format!(r#"{{"cniVersion":"1.0.0","type":"meta",{back}}}"#);
            assert_eq!(from_single(&meta, ENTRY), Err(Malformed::Circle));
            let list = format!(r#"{{"cniVersion":"1.0.0","plugins":[{meta}]}}"#);
            assert_eq!(refused(&list), Malformed::Circle);
        }
        let many = vec![r#"{"type":"a"}"#; MAX_PLUGINS + 1].join(",");
        let many = format!(r#"{{"cniVersion":"1.0.0","plugins":[{many}]}}"#);
        assert_eq!(refused(&many), Malformed::TooMany(MAX_PLUGINS + 1));
        let just_as_many = many.replacen(r#"{"type":"a"},"#, "", 1);
        let with_ours = Malformed::TooMany(MAX_PLUGINS + 1);
        assert_eq!(refused(&just_as_many), with_ours, "as nobody could read");
        let long = format!(r#"{{"type":"a","x":"{}"}}"#, "x".repeat(MAX_BYTES - 60));
        let single = format!(r#"{{"cniVersion":"1.0.0",{}"#, &long[1..]);
        assert_eq!(from_single(&single, ENTRY), Err(Malformed::TooLong));
        assert_eq!(refused(&" ".repeat(MAX_BYTES + 1)), Malformed::TooLong);
        let untyped = from_single(r#"{"cniVersion":"1.0.0"}"#, ENTRY);
        assert_eq!(untyped, Err(Malformed::NoType(0)));
        let ours = format!(r#"{{"cniVersion":"1.0.0",{}"#, &ENTRY[1..]);
        assert_eq!(from_single(&ours, ENTRY), Err(Malformed::NoPlugins));
    }
}
