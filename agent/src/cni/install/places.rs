//! Where Kubernetes distributions keep their network configurations and plugins.
//!
//! | distribution | configurations | plugins | source |
//! | --- | --- | --- | --- |
//! | kubeadm, kind, RKE2, most others | `/etc/cni/net.d` | `/opt/cni/bin` | containerd, docs/cri/config.md (`bin_dir`, `conf_dir`) |
//! | Debian's containerd | `/etc/cni/net.d` | `/usr/lib/cni` | its package containernetworking-plugins |
//! | K3s since October 2024 | `/var/lib/rancher/k3s/agent/etc/cni/net.d` | `/var/lib/rancher/k3s/data/cni` | docs.k3s.io/networking/multus-ipams; k3s-io/k3s pull request 10868 |
//! | K3s before | the same | `/var/lib/rancher/k3s/data/current/bin` | the same page |
//! | K3s in a container (k3d) up to 1.31.6 | the same | `/bin` | k3d-io/k3d issue 1572, k3s-io/k3s issue 11497 |
//! | MicroK8s | `/var/snap/microk8s/current/args/cni-network` | `/var/snap/microk8s/current/opt/cni/bin` | istio.io/docs/ambient/install/platform-prerequisites |
//!
//! Which of them a node has is not asked but seen: the directory of configurations that has one,
//! and the directory that holds the programs that this one names.

/// Directories of configurations, and for each those where its plugins may be. More special ones
/// first: a node of K3s may have an empty or forgotten /etc/cni/net.d besides.
pub(super) const PLACES: &[(&str, &[&str])] = &[
    (
        "/var/lib/rancher/k3s/agent/etc/cni/net.d",
        &[
            "/var/lib/rancher/k3s/data/cni",
            "/var/lib/rancher/k3s/data/current/bin",
            "/bin",
        ],
    ),
    (
        "/var/snap/microk8s/current/args/cni-network",
        &["/var/snap/microk8s/current/opt/cni/bin"],
    ),
    ("/etc/cni/net.d", &["/opt/cni/bin", "/usr/lib/cni"]),
];
