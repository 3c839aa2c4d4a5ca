//! The command line of `culvert-controller`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_model::IpPrefix;

use crate::cluster::ObjectName;

/// The controller of a Culvert mesh: reads manifests, tells agents about workloads and policies, signs certificates.
#[derive(Debug, Parser)]
#[command(name = "culvert-controller", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the controller.
    Run(Box<RunArgs>),
    /// Join tokens, by which a node's agent joins the mesh once.
    #[command(subcommand)]
    Token(TokenCommand),
    /// The manifests.
    #[command(subcommand)]
    Source(SourceCommand),
    /// The certificate authority. A running controller picks changes up within two seconds; other replicas within six.
    #[command(subcommand)]
    Ca(CaCommand),
    /// Tell a DaemonSet's agents to undo what they did to their nodes, and wait until all have; before a chart is removed
    Leave {
        /// NAMESPACE/NAME of the DaemonSet
        #[arg(long)]
        daemonset: ObjectName,
        /// How long all of them may take
        #[arg(long, default_value = "2m", value_parser = parse_duration)]
        timeout: Duration,
    },
}

/// Settings of a running controller.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Where objects come from: directory:PATH, kubernetes (KUBECONFIG, or the pod's own account) or kubernetes:KUBECONFIG
    #[arg(long, env = "CULVERT_SOURCE", value_parser = parse_source)]
    pub source: Source,
    /// Where the CA's keys and the tokens are kept; made with mode 0700
    #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-controller")]
    pub state_dir: PathBuf,
    /// Address for agents: xDS, certificates and enrolment over TLS
    #[arg(long, env = "CULVERT_LISTEN", default_value = "[::]:15012")]
    pub listen: SocketAddr,
    /// DNS name or IP address in the controller's own certificate; may repeat
    #[arg(long = "san", env = "CULVERT_SAN", value_delimiter = ',', default_value = "localhost")]
    pub sans: Vec<String>,
    /// Where readiness and metrics are told to whoever reaches it; none unless given
    #[arg(long, env = "CULVERT_STATUS_ADDRESS")]
    pub status_address: Option<SocketAddr>,
    /// Loopback address of the admin server
    #[arg(long, env = "CULVERT_ADMIN", default_value = "127.0.0.1:15014")]
    pub admin: SocketAddr,
    /// Unix socket of the admin server
    #[arg(long, env = "CULVERT_ADMIN_SOCKET")]
    pub admin_socket: Option<PathBuf>,
    /// Trust domain of the mesh
    #[arg(long, env = "CULVERT_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Name of this cluster
    #[arg(long, env = "CULVERT_CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Network of workloads that do not name another
    #[arg(long, env = "CULVERT_NETWORK", default_value = "")]
    pub network: String,
    /// DNS domain of services
    #[arg(long, env = "CULVERT_CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Namespace whose policies hold for the whole mesh
    #[arg(long, env = "CULVERT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Honour the istio.io twins of Culvert's labels
    #[arg(long, env = "CULVERT_ISTIO_LABELS")]
    pub istio_labels: bool,
    /// What becomes of unknown destinations, unless a namespace says otherwise
    #[arg(long, env = "CULVERT_UNKNOWN_EGRESS", value_enum, default_value_t = Egress::Allow)]
    pub unknown_egress: Egress,
    /// Network that pods have their addresses from, beside the nodes' spec.podCIDRs: an address inside that no workload has is
    /// refused, never reached in the clear; may repeat
    #[arg(
        long = "pod-cidr",
        env = "CULVERT_POD_CIDRS",
        value_delimiter = ',',
        value_parser = parse_pod_cidr
    )]
    pub pod_cidrs: Vec<IpPrefix>,
    /// Namespace that is never captured; may repeat
    #[arg(
        long = "exclude-namespace",
        env = "CULVERT_EXCLUDE_NAMESPACES",
        value_delimiter = ',',
        default_values = mesh_model::EXCLUDED_NAMESPACES
    )]
    pub exclude_namespaces: Vec<String>,
    /// NAMESPACE/NAME of the service account whose bound tokens prove a node's agent (source kubernetes only)
    #[arg(long, env = "CULVERT_AGENT_ACCOUNT")]
    pub agent_account: Option<ObjectName>,
    /// Audience those tokens are made for
    #[arg(long, env = "CULVERT_TOKEN_AUDIENCE", default_value = "culvert")]
    pub token_audience: String,
    /// NAMESPACE/NAME of the Secret that holds the authority, made when there is none (source kubernetes only)
    #[arg(long, env = "CULVERT_CA_SECRET")]
    pub ca_secret: Option<ObjectName>,
    /// Folder with an authority that somebody else makes and renews, in cert-manager's layout: tls.crt, tls.key, ca.crt
    #[arg(long, env = "CULVERT_CA_DIR", conflicts_with = "ca_secret")]
    pub ca_dir: Option<PathBuf>,
    /// NAMESPACE/NAME of the Secret that folder is mounted from: its end is told there (source kubernetes only)
    #[arg(long, env = "CULVERT_CA_DIR_SECRET", requires = "ca_dir")]
    pub ca_dir_secret: Option<ObjectName>,
    /// How long before its end an authority's certificate is warned of
    #[arg(
        long,
        env = "CULVERT_CA_WARN_BEFORE",
        default_value = "30d",
        value_parser = parse_duration
    )]
    pub ca_warn_before: Duration,
    /// NAMESPACE/NAME of the ConfigMap in which agents find the roots (source kubernetes only)
    #[arg(long, env = "CULVERT_ROOT_CONFIG_MAP")]
    pub root_config_map: Option<ObjectName>,
    /// NAMESPACE/NAME of the Lease whose holder writes the status of policies; nobody does without (source kubernetes only)
    #[arg(long, env = "CULVERT_LEASE")]
    pub lease: Option<ObjectName>,
    /// This controller's name among its replicas; the machine's unless given
    #[arg(long, env = "CULVERT_IDENTITY")]
    pub identity: Option<String>,
    /// How waypoints are deployed
    #[command(flatten)]
    pub waypoints: WaypointArgs,
    /// PEM file of certificate revocation lists, watched, added to the CA's own
    #[arg(long, env = "CULVERT_CRL_FILE")]
    pub crl_file: Option<PathBuf>,
    /// Longest life of a pod's certificate, whatever its agent asks for
    #[arg(
        long,
        env = "CULVERT_MAX_CERTIFICATE_TTL",
        default_value = "24h",
        value_parser = parse_duration
    )]
    pub max_certificate_ttl: Duration,
    /// How long changes are collected before agents are told
    #[arg(long, env = "CULVERT_DEBOUNCE", default_value = "10ms", value_parser = parse_duration)]
    pub debounce: Duration,
    /// Longest time between two looks at the manifests
    #[arg(long, env = "CULVERT_RESCAN", default_value = "5s", value_parser = parse_duration)]
    pub rescan: Duration,
    /// Log filter, e.g. info or mesh_controller=debug
    #[arg(long, env = "CULVERT_LOG", default_value = "info")]
    pub log: String,
    /// Log lines as JSON
    #[arg(long, env = "CULVERT_LOG_JSON")]
    pub log_json: bool,
}

