//! `cargo xtask mutants`: changes the files that decide, one operator at a time, and runs their
//! tests. A change that no test notices must have a written reason in `xtask/mutants.txt`.
//!
//! Hundreds of changes are only affordable if each costs seconds, and the whole agent takes a
//! minute to compile. What decides stands on few rooms and does no IO, so the changes are made in
//! a copy of the workspace whose agent has these rooms alone. The copy builds where the workspace
//! builds and with its lock file: everything but these rooms is compiled already.

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cache::CARGO_MUTANTS,
    needs::{self, Purpose},
    shell,
    test::Count,
};

/// The files whose every branch is somebody's access.
const FILES: [&str; 7] = [
    "agent/src/state/policy.rs",
    "agent/src/state/network_policy.rs",
    "agent/src/state/servers.rs",
    "agent/src/state/endpoints.rs",
    "agent/src/state/resolve.rs",
    "agent/src/state/frontends.rs",
    "agent/src/state/balance.rs",
];

/// The agent's rooms in the copy: `state`, and those by which its tests read manifests.
const ROOMS: [&str; 4] = ["k8s", "local", "state", "testing"];

/// What of them speaks with an API server: it decides nothing, and reaches into other rooms.
const LEFT_OUT: [(&str, &str); 5] = [
    ("k8s", "client"),
    ("k8s", "events"),
    ("k8s", "removal"),
    ("k8s", "status"),
    ("k8s", "watch"),
];

/// Tests of the room that decides; those of the others would only take time.
const TESTS: &str = "state::";

/// Survivors that were looked at: `FILE: CHANGE = REASON`, one a line.
const ACCEPTED: &str = "xtask/mutants.txt";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change only this file, e.g. agent/src/state/policy.rs
    #[arg(long = "file", value_name = "PATH")]
    files: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    for file in &args.files {
        ensure!(
            copied(file) && shell::root().join(file).is_file(),
            "--file {file}: no such file; name one below agent/src/{{{}}}, from the checkout's root",
            ROOMS.join(",")
        );
    }
    let count = if args.files.is_empty() {
        count()
    } else {
        tally(verdicts(&args.files))
    };
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    Ok(if count.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One pass for all mutants together, or one failure for each survivor without a reason and for
/// each reason without a survivor.
pub(crate) fn count() -> Count {
    tally(verdicts(&FILES.map(str::to_owned)))
}

fn tally(verdicts: Result<Vec<String>>) -> Count {
    match verdicts {
        Ok(verdicts) if verdicts.is_empty() => Count::success(),
        Ok(verdicts) => {
            let mut count = Count::default();
            for verdict in verdicts {
                count.add(Count::failure("mutants", &verdict));
            }
            count
        }
        Err(e) => Count::failure("mutants", &format!("{e:#}")),
    }
}

/// What is wrong with the changes of these files.
fn verdicts(files: &[String]) -> Result<Vec<String>> {
    needs::ensure(&[Purpose::Build, Purpose::Mutants])?;
    let accepted = accepted()?;
    let missed = missed(files)?;
    Ok(judge(&missed, &accepted, files))
}

/// Changes that no test noticed, as cargo-mutants names them.
fn missed(files: &[String]) -> Result<Vec<String>> {
    let output = shell::target_dir().join("mutants");
    let copy = output.join("source");
    copy_rooms(&copy)?;
    let mut command = shell::cargo();
    command.current_dir(&copy);
    command.args(["mutants", "--package", "picomesh-agent"]);
    // In place: the copy is ours, and one build directory makes each build an incremental one.
    command.args(["--in-place", "--no-shuffle", "--colors", "never"]);
    for file in files {
        command.args(["--file", file]);
    }
    command
        .arg("--output")
        .arg(&output)
        .args(["--minimum-test-timeout", "60"])
        // The library alone; the binary is not whole.
        .args(["--cargo-arg=--lib", "--", TESTS])
        .env("CARGO_TARGET_DIR", shell::target_dir())
        .env("PATH", path());
    let status = command.status().context("start cargo mutants")?;
    // 0: all caught; 2: some missed; 3: some timed out, which counts as noticed.
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        bail!("cargo mutants: {status}");
    }
    let missed = fs::read_to_string(output.join("mutants.out/missed.txt"))
        .context("read what cargo mutants missed")?;
    Ok(missed.lines().map(without_position).collect())
}

