//! `culvert-agent`: the per-node agent.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use culvert_agent::agent::{self, Ending};
use culvert_agent::config::{Arguments, Command, Settings};
use culvert_agent::retired;
use mesh_runtime::{Drain, FlowMeterConfig, LogConfig, Logging, Metrics};

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
        Some(Command::Ready) => culvert_agent::probe::ready(&settings),
        Some(Command::Retired) => runtime()?.block_on(retire(&settings)),
        Some(Command::Run) | None => match run(settings.clone(), logging)? {
            Ending::HandedOver if settings.stay_after_hand_over => {
                Err(retired::become_one(&settings))
            }
            Ending::HandedOver | Ending::Asked => Ok(()),
        },
    }
}

async fn retire(settings: &Settings) -> anyhow::Result<()> {
    let (trigger, drain) = Drain::new();
    tokio::spawn(async move {
        if let Err(error) = trigger.begin_on_signals().await {
            tracing::error!(%error, "signals cannot be received");
        }
    });
    retired::stay(&settings.handover_socket(), &drain).await
}

fn run(settings: Settings, logging: Logging) -> anyhow::Result<Ending> {
    let metrics = Metrics::install(
        "culvert-agent",
        env!("CARGO_PKG_VERSION"),
        FlowMeterConfig::default(),
        Some(logging.handle()),
    )?;
    mesh_identity::tls::install()?;
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
