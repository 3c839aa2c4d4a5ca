//! What the agent is told on its command line or in its environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use mesh_authorize::MissingPolicy;
use mesh_ebpf::GuardPreference;
use mesh_resolve::{ResolveSettings, WaypointEnforcement};
use mesh_telemetry::LogFormat;

use crate::cni::CniFolders;
use crate::control::pods::Denied;
use crate::control::session::{ControllerConfig, Credential};
use crate::dataplane::SameNode;

/// The per-node agent of the Culvert mesh.
#[derive(Clone, Debug, Parser)]
#[command(name = "culvert-agent", version, about)]
pub struct Arguments {
    /// What to do; without a command the agent runs.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings.
    #[command(flatten)]
    pub settings: Settings,
}

/// What else the program does.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Runs the agent (the default).
    Run,
    /// Takes every pod out of the mesh, restores routes and kernel settings, and detaches everything from the kernel.
    /// Traffic of this node's pods goes direct and in the clear afterwards. Stop the agent first.
    Uninstall {
        /// Afterwards, be ready and do nothing until told to end: for a DaemonSet, which would start it again.
        #[arg(long)]
        stay: bool,
    },
    /// What an agent becomes that stays after a hand-over.
    #[command(hide = true)]
    Retired,
    /// Says whether the agent of this instance serves the node and is ready: for a probe. Of two that hand over, only one is.
    Ready,
}

