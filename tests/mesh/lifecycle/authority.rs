//! A new authority takes the old one's place while connections are made all the time.

use std::{fs, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    PodSpec,
    load::Load,
    server::{Habit, Server},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};

use crate::ground::{Ground, PATIENCE, PORT, served};

/// Agents look at the files every second.
const NOTICED: Duration = Duration::from_secs(10);

pub(super) fn the_authority_is_rotated_under_load() -> Result<()> {
    let mut ground = Ground::new()?;
    let _servers =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    let dir = ground.world.ca_dir();
    let standing = Load::on_one_connection(&ground.near, ground.far.at(PORT))?;
    let new_ones = Load::of_connections(&ground.near, ground.far.at6(PORT))?;
    let go_on = || -> Result<()> {
        standing.wait_rounds(100)?;
        new_ones.wait_rounds(100)
    };
    go_on()?;

    // First everybody believes both, then the new one signs.
    let old = fs::read_to_string(dir.join("ca.crt"))?;
    let new = Authority::make()?;
    write(
        &dir.join("ca.crt"),
        0o644,
        &format!("{old}{}", new.certificate),
    )?;
    for agent in &ground.agents {
        agent.wait_log(&["the trust bundle has changed", "anchors=2"], NOTICED)?;
    }
    go_on()?;
    write(&dir.join("tls.key"), 0o600, &new.key)?;
    write(&dir.join("tls.crt"), 0o644, &new.certificate)?;
    std::thread::sleep(Duration::from_millis(2_500));
    go_on()?;

    // Who comes now is signed for by the new one, and talks with those that came before.
    let late = ground.world.pod(&PodSpec::new("late").on(1))?;
    let _server = Server::start(late.netns(), PORT, Habit::Echo)?;
    ground.agent(1)?.wait_captured(&late, PATIENCE)?;
    let newcomer = Load::of_connections(&ground.near, late.at(PORT))?;
    newcomer.wait_rounds(20)?;
    ensure!(
        served(&late, ground.beside.at(PORT)),
        "a pod of the new authority is refused by one of the old"
    );
    for (load, what) in [
        (standing, "the connection that stood all the time"),
        (new_ones, "connections made all the time"),
        (newcomer, "connections to a pod of the new authority"),
    ] {
        load.stop_unharmed().context(what)?;
    }

    // With the old anchor gone only certificates of the new authority are believed: the agents'
    // next lives have no others.
    for node in ground.world.nodes() {
        ground.agent(node.index())?.kill9();
    }
    write(&dir.join("ca.crt"), 0o644, &new.certificate)?;
    ground.mesh().context("with the new authority alone")?;
    for pod in [&ground.far, &late, &ground.beside] {
        ensure!(
            served(&ground.near, pod.at(PORT)),
            "with the new authority alone {} serves nobody",
            pod.name()
        );
    }
    Ok(())
}

/// In PEM.
struct Authority {
    certificate: String,
    key: String,
}

impl Authority {
    fn make() -> Result<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "the next authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self {
            certificate: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// Beside, then renamed, as an administrator's tools do.
fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    use std::io::Write;

    let beside = path.with_extension("new");
    fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(mode)
        .open(&beside)?
        .write_all(text.as_bytes())?;
    fs::rename(&beside, path).with_context(|| format!("replace {}", path.display()))
}
