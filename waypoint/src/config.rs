//! What a waypoint is told on its command line or in its environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use mesh_control::session::{ControllerConfig, Credential};
use mesh_model::{EmptySegments, EncodedSlashes, PathNormalization, PathParameters};
use mesh_resolve::{ResolveSettings, WaypointEnforcement};
use mesh_telemetry::LogFormat;
use mesh_wire::waypoint_node;

/// The L7 proxy of a service, namespace or workload.
#[derive(Clone, Debug, Parser)]
#[command(name = "culvert-waypoint", version, about)]
pub struct Settings {
    /// NAMESPACE/NAME of the Gateway that this is a waypoint of.
    #[arg(long, env = "CULVERT_WAYPOINT")]
    pub gateway: GatewayName,
    /// Service account that its pods run as; default: the Gateway's name.
    #[arg(long, env = "CULVERT_SERVICE_ACCOUNT")]
    pub service_account: Option<String>,
    /// Where the controller is, https://HOST:PORT.
    #[arg(long, env = "CULVERT_CONTROLLER", default_value = "https://127.0.0.1:15012")]
    pub controller: http::Uri,
    /// File with the roots by which the controller's certificate is judged, PEM.
    #[arg(long, env = "CULVERT_CONTROLLER_ROOT", default_value = "/etc/culvert/root.pem")]
    pub controller_root: PathBuf,
    /// File with the token this waypoint joins by: culvert-controller token create --waypoint NAMESPACE/NAME.
    #[arg(long, env = "CULVERT_JOIN_TOKEN_FILE", conflicts_with = "token_file")]
    pub join_token_file: Option<PathBuf>,
    /// File with a token that somebody else renews, instead of joining.
    #[arg(long, env = "CULVERT_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// Folder for the waypoint's token, so that it need not join again.
    #[arg(long, env = "CULVERT_STATE_DIR", default_value = "/var/lib/culvert-waypoint")]
    pub state_dir: PathBuf,
    /// Where tunnels are taken.
    #[arg(long, env = "CULVERT_HBONE_ADDRESS", default_value = "[::]:15008")]
    pub hbone_address: SocketAddr,
    /// Where the admin interface listens: loopback only, or `none`.
    #[arg(long, env = "CULVERT_ADMIN_ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin_address: ListenAddress,
    /// Where readiness is told, or `none`.
    #[arg(long, env = "CULVERT_READY_ADDRESS", default_value = "[::]:15021")]
    pub ready_address: ListenAddress,
    /// Where metrics are scraped by whoever reaches the port, or `none`.
    #[arg(long, env = "CULVERT_METRICS_ADDRESS", default_value = "[::]:15020")]
    pub metrics_address: ListenAddress,
    /// Threads that serve, each with connections of its own; default: usable cores.
    #[arg(long, env = "CULVERT_WORKERS")]
    pub workers: Option<usize>,
    /// How long streams may go on when the waypoint is asked to end, seconds.
    #[arg(long, env = "CULVERT_DRAIN_SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
    /// How long a client may take to say what it speaks, where the service does not. Milliseconds; then its bytes are
    /// passed on, unless the port has routes or policies on requests.
    #[arg(long, env = "CULVERT_DETECT_MS", default_value_t = 3_000)]
    pub detect_ms: u64,
    /// What paths may hold although servers read it differently, for servers that all read it in one way: `parameters` (;
    /// is an ordinary character), `encoded-slashes` (%2F and %5C are), `empty-segments` (// is not /). A list with commas.
    #[arg(long, env = "CULVERT_RELAX_PATHS", value_delimiter = ',')]
    pub relax_paths: Vec<RelaxedPath>,
    /// Leave the reason of a refusal out of its answer.
    #[arg(long, env = "CULVERT_HIDE_REASONS")]
    pub hide_reasons: bool,
    /// File with authorities, PEM, that are trusted beside the web's when issuers' keys are read over https.
    #[arg(long, env = "CULVERT_JWKS_CA")]
    pub jwks_ca: Option<PathBuf>,
    /// Go on without another waypoint that is bound to a backend and is not ready, as agents with the same setting do.
    #[arg(long, env = "CULVERT_PREFER_WAYPOINTS")]
    pub prefer_waypoints: bool,
    /// What is logged, e.g. `info,access=off`.
    #[arg(long, env = "CULVERT_LOG", default_value = "info")]
    pub log: String,
    /// The form of log lines: text or json.
    #[arg(long, env = "CULVERT_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Something in a path that is left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RelaxedPath {
    /// `;` is an ordinary character.
    Parameters,
    /// `%2F` and `%5C` are ordinary characters.
    EncodedSlashes,
    /// `//` is not `/`.
    EmptySegments,
}