/// A workspace at `to` with `common` and an agent of [`ROOMS`] only.
fn copy_rooms(to: &Path) -> Result<()> {
    let root = shell::root();
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to.join("agent/src"))?;
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    fs::write(to.join("Cargo.toml"), with_members(&manifest)?)?;
    for file in ["Cargo.lock", "agent/Cargo.toml"] {
        fs::copy(root.join(file), to.join(file)).with_context(|| format!("copy {file}"))?;
    }
    copy_dir(&root.join("common"), &to.join("common"))?;
    // `agent/Cargo.toml` names files in these; nobody compiles them here.
    for named in ["agent/src/bin", "agent/examples", "agent/tests"] {
        copy_dir(&root.join(named), &to.join(named))?;
    }
    let mut library = String::new();
    for room in ROOMS {
        let path = format!("agent/src/{room}");
        copy_dir(&root.join(&path), &to.join(&path))?;
        library.push_str(&format!("pub mod {room};\n"));
    }
    for (room, module) in LEFT_OUT {
        leave_out(&to.join("agent/src").join(room), module)?;
    }
    fs::write(to.join("agent/src/lib.rs"), library)?;
    Ok(())
}

fn leave_out(room: &Path, module: &str) -> Result<()> {
    let _ = fs::remove_dir_all(room.join(module));
    let _ = fs::remove_file(room.join(format!("{module}.rs")));
    let parent = room.join("mod.rs");
    let text = fs::read_to_string(&parent)?;
    let line = format!("mod {module};");
    let rest: Vec<&str> = text.lines().filter(|one| !one.ends_with(&line)).collect();
    ensure!(
        rest.len() + 1 == text.lines().count(),
        "{} has no line {line:?} to take out; see LEFT_OUT",
        parent.display()
    );
    fs::write(&parent, rest.join("\n")).context("write a room without a module")
}

/// The workspace's manifest with the two members that the copy has.
fn with_members(manifest: &str) -> Result<String> {
    let mut found = false;
    let lines: Vec<&str> = manifest
        .lines()
        .filter(|line| !line.starts_with("default-members"))
        .map(|line| {
            let members = line.starts_with("members = [") && line.ends_with(']');
            found |= members;
            if members {
                "members = [\"agent\", \"common\"]"
            } else {
                line
            }
        })
        .collect();
    ensure!(found, "Cargo.toml: no line `members = […]` to replace");
    Ok(lines.join("\n"))
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_dir(&from, &to)?;
        } else {
            fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
        }
    }
    Ok(())
}

/// Whether a file is in the copy.
fn copied(file: &str) -> bool {
    ROOMS
        .iter()
        .any(|room| file.starts_with(&format!("agent/src/{room}/")))
}

/// Survivors nobody explained, and explanations of these files' changes that are noticed by now.
fn judge(missed: &[String], accepted: &BTreeMap<String, String>, files: &[String]) -> Vec<String> {
    let unexplained = missed
        .iter()
        .filter(|name| !accepted.contains_key(*name))
        .map(|name| format!("no test notices: {name}; test it or tell why in {ACCEPTED}"));
    let outdated = accepted
        .keys()
        .filter(|name| files.iter().any(|f| name.starts_with(&format!("{f}: "))))
        .filter(|name| !missed.contains(name))
        .map(|name| format!("{ACCEPTED} tells why {name}, which a test notices: take it out"));
    unexplained.chain(outdated).collect()
}

fn accepted() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(shell::root().join(ACCEPTED))
        .with_context(|| format!("read {ACCEPTED}"))?;
    parse_accepted(&text)
}

fn parse_accepted(text: &str) -> Result<BTreeMap<String, String>> {
    let mut accepted = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // A change may contain "=" of its own; the reason may not contain " = ".
        match line.rsplit_once(" = ") {
            Some((name, reason)) if !reason.trim().is_empty() => {
                accepted.insert(name.trim().to_owned(), reason.trim().to_owned());
            }
            Some(_) | None => bail!("{ACCEPTED}: {line:?} has no reason; write CHANGE = REASON"),
        }
    }
    Ok(accepted)
}

