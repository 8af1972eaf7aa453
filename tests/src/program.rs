//! Programs people really run, in pods: nginx, redis, iperf3, socat, curl. Each function starts
//! one, waits until it listens and hands back its process.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{Pod, World, process::Process};

const START: Duration = Duration::from_secs(10);

/// nginx with one worker: `/` answers with the client's address, `/files/…` serves the directory
/// that [`files`] names. Its access log is off.
pub fn nginx(world: &World, pod: &Pod, port: u16) -> Result<Process> {
    let dir = world.dir().join(format!("nginx-{}", pod.netns().name()));
    fs::create_dir_all(dir.join("files")).with_context(|| format!("create {}", dir.display()))?;
    let at = dir.display();
    // `user root`: the files lie where only root may look.
    let config = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {at}/nginx.pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 600;\n\
         \x20 client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
         \x20 uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         \x20 server {{\n    listen {port} backlog=8192;\n    listen [::]:{port} backlog=8192;\n\
         \x20   location / {{ default_type text/plain; return 200 \"$remote_addr\\n\"; }}\n\
         \x20   location /files/ {{ alias {at}/files/; }}\n  }}\n}}\n"
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config)?;
    let process = pod.spawn(
        &format!("nginx-{}", pod.name()),
        "nginx",
        &[
            "-e",
            &format!("{at}/error.log"),
            "-c",
            &file.to_string_lossy(),
        ],
    )?;
    listening(pod, port, process)
}

/// Where [`nginx`] of this pod finds what it serves below `/files/`.
pub fn files(world: &World, pod: &Pod) -> std::path::PathBuf {
    world
        .dir()
        .join(format!("nginx-{}", pod.netns().name()))
        .join("files")
}

pub fn redis(pod: &Pod, port: u16) -> Result<Process> {
    let process = pod.spawn(
        &format!("redis-{}", pod.name()),
        "redis-server",
        &[
            "--port",
            &port.to_string(),
            "--bind",
            "*",
            "-::*",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
        ],
    )?;
    listening(pod, port, process)
}

pub fn iperf3_server(pod: &Pod, port: u16) -> Result<Process> {
    let process = pod.spawn(
        &format!("iperf3-{}", pod.name()),
        "iperf3",
        &["--server", "--port", &port.to_string(), "--forceflush"],
    )?;
    listening(pod, port, process)
}

/// Gbit/s as the receiving side counted them.
pub fn iperf3(pod: &Pod, to: &str, port: u16, seconds: u32, reverse: bool) -> Result<f64> {
    let (port, time) = (port.to_string(), seconds.to_string());
    let mut args = vec!["--client", to, "--port", &port, "--time", &time, "--json"];
    if reverse {
        args.push("--reverse");
    }
    let output = pod.output(
        "iperf3",
        &args,
        Duration::from_secs(u64::from(seconds) + 15),
    )?;
    let report: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("iperf3: {}{}", output.stdout, output.stderr))?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let bits = report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .context("iperf3 reports no sum_received")?;
    ensure!(bits > 0.0, "iperf3 received nothing");
    Ok(bits / 1e9)
}

/// `socat` that gives every connection to a command.
pub fn socat(pod: &Pod, port: u16, address: &str) -> Result<Process> {
    let process = pod.spawn(
        &format!("socat-{}", pod.name()),
        "socat",
        &[&format!("TCP6-LISTEN:{port},fork,reuseaddr"), address],
    )?;
    listening(pod, port, process)
}

/// curl's body; an error tells curl's code and words.
pub fn curl(pod: &Pod, url: &str) -> Result<String> {
    Ok(pod
        .output(
            "curl",
            &["-sS", "--noproxy", "*", "--max-time", "10", url],
            Duration::from_secs(15),
        )?
        .ok()?
        .stdout)
}

fn listening(pod: &Pod, port: u16, process: Process) -> Result<Process> {
    pod.wait_listening(port, START)
        .with_context(|| process.last_words(10))?;
    Ok(process)
}
