use clap::Parser as _;

use super::*;

fn parse(args: &[&str]) -> Result<Config, BadValue> {
    parse_with(args, |_| None)
}

fn parse_with(
    args: &[&str],
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Config, BadValue> {
    let required = ["picomesh-agent", "run", "--node", "n1"];
    let dirs = ["--manifests", "/", "--ca-dir", "/ca"];
    let all = [&required, &dirs, args].concat();
    let cli = Cli::try_parse_from(all).unwrap();
    let Command::Run(run) = cli.command else {
        panic!("not `run`")
    };
    run.config(environment)
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = parse(&[]).unwrap();
    assert_eq!(&*config.mesh.node, "n1");
    assert_eq!(&*config.mesh.trust_domain, "cluster.local");
    assert_eq!(
        config.mesh.default_inbound_policy,
        DefaultPolicy::AllUnauthenticated
    );
    assert_eq!(config.mesh.outbound_default, OutboundDefault::Allow);
    assert_eq!(config.mesh.cluster_networks.len(), 5);
    assert_eq!(config.run_dir, PathBuf::from("/run/picomesh"));
    assert_eq!(config.bpf_dir, PathBuf::from("/sys/fs/bpf/picomesh"));
    assert_eq!(config.metrics_address, "[::]:4191".parse().unwrap());
    assert!(wildcard_of_both_families(config.metrics_address));
    assert_eq!(config.tunnel_port, 15008);
    assert_eq!(config.caps, CapSettings::default());
    assert!(config.data_threads >= 1);
    assert!(!config.istio_metrics && !config.fail_open && !config.force_clsact);
    assert_eq!(config.drain_deadline, Duration::from_secs(30));
    assert_eq!(config.certificate_life, crate::identity::ca::LIFE);
    assert_eq!(config.log_level, "info");
    assert_eq!(config.access_log, AccessLogTarget::Stdout);
    assert_eq!(config.rules, picomesh_common::config::rule::ALL);
}

#[test]
fn flags_reach_the_configuration() {
    let config = parse(&[
        "--default-inbound-policy=cluster-authenticated",
        "--outbound-default=deny",
        "--cluster-networks=10.0.0.0/8,fd00::/8",
        "--metrics=linkerd",
        "--metrics=istio",
        "--metrics-address=127.0.0.1:0",
        "--tunnel-port=25008",
        "--data-threads=3",
        "--drain-deadline=250ms",
        "--certificate-life=2m",
        "--hbone-to-pods",
        "--pod-connections=20000",
        "--pod-inbound-connections=25000",
        "--pod-connection-rate=100000",
        "--pod-pending=7",
        "--pod-buffers=512KiB",
        "--node-connections=30000",
        "--node-buffers=2GiB",
        "--peer-tunnels=77",
        "--access-log=/var/log/access",
    ])
    .unwrap();
    assert_eq!(
        config.mesh.default_inbound_policy,
        DefaultPolicy::ClusterAuthenticated
    );
    assert_eq!(config.mesh.outbound_default, OutboundDefault::Deny);
    assert_eq!(config.mesh.cluster_networks.len(), 2);
    assert!(config.istio_metrics && config.hbone_to_pods);
    assert!(!wildcard_of_both_families(config.metrics_address));
    assert_eq!(config.tunnel_port, 25008);
    assert_eq!(config.data_threads, 3);
    let caps = CapSettings {
        pod_connections: Some(20_000),
        pod_inbound_connections: Some(25_000),
        pod_rate: Some(100_000),
        pod_pending: Some(7),
        pod_buffers: Some(512 << 10),
        node_connections: Some(30_000),
        node_buffers: Some(2 << 30),
        peer_tunnels: Some(77),
    };
    assert_eq!(config.caps, caps);
    assert_eq!(config.drain_deadline, Duration::from_millis(250));
    assert_eq!(config.certificate_life, Duration::from_secs(120));
    let path = PathBuf::from("/var/log/access");
    assert_eq!(config.access_log, AccessLogTarget::File(path));
}

#[test]
fn an_unusable_value_names_flag_value_and_remedy() {
    for (args, expected) in [
        (
            ["--trust-domain", "Cluster.Local"],
            "--trust-domain is \"Cluster.Local\": a name",
        ),
        (
            ["--trust-domain", "a..b"],
            "--trust-domain is \"a..b\": a name",
        ),
        (
            ["--cluster-domain", "-a.b"],
            "--cluster-domain is \"-a.b\": a name",
        ),
        (
            ["--data-threads", "0"],
            "--data-threads is \"0\": 1 to 64 are possible",
        ),
        (
            ["--data-threads", "65"],
            "--data-threads is \"65\": 1 to 64 are possible",
        ),
        (
            ["--tunnel-port", "0"],
            "--tunnel-port is \"0\": 1 to 65535 are possible; the other nodes must know it",
        ),
        (
            ["--drain-deadline", "30"],
            "--drain-deadline is \"30\": a whole number",
        ),
        (
            ["--drain-deadline", "-1s"],
            "--drain-deadline is \"-1s\": a whole number",
        ),
        (
            ["--certificate-life", "59s"],
            "--certificate-life is \"59s\": 1m to 720h are possible",
        ),
        (
            ["--certificate-life", "721h"],
            "--certificate-life is \"721h\": 1m to 720h are possible",
        ),
        (
            ["--run-dir", "here"],
            "--run-dir is \"here\": an absolute path",
        ),
        (
            ["--access-log", "here"],
            "--access-log is \"here\": write stdout, off",
        ),
        (["--log-level", "loud"], "--log-level is \"loud\": "),
        (
            ["--pod-connections", "0"],
            "--pod-connections is \"0\": 1 to 1000000",
        ),
        (
            ["--node-connections", "10000001"],
            "--node-connections is \"10000001\": 1 to 10000000",
        ),
        (
            ["--pod-buffers", "1KiB"],
            "--pod-buffers is \"1KiB\": a whole number and a unit is needed, 64KiB to 64GiB",
        ),
        (
            ["--node-buffers", "64MB"],
            "--node-buffers is \"64MB\": a whole number and a unit",
        ),
    ] {
        let args = [&format!("{}={}", args[0], args[1])[..]];
        let error = parse(&args).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn missing_manifests_are_named() {
    let all = [
        "x",
        "run",
        "--node=n1",
        "--manifests=/no/such",
        "--ca-dir=/ca",
    ];
    let Command::Run(run) = Cli::try_parse_from(all).unwrap().command else {
        panic!("not `run`")
    };
    let error = run.config(|_| None).unwrap_err();
    assert_eq!((error.flag, &*error.value), ("--manifests", "/no/such"));
}

#[test]
fn linkerds_variable_sets_the_level_and_the_flag_wins() {
    let environment = |name: &str| (name == "LINKERD_LOG_LEVEL").then(|| OsString::from("warn"));
    assert_eq!(parse_with(&[], environment).unwrap().log_level, "warn");
    let both = parse_with(&["--log-level=debug"], environment).unwrap();
    assert_eq!(both.log_level, "debug");
}

#[test]
fn rules_are_left_out_in_test_builds_alone() {
    let off =
        |rule: &'static str| parse_with(&[], move |name| (name == RULES_OFF).then(|| rule.into()));
    assert_eq!(off("").unwrap().rules, picomesh_common::config::rule::ALL);
    if cfg!(feature = "testing") {
        use picomesh_common::config::rule;
        let without = off("never-plain").unwrap().rules;
        assert_eq!(without, rule::ALL & !rule::NEVER_PLAIN);
        assert!(
            off("no-such-rule")
                .unwrap_err()
                .remedy
                .contains("never-plain")
        );
    } else {
        assert!(off("never-plain").is_err());
    }
}

#[test]
fn a_test_build_alone_passes_for_another() {
    let named = |value: &'static str| {
        parse_with(&[], move |name| (name == GENERATION).then(|| value.into()))
    };
    assert_eq!(named("").unwrap().generation, Generation::default());
    if cfg!(feature = "testing") {
        let other = named("7/other").unwrap().generation;
        assert_eq!((other.layout, &*other.name), (7, "other"));
        assert!(named("other").unwrap_err().remedy.contains("7/other"));
    } else {
        assert!(named("7/other").is_err());
    }
}

#[test]
fn debug_takes_its_flags_before_and_after_the_subject() {
    for args in [
        ["picomesh-agent", "debug", "--run-dir=/r", "-ojson", "pods"],
        ["picomesh-agent", "debug", "pods", "--run-dir=/r", "-ojson"],
    ] {
        let Command::Debug(debug) = Cli::try_parse_from(args).unwrap().command else {
            panic!("not `debug`")
        };
        assert_eq!(debug.run_dir, PathBuf::from("/r"));
        assert_eq!(debug.output, OutputArg::Json);
        assert!(matches!(debug.subject, DebugSubject::Pods));
    }
}

fn source(args: &[&str], in_a_pod: bool) -> Result<Source, BadValue> {
    let all = [&["picomesh-agent", "run", "--node", "n1"], args].concat();
    let Command::Run(run) = Cli::try_parse_from(all).unwrap().command else {
        panic!("not `run`")
    };
    let environment = |name: &str| (in_a_pod && name == IN_A_POD).then(|| "10.96.0.1".into());
    run.config(environment).map(|config| config.source)
}

#[test]
fn without_manifests_the_cluster_is_the_source() {
    let install = InstallSettings {
        host_root: "/".into(),
        conf_dir: None,
        bin_dir: None,
        program: std::env::current_exe()
            .unwrap()
            .with_file_name("picomesh-cni"),
        run_dir: "/run/picomesh".into(),
        intent: "/var/lib/picomesh/cni.json".into(),
    };
    let cluster = |kubeconfig: Option<&str>, namespace: &str| Source::Cluster {
        kubeconfig: kubeconfig.map(PathBuf::from),
        namespace: namespace.into(),
        cni: Cni {
            host_root: "/".into(),
            install: install.clone(),
            plugin: true,
        },
    };
    assert_eq!(source(&[], true), Ok(cluster(None, "picomesh-system")));
    assert_eq!(
        source(&["--kubeconfig=/k", "--namespace=mesh"], false),
        Ok(cluster(Some("/k"), "mesh"))
    );
    let elsewhere = [
        "--host-root=/host",
        "--cni-conf-dir=/c",
        "--cni-bin-dir=/b",
        "--run-dir=/r",
    ];
    let Source::Cluster { cni, .. } = source(&elsewhere, true).unwrap() else {
        panic!("not a cluster")
    };
    let there = InstallSettings {
        host_root: "/host".into(),
        conf_dir: Some("/c".into()),
        bin_dir: Some("/b".into()),
        run_dir: "/r".into(),
        ..install.clone()
    };
    assert_eq!((cni.host_root, cni.install), ("/host".into(), there));
    let Source::Cluster { cni, .. } = source(&["--no-cni"], true).unwrap() else {
        panic!("not a cluster")
    };
    // Where it would be must be known: an agent before may have put it there.
    assert_eq!((cni.install, cni.plugin), (install, false));
    let error = source(&["--cni-bin-dir=b"], true).unwrap_err();
    assert_eq!(error.flag, "--cni-bin-dir");
    let error = source(&[], false).unwrap_err();
    assert_eq!(error.flag, "--manifests");
    assert!(error.remedy.contains("--kubeconfig"), "{error}");
    let local = Source::Local {
        manifests: "/".into(),
        ca_dir: "/ca".into(),
    };
    assert_eq!(source(&["--manifests=/", "--ca-dir=/ca"], true), Ok(local));
    for wrong in [
        &["--manifests=/"][..],
        &["--ca-dir=/ca"],
        &["--manifests=/", "--ca-dir=/ca", "--kubeconfig=/k"],
    ] {
        let all = [&["picomesh-agent", "run", "--node", "n1"], wrong].concat();
        assert!(Cli::try_parse_from(all).is_err(), "{wrong:?}");
    }
}
