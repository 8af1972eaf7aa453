//! Runs one command of a tier: shows what it prints as it comes, and counts it.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use super::count::Count;

/// A command that prints test results counts by them; one that prints none counts as one.
pub(crate) fn run(name: &str, command: &mut Command) -> Count {
    println!("-- {name}");
    // Test results come on standard output; cargo's own words go straight to the terminal.
    let mut child = match command.stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(e) => return Count::failure(name, &format!("does not start: {e}")),
    };
    let mut count = Count::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            count.read(name, &line);
        }
    }
    match child.wait() {
        Ok(status) if status.success() => {
            if count.is_empty() && !is_test(command) {
                count = Count::success();
            }
        }
        // It did not compile, or a test took the whole process with it.
        Ok(status) if count.failed == 0 => count.add(Count::failure(name, &status.to_string())),
        Ok(_) => {}
        Err(e) => count.add(Count::failure(name, &e.to_string())),
    }
    count
}

/// Whether the command counts by its tests: with a filter it may have none, and that is no pass.
fn is_test(command: &Command) -> bool {
    command.get_args().any(|arg| arg == "test")
}
