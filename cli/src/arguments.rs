//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::failure::EXIT_CODES;

/// Looks at a Culvert mesh, and takes pods in and out of it.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Whom to ask.
    #[command(flatten)]
    pub(crate) reach: Reach,
    /// Whether a cluster is meant, and which.
    #[command(flatten)]
    pub(crate) cluster: ClusterReach,
    /// Tables for people, or the server's JSON, untouched, for programs.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Where the daemons listen.
#[derive(Clone, Debug, Args)]
pub(crate) struct Reach {
    /// Folder of the agent's sockets, `agent.sock` and `admin.sock`
    #[arg(long, env = "CULVERT_RUN_DIR", default_value = "/run/culvert", global = true)]
    pub(crate) run_dir: PathBuf,
    /// The controller's admin socket: its --admin-socket
    #[arg(
        long,
        env = "CULVERT_CONTROLLER_SOCKET",
        default_value = "/run/culvert-controller/admin.sock",
        global = true
    )]
    pub(crate) controller_socket: PathBuf,
    /// How long to wait for an answer, seconds
    #[arg(
        long = "timeout",
        value_name = "SECONDS",
        default_value_t = 20,
        global = true,
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    pub(crate) timeout_seconds: u64,
}

/// How a cluster is reached.
#[derive(Clone, Debug, Args)]
pub(crate) struct ClusterReach {
    /// Ask a mesh on Kubernetes, through kubectl, instead of this machine's daemons; kubectl-culvert always does
    #[arg(long, env = "CULVERT_CLUSTER", global = true)]
    pub(crate) cluster: bool,
    /// The agent of this node of the cluster is meant
    #[arg(long, global = true)]
    pub(crate) node: Option<String>,
    /// kubectl's context
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
    /// The namespace that Culvert is installed in
    #[arg(long, default_value = "culvert-system", global = true)]
    pub(crate) system_namespace: String,
}

/// For whom the answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Which daemon is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Daemon {
    /// This node's agent.
    Agent,
    /// The controller.
    Controller,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Has this machine what the agent needs? Works without an agent; run it as the agent will run. Of a cluster: which
    /// NetworkPolicies stop the mesh?
    Check(CheckArgs),
    /// How the node's agent, or the controller, is doing; exit code 1 while it is not ready. Of a cluster: controller, agents
    /// and every pod of the mesh, with the reason why it is not captured
    Status(StatusArgs),
    /// Would a connection be made, and what decides? Nothing is sent.
    ///
    /// Asks the controller, which runs the agents' own code on the whole mesh, and prints every step.
    #[command(after_help = "\
Examples:
  culvert explain shop/client web.shop:80
  culvert explain 'shop/client -> web.shop:80'
  culvert explain shop/client '->' '[fd00:10::7]:5432'
Both ends: namespace/pod, service.namespace, service.namespace.svc.cluster.local, or an address.")]
    Explain(ExplainArgs),
    /// What the agent, or the controller, holds: workloads, services, policies
    Config(ConfigArgs),
    /// The open connections of this node's pods
    Connections(ConnectionsArgs),
    /// The certificates this node's agent holds
    Certs,
    /// What the agent, or the controller, logs: shows it, or changes it until the next start
    #[command(after_help = "\
Examples:
  culvert log-level
  culvert log-level debug
  culvert log-level info,mesh_net=debug
  culvert log-level --of controller --reset")]
    LogLevel(LogLevelArgs),
    /// What the agent logged about one pod
    #[command(after_help = "\
Reads the journal of the agent's unit, or a file, or standard input:
  culvert logs --pod shop/cart-0 --follow
  kubectl logs -n culvert-system culvert-agent-x7k2p -f | culvert logs --pod shop/cart-0 --file -")]
    Logs(LogsArgs),
    /// This node's pods: take one in, let one go, list them
    #[command(subcommand)]
    Pod(PodCommand),
    /// This node's agent itself
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Install the mesh on a Kubernetes cluster, or bring it up to date; needs helm
    Install(ChartCommand),
    /// Take the mesh off a Kubernetes cluster, without a trace; needs helm
    Uninstall,
    /// Namespaces of a Kubernetes cluster: let one join the mesh, or leave it
    #[command(subcommand)]
    Ns(NamespaceCommand),
    /// A script that completes command lines: culvert completions bash > /etc/bash_completion.d/culvert
    Completions {
        /// Of which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// What is installed.
#[derive(Debug, Args)]
pub(crate) struct ChartCommand {
    /// The chart: a folder, an archive or oci://…; default: charts/culvert
    #[arg(long)]
    pub(crate) chart: Option<String>,
    /// A value of the chart, KEY=VALUE; give it once for each
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// What to do with a namespace.
#[derive(Debug, Subcommand)]
pub(crate) enum NamespaceCommand {
    /// Let a namespace join: its pods are captured without a restart; waits until they are
    Add {
        /// Its name
        namespace: String,
    },
    /// Let a namespace leave; waits until its pods are let go
    Remove {
        /// Its name
        namespace: String,
    },
}

/// Which machine is meant.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Where the agent pins its programs
    #[arg(long, env = "CULVERT_BPFFS", default_value = "/sys/fs/bpf/culvert")]
    pub(crate) bpffs: PathBuf,
    /// Root of the machine's cgroup2 hierarchy, or `auto`
    #[arg(long, env = "CULVERT_CGROUP_ROOT", default_value = "auto")]
    pub(crate) cgroup_root: String,
}

/// Whose configuration, and which part of it.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// The part; default: everything
    #[arg(value_enum, default_value_t = Part::All)]
    pub(crate) part: Part,
    /// Who is asked; default: the agent, on a machine without one the controller
    #[arg(long = "of", value_enum)]
    pub(crate) daemon: Option<Daemon>,
}

