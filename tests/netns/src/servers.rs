//! Real servers for pods: nginx, redis, PostgreSQL, iperf3, and the lab's own peer.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::pod::Pod;
use crate::process::{Process, run};
use crate::wait::{PATIENCE, until};

/// Ports of the real servers; those of the lab's peer are in [`crate::peer::ports`].
pub mod ports {
    /// nginx, HTTP/1.1.
    pub const HTTP: u16 = 8080;
    /// nginx, HTTP/2 with prior knowledge.
    pub const HTTP2: u16 = 8081;
    /// redis.
    pub const REDIS: u16 = 6379;
    /// PostgreSQL.
    pub const POSTGRES: u16 = 5432;
    /// iperf3.
    pub const IPERF: u16 = 5201;
}

/// Starts nginx: `GET /` answers `hello from <pod> to <client address>`, HTTP/1.1 and HTTP/2.
///
/// # Errors
/// When it does not listen in time.
pub fn nginx(pod: &Pod) -> anyhow::Result<Process> {
    let folder = pod.folder().join("nginx");
    std::fs::create_dir_all(&folder)?;
    let config = format!(
        "daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;\n\
         fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;\n\
         keepalive_requests 1000000;\n\
         server {{ listen {http}; listen [::]:{http}; listen {h2} http2; listen [::]:{h2} http2;\n\
         location / {{ return 200 \"hello from {name} to $remote_addr\\n\"; }} }} }}\n",
        folder = folder.display(),
        http = ports::HTTP,
        h2 = ports::HTTP2,
        name = pod.spec.name,
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config)?;
    let mut command = pod.command("nginx");
    command.arg("-c").arg(&file).arg("-e").arg(folder.join("error.log"));
    let process = pod.start("nginx", &mut command)?;
    listening(pod, ports::HTTP)?;
    Ok(process)
}

/// Starts redis without persistence.
///
/// # Errors
/// When it does not listen in time.
pub fn redis(pod: &Pod) -> anyhow::Result<Process> {
    let mut command = pod.command("redis-server");
    command.args(["--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir"]);
    command.arg(pod.folder());
    let process = pod.start("redis", &mut command)?;
    listening(pod, ports::REDIS)?;
    Ok(process)
}

/// Starts iperf3's server.
///
/// # Errors
/// When it does not listen in time.
pub fn iperf(pod: &Pod) -> anyhow::Result<Process> {
    let mut command = pod.command("iperf3");
    command.args(["-s", "-p", &ports::IPERF.to_string()]);
    let process = pod.start("iperf3", &mut command)?;
    listening(pod, ports::IPERF)?;
    Ok(process)
}

/// Starts PostgreSQL with a fresh cluster that trusts everybody.
///
/// # Errors
/// When its programs are missing or it does not listen in time.
pub fn postgres(pod: &Pod) -> anyhow::Result<Process> {
    let programs = postgres_programs()?;
    let data = pod.folder().join("postgres");
    std::fs::create_dir_all(&data)?;
    run(Command::new("chown").arg("postgres").arg(&data), PATIENCE)?.output()?;
    // The cluster's folder is reached through the lab's, which others than root must be able to enter.
    run(Command::new("chmod").arg("o+x").arg(pod.folder()), PATIENCE)?.output()?;
    let mut initdb = Command::new("runuser");
    initdb.args(["-u", "postgres", "--"]).arg(programs.join("initdb"));
    initdb.args(["--auth=trust", "--no-sync", "-D"]).arg(&data).current_dir("/");
    run(&mut initdb, Duration::from_secs(60))?.output().context("initdb")?;
    std::fs::write(
        data.join("pg_hba.conf"),
        "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n",
    )?;
    let mut command = pod.command("runuser");
    command.args(["-u", "postgres", "--"]).arg(programs.join("postgres"));
    command.args(["-c", "listen_addresses=*", "-c", "fsync=off", "-c"]);
    command.arg(format!("unix_socket_directories={}", data.display())).arg("-D").arg(&data);
    let process = pod.start("postgres", command.current_dir("/"))?;
    listening(pod, ports::POSTGRES)?;
    Ok(process)
}

fn postgres_programs() -> anyhow::Result<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed: run cargo xtask setup")?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|folder| folder.join("postgres").is_file())
        .collect();
    versions.sort();
    versions.pop().context("PostgreSQL is not installed: run cargo xtask setup")
}

/// Starts the lab's own peer.
///
/// # Errors
/// When it does not serve in time.
pub fn peer(pod: &Pod, bin_dir: &Path) -> anyhow::Result<Process> {
    let mut command = pod.command(&bin_dir.join("culvert-lab-peer").to_string_lossy());
    command.arg("serve");
    let process = pod.start("peer", &mut command)?;
    until("the lab's peer serving", PATIENCE, || {
        Ok(process.log().contains("serving").then_some(()))
    })?;
    Ok(process)
}

/// Waits until something listens on `port` in the pod.
///
/// # Errors
/// When nothing does in time.
pub fn listening(pod: &Pod, port: u16) -> anyhow::Result<()> {
    until(&format!("port {port} listening in {}", pod.spec.name), PATIENCE, || {
        let sockets = pod.shell(&format!("ss -Hltn sport = :{port}"))?;
        Ok((!sockets.stdout.trim().is_empty()).then_some(()))
    })
}
