//! The manifests in deploy/ keep what they promise, read as text: a rule, a path or a capability
//! without its reason is red here, and so is a right that nobody should have. That the API server
//! sees it in the same way is the tier `k8s`.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use picomesh_tests::image;
use serde_json::{Value, json};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All documents of a file.
fn documents(path: &Path) -> Vec<Value> {
    let text = text(path);
    let parts = text.split("\n---\n");
    parts
        .map(|part| {
            serde_saphyr::from_str(part).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        })
        .collect()
}

/// Every manifest that is no kustomization.
fn manifests() -> Vec<(PathBuf, Value)> {
    files()
        .into_iter()
        .filter(|path| !path.ends_with(LIST))
        .flat_map(|path| {
            documents(&path)
                .into_iter()
                .map(move |one| (path.clone(), one))
        })
        .collect()
}

const LIST: &str = "kustomization.yaml";

fn files() -> Vec<PathBuf> {
    let (mut dirs, mut found) = (vec![deploy()], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() > 20, "{found:?}");
    found
}

/// Those of the mesh of one kind, by name.
fn of_kind(kind: &str) -> BTreeMap<String, Value> {
    of_kind_in("base", kind)
}

fn of_kind_in(dir: &str, kind: &str) -> BTreeMap<String, Value> {
    let dir = deploy().join("kustomize").join(dir);
    manifests()
        .into_iter()
        .filter(|(path, one)| path.starts_with(&dir) && one["kind"] == kind)
        .map(|(_, one)| (string(&one["metadata"]["name"]), one))
        .collect()
}

fn string(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value}"))
        .to_owned()
}

fn strings(value: &Value) -> BTreeSet<String> {
    list(value).iter().map(string).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn kustomizations_list_every_file_beside_them_and_nothing_else() {
    for path in files().into_iter().filter(|path| path.ends_with(LIST)) {
        let dir = path.parent().unwrap();
        let [kustomization] = &documents(&path)[..] else {
            panic!("{}: one document is expected", path.display())
        };
        let patches = list(&kustomization["patches"]).iter().map(|p| &p["path"]);
        let listed: BTreeSet<String> = ["resources", "components"]
            .iter()
            .flat_map(|field| list(&kustomization[*field]))
            .chain(patches)
            .map(string)
            .collect();
        for name in &listed {
            let at = dir.join(name);
            let is = at.is_file() || at.join(LIST).is_file();
            assert!(is, "{}: {name} is not there", path.display());
        }
        let beside: BTreeSet<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|file| file.is_file() && !file.ends_with(LIST))
            .map(|file| file.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        let own: BTreeSet<String> = listed.into_iter().filter(|n| !n.contains('/')).collect();
        assert_eq!(own, beside, "{}", path.display());
    }
}

#[test]
fn every_manifest_is_an_object_with_a_name() {
    let mut names = BTreeSet::new();
    for (path, object) in manifests() {
        for field in ["/apiVersion", "/kind", "/metadata/name"] {
            let there = object.pointer(field).is_some_and(Value::is_string);
            assert!(there, "{}: no {field}", path.display());
        }
        if path.starts_with(deploy().join("kustomize/components")) {
            continue;
        }
        let key = (
            string(&object["kind"]),
            object["metadata"]["namespace"].clone().to_string(),
            string(&object["metadata"]["name"]),
        );
        assert!(names.insert(key.clone()), "{key:?} is there twice");
    }
}

#[test]
fn no_manifest_has_a_key() {
    for path in files() {
        let text = text(&path);
        assert!(!text.contains("PRIVATE KEY"), "{}", path.display());
    }
    for (path, object) in manifests() {
        assert_ne!(object["kind"], "Secret", "{}", path.display());
    }
}

fn rules() -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for kind in ["ClusterRole", "Role"] {
        for (name, role) in of_kind(kind) {
            for rule in list(&role["rules"]) {
                all.push((name.clone(), rule.clone()));
            }
        }
    }
    assert!(all.len() > 20, "{all:?}");
    all
}