/// A part of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Everything.
    All,
    /// Workloads.
    Workloads,
    /// Services.
    Services,
    /// Policies.
    Policies,
}

/// Whose log, and what it is to hold.
#[derive(Debug, Args)]
pub(crate) struct LogLevelArgs {
    /// A level, or a filter such as info,mesh_net=debug; none only shows what is in force
    #[arg(conflicts_with = "reset")]
    pub(crate) level: Option<String>,
    /// Back to what the daemon was started with
    #[arg(long)]
    pub(crate) reset: bool,
    /// Who is asked; default: the agent, on a machine without one the controller
    #[arg(long = "of", value_enum)]
    pub(crate) daemon: Option<Daemon>,
}

/// Which lines of which log.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The pod: NAMESPACE/NAME
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) pod: String,
    /// A file with the agent's log, or `-` for standard input; default: the journal
    #[arg(long, value_name = "PATH", conflicts_with_all = ["follow", "since"])]
    pub(crate) file: Option<PathBuf>,
    /// The agent's systemd unit
    #[arg(long, default_value = "culvert-agent")]
    pub(crate) unit: String,
    /// Go on with what is logged from now on
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only what is younger, as journalctl reads it: `10 min ago`, today
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Only connections that did not end well
    #[arg(long)]
    pub(crate) refused: bool,
}

/// Whose status.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Who is asked; default: the agent, on a machine without one the controller
    #[arg(value_enum)]
    pub(crate) daemon: Option<Daemon>,
}

/// A question to explain.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Who dials, or the whole question in quotes: 'A -> B:port'
    pub(crate) from: String,
    /// `->`, or what is dialled
    #[arg(allow_hyphen_values = true)]
    pub(crate) arrow: Option<String>,
    /// What is dialled, with its port
    pub(crate) to: Option<String>,
    /// The method of a request, which a waypoint on the way judges
    pub(crate) method: Option<String>,
    /// Its path
    pub(crate) path: Option<String>,
    /// A header of it: 'Name: value'
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    pub(crate) headers: Vec<String>,
}

/// Which connections.
#[derive(Debug, Args)]
pub(crate) struct ConnectionsArgs {
    /// Only those of this pod: NAMESPACE/NAME
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) pod: Option<String>,
}

/// What to do with the agent.
#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Have another version take over: no connection is lost.
    ///
    /// The running agent starts the program with its own arguments; that one takes over its connections, and the old one ends.
    Upgrade {
        /// The program; default: the file from which the running agent was started
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
    },
}

/// What to do with pods.
#[derive(Debug, Subcommand)]
pub(crate) enum PodCommand {
    /// Take a pod into the mesh; for machines without a CNI
    Enroll(Box<EnrollArgs>),
    /// Let a pod go; its open connections end or finish first
    Unenroll(UnenrollArgs),
    /// The pods that the agent knows
    List,
}

/// The pod to take in.
#[derive(Debug, Args)]
pub(crate) struct EnrollArgs {
    /// Its network namespace, such as /run/netns/NAME or /proc/PID/ns/net
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: String,
    /// Its namespace
    #[arg(long)]
    pub(crate) namespace: String,
    /// Its name
    #[arg(long)]
    pub(crate) name: String,
    /// Its service account, for lists and logs; its identity comes from the controller
    #[arg(long, default_value = "")]
    pub(crate) service_account: String,
    /// Its uid, or a name of your choice that no other pod of this node has
    #[arg(long)]
    pub(crate) uid: String,
    /// An address of it; give it once for each. Default: those the namespace has
    #[arg(long = "ip", value_name = "ADDRESS")]
    pub(crate) ips: Vec<IpAddr>,
    /// A nameserver of it; give it once for each. Default: the node's
    #[arg(long = "nameserver", value_name = "ADDRESS")]
    pub(crate) nameservers: Vec<IpAddr>,
    /// Its sandbox, as the container runtime names it; default: the uid
    #[arg(long)]
    pub(crate) container_id: Option<String>,
    /// It runs already: leave its open connections as they are
    #[arg(long)]
    pub(crate) live: bool,
}

/// The pod to let go.
#[derive(Debug, Args)]
#[group(required = true, multiple = false, id = "which")]
pub(crate) struct UnenrollArgs {
    /// By name: NAMESPACE/NAME
    #[arg(value_name = "NAMESPACE/NAME", group = "which")]
    pub(crate) pod: Option<String>,
    /// By uid
    #[arg(long, group = "which")]
    pub(crate) uid: Option<String>,
    /// By sandbox
    #[arg(long, group = "which")]
    pub(crate) container_id: Option<String>,
}
