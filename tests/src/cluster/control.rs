//! The control plane: etcd, API server, controller manager and scheduler in a namespace of their
//! own, and the forwarder that makes the API server reachable from the machine's.

use std::{net::TcpListener, path::Path, thread};

use anyhow::{Context, Result, ensure};

use super::{
    Kubectl, POLL, START,
    component::{Component, words},
    kubeconfig,
    node::Place,
    pki::{Pki, Subject},
    spoken,
};
use crate::{Netns, reaper, wait};

pub(super) const ADDRESS: &str = "192.168.77.2";
pub(super) const ADDRESS6: &str = "fd77::2";
const PORT: u16 = 6443;
/// The first of the addresses of Services is the API server's.
const SERVICES: &str = "10.96.0.0/16";
const SERVICES6: &str = "fd00:96::/112";
pub(super) const PODS: &str = "10.244.0.0/16";
pub(super) const PODS6: &str = "fd00:244::/48";

#[derive(Debug)]
pub struct Control {
    netns: Netns,
    // In the order in which they are to be ended: an API server without etcd waits long.
    forwarders: [Component; 2],
    scheduler: Component,
    controllers: Component,
    api_server: Component,
    etcd: Component,
}

impl Control {
    pub(super) fn start(
        name: &str,
        kubernetes: &Path,
        wire: &Netns,
        pki: &Pki,
        places: &[Place],
        kubectl: &Kubectl,
        kept: bool,
    ) -> Result<Self> {
        let dir = reaper::dir(name);
        let logs = dir.join("logs");
        let netns = Netns::create(&format!("{name}-control"))?;
        plug(wire, &netns, "control", ADDRESS, ADDRESS6)?;
        for place in places {
            netns.ip(&place.routes())?;
        }

        let alternatives: Vec<String> = [
            "DNS:kubernetes",
            "DNS:kubernetes.default",
            "DNS:kubernetes.default.svc",
            "DNS:kubernetes.default.svc.cluster.local",
            "DNS:localhost",
            "IP:127.0.0.1",
            "IP:10.96.0.1",
            "IP:192.168.77.2",
        ]
        .map(str::to_owned)
        .into();
        let subject = |name, group| Subject {
            name,
            group,
            alternatives: &[],
        };
        pki.issue(
            "apiserver",
            &Subject {
                alternatives: &alternatives,
                ..subject("kube-apiserver", "")
            },
        )?;
        pki.issue(
            "kubelet-client",
            &subject("kube-apiserver-kubelet-client", "system:masters"),
        )?;

        let start = |program: &str, args: &[String]| {
            let mut argv = vec![kubernetes.join(program).to_string_lossy().into_owned()];
            argv.extend_from_slice(args);
            Component::start(program, argv, &netns, &logs, kept)
        };
        let data = dir.join("etcd").to_string_lossy().into_owned();
        let etcd = Component::start(
            "etcd",
            words(&[
                "etcd",
                "--data-dir",
                &data,
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
            ]),
            &netns,
            &logs,
            kept,
        )?;
        let services = spoken(SERVICES, SERVICES6).join(",");
        let api_server = start(
            "kube-apiserver",
            &[
                "--etcd-servers=http://127.0.0.1:2379".into(),
                format!("--advertise-address={ADDRESS}"),
                format!("--secure-port={PORT}"),
                format!("--service-cluster-ip-range={services}"),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                "--allow-privileged=true".into(),
                format!("--client-ca-file={}", pki.path("ca.crt")),
                format!("--tls-cert-file={}", pki.path("apiserver.crt")),
                format!("--tls-private-key-file={}", pki.path("apiserver.key")),
                format!("--kubelet-certificate-authority={}", pki.path("ca.crt")),
                format!(
                    "--kubelet-client-certificate={}",
                    pki.path("kubelet-client.crt")
                ),
                format!("--kubelet-client-key={}", pki.path("kubelet-client.key")),
                "--kubelet-preferred-address-types=InternalIP".into(),
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
                format!("--service-account-key-file={}", pki.path("sa.pub")),
                format!("--service-account-signing-key-file={}", pki.path("sa.key")),
            ],
        )?;

        // A socket with a name is seen from every network namespace.
        let socket = dir.join("api.sock").to_string_lossy().into_owned();
        let port = free_port()?;
        let inside = Component::start(
            "forward-inside",
            words(&[
                "socat",
                &format!("UNIX-LISTEN:{socket},fork,mode=600"),
                &format!("TCP:127.0.0.1:{PORT}"),
            ]),
            &netns,
            &logs,
            kept,
        )?;
        let outside = Component::start(
            "forward-outside",
            words(&[
                "socat",
                &format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork"),
                &format!("UNIX-CONNECT:{socket}"),
            ]),
            &Netns::current()?,
            &logs,
            kept,
        )?;
        // Found by nothing but its number: it runs in no namespace of the cluster's.
        if let Some(pid) = outside.pid() {
            reaper::note_process(name, pid)?;
        }
        pki.kubeconfig(
            "admin",
            &subject("kubernetes-admin", "system:masters"),
            &format!("https://127.0.0.1:{port}"),
            &kubeconfig(name),
        )?;
        // Before, they would find no roles and end.
        wait_ready(kubectl, &[&etcd, &api_server])?;

        let server = format!("https://127.0.0.1:{PORT}");
        let client = |file: &str, name: &'static str| -> Result<String> {
            let to = dir.join(format!("{file}.kubeconfig"));
            pki.kubeconfig(file, &subject(name, ""), &server, &to)?;
            Ok(to.to_string_lossy().into_owned())
        };
        let of_controllers = client("controllers", "system:kube-controller-manager")?;
        let of_scheduler = client("scheduler", "system:kube-scheduler")?;
        let controllers = start(
            "kube-controller-manager",
            &[
                format!("--kubeconfig={of_controllers}"),
                format!("--authentication-kubeconfig={of_controllers}"),
                format!("--authorization-kubeconfig={of_controllers}"),
                "--leader-elect=false".into(),
                "--use-service-account-credentials=true".into(),
                // It makes this directory, and its own choice is one of the machine's.
                format!(
                    "--flex-volume-plugin-dir={}",
                    dir.join("volume-plugins").display()
                ),
                format!("--root-ca-file={}", pki.path("ca.crt")),
                format!("--service-account-private-key-file={}", pki.path("sa.key")),
                format!("--cluster-signing-cert-file={}", pki.path("ca.crt")),
                format!("--cluster-signing-key-file={}", pki.path("ca.key")),
            ],
        )?;
        let scheduler = start(
            "kube-scheduler",
            &[
                format!("--kubeconfig={of_scheduler}"),
                format!("--authentication-kubeconfig={of_scheduler}"),
                format!("--authorization-kubeconfig={of_scheduler}"),
                "--leader-elect=false".into(),
            ],
        )?;

