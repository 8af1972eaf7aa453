//! An authority that somebody else keeps takes the place of the signer's own, and no connection
//! notices.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::TOOLS, crowd::Crowd, load::Load, wait};
use serde_json::json;

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground, slowly},
    install::{NAMESPACE, agent_on, diagnosis, wait_captured},
    requests::{Asked, Requests, token_of},
    talk::{PORT, SLEEP, Scene, both, identity},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "authority::one_that_is_given_is_followed_and_nobody_notices",
    needs: &[Need::Full, Need::Nodes, Need::Image],
    run: one_that_is_given_is_followed_and_nobody_notices,
}];

/// The new anchor is known for a minute before anything is signed below it.
const SPREAD: Duration = Duration::from_secs(60);

fn one_that_is_given_is_followed_and_nobody_notices() -> Result<()> {
    let ground = ground()?;
    let [near, far] = both(ground.own()?)?;
    let scene = Scene::new(&ground, "authority")?;
    let scratch = tempfile::tempdir()?;
    let agent = token_of(&ground, &agent_on(&ground, near.name())?, scratch.path())?;
    let mut requests = Requests::new(&ground);
    let asked = Asked {
        names: format!("URI:{}", identity(&scene.space, "default")),
        ..Asked::default()
    };
    let mut signed_by = |name: &str| -> Result<String> {
        let request = requests.make(&agent, name, &asked)?;
        requests.wait_issued(&request, PATIENCE)?;
        issuer_of(&ground, &request)
    };
    let own = anchors(&ground)?;
    let before = signed_by("before")?;
    ensure!(
        own.len() == 1 && !before.contains(GIVEN),
        "it is given already: {before}"
    );

    let calls = [(0, 1), (1, 0)]
        .map(|(from, to)| {
            let pause = Duration::from_millis(50);
            Crowd::start(&scene.pods[from], &[scene.at[to]; 2], pause)
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let stream = Load::on_one_connection(&scene.pods[0], scene.at[1])?;
    give(&ground, scratch.path())?;
    wait::for_value("both anchors are known", PATIENCE, || {
        let now = slowly(anchors(&ground))?;
        let both = now.len() == 2 && now.contains(&own[0]);
        slowly(both.then_some(()).with_context(|| format!("{now:?}"))).map(Some)
    })
    .with_context(|| diagnosis(&ground))?;
    let mut tries = 0;
    let patience = SPREAD + PATIENCE;
    wait::for_value("the given issuer signs", patience, || {
        tries += 1;
        let by = signed_by(&format!("after-{tries}"))?;
        std::thread::sleep(Duration::from_secs(5));
        slowly(by.contains(GIVEN).then_some(()).context(by)).map(Some)
    })
    .with_context(|| diagnosis(&ground))?;

    // Who has a certificate of the new one and who has one of the old understand each other, both
    // ways.
    let space = &scene.space;
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "late"},
    });
    space.apply(account)?;
    let to = scene.at[1].ip().to_string();
    let word = "echo picomesh-late | nc -w 5";
    let script = format!("{word} {to} {PORT} | grep late && exec {}", SLEEP.join(" "));
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "late", "labels": {"app": "late"}},
        "spec": {
            "nodeName": near.name(),
            "serviceAccountName": "late",
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", script],
            }],
        },
    }))?;
    space.wait_ready("late")?;
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;
    let names = [identity(space, "late"), identity(space, "default")]
        .iter()
        .zip(["src", "dst"])
        .map(|(name, end)| format!("{end}.identity=\"{name}\""))
        .collect();
    crate::talk::wait_told(&ground, far.name(), &[names])?;

    for crowd in calls {
        let fared = crowd.stop()?;
        ensure!(
            fared.opened > 0 && fared.failures.is_empty(),
            "of {} connections failed: {}",
            fared.opened,
            fared.failures.join("; ")
        );
    }
    stream.stop_unharmed()?;
    scene.is_carried(&ground)?;
    scene.is_read_outside_of_the_mesh(&ground)
}

/// What the given issuer calls itself.
const GIVEN: &str = "picomesh-test-given";

/// A root and an issuer by openssl, in the place of the signer's own.
fn give(ground: &Ground, scratch: &Path) -> Result<()> {
    let script = format!(
        "ec='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'\n\
         openssl req -x509 $ec -keyout root.key -out ca.crt -days 3650 -subj /CN={GIVEN}-root \
           -addext basicConstraints=critical,CA:TRUE \
           -addext keyUsage=critical,keyCertSign,cRLSign\n\
         openssl req -new $ec -keyout tls.key -out issuer.csr -subj /CN={GIVEN}\n\
         printf 'basicConstraints=critical,CA:TRUE,pathlen:0\\n\
           keyUsage=critical,keyCertSign,cRLSign\\n' > extensions\n\
         openssl x509 -req -in issuer.csr -CA ca.crt -CAkey root.key -CAcreateserial -days 365 \
           -extfile extensions -out tls.crt"
    );
    let output = Command::new("sh")
        .args(["-ec", &script])
        .current_dir(scratch)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let entry = |name: &str| fs::read_to_string(scratch.join(name));
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "picomesh-issuer", "namespace": NAMESPACE},
        "stringData": {
            "tls.crt": entry("tls.crt")?, "tls.key": entry("tls.key")?, "ca.crt": entry("ca.crt")?,
        },
    });
    let kubectl = ground.kubectl();
    kubectl.feed(&["replace", "-f", "-"], &secret.to_string())?;
    Ok(())
}

fn anchors(ground: &Ground) -> Result<Vec<String>> {
    let get = ["get", "configmap", "picomesh-trust-roots", "-n", NAMESPACE];
    let data = ["-o=jsonpath={.data.ca\\.crt}"];
    let text = ground.kubectl().run(&[&get[..], &data].concat())?;
    let one = |text: &str| text.split_whitespace().collect();
    let begin = "-----BEGIN CERTIFICATE-----";
    Ok(text.split(begin).skip(1).map(one).collect())
}

/// Of a request's certificate.
fn issuer_of(ground: &Ground, request: &str) -> Result<String> {
    let certificate = "-o=jsonpath={.status.certificate}";
    let certificate = ground
        .kubectl()
        .run(&["get", "csr", request, certificate])?;
    let output = Command::new("sh")
        .args([
            "-ec",
            "printf %s \"$1\" | base64 -d | openssl x509 -noout -issuer",
            "sh",
        ])
        .arg(certificate.trim())
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
