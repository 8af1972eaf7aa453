//! What the tests stand on: the cluster that they share, and pods in it.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use picomesh_tests::{
    Netns,
    cluster::{self, Cluster, Kubectl, NodeSpec},
    requirements, wait,
};
use serde_json::{Value, json};

/// One row of a table.
#[derive(Clone, Copy)]
pub(crate) struct Test {
    /// `subject::promise`.
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn() -> Result<()>,
}

/// What a test cannot run without.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A cluster: one of ours, or the one that KUBECONFIG names.
    Cluster,
    /// A cluster of ours: it reaches into nodes.
    Nodes,
    /// The archive of the agent's image.
    Image,
    /// Minutes that CI does not have: it is there with `cargo xtask test --full` only.
    Full,
}

impl Need {
    /// Why it is not met.
    pub(crate) fn lacks(self) -> Option<String> {
        match self {
            Self::Cluster if foreign().is_some() => (!requirements::program("kubectl")
                && kubernetes().is_err())
            .then(|| "kubectl is missing: install it, or cargo xtask setup --for cluster".into()),
            Self::Nodes if foreign().is_some() => Some(
                "it reaches into nodes, and KUBECONFIG names a cluster of somebody else's".into(),
            ),
            Self::Cluster | Self::Nodes => match kubernetes() {
                Ok(dir) => cluster::lack(&dir),
                Err(e) => Some(format!("{e:#}")),
            },
            Self::Image => image().err().map(|e| format!("{e:#}")),
            // Without it the test is not listed.
            Self::Full => None,
        }
    }
}

/// The cluster that all tests share.
pub(crate) struct Ground {
    kubectl: Kubectl,
    own: Option<Cluster>,
}

static GROUND: Mutex<Option<Arc<Ground>>> = Mutex::new(None);

/// Made by the first who asks.
pub(crate) fn ground() -> Result<Arc<Ground>> {
    let mut ground = GROUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ground) = &*ground {
        return Ok(ground.clone());
    }
    let made = match foreign() {
        Some(kubeconfig) => {
            let program = kubernetes().map_or_else(|_| "kubectl".into(), |dir| dir.join("kubectl"));
            Ground {
                kubectl: Kubectl::new(&program, &kubeconfig),
                own: None,
            }
        }
        None => {
            // The far one starts as a machine does whose system mounts no bpffs.
            let specs = [NodeSpec::default(), NodeSpec { bpffs: false }];
            let own = Cluster::up_with(&kubernetes()?, &specs, false)?;
            Ground {
                kubectl: own.kubectl().clone(),
                own: Some(own),
            }
        }
    };
    Ok(ground.insert(Arc::new(made)).clone())
}

/// Removes the cluster if it is ours.
pub(crate) fn remove() {
    GROUND.lock().unwrap_or_else(PoisonError::into_inner).take();
}

impl Ground {
    pub(crate) fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Ours; only for tests that say [`Need::Nodes`].
    pub(crate) fn own(&self) -> Result<&Cluster> {
        self.own.as_ref().context("not a cluster of ours")
    }

    /// Names of the nodes that take pods.
    pub(crate) fn nodes(&self) -> Result<Vec<String>> {
        let list = self.kubectl.get(&["nodes"])?;
        Ok(items(&list)
            .filter(|node| node["spec"]["unschedulable"] != true)
            .filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned))
            .collect())
    }

    /// A Kubernetes namespace of the test's own.
    pub(crate) fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::create(&self.kubectl, name)
    }
}

/// How long anything of the cluster's may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// Removed when dropped, with all that is in it.
pub(crate) struct Namespace {
    name: String,
    kubectl: Kubectl,
}

impl Namespace {
    /// In a cluster that the test has to itself.
    pub(crate) fn of(cluster: &Cluster, name: &str) -> Result<Self> {
        Self::create(cluster.kubectl(), name)
    }

    fn create(kubectl: &Kubectl, name: &str) -> Result<Self> {
        let namespace = Self {
            name: format!("picomesh-test-{name}"),
            kubectl: kubectl.clone(),
        };
        namespace.make()?;
        Ok(namespace)
    }

    /// Removes it, and when it is gone makes an empty one of the same name.
    pub(crate) fn make_again(&self) -> Result<()> {
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        self.kubectl
            .run(&["delete", "namespace", &self.name, &timeout])?;
        self.make()
    }