#[test]
fn every_rule_stands_below_its_reason() {
    for path in files() {
        let text = text(&path);
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if line.starts_with("  - apiGroups:") {
                let before = lines[number - 1];
                let at = format!("{}:{}", path.display(), number + 1);
                assert!(before.starts_with("  #"), "{at}: a rule without its reason");
            }
        }
    }
}

#[test]
fn no_rule_has_a_wildcard() {
    for (role, rule) in rules() {
        for field in ["apiGroups", "resources", "verbs"] {
            let all = strings(&rule[field]);
            assert!(!all.is_empty(), "{role}: {rule}");
            assert!(!all.iter().any(|one| one.contains('*')), "{role}: {rule}");
        }
        assert!(rule["nonResourceURLs"].is_null(), "{role}: {rule}");
    }
}

/// Whoever may do this may do everything, by one more step.
const FOR_NOBODY: &[&str] = &["bind", "deletecollection", "escalate", "impersonate"];
const READING: &[&str] = &["get", "list", "watch"];

#[test]
fn nobody_writes_pods_workloads_or_rights() {
    for (role, rule) in rules() {
        let verbs = strings(&rule["verbs"]);
        let taboo = FOR_NOBODY.iter().find(|verb| verbs.contains(**verb));
        assert_eq!(taboo, None, "{role}: {rule}");
        let writes = verbs.iter().any(|verb| !READING.contains(&verb.as_str()));
        for resource in strings(&rule["resources"]) {
            let subresource = resource.contains('/');
            let (resource, sub) = resource.split_once('/').unwrap_or((&resource, ""));
            let mesh = [
                "certificatesigningrequests",
                "configmaps",
                "events",
                "leases",
                "meshnodes",
                "secrets",
                "signers",
            ];
            assert!(
                !writes || mesh.contains(&resource),
                "{role} writes {resource}"
            );
            let known = ["", "approval", "status"];
            assert!(!subresource || known.contains(&sub), "{role}: {rule}");
        }
    }
}

#[test]
fn the_three_accounts_have_nothing_of_each_others() {
    let has = |account: &str, resource: &str, verb: &str| {
        rules().iter().any(|(role, rule)| {
            role == account
                && strings(&rule["resources"]).contains(resource)
                && strings(&rule["verbs"]).contains(verb)
        })
    };
    let (agent, controller, signer) = ("picomesh-agent", "picomesh-controller", "picomesh-signer");
    let approval = "certificatesigningrequests/approval";
    let status = "certificatesigningrequests/status";
    for verb in [
        "get", "list", "watch", "create", "update", "patch", "delete",
    ] {
        for other in [agent, controller] {
            assert!(!has(other, "secrets", verb), "{other} may {verb} secrets");
            assert!(!has(other, status, verb), "{other} may {verb} {status}");
        }
        for other in [agent, signer] {
            assert!(!has(other, approval, verb), "{other} may {verb} {approval}");
        }
    }
    for other in [agent, controller] {
        for verb in ["create", "update", "patch", "delete"] {
            assert!(
                !has(other, "configmaps", verb),
                "{other} may {verb} configmaps"
            );
        }
    }
    // The controls: the search finds what is there.
    assert!(has(signer, "secrets", "get") && has(signer, status, "patch"));
    assert!(has(controller, approval, "patch") && has(signer, "configmaps", "update"));

    // What reads or changes by name has a name.
    for (role, rule) in rules() {
        let resources = strings(&rule["resources"]);
        let named = ["configmaps", "daemonsets", "leases", "secrets", "signers"];
        if named.iter().any(|one| resources.contains(*one)) {
            let only_create = strings(&rule["verbs"]) == BTreeSet::from(["create".to_owned()]);
            assert_ne!(
                only_create,
                rule["resourceNames"].is_array(),
                "{role}: {rule}"
            );
        }
    }
}