        Ok(Self {
            netns,
            forwarders: [outside, inside],
            scheduler,
            controllers,
            api_server,
            etcd,
        })
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub fn api_server(&self) -> &Component {
        &self.api_server
    }

    /// kube-controller-manager.
    pub fn controllers(&self) -> &Component {
        &self.controllers
    }

    pub fn etcd(&self) -> &Component {
        &self.etcd
    }

    pub fn components(&self) -> impl Iterator<Item = &Component> {
        self.forwarders.iter().chain([
            &self.scheduler,
            &self.controllers,
            &self.api_server,
            &self.etcd,
        ])
    }
}

fn wait_ready(kubectl: &Kubectl, components: &[&Component]) -> Result<()> {
    let words = || -> String {
        components
            .iter()
            .map(|c| format!("--- {} ---\n{}\n", c.name(), c.last_words(15)))
            .collect()
    };
    wait::for_value("the API server is ready", START, || {
        if components.iter().any(|c| c.pid().is_none()) {
            return Ok(Some(false));
        }
        thread::sleep(POLL);
        Ok((kubectl.text(&["get", "--raw", "/readyz"])? == "ok").then_some(true))
    })
    .and_then(|ready| {
        ensure!(ready, "it ended");
        Ok(())
    })
    .with_context(words)
}

/// Puts a namespace on the wire.
pub(super) fn plug(wire: &Netns, netns: &Netns, port: &str, v4: &str, v6: &str) -> Result<()> {
    wire.ip(&format!(
        "link add {port} type veth peer name eth0 netns {}\nlink set {port} master br0 up\n",
        netns.name()
    ))?;
    netns.ip(&format!(
        "addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n"
    ))
}

/// A port of the loopback that nobody has at this moment.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// The address families that the cluster's programs are told of, as `--cluster-cidr` takes them.
pub(super) fn pod_networks() -> String {
    spoken(PODS, PODS6).join(",")
}