/// The settings, as written.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// This node's name, as the controller knows it; default: the host name.
    #[arg(long, env = "CULVERT_NODE_NAME", global = true)]
    pub node_name: Option<String>,
    /// Folder of the agent's sockets.
    #[arg(long, env = "CULVERT_RUN_DIR", default_value = "/run/culvert", global = true)]
    pub run_dir: PathBuf,
    /// Folder of what survives a restart; readable by root only.
    #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert", global = true)]
    pub state_dir: PathBuf,
    /// Folder of the pinned programs, on a bpffs mount.
    #[arg(long, env = "CULVERT_BPFFS", default_value = "/sys/fs/bpf/culvert", global = true)]
    pub bpffs: PathBuf,
    /// Root of the machine's cgroup2 hierarchy, or `auto`.
    #[arg(long, env = "CULVERT_CGROUP_ROOT", default_value = "auto", global = true)]
    pub cgroup_root: String,
    /// How the guard is attached to a pod's host-side interface.
    #[arg(long, env = "CULVERT_GUARD", value_enum, default_value = "auto", global = true)]
    pub guard: Guard,
    /// The controller.
    #[arg(long, env = "CULVERT_CONTROLLER", default_value = "https://127.0.0.1:15012")]
    pub controller: http::Uri,
    /// File with the roots that the controller's certificate is judged by.
    #[arg(
        long,
        env = "CULVERT_CONTROLLER_ROOT",
        default_value = "/etc/culvert/controller-root.pem"
    )]
    pub controller_root: PathBuf,
    /// File with the token this node joins by; needed once.
    #[arg(long, env = "CULVERT_JOIN_TOKEN_FILE", conflicts_with = "token_file")]
    pub join_token_file: Option<PathBuf>,
    /// File with a token that somebody else renews (a projected service-account token), instead of joining.
    #[arg(long, env = "CULVERT_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// Name of the cluster, for the controller and for telemetry.
    #[arg(long, env = "CULVERT_CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// DNS domain of the cluster.
    #[arg(long, env = "CULVERT_CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Where the admin interface listens, which shows the mesh to every user of this machine: loopback only, or `none`.
    /// The Unix socket in the run folder, for root alone, is always there.
    #[arg(long, env = "CULVERT_ADMIN_ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin_address: ListenAddress,
    /// Where readiness is told, or `none`.
    #[arg(long, env = "CULVERT_READY_ADDRESS", default_value = "[::]:15021", global = true)]
    pub ready_address: ListenAddress,
    /// This agent's name among those that follow one another on the node, such as its pod's uid.
    #[arg(long, env = "CULVERT_INSTANCE", global = true)]
    pub instance: Option<String>,
    /// After a hand-over stay and do nothing, until told to end or the successor is gone: where a supervisor starts every
    /// agent again that ends.
    #[arg(long, env = "CULVERT_STAY_AFTER_HAND_OVER")]
    pub stay_after_hand_over: bool,
    /// Where metrics are scraped by whoever reaches the port, or `none`.
    #[arg(long, env = "CULVERT_METRICS_ADDRESS", default_value = "[::]:15020")]
    pub metrics_address: ListenAddress,
    /// What is logged, e.g. `info,culvert_agent=debug`.
    #[arg(long, env = "CULVERT_LOG", default_value = "info", global = true)]
    pub log: String,
    /// The form of log lines.
    #[arg(long, env = "CULVERT_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    pub log_format: LogForm,
    /// Folder of the node's CNI configuration lists, to chain the plugin to the first of them; default: leave CNI alone.
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", global = true)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Folder of the node's CNI plugins.
    #[arg(long, env = "CULVERT_CNI_BIN_DIR", default_value = "/opt/cni/bin", global = true)]
    pub cni_bin_dir: PathBuf,
    /// The plugin to install there.
    #[arg(long, env = "CULVERT_CNI_PLUGIN", default_value = "/usr/local/bin/culvert-cni")]
    pub cni_plugin: PathBuf,
    /// Namespace whose pods never wait for the agent; what the mesh itself needs to start has to be among them. May repeat.
    #[arg(
        long = "cni-exclude-namespace",
        env = "CULVERT_CNI_EXCLUDE_NAMESPACES",
        value_delimiter = ',',
        default_values = mesh_enroll::cni::config::DEFAULT_EXCLUDED
    )]
    pub cni_exclude_namespaces: Vec<String>,
    /// Engines of the data path, each on a thread of its own; default: usable cores.
    #[arg(long, env = "CULVERT_WORKERS")]
    pub workers: Option<usize>,
    /// Whether captured pods of this node talk without the agent where policy allows it, or always through its tunnels,
    /// encrypted.
    #[arg(long, env = "CULVERT_SAME_NODE", value_enum, default_value = "tunnel")]
    pub same_node: SameNode,
    /// How long connections may go on when the agent stops, seconds. Those of a pod that leaves the mesh go on until they end.
    #[arg(long, env = "CULVERT_DRAIN_SECONDS", default_value_t = 5)]
    pub drain_seconds: u64,
    /// Where private keys outlive this process, so that one that starts while the controller is away has them: `kernel`, in
    /// a map that root alone may read and no disk holds, gone when the machine stops; or `none`.
    #[arg(long, env = "CULVERT_KEEP_KEYS", value_enum, default_value = "kernel")]
    pub keep_keys: KeepKeys,
    /// Enrolled pods may not send UDP, except DNS to the agent.
    #[arg(long, env = "CULVERT_DENY_UDP")]
    pub deny_udp: bool,
    /// Enrolled pods may not send ICMP, except what IPv6 needs.
    #[arg(long, env = "CULVERT_DENY_ICMP")]
    pub deny_icmp: bool,
    /// Whether traffic may pass by the waypoint that its destination is bound to when that is away.
    #[arg(long, env = "CULVERT_WAYPOINTS", value_enum, default_value = "required")]
    pub waypoints: Waypoints,
    /// Where to be as lenient as ztunnel, in a mesh of both. May repeat.
    #[arg(long, env = "CULVERT_COMPAT", value_enum, value_delimiter = ',')]
    pub compat: Vec<Compat>,
}

/// What happens to traffic that does not pass the waypoint bound to its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Waypoints {
    /// It is refused.
    Required,
    /// It goes on without, unjudged by what the waypoint enforces.
    Preferred,
}