#[test]
fn what_may_be_made_or_removed_by_any_name_is_bound_by_an_admission_policy() {
    let policies = of_kind("ValidatingAdmissionPolicy");
    let bindings = of_kind("ValidatingAdmissionPolicyBinding");
    // (operation, resource, the condition that says by whom)
    let mut bound = Vec::new();
    for (name, policy) in &policies {
        assert_eq!(policy["spec"]["failurePolicy"], "Fail", "{name}");
        let binding = bindings
            .get(name)
            .unwrap_or_else(|| panic!("{name}: unbound"));
        assert_eq!(binding["spec"]["policyName"], **name);
        assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
        let [by] = list(&policy["spec"]["matchConditions"]) else {
            panic!("{name}: one condition is expected")
        };
        let by = string(&by["expression"]);
        for rule in list(&policy["spec"]["matchConstraints"]["resourceRules"]) {
            for operation in strings(&rule["operations"]) {
                for resource in strings(&rule["resources"]) {
                    bound.push((operation.clone(), resource, by.clone()));
                }
            }
        }
    }
    for (role, rule) in rules() {
        let account = format!("'system:serviceaccount:picomesh-system:{role}'");
        let verbs = strings(&rule["verbs"]);
        for (verb, operation) in [("create", "CREATE"), ("delete", "DELETE")] {
            if !verbs.contains(verb) {
                continue;
            }
            for resource in strings(&rule["resources"]) {
                // What an Event says is bounded by nothing; it decides nothing either.
                let free = resource == "events"
                    || bound.iter().any(|(at, of, by)| {
                        at == operation && *of == resource && by.contains(&account)
                    });
                assert!(free, "{role} may {verb} {resource} by any name");
            }
        }
    }
}

/// The pods' templates, by the name of what makes them.
fn templates() -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for kind in ["DaemonSet", "Deployment"] {
        for (name, object) in of_kind(kind) {
            let account = &object["spec"]["template"]["spec"]["serviceAccountName"];
            assert_eq!(account, &json!(name), "its account has another name");
            all.insert(name, object["spec"]["template"]["spec"].clone());
        }
    }
    let names: Vec<_> = all.keys().collect();
    assert_eq!(
        names,
        ["picomesh-agent", "picomesh-controller", "picomesh-signer"]
    );
    all
}

#[test]
fn every_container_has_the_image_of_cargo_xtask_image_and_a_limit_of_memory() {
    for (name, spec) in templates() {
        assert_eq!(spec["enableServiceLinks"], false, "{name}");
        for field in ["containers", "initContainers"] {
            for container in list(&spec[field]) {
                assert_eq!(container["image"], image::AGENT, "{name}");
                let context = &container["securityContext"];
                assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
                for resource in ["/requests/cpu", "/requests/memory", "/limits/memory"] {
                    let set = container["resources"].pointer(resource);
                    assert!(set.is_some(), "{name}: no {resource}");
                }
                let limits = &container["resources"]["limits"]["cpu"];
                assert!(limits.is_null(), "{name}: throttled, it delays others");
            }
        }
    }
}