/// Settings of the waypoints that are deployed for Gateways of class `culvert-waypoint`.
#[derive(Clone, Debug, Args)]
pub struct WaypointArgs {
    /// Image of waypoints; nobody deploys them without (needs --lease)
    #[arg(long = "waypoint-image", env = "CULVERT_WAYPOINT_IMAGE", requires = "lease")]
    pub image: Option<String>,
    /// When that image is pulled: Always, IfNotPresent or Never
    #[arg(
        long = "waypoint-pull-policy",
        env = "CULVERT_WAYPOINT_PULL_POLICY",
        default_value = "IfNotPresent"
    )]
    pub pull_policy: String,
    /// Secret, in the Gateway's namespace, with credentials of the image's registry; may repeat
    #[arg(
        long = "waypoint-pull-secret",
        env = "CULVERT_WAYPOINT_PULL_SECRETS",
        value_delimiter = ','
    )]
    pub pull_secrets: Vec<String>,
    /// Pods of a Gateway that does not say how many by culvert.dev/replicas
    #[arg(
        long = "waypoint-replicas",
        env = "CULVERT_WAYPOINT_REPLICAS",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=100)
    )]
    pub replicas: u32,
    /// Their resources as JSON, as a container has them
    #[arg(
        long = "waypoint-resources",
        env = "CULVERT_WAYPOINT_RESOURCES",
        default_value = "{}",
        value_parser = parse_resources
    )]
    pub resources: serde_json::Value,
    /// Where they reach the controller; default: the first name of its certificate, port 15012
    #[arg(long = "waypoint-controller", env = "CULVERT_WAYPOINT_CONTROLLER")]
    pub controller: Option<String>,
    /// Whether they go on without other waypoints that are away, as agents do that are told so
    #[arg(long = "waypoint-prefer-waypoints", env = "CULVERT_WAYPOINT_PREFER_WAYPOINTS")]
    pub prefer_waypoints: bool,
    /// Filter of their log
    #[arg(long, env = "CULVERT_WAYPOINT_LOG", default_value = "info")]
    pub waypoint_log: String,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Directory(PathBuf),
    /// A Kubernetes API server, reached by this kubeconfig or by what is found.
    Kubernetes(Option<PathBuf>),
}

