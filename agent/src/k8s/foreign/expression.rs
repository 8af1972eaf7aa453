//! What selectors say, of all three families: Kubernetes' label selectors, Cilium's (the same with
//! other keys) and Calico's expressions (`app == "web" && has(tier)`).
//!
//! Evaluation knows a third answer: of a label that we cannot know, nothing follows. Whoever asks
//! takes that for yes: a pod that may be selected is treated as one that is.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Deeper or longer ones are nobody's, and reading them would cost a stack.
const MAX_DEPTH: usize = 32;
const MAX_LENGTH: usize = 16 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    All,
    /// Things without a namespace, and so no pods.
    Never,
    Has(String),
    In(String, Vec<String>),
    Contains(String, String),
    StartsWith(String, String),
    EndsWith(String, String),
    Not(Box<Expression>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
}

/// A label of the thing that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Label<'a> {
    Is(&'a str),
    Absent,
    Unknown,
}

impl Expression {
    /// `None`: that depends on what we do not know.
    pub(super) fn holds<'a>(&self, label: &dyn Fn(&str) -> Label<'a>) -> Option<bool> {
        let of = |key: &str, test: &dyn Fn(&str) -> bool| match label(key) {
            Label::Is(value) => Some(test(value)),
            Label::Absent => Some(false),
            Label::Unknown => None,
        };
        match self {
            Self::All => Some(true),
            Self::Never => Some(false),
            Self::Has(key) => of(key, &|_| true),
            Self::In(key, values) => of(key, &|value| values.iter().any(|one| one == value)),
            Self::Contains(key, part) => of(key, &|value| value.contains(part.as_str())),
            Self::StartsWith(key, part) => of(key, &|value| value.starts_with(part.as_str())),
            Self::EndsWith(key, part) => of(key, &|value| value.ends_with(part.as_str())),
            Self::Not(inner) => inner.holds(label).map(|holds| !holds),
            Self::And(parts) => among(parts, label, false),
            Self::Or(parts) => among(parts, label, true),
        }
    }

    /// A selector with an operator that nobody knows selects everything.
    pub(super) fn of_labels(selector: LabelSelector) -> Self {
        let exact = selector.match_labels.unwrap_or_default().into_iter();
        let exact = exact.map(|(key, value)| Self::In(key, vec![value]));
        let requirements = selector.match_expressions.unwrap_or_default().into_iter();
        let requirements = requirements.map(|requirement| {
            let (key, values) = (requirement.key, requirement.values.unwrap_or_default());
            match requirement.operator.as_str() {
                "In" => Self::In(key, values),
                "NotIn" => Self::Not(Box::new(Self::In(key, values))),
                "Exists" => Self::Has(key),
                "DoesNotExist" => Self::Not(Box::new(Self::Has(key))),
                _ => Self::All,
            }
        });
        Self::And(exact.chain(requirements).collect())
    }

    /// Calico's language. `None`: it cannot be read.
    pub(super) fn of_calico(text: &str) -> Option<Self> {
        if text.len() > MAX_LENGTH {
            return None;
        }
        if text.trim().is_empty() {
            return Some(Self::All);
        }
        let mut reader = Reader { rest: text };
        let expression = reader.alternatives(0)?;
        reader.skip_space();
        reader.rest.is_empty().then_some(expression)
    }
}

