//! `picomesh-agent debug`: asks a running agent and shows the answer, as a table for people or as
//! JSON for programs. The tables are views of the same JSON, so that neither says less.

use std::fmt::Write as _;

use comfy_table::{Table, presets};
use serde_json::Value;

use crate::config::{DebugArgs, DebugSubject, OutputArg};

use super::{
    Request,
    socket::{AskError, ask},
};

/// The text to print.
pub async fn run(args: DebugArgs) -> Result<String, AskError> {
    let request = request(args.subject);
    let answer = ask(&args.run_dir, &request).await?;
    Ok(match args.output {
        OutputArg::Json => format!("{answer:#}\n"),
        OutputArg::Table => text(&request, &answer),
    })
}

fn request(subject: DebugSubject) -> Request {
    match subject {
        DebugSubject::State => Request::State,
        DebugSubject::Pods => Request::Pods,
        DebugSubject::Tunnels => Request::Tunnels,
        DebugSubject::Certificates => Request::Certificates,
        DebugSubject::Policies(args) => Request::Policies(args.question()),
        DebugSubject::Limits => Request::Limits,
        DebugSubject::LogLevel { level } => Request::LogLevel { level },
    }
}

fn text(request: &Request, answer: &Value) -> String {
    match request {
        Request::Readiness | Request::State | Request::Limits => state(answer),
        Request::Pods => table(
            &[
                ("POD", "name"),
                ("STATE", "state"),
                ("REASON", "reason"),
                ("SLOT", "slot"),
                ("REPAIRS", "repairs"),
                ("REFUSED", "refused"),
                ("COUNTERS", "counters"),
            ],
            answer,
            "no meshed pod runs on this node",
        ),
        Request::Tunnels => table(
            &[
                ("ROLE", "role"),
                ("SOURCE", "source"),
                ("DESTINATION", "destination"),
                ("REMOTE", "remote"),
                ("STREAMS", "streams"),
                ("BYTES", "bytes"),
                ("SECONDS", "seconds"),
                ("RETIRING", "retiring"),
            ],
            answer,
            "no tunnel stands",
        ),
        Request::Certificates => table(
            &[
                ("IDENTITY", "identity"),
                ("STATE", "state"),
                ("SERIAL", "serial"),
                ("VALID FROM", "not_before"),
                ("UNTIL", "not_after"),
                ("RENEWED AT", "renew_at"),
                ("RENEWALS", "renewals"),
                ("LAST ERROR", "last_error"),
            ],
            answer,
            "no certificate is wanted: no meshed pod runs on this node",
        ),
        Request::Policies(question) if question.from.is_some() || question.to.is_some() => table(
            &[
                ("ASKED", "asked"),
                ("VERDICT", "verdict"),
                ("DECIDED BY", "decided_by"),
                ("WHY", "why"),
            ],
            answer,
            "nobody is asked",
        ),
        Request::Policies(_) => table(
            &[
                ("POD", "pod"),
                ("PORT", "port"),
                ("POLICY", "policy"),
                ("ALLOWED", "allowed"),
                ("OTHERWISE", "otherwise"),
            ],
            answer,
            "no meshed pod runs on this node",
        ),
        Request::LogLevel { .. } => cell(answer) + "\n",
    }
}

/// Single values line by line, lists as tables below.
fn state(answer: &Value) -> String {
    let mut text = String::new();
    let Value::Object(fields) = answer else {
        return cell(answer) + "\n";
    };
    let width = fields.keys().map(String::len).max().unwrap_or(0);
    // Writing to a String cannot fail.
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_array()) {
        let _ = writeln!(text, "{name:width$}  {}", cell(value));
    }
    for (name, value) in fields.iter().filter(|(_, value)| value.is_array()) {
        let _ = writeln!(text, "\n{}", name.replace('_', " "));
        text += &any_table(value, "none");
    }
    text
}

/// A table whose columns are the fields of the first row.
fn any_table(rows: &Value, empty: &str) -> String {
    let first = rows.as_array().and_then(|rows| rows.first());
    let Some(Value::Object(fields)) = first else {
        return match rows.as_array() {
            Some(rows) if !rows.is_empty() => {
                rows.iter().map(|row| cell(row) + "\n").collect::<String>()
            }
            Some(_) | None => format!("{empty}\n"),
        };
    };
    let titles: Vec<String> = fields
        .keys()
        .map(|name| name.replace('_', " ").to_uppercase())
        .collect();
    let columns: Vec<(&str, &str)> = titles
        .iter()
        .zip(fields.keys())
        .map(|(title, name)| (title.as_str(), name.as_str()))
        .collect();
    table(&columns, rows, empty)
}

fn table(columns: &[(&str, &str)], rows: &Value, empty: &str) -> String {
    let rows = rows.as_array().map_or(&[][..], Vec::as_slice);
    if rows.is_empty() {
        return format!("{empty}\n");
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(columns.iter().map(|(title, _)| *title));
    for row in rows {
        table.add_row(columns.iter().map(|(_, name)| cell(&row[*name])));
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A value in a table.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        // `["word", "sentence"]` and `["counter", 3]` are read as one.
        Value::Array(items) => match &items[..] {
            [] => "-".into(),
            [
                Value::String(word),
                rest @ (Value::String(_) | Value::Number(_)),
            ] => {
                format!("{word}: {}", cell(rest))
            }
            items => items.iter().map(cell).collect::<Vec<_>>().join("\n"),
        },
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{name}={}", cell(value)))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_a_row_with_its_reason_and_counters() {
        let answer = json!([{
            "uid": "u1", "name": "shop/cart", "state": "failed", "slot": null, "repairs": 2,
            "reason": ["netns", "its network namespace is the node's"],
            "counters": [["captured_outbound", 7], ["fragment", 1]],
        }]);
        let text = text(&Request::Pods, &answer);
        for words in [
            "POD",
            "shop/cart",
            "failed",
            "netns: its network namespace is the node's",
            "captured_outbound: 7",
            "fragment: 1",
        ] {
            assert!(text.contains(words), "{words:?} in:\n{text}");
        }
        assert!(!text.contains("u1"), "uids are for programs:\n{text}");
    }

    #[test]
    fn state_shows_values_first_and_lists_as_tables() {
        let answer = json!({
            "node": "n1",
            "problems": [{"object": "shop/api", "message": "selects nothing"}],
            "pending": [],
            "workloads": 12,
        });
        let text = text(&Request::State, &answer);
        assert!(text.contains("node       n1\n"), "{text}");
        assert!(text.contains("workloads  12\n"), "{text}");
        assert!(text.contains("\nproblems\n"), "{text}");
        assert!(text.contains("MESSAGE"), "{text}");
        assert!(text.contains("selects nothing"), "{text}");
        assert!(text.contains("\npending\nnone\n"), "{text}");
    }

    #[test]
    fn an_empty_answer_says_what_it_means() {
        let empty = json!([]);
        assert_eq!(text(&Request::Tunnels, &empty), "no tunnel stands\n");
        assert!(text(&Request::Pods, &empty).starts_with("no meshed pod"));
    }

    #[test]
    fn a_log_level_is_shown_bare() {
        let request = Request::LogLevel { level: None };
        assert_eq!(text(&request, &json!("info")), "info\n");
    }
}