    fn make(&self) -> Result<()> {
        self.kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name},
        }))?;
        // Pods need its service account, which a controller makes.
        wait::for_value("the namespace has its service account", PATIENCE, || {
            slowly(self.kubectl(&["get", "serviceaccount", "default"])).map(Some)
        })
        .map(drop)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// kubectl in this namespace.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl
            .run(&[&["--namespace", &self.name], args].concat())
    }

    pub(crate) fn get(&self, what: &[&str]) -> Result<Value> {
        self.kubectl
            .get(&[&["--namespace", &self.name], what].concat())
    }

    /// Applies an object in this namespace.
    pub(crate) fn apply(&self, mut object: Value) -> Result<()> {
        object["metadata"]["namespace"] = json!(self.name);
        self.kubectl.apply(&object)
    }

    /// Starts a pod of one container that runs `command` on `node`.
    pub(crate) fn pod(&self, name: &str, node: &str, image: &str, command: &[&str]) -> Result<()> {
        self.kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": self.name, "labels": {"app": name}},
            "spec": {
                "nodeName": node,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "enableServiceLinks": false,
                "containers": [{
                    "name": "main", "image": image, "imagePullPolicy": "Never",
                    "command": command,
                }],
            },
        }))
    }

    /// A Service for the pods with this label.
    pub(crate) fn service(&self, name: &str, app: &str, port: u16) -> Result<()> {
        self.kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": self.name},
            "spec": {
                "selector": {"app": app},
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"port": port}],
            },
        }))
    }

    pub(crate) fn wait_ready(&self, pod: &str) -> Result<()> {
        self.wait_pod(pod, "condition=Ready")
    }

    pub(crate) fn wait_succeeded(&self, pod: &str) -> Result<()> {
        self.wait_pod(pod, "jsonpath={.status.phase}=Succeeded")
    }

    /// Waits for this of all pods that a selector finds.
    pub(crate) fn wait_all(&self, selector: &str, condition: &str) -> Result<()> {
        let condition = format!("--for={condition}");
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        self.kubectl(&["wait", "pods", "-l", selector, &condition, &timeout])
            .map(drop)
            .with_context(|| {
                self.kubectl(&["describe", "pods", "-l", selector])
                    .unwrap_or_else(|e| format!("{e:#}"))
            })
    }

    /// By one call that watches: a call of kubectl costs a tenth of a second of a core.
    fn wait_pod(&self, pod: &str, condition: &str) -> Result<()> {
        let condition = format!("--for={condition}");
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        self.kubectl(&["wait", "pod", pod, &condition, &timeout])
            .map(drop)
            .with_context(|| {
                self.kubectl(&["describe", "pod", pod])
                    .unwrap_or_else(|e| format!("{e:#}"))
            })
    }

    /// Where a program in the pod is reached, by IPv4.
    pub(crate) fn at(&self, pod: &str, port: u16) -> Result<SocketAddr> {
        let address = self.addresses(pod)?.remove(0);
        let address: IpAddr = address.parse().with_context(|| address.clone())?;
        Ok((address, port).into())
    }

    /// The network namespace of a pod that runs, in a cluster of ours: for programs of the test's
    /// own, of which it can have many.
    pub(crate) fn netns(&self, cluster: &Cluster, pod: &str) -> Result<Netns> {
        let uid = self.get(&["pod", pod])?["metadata"]["uid"].clone();
        let uid = uid.as_str().context("no uid")?;
        let mut processes = cluster.processes_of(uid).into_iter();
        let pid = processes
            .next()
            .with_context(|| format!("{pod} has no process"))?;
        Netns::of_process(pid)
    }

    /// The pod's addresses, IPv4 first.
    pub(crate) fn addresses(&self, pod: &str) -> Result<Vec<String>> {
        addresses(
            &self.get(&["pod", pod])?["status"]["podIPs"],
            |ip| &ip["ip"],
        )
    }

    /// The Service's addresses, IPv4 first.
    pub(crate) fn service_addresses(&self, service: &str) -> Result<Vec<String>> {
        addresses(
            &self.get(&["service", service])?["spec"]["clusterIPs"],
            |ip| ip,
        )
    }

    pub(crate) fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], command].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let gone = self
            .kubectl
            .run(&["delete", "namespace", &self.name, "--wait=false"]);
        if let Err(e) = gone {
            eprintln!("{e:#}");
        }
    }
}

/// What a poll waits for by calling kubectl, which costs a tenth of a second of a core: a failure
/// is told a little later.
pub(crate) fn slowly<T>(asked: Result<T>) -> Result<T> {
    if asked.is_err() {
        thread::sleep(Duration::from_millis(250));
    }
    asked
}

/// The objects of a list.
pub(crate) fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn addresses(list: &Value, one: impl Fn(&Value) -> &Value) -> Result<Vec<String>> {
    let all = list.as_array().context("no addresses")?;
    let mut all: Vec<String> = all
        .iter()
        .filter_map(|address| one(address).as_str().map(str::to_owned))
        .collect();
    all.sort_by_key(|address| address.contains(':'));
    Ok(all)
}

/// An address in a URL.
pub(crate) fn url(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("http://[{address}]:{port}/")
    } else {
        format!("http://{address}:{port}/")
    }
}

pub(crate) fn image() -> Result<PathBuf> {
    file(cluster::AGENT_IMAGE, "the agent's image")
}

/// The directory with Kubernetes' programs.
pub(crate) fn kubernetes() -> Result<PathBuf> {
    file(
        cluster::KUBERNETES,
        "the directory with Kubernetes' programs",
    )
}

fn file(variable: &str, what: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).with_context(|| {
        format!("{what} is missing: cargo xtask test --tier k8s sets {variable}")
    })?;
    let path = Path::new(&path).to_owned();
    if path.exists() {
        Ok(path)
    } else {
        Err(anyhow!("{variable}={}: not there", path.display()))
    }
}

fn foreign() -> Option<PathBuf> {
    env::var_os("KUBECONFIG").map(PathBuf::from)
}
