//! `culvert-agent`: the per-node agent.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use culvert_agent::agent;
use culvert_agent::config::{Arguments, Command, Settings};
use mesh_runtime::{FlowMeterConfig, LogConfig, Logging, Metrics};

/// glibc keeps what a burst of pods and connections took; this one gives it back within seconds.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> anyhow::Result<()> {
    // A core dump would hold private keys.
    nix::sys::prctl::set_dumpable(false).context("forbidding core dumps")?;
    let settings = arguments.settings;
    let logging = logging(&settings)?;
    match arguments.command {
        Some(Command::Uninstall { stay: false }) => agent::uninstall(&settings),
        Some(Command::Uninstall { stay: true }) => {
            agent::uninstall(&settings)?;
            runtime()?.block_on(agent::stay(&settings))
        }
        Some(Command::Run) | None => run(settings, logging),
    }
}

fn run(settings: Settings, logging: Logging) -> anyhow::Result<()> {
    let metrics = Metrics::install(
        "culvert-agent",
        env!("CARGO_PKG_VERSION"),
        FlowMeterConfig::default(),
        Some(logging.handle()),
    )?;
    mesh_identity::tls::provider()
        .as_ref()
        .clone()
        .install_default()
        .map_err(|_another| anyhow::anyhow!("another TLS provider was installed before"))?;
    runtime()?.block_on(agent::run(settings, logging, metrics))
}

/// The byte path has threads of its own; this runtime serves the controller, DNS, enrolment and the admin interface.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_name("culvert-control")
        .enable_all()
        .build()
        .context("starting the runtime")
}

fn logging(settings: &Settings) -> anyhow::Result<Logging> {
    let config = LogConfig {
        filter: settings.log.clone(),
        format: settings.log_format.into(),
        ..LogConfig::default()
    };
    Ok(Logging::start(&config, std::io::stderr())?)
}

/// The last words go to standard error whatever the log's filter says.
fn report(error: &anyhow::Error) {
    #[expect(clippy::print_stderr, reason = "the last words of the process")]
    {
        eprintln!("culvert-agent: {error:#}");
    }
}