/// A strictness that can be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compat {
    /// A CONNECT may name any known host, and any authority for a workload with an application tunnel.
    ForeignAuthority,
    /// A policy that is named and was not received yet refuses nobody.
    MissingPolicy,
}

/// Where to listen, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

/// Neither an address nor `none`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not ADDRESS:PORT and not `none`")]
pub struct InvalidListenAddress {
    /// What was given.
    pub text: String,
}

impl FromStr for ListenAddress {
    type Err = InvalidListenAddress;

    fn from_str(text: &str) -> Result<Self, InvalidListenAddress> {
        if text == "none" {
            return Ok(Self(None));
        }
        let invalid = |_source| InvalidListenAddress { text: text.to_owned() };
        text.parse().map(|address| Self(Some(address))).map_err(invalid)
    }
}

/// How the guard is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guard {
    /// tcx where the kernel has it, otherwise clsact.
    Auto,
    /// clsact everywhere.
    Clsact,
}

/// Where private keys outlive the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KeepKeys {
    /// In the kernel's memory, pinned in the folder of the pinned programs.
    Kernel,
    /// Nowhere: they are in this process's memory only.
    None,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogForm {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl From<LogForm> for LogFormat {
    fn from(form: LogForm) -> Self {
        match form {
            LogForm::Text => Self::Text,
            LogForm::Json => Self::Json,
        }
    }
}

/// Settings that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSettings {
    /// The host has no name, or none that is text.
    #[error("the host's name cannot be used: give --node-name")]
    NodeName,
    /// The admin interface tells secrets of the mesh's shape, and changes things.
    #[error("--admin-address {0} is not a loopback address")]
    AdminAddress(SocketAddr),
    /// No scheme or host.
    #[error("--controller {0} is not of the form https://host:port")]
    Controller(http::Uri),
}

impl Settings {
    /// This node's name.
    ///
    /// # Errors
    /// When none was given and the host has none.
    pub fn node_name(&self) -> Result<String, InvalidSettings> {
        match &self.node_name {
            Some(name) if !name.is_empty() => Ok(name.clone()),
            Some(_) | None => std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map(|name| name.trim().to_owned())
                .ok()
                .filter(|name| !name.is_empty())
                .ok_or(InvalidSettings::NodeName),
        }
    }

    /// Checks what the command line parser cannot.
    ///
    /// # Errors
    /// [`InvalidSettings`], naming the flag.
    pub fn check(&self) -> Result<(), InvalidSettings> {
        if let ListenAddress(Some(address)) = self.admin_address
            && !address.ip().is_loopback()
        {
            return Err(InvalidSettings::AdminAddress(address));
        }
        let scheme = self.controller.scheme_str();
        if !matches!(scheme, Some("https" | "http")) || self.controller.host().is_none() {
            return Err(InvalidSettings::Controller(self.controller.clone()));
        }
        self.node_name().map(drop)
    }

    /// The agent's socket for enrolment.
    #[must_use]
    pub fn enrolment_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// The agent's socket for administration.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }

    /// The agent's socket for its successor.
    #[must_use]
    pub fn handover_socket(&self) -> PathBuf {
        self.run_dir.join("handover.sock")
    }

    /// How long connections may go on when the agent stops.
    #[must_use]
    pub const fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// Where the CNI plugin goes; none when CNI is left alone.
    pub(crate) fn cni_folders(&self) -> Option<CniFolders> {
        let configurations = self.cni_conf_dir.clone()?;
        let kept = self.state_dir.join("cni");
        Some(CniFolders { configurations, programs: self.cni_bin_dir.clone(), kept })
    }

    /// Where capture lives.
    pub(crate) fn capture(&self) -> mesh_ebpf::CaptureConfig {
        mesh_ebpf::CaptureConfig {
            bpffs: self.bpffs.clone(),
            cgroup_root: (self.cgroup_root != "auto").then(|| PathBuf::from(&self.cgroup_root)),
            guard: match self.guard {
                Guard::Auto => GuardPreference::Auto,
                Guard::Clsact => GuardPreference::Clsact,
            },
        }
    }

