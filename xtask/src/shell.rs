//! Where things lie, and how the verbs start cargo.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// The checkout.
pub(crate) fn root() -> &'static Path {
    // xtask lies one level below it.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Where the outer cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(
        || root().join("target"),
        |dir| env::current_dir().unwrap_or_default().join(dir),
    )
}

/// What compilers write down instead of where things lie here, so that a build gives the same bytes
/// in another directory.
pub(crate) fn renamed_paths() -> Vec<(PathBuf, &'static str)> {
    let home = env::var_os("HOME").unwrap_or_else(|| "/root".into());
    let cargo_home =
        env::var_os("CARGO_HOME").map_or_else(|| Path::new(&home).join(".cargo"), PathBuf::from);
    // The last that fits counts, and a target directory may lie in the checkout.
    vec![
        (cargo_home, "/cargo"),
        (root().to_owned(), "/picomesh"),
        (target_dir(), "/target"),
    ]
}

/// [`renamed_paths`] as rustc is told.
pub(crate) fn remap_flags() -> Vec<String> {
    renamed_paths()
        .iter()
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
        .collect()
}

/// The cargo that runs us, in the checkout, free of what it told us about this package alone.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            command.env_remove(name);
        }
    }
    command
}

/// A cargo for another target or tool: nothing of the outer build's settings reaches it but where
/// the registry is.
pub(crate) fn fresh_cargo() -> Command {
    const KEPT: [&str; 7] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_BUILD_JOBS",
    ];
    // By name: rustup's proxy, if there is one, chooses the toolchain.
    let mut command = Command::new("cargo");
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let ours = name.starts_with("CARGO") || name.starts_with("RUST");
        let kept = name.starts_with("RUSTUP_") || KEPT.iter().any(|k| name.starts_with(k));
        if ours && !kept {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command with our own output; an exit code that is not 0 is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {}", words(command)))?;
    ensure!(status.success(), "{}: {status}", words(command));
    Ok(())
}

/// What a command prints, if it succeeds.
pub(crate) fn stdout(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn words(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
