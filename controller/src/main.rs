//! `culvert-controller`: parse, build, run, drain.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Parser;
use mesh_controller::ca::authority::{Authority, Done, Order};
use mesh_controller::ca::tokens::Tokens;
use mesh_controller::cli::{
    CaCommand, CaPlace, Cli, Command, RunArgs, Source, SourceCommand, TokenCommand,
};
use mesh_controller::cluster::ca_secret::CaSecret;
use mesh_controller::cluster::{self, ObjectName};
use mesh_controller::run::Controller;
use mesh_controller::source::directory::accept_empty;
use mesh_controller::source::kubernetes::KubernetesSettings;
use mesh_controller::state_dir::StateDir;
use mesh_runtime::{Drain, FlowMeterConfig, LogConfig, Logging, Metrics};
use mesh_telemetry::LogFormat;

/// glibc keeps what thousands of short-lived pods took; this one gives it back within seconds.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// `ca revoke` of a serial that was never issued: done, and likely not what was meant.
const NEVER_ISSUED: u8 = 5;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run(*args).map(|()| ExitCode::SUCCESS),
        Command::Token(TokenCommand::Create { node, waypoint, ttl, state_dir }) => {
            open(&state_dir).and_then(|files| {
                let node = waypoint.map(|name| format!("waypoint/{name}")).or(node);
                let node = node.unwrap_or_default();
                let token = Tokens::open(files)?.create(&node, ttl, SystemTime::now())?;
                say(&token)
            })
        }
        Command::Source(SourceCommand::AcceptEmpty { state_dir }) => open(&state_dir)
            .and_then(|files| {
                accept_empty(&files)?;
                say("accepted: within seconds, or at its start, the controller deletes what an empty folder held")
            }),
        Command::Ca(command) => ca(command),
        Command::Leave { daemonset, timeout } => leave(&daemonset, timeout),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("culvert-controller: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: RunArgs) -> Result<()> {
    let format = if args.log_json { LogFormat::Json } else { LogFormat::Text };
    let log = LogConfig { filter: args.log.clone(), format, ..LogConfig::default() };
    let logging = Logging::start(&log, io::stderr()).context("--log")?;
    let metrics = Metrics::install(
        "culvert-controller",
        env!("CARGO_PKG_VERSION"),
        FlowMeterConfig::default(),
        Some(logging.handle()),
    )?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("runtime")?;
    let outcome = runtime.block_on(async {
        let (trigger, drain) = Drain::new();
        let controller = Controller::start(args, &drain).await?;
        controller.serve_admin(metrics, logging.handle(), &drain).await?;
        tracing::info!(address = %controller.local_addr()?, "listening for agents");
        tokio::select! {
            outcome = controller.serve(drain) => outcome,
            signals = trigger.begin_on_signals() => signals.context("signals"),
        }
    });
    runtime.shutdown_background();
    outcome
}

fn leave(daemonset: &ObjectName, timeout: Duration) -> Result<ExitCode> {
    in_runtime(async {
        let client = KubernetesSettings::new(None).client().await?;
        cluster::leave::leave(&client, daemonset, timeout).await
    })?;
    say("every agent has left its node")
}

fn ca(command: CaCommand) -> Result<ExitCode> {
    let now = SystemTime::now();
    match command {
        CaCommand::RotateRoot { overlap, place } => {
            order(&place, &Order::RotateRoot { overlap }, now)?;
            say("the new root is believed at once and signs after the overlap")
        }
        CaCommand::Revoke { serial, place } => {
            if order(&place, &Order::Revoke { serial: serial.clone() }, now)? == Done::NeverIssued {
                complain(&format!(
                    "culvert-controller: {serial:?} is on the revocation lists, but this authority never issued it: \
                     no certificate is revoked by that, unless one of before this version\n  \
                     remedy: compare it with culvert certs -o json on the node of the pod"
                ));
                return Ok(ExitCode::from(NEVER_ISSUED));
            }
            say("revoked")
        }
        CaCommand::Root { state_dir } => {
            let authority = Authority::open_existing(open(&state_dir)?, now)
                .with_context(|| format!("state directory {}", state_dir.display()))?;
            say(authority.root_bundle_pem().trim_end())
        }
    }
}

fn order(place: &CaPlace, order: &Order, now: SystemTime) -> Result<Done> {
    if let Some(folder) = &place.ca_dir {
        Authority::open_mounted(folder, "", now)?.order(order, now)?;
    }
    let files = open(&place.state_dir)?;
    let Some(name) = &place.ca_secret else {
        return Ok(Authority::open_existing(files, now)?.order(order, now)?);
    };
    let Source::Kubernetes(kubeconfig) = &place.source else {
        anyhow::bail!("--ca-secret needs --source kubernetes");
    };
    in_runtime(async {
        let client = KubernetesSettings::new(kubeconfig.clone()).client().await?;
        Ok(CaSecret::new(&client, name, files).order(order, now).await?)
    })
}

fn in_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")?;
    runtime.block_on(work)
}

/// The directory of a controller; a command never makes one, lest a misspelt name passes for an empty mesh.
fn open(state_dir: &Path) -> Result<StateDir> {
    StateDir::open_existing(state_dir).with_context(|| {
        format!(
            "state directory {}; start the controller once, or give the right --state-dir",
            state_dir.display()
        )
    })
}

#[expect(clippy::unnecessary_wraps, reason = "the last step of commands that can fail")]
#[expect(clippy::print_stdout, reason = "the command's answer")]
fn say(text: &str) -> Result<ExitCode> {
    println!("{text}");
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::print_stderr, reason = "there is no log yet, or it is gone")]
fn complain(text: &str) {
    eprintln!("{text}");
}