/// The key of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// Settings that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSettings {
    /// Not a key.
    #[error("{text:?} is not NAMESPACE/NAME")]
    Gateway {
        /// What was given.
        text: String,
    },
    /// Not an address.
    #[error("{text:?} is not ADDRESS:PORT and not `none`")]
    Listen {
        /// What was given.
        text: String,
    },
    /// The admin interface tells what this waypoint serves.
    #[error("--admin-address {0} is not a loopback address")]
    Admin(SocketAddr),
    /// No scheme or host.
    #[error("--controller {0} is not of the form https://host:port")]
    Controller(http::Uri),
}

impl FromStr for GatewayName {
    type Err = InvalidSettings;

    fn from_str(text: &str) -> Result<Self, InvalidSettings> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self { namespace: namespace.into(), name: name.into() })
            }
            Some(_) | None => Err(InvalidSettings::Gateway { text: text.to_owned() }),
        }
    }
}

/// Where to listen, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl FromStr for ListenAddress {
    type Err = InvalidSettings;

    fn from_str(text: &str) -> Result<Self, InvalidSettings> {
        if text == "none" {
            return Ok(Self(None));
        }
        let invalid = |_source| InvalidSettings::Listen { text: text.to_owned() };
        text.parse().map(|address| Self(Some(address))).map_err(invalid)
    }
}

impl Settings {
    /// Checks what the command line parser cannot.
    ///
    /// # Errors
    /// [`InvalidSettings`], naming the flag.
    pub fn check(&self) -> Result<(), InvalidSettings> {
        if let ListenAddress(Some(address)) = self.admin_address
            && !address.ip().is_loopback()
        {
            return Err(InvalidSettings::Admin(address));
        }
        let scheme = self.controller.scheme_str();
        if !matches!(scheme, Some("https" | "http")) || self.controller.host().is_none() {
            return Err(InvalidSettings::Controller(self.controller.clone()));
        }
        Ok(())
    }

    /// The service account of its pods.
    #[must_use]
    pub fn service_account(&self) -> &str {
        self.service_account.as_deref().unwrap_or(&self.gateway.name)
    }

    /// How long streams may go on.
    #[must_use]
    pub const fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// How paths are normalised.
    #[must_use]
    pub fn paths(&self) -> PathNormalization {
        let mut rules = PathNormalization::default();
        for relaxed in &self.relax_paths {
            match relaxed {
                RelaxedPath::Parameters => rules.parameters = PathParameters::Keep,
                RelaxedPath::EncodedSlashes => rules.encoded_slashes = EncodedSlashes::Keep,
                RelaxedPath::EmptySegments => rules.empty_segments = EmptySegments::Keep,
            }
        }
        rules
    }

    /// How it looks for backends.
    #[must_use]
    pub fn resolving(&self) -> ResolveSettings {
        let waypoints = if self.prefer_waypoints {
            WaypointEnforcement::Preferred
        } else {
            WaypointEnforcement::Required
        };
        ResolveSettings { waypoints, ..ResolveSettings::default() }
    }

    /// Where the controller is.
    #[must_use]
    pub fn controller(&self) -> ControllerConfig {
        let credential = match &self.token_file {
            Some(file) => Credential::File(file.clone()),
            None => Credential::Join {
                file: self.join_token_file.clone(),
                kept: self.state_dir.join("token"),
            },
        };
        ControllerConfig {
            address: self.controller.clone(),
            root: self.controller_root.clone(),
            node: waypoint_node(&self.gateway.namespace, &self.gateway.name),
            credential,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Settings::command().debug_assert();
        let parse = |extra: &[&str]| {
            let program = ["culvert-waypoint", "--gateway", "shop/w"];
            Settings::try_parse_from(program.iter().chain(extra))
        };
        let settings = parse(&[]).unwrap();
        assert_eq!(settings.service_account(), "w");
        assert_eq!(settings.controller().node, "waypoint/shop/w");
        assert!(parse(&["--gateway", "w"]).is_err());
        assert_eq!(settings.paths(), PathNormalization::default());
        let relaxed = parse(&["--relax-paths", "parameters,empty-segments"]).unwrap().paths();
        assert_eq!(relaxed.parameters, PathParameters::Keep);
        assert_eq!(relaxed.encoded_slashes, EncodedSlashes::Refuse);
        assert!(parse(&["--relax-paths", "dots"]).is_err());
        let refused = parse(&["--admin-address", "0.0.0.0:1"]).unwrap().check();
        assert!(refused.unwrap_err().to_string().contains("loopback"));
    }
}