/// What becomes of unknown destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Egress {
    /// They may be dialled.
    Allow,
    /// They are refused.
    Deny,
}

/// Join tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a token with which the agent of a node, or a waypoint, can join once
    Create {
        /// Name of the node
        #[arg(long, required_unless_present = "waypoint")]
        node: Option<String>,
        /// NAMESPACE/NAME of the Gateway, for a waypoint instead of a node's agent
        #[arg(long, conflicts_with = "node")]
        waypoint: Option<String>,
        /// How long the token may be used
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
        /// The controller's state directory
        #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-controller")]
        state_dir: PathBuf,
    },
}

/// The manifests.
#[derive(Debug, Subcommand)]
pub enum SourceCommand {
    /// Confirm that the folder of manifests is meant to be empty: the controller then deletes what it held
    AcceptEmpty {
        /// The controller's state directory
        #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-controller")]
        state_dir: PathBuf,
    },
}

/// The certificate authority.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new root; certificates of the old one stay valid while they last
    RotateRoot {
        /// Time for agents to learn the new root before it signs
        #[arg(long, default_value = "10m", value_parser = parse_duration)]
        overlap: Duration,
        /// Where the authority is.
        #[command(flatten)]
        place: CaPlace,
    },
    /// Revoke a certificate of this CA; its live connections are cut
    Revoke {
        /// Serial number, hexadecimal
        #[arg(long)]
        serial: String,
        /// Where the authority is.
        #[command(flatten)]
        place: CaPlace,
    },
    /// Print the roots agents need to trust the controller, PEM
    Root {
        /// The controller's state directory
        #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-controller")]
        state_dir: PathBuf,
    },
}

/// Where the authority is. In a controller's pod the environment says it.
#[derive(Clone, Debug, Args)]
pub struct CaPlace {
    /// The controller's state directory
    #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-controller")]
    pub state_dir: PathBuf,
    /// NAMESPACE/NAME of the Secret that holds the authority; it is changed first, and the command waits for it
    #[arg(long, env = "CULVERT_CA_SECRET")]
    pub ca_secret: Option<ObjectName>,
    /// Folder with somebody else's authority: nothing of it is changed here
    #[arg(long, env = "CULVERT_CA_DIR")]
    pub ca_dir: Option<PathBuf>,
    /// How the cluster of that Secret is reached: kubernetes or kubernetes:KUBECONFIG
    #[arg(long, env = "CULVERT_SOURCE", value_parser = parse_source, default_value = "kubernetes")]
    pub source: Source,
}

