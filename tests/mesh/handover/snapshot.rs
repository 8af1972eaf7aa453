//! What a restarted agent begins with when its sources are away.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, PodSpec,
    server::{Habit, Server},
    wait,
};
use serde_json::json;

use super::SOON;
use crate::ground::{Ground, PORT, served};

const STATE: &str = "state.snapshot";
const KEYS: &str = "keys.snapshot";

pub(super) fn a_restarted_agent_serves_from_its_snapshot_and_the_sources_win() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    let run_dir = ground.agent(0)?.run_dir().to_owned();
    let kept = snapshots(&run_dir)?;
    for path in &kept {
        let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
        ensure!(mode == 0o600, "{} has mode {mode:o}", path.display());
    }
    let serial = serials(&ground)?;

    ground.agent(0)?.kill9();
    let sources = [
        ground.world.manifests().dir().to_owned(),
        ground.world.ca_dir(),
    ];
    let away = sources.each_ref().map(|dir| dir.with_extension("away"));
    for (dir, away) in sources.iter().zip(&away) {
        fs::rename(dir, away)?;
    }
    let node = ground.world.node(0)?;
    let next = ground
        .world
        .start_agent_with(&node, &AgentOptions::default())?;
    next.wait_ready(SOON)?;
    ground.agents[0] = next;
    // By a tunnel that only a certificate of the known authority opens; the other node has one.
    ensure!(
        served(&ground.near, ground.far.at(PORT)),
        "not served from the snapshot{}",
        ground.logs()
    );
    ensure!(
        serials(&ground)? == serial,
        "the certificates are not those of before: {serial} was, {} is",
        serials(&ground)?
    );
    ensure!(
        !sources[1].exists(),
        "an authority was made in the place of one that is away"
    );

    // The sources are there again, and say something else.
    for (dir, away) in sources.iter().zip(&away) {
        fs::rename(away, dir)?;
    }
    let late = ground.world.pod(&PodSpec::new("late"))?;
    let agent = ground.agent(0)?;
    agent.wait_captured(&late, SOON)?;
    wait::for_value("the new pod is served", SOON, || {
        ensure!(served(&late, ground.far.at(PORT)), "not served");
        Ok(Some(()))
    })
    .with_context(|| agent.process().last_words(20))?;
    wait::for_value("the new state is kept", SOON, || {
        let text = fs::read_to_string(run_dir.join(STATE))?;
        ensure!(text.contains("late"), "the new pod is not in it");
        Ok(Some(()))
    })
}

pub(super) fn a_snapshot_that_does_not_count_is_ignored_with_a_line() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let run_dir = ground.agent(0)?.run_dir().to_owned();
    snapshots(&run_dir)?;
    let node = ground.world.node(0)?;
    type Damage = fn(&Path) -> Result<()>;
    let damages: [(&str, &str, Damage); 3] = [
        (KEYS, "cut off", |path| {
            let bytes = fs::read(path)?;
            Ok(fs::write(path, &bytes[..bytes.len() / 2])?)
        }),
        (STATE, "the boot", |path| {
            let text = fs::read_to_string(path)?;
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
            Ok(fs::write(path, text.replacen(boot.trim(), "another", 1))?)
        }),
        (STATE, "mode 644", |path| {
            Ok(fs::set_permissions(path, PermissionsExt::from_mode(0o644))?)
        }),
    ];
    for (name, line, damage) in damages {
        ground.agent(0)?.kill9();
        let path = run_dir.join(name);
        damage(&path)?;
        let next = ground
            .world
            .start_agent_with(&node, &AgentOptions::default())?;
        next.wait_ready(SOON)?;
        next.wait_log(&["does not count", line], SOON)?;
        ground.agents[0] = next;
        ensure!(
            served(&ground.near, ground.far.at(PORT)),
            "{name}, {line}: not served"
        );
        // What does not count is replaced by what does.
        wait::for_value("a good one is there again", SOON, || {
            let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
            let text = fs::read_to_string(&path)?;
            let length = text.split_once('\n').map_or(0, |(_, body)| body.len());
            let whole = text.contains(&format!("\"bytes\":{length},"));
            ensure!(
                whole && mode == 0o600 && !text.contains("another"),
                "{name}: it is still the damaged one"
            );
            Ok(Some(()))
        })?;
    }

    // An agent that is told of a broken file keeps what was good, and so does the next.
    let manifests = ground.world.manifests().dir().to_owned();
    let file = manifests.join("extra.yaml");
    let extra = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "extra"}});
    fs::write(&file, extra.to_string())?;
    wait::for_value("the file is kept", SOON, || {
        let text = fs::read_to_string(run_dir.join(STATE))?;
        ensure!(text.contains("extra.yaml"), "it is not in the snapshot");
        Ok(Some(()))
    })
    .with_context(|| ground.logs())?;
    fs::File::create(&file)?.write_all(b"kind: [")?;
    ground.agent(0)?.kill9();
    let next = ground
        .world
        .start_agent_with(&node, &AgentOptions::default())?;
    next.wait_ready(SOON)?;
    next.wait_log(&["extra.yaml", "what was good before stays"], SOON)?;
    ground.agents[0] = next;
    Ok(())
}

/// Waits until both are there.
fn snapshots(run_dir: &Path) -> Result<[PathBuf; 2]> {
    let paths = [run_dir.join(STATE), run_dir.join(KEYS)];
    wait::for_value("the snapshot is written", SOON, || {
        for path in &paths {
            fs::metadata(path).with_context(|| path.display().to_string())?;
        }
        // Keys may be written before the certificates came.
        let keys = fs::read_to_string(&paths[1])?;
        ensure!(keys.contains("/sa/near"), "no keys yet");
        Ok(Some(()))
    })?;
    Ok(paths)
}

/// Of the certificates that the agent of node 0 holds.
fn serials(ground: &Ground) -> Result<String> {
    let all = ground.agent(0)?.debug_json(&["certificates"])?;
    let all = all
        .as_array()
        .or_else(|| all["certificates"].as_array())
        .cloned()
        .unwrap_or_default();
    let mut serials: Vec<String> = all.iter().map(|one| one["serial"].to_string()).collect();
    ensure!(!serials.is_empty(), "no certificates");
    serials.sort();
    Ok(serials.join(" "))
}