/// `file.rs:12:5: change` → `file.rs: change`; lines move, changes stay.
fn without_position(mutant: &str) -> String {
    match mutant.split_once(": ") {
        Some((place, change)) => {
            let file = place.split(':').next().unwrap_or(place);
            format!("{file}: {change}")
        }
        None => mutant.to_owned(),
    }
}

fn path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", CARGO_MUTANTS.bin_dir().display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survivor_is_known_by_file_and_change() {
        assert_eq!(
            without_position("agent/src/state/policy.rs:12:5: replace a == b with true"),
            "agent/src/state/policy.rs: replace a == b with true"
        );
    }

    #[test]
    fn a_survivor_needs_a_reason_and_a_reason_a_survivor() {
        let accepted = BTreeMap::from([
            ("a.rs: x".to_owned(), "why".to_owned()),
            ("b.rs: y".to_owned(), "why".to_owned()),
        ]);
        let files = ["a.rs".to_owned()];
        let judged = |missed: &[&str]| {
            let missed: Vec<String> = missed.iter().map(|m| (*m).to_owned()).collect();
            judge(&missed, &accepted, &files)
        };
        assert!(judged(&["a.rs: x"]).is_empty());
        // The reason in b.rs is not asked about.
        let verdicts = judged(&["a.rs: z"]);
        assert_eq!(verdicts.len(), 2, "{verdicts:?}");
        assert!(verdicts[0].contains("no test notices: a.rs: z"));
        assert!(verdicts[1].contains("tells why a.rs: x"));
    }

    /// The copy is built by `--full` only: this is what tells at once that it no longer can be.
    #[test]
    fn the_copy_names_no_room_that_it_does_not_have() {
        let name = format!("picomesh-mutants-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        copy_rooms(&dir).unwrap();
        let mut files = vec![dir.join("agent/src")];
        let mut named = 0;
        while let Some(path) = files.pop() {
            if path.is_dir() {
                let entries = fs::read_dir(&path).unwrap();
                // Other programs.
                files.extend(
                    entries
                        .map(|one| one.unwrap().path())
                        .filter(|one| !one.ends_with("bin")),
                );
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for room in rooms_named(&text) {
                named += 1;
                assert!(
                    ROOMS.contains(&room),
                    "{} names crate::{room}",
                    path.display()
                );
            }
        }
        assert!(named > 20, "{named}");
        fs::remove_dir_all(dir).unwrap();
        let text = "use crate::{\n    a::{b, c::d}, e,\n};\nlet x = crate::f::g();";
        assert_eq!(rooms_named(text), ["a", "e", "f"]);
    }

    /// First words behind `crate::`, alone or in braces.
    fn rooms_named(text: &str) -> Vec<&str> {
        let mut named = Vec::new();
        for (at, word) in text.match_indices("crate::") {
            let rest = &text[at + word.len()..];
            let Some(list) = rest.strip_prefix('{') else {
                named.push(first_word(rest));
                continue;
            };
            let mut depth = 1;
            let mut begins = 0;
            for (at, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 || (depth == 1 && c == ',') {
                    named.push(first_word(list[begins..at].trim_start()));
                    begins = at + 1;
                }
                if depth == 0 {
                    break;
                }
            }
        }
        named.retain(|word| !word.is_empty());
        named
    }

    fn first_word(text: &str) -> &str {
        let ends = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        &text[..ends.unwrap_or(text.len())]
    }

    #[test]
    fn the_copy_has_two_members() {
        let manifest = fs::read_to_string(shell::root().join("Cargo.toml")).unwrap_or_default();
        let changed = with_members(&manifest);
        assert!(changed.is_ok_and(|text| {
            text.contains("members = [\"agent\", \"common\"]") && !text.contains("xtask\"]")
        }));
        assert!(with_members("[workspace]\n").is_err());
    }

    #[test]
    fn an_accepted_survivor_needs_a_reason() {
        let good = parse_accepted("# why\n\na.rs: replace == with != = both are zero\n");
        assert!(good.is_ok_and(|a| a["a.rs: replace == with !="] == "both are zero"));
        assert!(parse_accepted("a.rs: replace x with y\n").is_err());
    }
}
