//! The lab of this suite, and the questions that all its parts ask.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use mesh_netns::lab::OUTSIDE_IP;
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, PodSpec, Process, manifest};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

/// What puts a namespace into the mesh.
pub(crate) const AMBIENT: (&str, &str) = ("culvert.dev/dataplane-mode", "ambient");
/// Port of the web server outside the mesh.
pub(crate) const OUTSIDE_PORT: u16 = 9000;

/// Two nodes; `mesh/server` on b; on a `mesh/client`, `far/visitor` and `plain/stranger`, who is not in the mesh.
pub(crate) struct Mesh {
    pub(crate) lab: Lab,
    servers: Vec<Process>,
    pub(crate) resolver: crate::dns::Resolver,
}

impl AsRef<Lab> for Mesh {
    fn as_ref(&self) -> &Lab {
        &self.lab
    }
}

impl Mesh {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut lab = Lab::start(LabConfig::two_nodes("rul"))?;
        for namespace in ["mesh", "far"] {
            lab.apply(&manifest::namespace(namespace, &[AMBIENT]))?;
        }
        lab.apply(&manifest::namespace("plain", &[]))?;
        serve(lab.outside(), OUTSIDE_PORT, "outside")?;
        let resolver = crate::dns::Resolver::start(lab.outside())?;
        lab.run_pod("a", PodSpec::new("mesh", "client"))?;
        lab.run_pod("a", PodSpec::new("far", "visitor"))?;
        lab.run_pod("a", PodSpec::new("plain", "stranger"))?;
        let mut mesh = Self { lab, servers: Vec::new(), resolver };
        mesh.run_server("mesh", "server")?;
        for client in ["client", "visitor", "stranger"] {
            mesh.wait_for(client, mesh.server())?;
        }
        Ok(mesh)
    }

    /// Runs a pod on b with nginx and the lab's peer in it.
    pub(crate) fn run_server(&mut self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let bin_dir = self.lab.bin_dir().to_owned();
        let pod = self.lab.run_pod("b", PodSpec::new(namespace, name))?;
        self.servers.push(servers::nginx(pod)?);
        self.servers.push(servers::peer(pod, &bin_dir)?);
        Ok(())
    }

    /// Where the server's nginx is.
    pub(crate) fn server(&self) -> SocketAddr {
        SocketAddr::new(self.lab.pod("server").ipv4, ports::HTTP)
    }

    /// True when a pod gets an answer from a web server.
    pub(crate) fn reaches(&self, pod: &str, target: SocketAddr) -> anyhow::Result<bool> {
        Ok(self.get(pod, &target.to_string())?.is_some())
    }

    /// What a pod gets from a web server; `None` when it gets nothing.
    pub(crate) fn get(&self, pod: &str, host: &str) -> anyhow::Result<Option<String>> {
        let mut curl = self.lab.pod(pod).command("curl");
        let done = run(curl.args(["-sS", "-g", "-m", "20", &format!("http://{host}/")]), PATIENCE)?;
        Ok(done.success().then_some(done.stdout))
    }

    /// Waits until a pod gets an answer.
    pub(crate) fn wait_for(&self, pod: &str, target: SocketAddr) -> anyhow::Result<()> {
        until(&format!("{pod} reaching {target}"), PATIENCE, || {
            Ok(self.reaches(pod, target)?.then_some(()))
        })
    }

    /// What the controller answers to "would this connection be made".
    pub(crate) fn explain(&self, pod: &str, target: SocketAddr) -> anyhow::Result<Value> {
        let from = format!("{}/{pod}", self.lab.pod(pod).spec.namespace);
        let answer = self.lab.culvert(&["explain", &from, &target.to_string(), "-o", "json"])?;
        serde_json::from_str(&answer.stdout)
            .with_context(|| format!("explain: {}{}", answer.stdout, answer.stderr))
    }

    /// The path of the lab's peer program.
    pub(crate) fn peer_program(&self) -> String {
        self.lab.bin_dir().join("culvert-lab-peer").to_string_lossy().into_owned()
    }

    /// Everything the controller has logged.
    pub(crate) fn controller_log(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.lab.folder().join("controller.log"))?)
    }
}

/// The log of an agent from now on.
pub(crate) struct LogFromNow {
    file: PathBuf,
    skip: usize,
}

impl LogFromNow {
    pub(crate) fn of(mesh: &Mesh, node: &str) -> anyhow::Result<Self> {
        let file = mesh.lab.folder().join(format!("node-{node}/agent.log"));
        let skip = std::fs::read_to_string(&file)?.len();
        Ok(Self { file, skip })
    }

    /// Waits for a line that holds every one of `parts`.
    pub(crate) fn line(&self, parts: &[&str]) -> anyhow::Result<String> {
        until(&format!("a line with {parts:?}"), PATIENCE, || {
            Ok(self.lines(parts)?.into_iter().next())
        })
    }

    /// The lines so far that hold every one of `parts`.
    pub(crate) fn lines(&self, parts: &[&str]) -> anyhow::Result<Vec<String>> {
        let log = std::fs::read_to_string(&self.file)?;
        let new = log.get(self.skip..).unwrap_or_default();
        let wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        Ok(new.lines().filter(wanted).map(str::to_owned).collect())
    }
}

/// The value of `key=` in a line of the access log.
pub(crate) fn field<'l>(line: &'l str, key: &str) -> Option<&'l str> {
    let start = line.find(&format!(" {key}=")).or_else(|| line.find(&format!("\t{key}=")))?;
    let value = &line[start + key.len() + 2..];
    match value.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => value.split([' ', '\n']).next(),
    }
}

/// The sum of a metric's series that have all of these labels.
pub(crate) fn sum_of(metrics: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    metrics
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))
        .filter(|line| {
            labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Runs `work` on a thread in a network namespace.
pub(crate) fn inside<T: Send>(
    namespace: &str,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let netns = File::open(PathBuf::from("/run/netns").join(namespace))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().map_err(|_panic| anyhow!("the thread in {namespace} panicked"))?
    })
}

/// A small web server in a namespace that is no pod's, for as long as this program runs.
pub(crate) fn serve(namespace: &str, port: u16, name: &'static str) -> anyhow::Result<()> {
    let listener = inside(namespace, || Ok(TcpListener::bind(("::", port))?))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answered = (|mut stream: std::net::TcpStream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                let _request = stream.read(&mut [0; 4096])?;
                write!(stream, "HTTP/1.0 200 OK\r\n\r\nhello from {name}\n")
            })(stream);
            if let Err(error) = answered {
                eprintln!("{name}: {error}");
            }
        }
    });
    Ok(())
}

/// Where the web server outside the mesh is.
pub(crate) fn outside_target() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(OUTSIDE_IP.parse::<IpAddr>()?, OUTSIDE_PORT))
}

/// A namespace's object with further annotations.
pub(crate) fn annotated(mut object: Value, annotations: &Value) -> Value {
    object["metadata"]["annotations"] = json!(annotations);
    object
}
