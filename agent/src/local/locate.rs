//! Where in a document a field stands, for messages about values that parsed well.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// Line of the field `path` (like `spec.ports[0].port`), from 1; if it is not there, of the nearest
/// thing around it that is. `None`: the text is no document.
pub(super) fn line_of(text: &str, path: &str) -> Option<u64> {
    let root: Spanned<Tree> = serde_saphyr::from_str(text).ok()?;
    let mut line = root.referenced.line();
    let mut here = &root.value;
    for step in steps(path) {
        let next = match (here, step) {
            (Tree::Map(fields), Step::Field(name)) => {
                let found = fields.iter().find(|(key, _)| key.value == name);
                found.map(|(key, value)| (key.referenced.line(), value))
            }
            (Tree::List(items), Step::Index(index)) => items
                .get(index)
                .map(|item| (item.referenced.line(), &item.value)),
            (Tree::Map(_) | Tree::List(_) | Tree::Leaf, Step::Field(_) | Step::Index(_)) => None,
        };
        let Some((at, value)) = next else { break };
        line = at;
        here = value;
    }
    Some(line)
}

enum Step<'a> {
    Field(&'a str),
    Index(usize),
}

/// `a.b[0].c`, and `metadata.labels[some.key/with.dots]`.
fn steps(path: &str) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some((inner, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            steps.push(inner.parse().map_or(Step::Field(inner), Step::Index));
            rest = after;
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            // An unclosed bracket at the very beginning: nothing more to follow.
            if end == 0 {
                break;
            }
            steps.push(Step::Field(&rest[..end]));
            rest = &rest[end..];
        }
    }
    steps
}

/// A document of any shape that remembers where everything stands.
enum Tree {
    Map(Vec<(Spanned<String>, Tree)>),
    List(Vec<Spanned<Tree>>),
    Leaf,
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = map.next_entry()? {
            fields.push(entry);
        }
        Ok(Tree::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Tree::List(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_i128<E>(self, _: i128) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_u128<E>(self, _: u128) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_str<E>(self, _: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_path_and_a_missing_one_by_what_is_around_it() {
        let text = "\
---
# a comment
apiVersion: v1
metadata:
  labels:
    app.kubernetes.io/name: web
    other: x
spec:
  ports:
  - port: 80
    name: http
  - { port: 90, name: more }
  list:
    - 1
    - two
";
        let rows = [
            ("apiVersion", 3),
            ("metadata.labels[app.kubernetes.io/name]", 6),
            ("metadata.labels[other]", 7),
            ("spec.ports", 9),
            ("spec.ports[0]", 10),
            ("spec.ports[0].name", 11),
            ("spec.ports[1].name", 12),
            ("spec.list[1]", 15),
            ("spec.ports[0].targetPort", 10),
            ("spec.nodeName", 8),
            ("spec.ports[7].port", 9),
            ("nothing.there", 3),
        ];
        for (path, line) in rows {
            assert_eq!(line_of(text, path), Some(line), "{path}");
        }
        assert_eq!(line_of("a: [", "a"), None);
    }
}