    /// Where the controller is.
    pub(crate) fn controller(&self, node: &str) -> ControllerConfig {
        let credential = match &self.token_file {
            Some(file) => Credential::File(file.clone()),
            None => Credential::Join {
                file: self.join_token_file.clone(),
                kept: self.state_dir.join("node-token"),
            },
        };
        ControllerConfig {
            address: self.controller.clone(),
            root: self.controller_root.clone(),
            node: node.to_owned(),
            credential,
        }
    }

    /// How connections are routed.
    pub(crate) fn resolving(&self) -> ResolveSettings {
        ResolveSettings {
            waypoints: match self.waypoints {
                Waypoints::Required => WaypointEnforcement::Required,
                Waypoints::Preferred => WaypointEnforcement::Preferred,
            },
            accept_foreign_authority: self.compat.contains(&Compat::ForeignAuthority),
            ..ResolveSettings::default()
        }
    }

    /// What becomes of flows whose policies are not known.
    pub(crate) fn missing_policies(&self) -> MissingPolicy {
        if self.compat.contains(&Compat::MissingPolicy) {
            MissingPolicy::Ignore
        } else {
            MissingPolicy::Deny
        }
    }

    /// What enrolled pods may not send.
    pub(crate) const fn denied(&self) -> Denied {
        Denied { udp: self.deny_udp, icmp: self.deny_icmp }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let check = |flags: &[&str], expected: &str| {
            let program = ["culvert-agent", "--node-name", "n"];
            let arguments = Arguments::parse_from(program.iter().chain(flags));
            let error = arguments.settings.check().unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(&["--admin-address", "0.0.0.0:15000"], "loopback");
        check(&["--controller", "host:15012"], "https://");
        check(&["--controller", "ftp://host"], "https://");
    }

    #[test]
    fn interfaces_may_be_switched_off() {
        let flags = ["culvert-agent", "--admin-address", "none", "--metrics-address", "none"];
        let settings = Arguments::parse_from(flags).settings;
        assert_eq!(settings.admin_address, ListenAddress(None));
        assert_eq!(settings.metrics_address, ListenAddress(None));
        let ready = ListenAddress(Some("[::]:15021".parse().unwrap()));
        assert_eq!(settings.ready_address, ready);
        assert!(settings.check().is_ok());
        assert!("localhost:1".parse::<ListenAddress>().is_err());
    }

    #[test]
    fn strictness_is_given_up_only_where_that_is_asked_for() {
        let parse =
            |flags: &[&str]| Arguments::parse_from(["culvert-agent"].iter().chain(flags)).settings;
        let strict = parse(&[]);
        assert_eq!(strict.resolving(), ResolveSettings::default());
        assert_eq!(strict.missing_policies(), MissingPolicy::Deny);
        let flags = ["--waypoints", "preferred", "--compat", "foreign-authority,missing-policy"];
        let lenient = parse(&flags);
        assert_eq!(lenient.resolving().waypoints, WaypointEnforcement::Preferred);
        assert!(lenient.resolving().accept_foreign_authority);
        assert_eq!(lenient.missing_policies(), MissingPolicy::Ignore);
        let one = parse(&["--compat", "missing-policy"]);
        assert_eq!(one.resolving(), ResolveSettings::default());
    }

    #[test]
    fn a_command_may_follow_the_flags_or_precede_them() {
        let flags = ["culvert-agent", "--bpffs", "/b", "uninstall"];
        let arguments = Arguments::parse_from(flags);
        assert!(matches!(arguments.command, Some(Command::Uninstall { .. })));
        assert_eq!(arguments.settings.bpffs, PathBuf::from("/b"));
        let flags = ["culvert-agent", "uninstall", "--bpffs", "/b"];
        assert_eq!(Arguments::parse_from(flags).settings.bpffs, PathBuf::from("/b"));
    }
}
