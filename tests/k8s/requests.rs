//! Requests for certificates as agents make them, and as they must not be. By openssl: nothing of
//! ours makes what ours has to judge.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::Kubectl, wait};
use serde_json::{Value, json};

use crate::{
    ground::{Ground, slowly},
    install::{NAMESPACE, OwnPod},
};

/// What a request asks for. The default lacks a name, and nothing else.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Alternative names, as openssl writes them.
    pub(crate) names: String,
    /// As openssl takes it, with options.
    pub(crate) key: &'static str,
    pub(crate) subject: &'static str,
    /// One more, as openssl writes it; "" for none.
    pub(crate) extension: &'static str,
    /// What a shell does to the file `request` at last.
    pub(crate) then: &'static str,
    pub(crate) usages: &'static [&'static str],
    pub(crate) seconds: Option<u32>,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            names: String::new(),
            key: "ec -pkeyopt ec_paramgen_curve:prime256v1",
            subject: "/",
            extension: "",
            then: "",
            usages: &["digital signature", "client auth", "server auth"],
            seconds: Some(600),
        }
    }
}

impl Asked {
    /// With a fresh key.
    pub(crate) fn object(&self, name: &str) -> Result<Value> {
        let mut spec = json!({
            "signerName": "picomesh.io/workload",
            "request": self.request()?,
            "usages": self.usages,
        });
        if let Some(seconds) = self.seconds {
            spec["expirationSeconds"] = json!(seconds);
        }
        Ok(json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": spec,
        }))
    }

    /// In base64.
    fn request(&self) -> Result<String> {
        let scratch = tempfile::tempdir()?;
        let script = "openssl req -new -newkey $1 -nodes -keyout key -subj \"$2\" \
                      -addext \"subjectAltName=$3\" ${4:+-addext \"$4\"} -out request\n\
                      eval \"$5\"\nopenssl base64 -A -in request";
        let output = Command::new("sh")
            .args(["-ec", script, "sh"])
            .args([self.key, self.subject, &self.names])
            .args([self.extension, self.then])
            .current_dir(scratch.path())
            .output()?;
        ensure!(
            output.status.success(),
            "{self:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// The cluster as the agent of this pod sees it. `scratch` is a directory.
pub(crate) fn token_of(ground: &Ground, agent: &OwnPod, scratch: &Path) -> Result<Kubectl> {
    let kubectl = ground.kubectl();
    let token = kubectl.text(&[
        "create",
        "token",
        "picomesh-agent",
        "-n",
        NAMESPACE,
        "--bound-object-kind=Pod",
        &format!("--bound-object-name={}", agent.name),
        &format!("--bound-object-uid={}", agent.uid),
    ])?;
    kubectl.with_token(&token, &scratch.join(&agent.name))
}

/// Requests that tests have made: of the whole cluster, so that nothing else removes them. Removed
/// when dropped.
pub(crate) struct Requests<'a> {
    kubectl: &'a Kubectl,
    names: Vec<String>,
}

impl<'a> Requests<'a> {
    pub(crate) fn new(ground: &'a Ground) -> Self {
        Self {
            kubectl: ground.kubectl(),
            names: Vec::new(),
        }
    }

    /// Returns its name.
    pub(crate) fn make(&mut self, by: &Kubectl, name: &str, asked: &Asked) -> Result<String> {
        let name = format!("picomesh-test-{name}");
        let object = asked.object(&name)?;
        by.feed(&["create", "-f", "-"], &object.to_string())?;
        self.names.push(name.clone());
        Ok(name)
    }

    /// Waits until it has a condition of this type. Returns the condition's reason.
    pub(crate) fn wait_reason(
        &self,
        name: &str,
        condition: &str,
        patience: Duration,
    ) -> Result<String> {
        wait::for_value(&format!("{name} is {condition}"), patience, || {
            let request = slowly(self.kubectl.get(&["csr", name]))?;
            let found = reason(&request, condition);
            slowly(found.with_context(|| request["status"].to_string())).map(Some)
        })
    }

    pub(crate) fn wait_issued(&self, name: &str, patience: Duration) -> Result<()> {
        wait::for_value(&format!("{name} has its certificate"), patience, || {
            let request = slowly(self.kubectl.get(&["csr", name]))?;
            let issued = is_issued(&request).then_some(());
            slowly(issued.with_context(|| request["status"].to_string())).map(Some)
        })
    }

    pub(crate) fn is_issued(&self, name: &str) -> Result<bool> {
        Ok(is_issued(&self.kubectl.get(&["csr", name])?))
    }

    /// Those that stand and have a certificate.
    pub(crate) fn issued(&self) -> Result<Vec<&str>> {
        let names = self.names.iter().map(String::as_str);
        let mut issued = Vec::new();
        for name in names {
            if self.is_issued(name)? {
                issued.push(name);
            }
        }
        Ok(issued)
    }
}

impl Drop for Requests<'_> {
    fn drop(&mut self) {
        let names = self.names.iter().map(String::as_str);
        let how = ["delete", "csr", "--ignore-not-found"];
        let all: Vec<&str> = how.into_iter().chain(names).collect();
        if all.len() > how.len()
            && let Err(e) = self.kubectl.run(&all)
        {
            eprintln!("{e:#}");
        }
    }
}

fn is_issued(request: &Value) -> bool {
    let certificate = request["status"]["certificate"].as_str();
    certificate.is_some_and(|text| !text.is_empty())
}

fn reason(request: &Value, condition: &str) -> Option<String> {
    let conditions = request["status"]["conditions"].as_array();
    let mut conditions = conditions.into_iter().flatten();
    let found = conditions.find(|one| one["type"] == condition)?;
    Some(found["reason"].as_str().unwrap_or_default().to_owned())
}
