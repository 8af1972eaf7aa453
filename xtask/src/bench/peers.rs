//! The peers: Debian's haproxy and nginx as they come, in TCP mode, mutual TLS between the nodes.
//!
//! Node A takes plain connections and carries each over TLS 1.3 to node B, which checks A's
//! certificate as A checks B's, and hands the bytes to the server. P-256 keys, certificates of
//! 24 hours, a worker or thread per core; whatever else is configurable stays at its default,
//! session resumption included. Nothing redirects the client: it dials an address of node A, so
//! a peer pays for no capture, and the server sees node B's address instead of the client's.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{Node, World, process::Process};

use super::stage::{BULK, HTTP};

/// Where node B takes what comes from node A, by the port it is for.
const TLS_HTTP: u16 = 9080;
const TLS_BULK: u16 = 9081;
/// Names in the nodes' certificates; side A demands B's.
const SIDE_A: &str = "node-a.bench.internal";
const SIDE_B: &str = "node-b.bench.internal";
const NGINX_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// Room for a thousand connections through each side, and to spare.
const CONNECTIONS: u32 = 4096;

/// The ways through both peers: port at node A, port at node B.
const WAYS: [(u16, u16); 2] = [(HTTP, TLS_HTTP), (BULK, TLS_BULK)];

/// haproxy on both nodes, the one that the client dials first.
pub(crate) fn haproxy(world: &World, server: [SocketAddr; 2]) -> Result<Vec<Process>> {
    let certificates = Certificates::make(world)?;
    let (a, b) = (world.node(0)?, world.node(1)?);
    let head = format!(
        "global\n  maxconn {CONNECTIONS}\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
    );
    let tls = |side: &str| {
        format!(
            "ssl crt {} ca-file {} verify required ssl-min-ver TLSv1.3",
            certificates.bundle(side).display(),
            certificates.anchor().display()
        )
    };
    let (mut near, mut far) = (head.clone(), head);
    for ((plain, secure), server) in WAYS.into_iter().zip(server) {
        near += &format!(
            "listen way{plain}\n  bind {}:{plain}\n  server b {}:{secure} {} verifyhost {SIDE_B}\n",
            a.v4(),
            b.v4(),
            tls(SIDE_A)
        );
        far += &format!(
            "listen way{plain}\n  bind {}:{secure} {}\n  server pod {server}\n",
            b.v4(),
            tls(SIDE_B)
        );
    }
    [(a, near), (b, far)]
        .into_iter()
        .map(|(node, config)| {
            let file = world.dir().join(format!("haproxy-{}.cfg", node.name()));
            fs::write(&file, config)?;
            let file = file.to_string_lossy();
            start(&node, "haproxy", &["-db", "-f", &file])
        })
        .collect()
}

/// nginx on both nodes, the one that the client dials first.
pub(crate) fn nginx(world: &World, server: [SocketAddr; 2]) -> Result<Vec<Process>> {
    ensure!(
        Path::new(NGINX_MODULE).exists(),
        "{NGINX_MODULE} is missing; install the package libnginx-mod-stream"
    );
    let certificates = Certificates::make(world)?;
    let (a, b) = (world.node(0)?, world.node(1)?);
    let (mut near, mut far) = (String::new(), String::new());
    for ((plain, secure), server) in WAYS.into_iter().zip(server) {
        near += &format!(
            "  server {{\n    listen {}:{plain};\n    proxy_pass {}:{secure};\n    proxy_ssl on;\n    \
             proxy_ssl_name {SIDE_B};\n    proxy_ssl_verify on;\n    proxy_ssl_protocols TLSv1.3;\n    \
             proxy_ssl_certificate {};\n    proxy_ssl_certificate_key {};\n    \
             proxy_ssl_trusted_certificate {};\n  }}\n",
            a.v4(),
            b.v4(),
            certificates.certificate(SIDE_A).display(),
            certificates.key(SIDE_A).display(),
            certificates.anchor().display(),
        );
        far += &format!(
            "  server {{\n    listen {}:{secure} ssl;\n    proxy_pass {server};\n    \
             ssl_protocols TLSv1.3;\n    ssl_certificate {};\n    ssl_certificate_key {};\n    \
             ssl_verify_client on;\n    ssl_client_certificate {};\n  }}\n",
            b.v4(),
            certificates.certificate(SIDE_B).display(),
            certificates.key(SIDE_B).display(),
            certificates.anchor().display(),
        );
    }
    [(a, near), (b, far)]
        .into_iter()
        .map(|(node, servers)| {
            let dir = world.dir().join(format!("nginx-{}", node.name()));
            fs::create_dir_all(&dir)?;
            let config = format!(
                "load_module {NGINX_MODULE};\nuser root;\ndaemon off;\nworker_processes auto;\n\
                 worker_rlimit_nofile {files};\nerror_log stderr;\npid {dir}/pid;\n\
                 events {{ worker_connections {CONNECTIONS}; }}\n\
                 stream {{\n  proxy_timeout 1h;\n{servers}}}\n",
                files = CONNECTIONS * 2,
                dir = dir.display(),
            );
            let file = dir.join("nginx.conf");
            fs::write(&file, config)?;
            start(
                &node,
                "nginx",
                &["-e", "stderr", "-c", &file.to_string_lossy()],
            )
        })
        .collect()
}

fn start(node: &Node, program: &str, args: &[&str]) -> Result<Process> {
    node.spawn(&format!("{program}-{}", node.name()), program, args)
}

/// One authority and a certificate for either side, made with the openssl program.
struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    fn make(world: &World) -> Result<Self> {
        let dir = world.dir().join("peers");
        fs::create_dir_all(&dir)?;
        let made = Self { dir };
        let key = made.key("anchor");
        let anchor = made.anchor();
        made.openssl(&[
            "-keyout",
            &key.to_string_lossy(),
            "-out",
            &anchor.to_string_lossy(),
            "-subj",
            "/CN=bench",
        ])?;
        for side in [SIDE_A, SIDE_B] {
            made.openssl(&[
                "-CA",
                &anchor.to_string_lossy(),
                "-CAkey",
                &key.to_string_lossy(),
                "-keyout",
                &made.key(side).to_string_lossy(),
                "-out",
                &made.certificate(side).to_string_lossy(),
                "-subj",
                &format!("/CN={side}"),
                "-addext",
                &format!("subjectAltName=DNS:{side}"),
                "-addext",
                "basicConstraints=critical,CA:FALSE",
            ])?;
            let bundle = [fs::read(made.certificate(side))?, fs::read(made.key(side))?];
            fs::write(made.bundle(side), bundle.concat())?;
        }
        Ok(made)
    }

    fn openssl(&self, args: &[&str]) -> Result<()> {
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "1"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(args)
            .output()
            .context("start `openssl`; install the package openssl")?;
        ensure!(
            output.status.success(),
            "openssl req {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    fn anchor(&self) -> PathBuf {
        self.certificate("anchor")
    }

    fn certificate(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.crt"))
    }

    fn key(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.key"))
    }

    /// Certificate and key in one file, as haproxy wants them.
    fn bundle(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.pem"))
    }
}