/// Of several parts one that is `decisive` decides; else what is not known.
fn among<'a>(
    parts: &[Expression],
    label: &dyn Fn(&str) -> Label<'a>,
    decisive: bool,
) -> Option<bool> {
    let mut known = true;
    for part in parts {
        match part.holds(label) {
            Some(holds) if holds == decisive => return Some(decisive),
            Some(_) => {}
            None => known = false,
        }
    }
    known.then_some(!decisive)
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn alternatives(&mut self, depth: usize) -> Option<Expression> {
        let mut parts = vec![self.all_of(depth)?];
        while self.take("||") {
            parts.push(self.all_of(depth)?);
        }
        Some(single_or(parts, Expression::Or))
    }

    fn all_of(&mut self, depth: usize) -> Option<Expression> {
        let mut parts = vec![self.term(depth)?];
        while self.take("&&") {
            parts.push(self.term(depth)?);
        }
        Some(single_or(parts, Expression::And))
    }

    fn term(&mut self, depth: usize) -> Option<Expression> {
        if depth > MAX_DEPTH {
            return None;
        }
        if self.take("!") {
            return Some(Expression::Not(Box::new(self.term(depth + 1)?)));
        }
        if self.take("(") {
            let inner = self.alternatives(depth + 1)?;
            return self.take(")").then_some(inner);
        }
        let key = self.key()?.to_owned();
        if self.take("(") {
            let argument = self.key().map(str::to_owned);
            let closed = self.take(")");
            return match (key.as_str(), argument) {
                ("all", None) if closed => Some(Expression::All),
                ("global", None) if closed => Some(Expression::Never),
                ("has", Some(key)) if closed => Some(Expression::Has(key)),
                _ => None,
            };
        }
        if self.take("==") {
            return Some(Expression::In(key, vec![self.quoted()?]));
        }
        if self.take("!=") {
            let equals = Expression::In(key, vec![self.quoted()?]);
            return Some(Expression::Not(Box::new(equals)));
        }
        match self.key()? {
            "in" => Some(Expression::In(key, self.set()?)),
            "not" if self.key()? == "in" => {
                let within = Expression::In(key, self.set()?);
                Some(Expression::Not(Box::new(within)))
            }
            "contains" => Some(Expression::Contains(key, self.quoted()?)),
            "starts" if self.key()? == "with" => Some(Expression::StartsWith(key, self.quoted()?)),
            "ends" if self.key()? == "with" => Some(Expression::EndsWith(key, self.quoted()?)),
            _ => None,
        }
    }

    fn set(&mut self) -> Option<Vec<String>> {
        let mut values = Vec::new();
        if !self.take("{") {
            return None;
        }
        if self.take("}") {
            return Some(values);
        }
        loop {
            values.push(self.quoted()?);
            if self.take("}") {
                return Some(values);
            }
            if !self.take(",") {
                return None;
            }
        }
    }

    fn quoted(&mut self) -> Option<String> {
        self.skip_space();
        let quote = self
            .rest
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''))?;
        let (text, rest) = self.rest[1..].split_once(quote)?;
        self.rest = rest;
        Some(text.to_owned())
    }

    fn key(&mut self) -> Option<&'a str> {
        self.skip_space();
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
        let end = self.rest.find(|c| !inner(c)).unwrap_or(self.rest.len());
        let (key, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!key.is_empty()).then_some(key)
    }

    /// `!=` begins with `!`, and is not taken for it: no term begins with `=`.
    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }
}

fn single_or(mut parts: Vec<Expression>, of: fn(Vec<Expression>) -> Expression) -> Expression {
    match parts.pop() {
        Some(only) if parts.is_empty() => only,
        Some(last) => {
            parts.push(last);
            of(parts)
        }
        None => of(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(text: &str, labels: &[(&str, &str)]) -> Option<bool> {
        let label = |key: &str| match labels.iter().find(|(known, _)| *known == key) {
            Some((_, "?")) => Label::Unknown,
            Some((_, value)) => Label::Is(value),
            None => Label::Absent,
        };
        let expression = Expression::of_calico(text).unwrap_or_else(|| panic!("{text}"));
        expression.holds(&label)
    }

    #[test]
    fn calicos_language_is_read_as_calico_reads_it() {
        let web = [("app", "web-1"), ("tier", "front")];
        for (text, expected) in [
            ("", true),
            ("all()", true),
            ("global()", false),
            ("app == 'web-1'", true),
            ("app == \"web\"", false),
            ("app != 'web'", true),
            ("absent != 'web'", true),
            ("absent == 'web'", false),
            ("has(app)", true),
            ("!has(app)", false),
            ("! has( absent )", true),
            ("app in {'a', 'web-1'}", true),
            ("app in {}", false),
            ("app not in { 'web-1' }", false),
            ("absent not in {'x'}", true),
            ("app contains 'eb'", true),
            ("app starts with 'web'", true),
            ("app ends with '-2'", false),
            ("app == 'x' || tier == 'front' && has(app)", true),
            ("(app == 'x' || tier == 'front') && !has(app)", false),
            ("projectcalico.org/namespace == 'x'", false),
        ] {
            assert_eq!(holds(text, &web), Some(expected), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_somebody_writes_it_is_read_or_not(text in r#"([a-z!=&|(){},'" ]|has|all|in|ü){0,40}"#) {
            let _read = Expression::of_calico(&text);
        }
    }

    #[test]
    fn of_what_is_unknown_nothing_follows() {
        let labels = [("secret", "?"), ("app", "web")];
        assert_eq!(holds("secret == 'x'", &labels), None);
        assert_eq!(holds("!has(secret)", &labels), None);
        assert_eq!(holds("secret == 'x' && app == 'db'", &labels), Some(false));
        assert_eq!(holds("secret == 'x' || app == 'web'", &labels), Some(true));
        assert_eq!(holds("secret == 'x' && app == 'web'", &labels), None);
    }

    #[test]
    fn what_is_no_selector_is_not_read() {
        let deep = format!("{}all(){}", "(".repeat(500), ")".repeat(500));
        let long = format!("app == '{}'", "x".repeat(MAX_LENGTH));
        for text in [
            "app",
            "app ==",
            "app == web",
            "== 'x'",
            "has()",
            "all(x)",
            "app in 'x'",
            "app in {'x'",
            "app in {'x' 'y'}",
            "(has(a)",
            "has(a))",
            "has(a) &&",
            "has(a) has(b)",
            "app like 'x'",
            "app == 'x",
            "app not 'x'",
            "ü == 'x'",
            &deep,
            &long,
        ] {
            assert_eq!(Expression::of_calico(text), None, "{text}");
        }
    }
}