fn parse_source(text: &str) -> Result<Source, String> {
    match text.split_once(':') {
        Some(("directory", path)) if !path.is_empty() => Ok(Source::Directory(path.into())),
        Some(("kubernetes", path)) if !path.is_empty() => Ok(Source::Kubernetes(Some(path.into()))),
        None if text == "kubernetes" => Ok(Source::Kubernetes(None)),
        Some(_) | None => Err("write directory:PATH, kubernetes or kubernetes:KUBECONFIG".into()),
    }
}

fn parse_resources(text: &str) -> Result<serde_json::Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ serde_json::Value::Object(_)) => Ok(value),
        Ok(_) => Err("not an object".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_pod_cidr(text: &str) -> Result<IpPrefix, String> {
    let network: IpPrefix = text.parse().map_err(|error| format!("{error}"))?;
    if network.length() == 0 {
        return Err("every address is no pod's network; --unknown-egress deny refuses them".into());
    }
    Ok(network)
}

/// Reads `250ms`, `90s`, `15m`, `24h` or `7d`.
///
/// # Errors
/// When the text is none of these, or is zero.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 =
        number.parse().map_err(|_source| format!("{text:?} does not start with a number"))?;
    let millis_per_unit: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(format!("{unit:?} is no unit; use ms, s, m, h or d")),
    };
    number
        .checked_mul(millis_per_unit)
        .filter(|millis| *millis > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_number_and_a_unit() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "5", "s", "1w", "0s", "99999999999999999999s", "18446744073709551615d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        for wrong in ["kubernetes:", "directory", "directory:", "etcd:/x"] {
            assert!(parse_source(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_source("kubernetes"), Ok(Source::Kubernetes(None)));
        assert_eq!(parse_source("kubernetes:/k"), Ok(Source::Kubernetes(Some("/k".into()))));
        let run = [
            "culvert-controller",
            "run",
            "--source",
            "directory:/m",
            "--san",
            "a,127.0.0.1",
            "--san",
            "b",
        ];
        let Command::Run(args) = Cli::try_parse_from(run).unwrap().command else {
            panic!("not run")
        };
        assert_eq!(args.sans, ["a", "127.0.0.1", "b"]);
    }

    #[test]
    fn waypoints_are_deployed_by_a_leader() {
        let parse = |extra: &[&str]| {
            let run = ["culvert-controller", "run", "--source", "kubernetes"];
            Cli::try_parse_from(run.iter().chain(extra)).map(drop)
        };
        let image = ["--waypoint-image", "w:1"];
        parse(
            &[&image[..], &["--lease", "a/b", "--waypoint-resources", "{\"limits\":{}}"]].concat(),
        )
        .unwrap();
        assert!(parse(&image).is_err());
        assert!(parse(&["--waypoint-resources", "[]"]).is_err());
        assert!(parse(&["--waypoint-replicas", "0"]).is_err());
        assert!(parse(&["--ca-dir-secret", "a/b"]).is_err());
    }

    #[test]
    fn networks_of_pods_may_repeat_and_hold_less_than_everything() {
        let parse = |cidrs: &str| {
            let run =
                ["culvert-controller", "run", "--source", "directory:/m", "--pod-cidr", cidrs];
            Cli::try_parse_from(run).map(|cli| match cli.command {
                Command::Run(args) => args.pod_cidrs.iter().map(ToString::to_string).collect(),
                Command::Token(_) | Command::Source(_) | Command::Ca(_) | Command::Leave { .. } => {
                    Vec::new()
                }
            })
        };
        assert_eq!(parse("10.0.0.0/8,fd00::/16").unwrap(), ["10.0.0.0/8", "fd00::/16"]);
        for wrong in ["0.0.0.0/0", "::/0", "10.0.0.0/33", "pods"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