#[test]
fn the_agent_has_three_capabilities_and_each_path_has_its_reason() {
    let spec = &templates()["picomesh-agent"];
    assert_eq!(spec["hostNetwork"], true);
    for field in ["hostPID", "hostIPC"] {
        assert!(spec[field].is_null(), "{field}");
    }
    assert_eq!(spec["priorityClassName"], "system-node-critical");
    assert_eq!(spec["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(
        spec["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    let [agent] = list(&spec["containers"]) else {
        panic!("one container is expected")
    };
    assert!(
        agent["ports"].is_null(),
        "declared, they forbid two agents on a node"
    );
    let context = &agent["securityContext"];
    assert!(context["privileged"].is_null());
    assert_eq!(context["allowPrivilegeEscalation"], false);
    let capabilities = json!({"drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"]});
    assert_eq!(context["capabilities"], capabilities);
    let [mounting] = list(&spec["initContainers"]) else {
        panic!("one init container is expected")
    };
    assert_eq!(mounting["securityContext"]["privileged"], true);
    let [only] = list(&mounting["volumeMounts"]) else {
        panic!("who is privileged has one path")
    };
    assert_eq!(only["name"], "bpffs");
    assert_eq!(only["mountPropagation"], "Bidirectional");

    let mounts: BTreeMap<_, _> = list(&agent["volumeMounts"])
        .iter()
        .map(|mount| (string(&mount["name"]), mount))
        .collect();
    let text = text(&deploy().join("kustomize/base/agent.yaml"));
    let lines: Vec<&str> = text.lines().collect();
    for volume in list(&spec["volumes"]) {
        let name = string(&volume["name"]);
        assert!(volume["hostPath"]["path"].is_string(), "{volume}");
        let mount = mounts
            .get(&name)
            .unwrap_or_else(|| panic!("{name} is not mounted"));
        let reads_only = ["proc", "cgroup"].contains(&name.as_str());
        assert_eq!(mount["readOnly"] == true, reads_only, "{name}");
        let line = format!("        - name: {name}");
        let at = lines.iter().rposition(|one| *one == line).unwrap();
        assert!(
            lines[at - 1].starts_with("        #"),
            "{name} has no reason"
        );
        assert_ne!(volume["hostPath"]["path"], "/", "the whole node");
    }
    for capability in ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"] {
        let line = format!("                - {capability}");
        let at = lines.iter().position(|one| *one == line).unwrap();
        let reason = lines[at - 1].starts_with("                #");
        assert!(reason, "{capability} has no reason");
    }
}

