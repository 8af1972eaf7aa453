//! The cluster's certificates, as kubeadm makes them: one authority, and one certificate for
//! everybody who speaks with the API server. By `openssl`, so that no crypto library is linked here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

#[derive(Debug)]
pub(super) struct Pki {
    dir: PathBuf,
}

/// What a certificate says.
pub(super) struct Subject<'a> {
    pub(super) name: &'a str,
    /// "" for none.
    pub(super) group: &'a str,
    /// As openssl writes them: `DNS:kubernetes`, `IP:10.96.0.1`.
    pub(super) alternatives: &'a [String],
}

impl Pki {
    /// Makes the authority and the key that signs service accounts' tokens.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        // Nothing of the machine's own openssl.cnf gets in.
        fs::write(
            dir.join("openssl.cnf"),
            "[req]\ndistinguished_name = name\n[name]\n",
        )?;
        let pki = Self {
            dir: dir.to_owned(),
        };
        pki.request(
            "ca",
            &["-subj", "/CN=kubernetes"],
            &[
                "basicConstraints=critical,CA:TRUE",
                "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
                "subjectKeyIdentifier=hash",
            ],
        )?;
        pki.openssl(&[
            "genpkey",
            "-algorithm",
            "EC",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-out",
            "sa.key",
        ])?;
        pki.openssl(&["pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub"])?;
        Ok(pki)
    }

    /// Makes `<file>.crt` and `<file>.key`.
    pub(super) fn issue(&self, file: &str, subject: &Subject) -> Result<()> {
        let group = match subject.group {
            "" => String::new(),
            group => format!("/O={group}"),
        };
        let alternatives = format!("subjectAltName={}", subject.alternatives.join(","));
        let mut extensions = vec![
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "extendedKeyUsage=serverAuth,clientAuth",
        ];
        if !subject.alternatives.is_empty() {
            extensions.push(&alternatives);
        }
        let name = format!("{group}/CN={}", subject.name);
        let args = ["-subj", &name, "-CA", "ca.crt", "-CAkey", "ca.key"];
        self.request(file, &args, &extensions)
    }

    /// Makes a certificate for a client, and the kubeconfig that shows it to the API server at
    /// `server`.
    pub(super) fn kubeconfig(
        &self,
        file: &str,
        subject: &Subject,
        server: &str,
        to: &Path,
    ) -> Result<()> {
        self.issue(file, subject)?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "picomesh",
            "clusters": [{"name": "picomesh", "cluster": {
                "server": server, "certificate-authority": self.path("ca.crt"),
            }}],
            "users": [{"name": subject.name, "user": {
                "client-certificate": self.path(&format!("{file}.crt")),
                "client-key": self.path(&format!("{file}.key")),
            }}],
            "contexts": [{"name": "picomesh", "context": {
                "cluster": "picomesh", "user": subject.name,
            }}],
        });
        fs::write(to, serde_json::to_vec_pretty(&config)?)
            .with_context(|| format!("write {}", to.display()))
    }

    pub(super) fn path(&self, file: &str) -> String {
        self.dir.join(file).to_string_lossy().into_owned()
    }

    fn request(&self, file: &str, args: &[&str], extensions: &[&str]) -> Result<()> {
        let (key, certificate) = (format!("{file}.key"), format!("{file}.crt"));
        let mut all = vec![
            "req",
            "-x509",
            "-config",
            "openssl.cnf",
            "-days",
            "365",
            "-sha256",
            "-nodes",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-keyout",
            &key,
            "-out",
            &certificate,
        ];
        all.extend(args);
        for extension in extensions {
            all.extend(["-addext", extension]);
        }
        self.openssl(&all)
    }

    fn openssl(&self, args: &[&str]) -> Result<()> {
        let output = Command::new("openssl")
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .args(args)
            .output()
            .context("start openssl: is it installed?")?;
        ensure!(
            output.status.success(),
            "openssl {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}
