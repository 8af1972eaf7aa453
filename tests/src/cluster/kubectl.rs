//! kubectl, of this cluster or of any other.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::wait;

/// What a call may take, and then it is killed.
const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    /// Where it keeps what it learnt of the API server; its own place if there is none.
    cache: Option<PathBuf>,
}

impl Kubectl {
    pub fn new(program: &Path, kubeconfig: &Path) -> Self {
        Self {
            program: program.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            cache: None,
        }
    }

    pub(super) fn caching_in(self, cache: &Path) -> Self {
        Self {
            cache: Some(cache.to_owned()),
            ..self
        }
    }

    /// The same cluster as somebody else sees it: by a token, and by nothing of our own. Writes
    /// the kubeconfig for that.
    pub fn with_token(&self, token: &str, kubeconfig: &Path) -> Result<Self> {
        let mut config = self.config()?;
        config["users"] = json!([{"name": "token", "user": {"token": token}}]);
        config["contexts"][0]["context"]["user"] = json!("token");
        self.with_config(&config, kubeconfig)
    }

    /// The same cluster as an administrator sees it who takes another's name, and says what the API
    /// server would know of that one's token.
    pub fn impersonating(
        &self,
        user: &str,
        extra: &[(&str, &str)],
        kubeconfig: &Path,
    ) -> Result<Self> {
        let mut config = self.config()?;
        let own = &mut config["users"][0]["user"];
        own["as"] = json!(user);
        for (key, value) in extra {
            own["as-user-extra"][*key] = json!([value]);
        }
        self.with_config(&config, kubeconfig)
    }

    fn config(&self) -> Result<Value> {
        let shown = self.run(&["config", "view", "--raw", "--minify", "-o=json"])?;
        serde_json::from_str(&shown).context("the kubeconfig")
    }

    fn with_config(&self, config: &Value, kubeconfig: &Path) -> Result<Self> {
        fs::write(kubeconfig, config.to_string())
            .with_context(|| format!("write {}", kubeconfig.display()))?;
        Ok(Self {
            kubeconfig: kubeconfig.to_owned(),
            ..self.clone()
        })
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The command, for who wants its input and output for himself. It ends after a deadline.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after", "5"])
            .arg(wait::patience(DEADLINE).as_secs().to_string())
            .arg(&self.program)
            .args(args)
            .env("KUBECONFIG", &self.kubeconfig);
        if let Some(cache) = &self.cache {
            command.env("KUBECACHEDIR", cache);
        }
        command
    }

    /// Calls it; an exit code that is not 0 is an error with what it said. Returns what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.feed(args, "")
    }

    /// The same, without the blanks around.
    pub fn text(&self, args: &[&str]) -> Result<String> {
        Ok(self.run(args)?.trim().to_owned())
    }

    /// `get … -o json`
    pub fn get(&self, what: &[&str]) -> Result<Value> {
        let text = self.run(&[&["get", "-o", "json"], what].concat())?;
        serde_json::from_str(&text).context("parse what kubectl printed")
    }

    /// Applies an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.feed(&["apply", "-f", "-"], &object.to_string())
            .map(drop)
    }

    /// The same, and what it reads on standard input.
    pub fn feed(&self, args: &[&str], input: &str) -> Result<String> {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start timeout: is coreutils installed?")?;
        if let Some(mut stdin) = child.stdin.take() {
            // It may end without reading: then its exit code says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "kubectl {}: {}: {stdout}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(stdout)
    }
}
