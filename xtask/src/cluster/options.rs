//! The command line of `cargo xtask cluster`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Which cluster.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Tells clusters of one machine apart.
    #[arg(long, default_value = "culvert")]
    pub(super) name: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Starts a cluster and waits until its nodes and its DNS are ready.
    Up {
        #[command(flatten)]
        cluster: Name,
        /// Nodes beside the control plane.
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// IPv6 beside IPv4.
        #[arg(long)]
        dual_stack: bool,
    },
    /// Ends a cluster and everything in it; nothing is left.
    Down {
        #[command(flatten)]
        cluster: Name,
    },
    /// Lists the clusters of this machine, with their folders.
    List,
    /// Gives every node the images of an OCI archive.
    Load {
        #[command(flatten)]
        cluster: Name,
        /// The archive, as `cargo xtask image` writes it.
        archive: PathBuf,
    },
    /// Runs kubectl as the cluster's administrator.
    Kubectl {
        #[command(flatten)]
        cluster: Name,
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs a program where it reaches the API server, nodes, pods and services; KUBECONFIG is set.
    Exec {
        #[command(flatten)]
        cluster: Name,
        /// On a node, in all of its namespaces, instead of beside the control plane.
        #[arg(long)]
        node: Option<u8>,
        /// Program and arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<OsString>,
    },
    /// Takes a node's power away: everything on it ends at once, its disk stays.
    PowerOff {
        #[command(flatten)]
        cluster: Name,
        /// 1 is the first.
        node: u8,
    },
    /// Starts a node again.
    PowerOn {
        #[command(flatten)]
        cluster: Name,
        /// 1 is the first.
        node: u8,
    },
    /// Writes an archive with images of redis, PostgreSQL and a gRPC pair, for tests.
    #[command(hide = true)]
    Programs {
        /// The archive.
        output: PathBuf,
    },
    /// Prints the folder with the definitions of the Gateway API, fetched once, for tests.
    #[command(hide = true)]
    Definitions,
    /// Builds the upstream programs, as `up` does when they are missing.
    Build,
    /// A step of starting a machine.
    #[command(hide = true)]
    Machine {
        /// `enter` or `boot`.
        step: String,
        /// Which machine.
        machine: String,
        /// The cluster's folder.
        folder: PathBuf,
    },
}