#[test]
fn the_agents_probes_ask_in_its_own_container_and_its_end_outlasts_the_drain() {
    let spec = &templates()["picomesh-agent"];
    let agent = &spec["containers"][0];
    for (probe, what) in [
        ("startupProbe", "serves"),
        ("readinessProbe", "ready"),
        ("livenessProbe", "live"),
    ] {
        let command = json!(["/usr/bin/picomesh-agent", "probe", what]);
        assert_eq!(agent[probe]["exec"]["command"], command, "{probe}");
    }
    let environment = list(&agent["env"]).iter();
    let drain = environment
        .filter(|variable| variable["name"] == "PICOMESH_DRAIN_DEADLINE")
        .find_map(|variable| {
            variable["value"]
                .as_str()?
                .strip_suffix('s')?
                .parse::<u64>()
                .ok()
        })
        .unwrap();
    let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(
        grace >= 2 * drain + 10,
        "{grace} s, and it drains for {drain} s"
    );

    let strategy = &of_kind("DaemonSet")["picomesh-agent"]["spec"]["updateStrategy"];
    assert_eq!(
        strategy["rollingUpdate"],
        json!({"maxSurge": 1, "maxUnavailable": 0})
    );
    let variant = deploy().join("kustomize/components/max-unavailable/agent.yaml");
    let variant = &documents(&variant)[0]["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!(variant, &json!({"maxSurge": 0, "maxUnavailable": 1}));
}

#[test]
fn what_an_agent_left_is_cleaned_as_the_agent_saw_it_and_only_until_it_is_done() {
    let mut found = of_kind_in("cleanup", "DaemonSet");
    let cleanup = found.remove("picomesh-cleanup").unwrap();
    let spec = &cleanup["spec"]["template"]["spec"];
    // It runs where agents ran, whatever becomes of other pods, and asks nobody.
    let agent = &templates()["picomesh-agent"];
    for field in [
        "hostNetwork",
        "nodeSelector",
        "priorityClassName",
        "tolerations",
    ] {
        assert_eq!(spec[field], agent[field], "{field}");
    }
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert!(spec["serviceAccountName"].is_null());
    for field in ["hostPID", "hostIPC"] {
        assert!(spec[field].is_null(), "{field}");
    }
    // Removing the mesh must not remove it, nor it the mesh.
    let namespaces = of_kind_in("cleanup", "Namespace");
    assert_eq!(cleanup["metadata"]["namespace"], "picomesh-cleanup");
    assert!(namespaces.contains_key("picomesh-cleanup"));
    assert_eq!(of_kind_in("cleanup", "ClusterRole").len(), 0);

    let ([cleans], [waits]) = (list(&spec["initContainers"]), list(&spec["containers"])) else {
        panic!("one container that cleans and one that waits are expected")
    };
    assert_eq!(cleans["args"], json!(["cleanup"]));
    assert_eq!(waits["args"], json!(["cleanup", "--wait"]));
    let host_root = |container: &Value| {
        let all = list(&container["env"]).iter();
        let mut named = all.filter(|variable| variable["name"] == "PICOMESH_HOST_ROOT");
        string(&named.next().unwrap()["value"])
    };
    // What pins and records name, they name by these.
    let root = host_root(&agent["containers"][0]);
    assert_eq!(host_root(cleans), root);
    let paths: BTreeMap<_, _> = list(&spec["volumes"])
        .iter()
        .map(|volume| (string(&volume["name"]), &volume["hostPath"]["path"]))
        .collect();
    let mounts: BTreeMap<_, _> = list(&cleans["volumeMounts"])
        .iter()
        .map(|mount| {
            let from = string(paths[&string(&mount["name"])]);
            (from, string(&mount["mountPath"]))
        })
        .collect();
    let wanted = [
        ("/", root.as_str()),
        ("/run", "/run"),
        ("/sys/fs/bpf", "/sys/fs/bpf"),
    ];
    let wanted = wanted.map(|(from, to)| (from.to_owned(), to.to_owned()));
    assert_eq!(mounts, BTreeMap::from(wanted));
    for container in [cleans, waits] {
        assert_eq!(container["image"], image::AGENT);
        let context = &container["securityContext"];
        assert!(context["privileged"].is_null());
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
    }
    let of_agent = &agent["containers"][0]["securityContext"]["capabilities"];
    assert_eq!(&cleans["securityContext"]["capabilities"], of_agent);
    assert!(waits["securityContext"]["capabilities"]["add"].is_null());
    assert_eq!(waits["securityContext"]["runAsNonRoot"], true);
    assert!(waits["volumeMounts"].is_null() && waits["env"].is_null());
}

#[test]
fn controller_and_signer_have_nothing_of_the_node() {
    for name in ["picomesh-controller", "picomesh-signer"] {
        let spec = &templates()[name];
        for field in ["hostNetwork", "hostPID", "volumes", "initContainers"] {
            assert!(spec[field].is_null(), "{name}: {field}");
        }
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(
            spec["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        let [container] = list(&spec["containers"]) else {
            panic!("{name}: one container is expected")
        };
        let context = &container["securityContext"];
        assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}), "{name}");
        let argument = name.strip_prefix("picomesh-").unwrap();
        assert_eq!(container["args"], json!([argument]), "{name}");
        assert_eq!(of_kind("Deployment")[name]["spec"]["replicas"], 2, "{name}");
    }
}

#[test]
fn scrapers_find_the_agents_by_the_port_that_linkerds_users_know() {
    let service = &of_kind("Service")["picomesh-agent"]["spec"];
    assert_eq!(service["clusterIP"], "None");
    assert_eq!(
        service["ports"],
        json!([{"name": "linkerd-admin", "port": 4191}])
    );
}

#[test]
fn linkerds_kinds_are_not_part_of_what_is_applied_and_removed() {
    for path in files().into_iter().filter(|path| path.ends_with(LIST)) {
        let listed = text(&path);
        let listed = listed
            .lines()
            .filter(|line| line.trim_start().starts_with("- "));
        for line in listed {
            assert!(!line.contains("policy-crds"), "{}: {line}", path.display());
        }
    }
    let definitions = manifests().into_iter().filter(|(_, one)| {
        one["kind"] == "CustomResourceDefinition" && one["spec"]["group"] != "picomesh.io"
    });
    for (path, _) in definitions {
        let apart = deploy().join("kustomize/policy-crds");
        assert!(path.starts_with(apart), "{}", path.display());
    }
}
