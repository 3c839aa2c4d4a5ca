//! Logging: filtered events and access-log lines through one writer that never waits.

mod writer;

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_telemetry::access_log::{early_denial_line, flow_line, is_failure};
use mesh_telemetry::request::request_line;
use mesh_telemetry::{EarlyDenial, FlowRecord, LogFormat, RequestRecord};
use tracing::Level;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

pub use writer::{FlushOnDrop, LineWriter, MAX_LINE_BYTES};

/// How a program logs.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// What is logged: a level, and other levels of single targets, as `tracing_subscriber::EnvFilter` reads them: `info`,
    /// `info,access=off`, `warn,mesh_net=debug`. Without a level of its own it is `info`, so that a filter about one target
    /// does not silence the others. Targets are modules of ours (`culvert_…`, `mesh_…`), `access`, `policy`, and the
    /// libraries below that log.
    pub filter: String,
    /// How lines look.
    pub format: LogFormat,
    /// Lines that wait for the sink at most; more are dropped and counted. At least 1; default 8192.
    pub queue_lines: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: LogFormat::Text, queue_lines: 8192 }
    }
}

/// Logging that cannot be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter cannot be read.
    #[error("not a log filter: {filter:?}: {problem}")]
    Filter {
        /// What was given.
        filter: String,
        /// Where it goes wrong, and what would be right.
        problem: String,
    },
    /// The thread of the writer cannot be started.
    #[error("cannot start the log writer")]
    Writer(#[source] io::Error),
    /// Logging was set up before.
    #[error("logging is set up already")]
    Installed(#[source] TryInitError),
    /// The subscriber is gone.
    #[error("logging has ended")]
    Gone(#[source] reload::Error),
}

/// Logging of this process. Dropping it waits up to a second for what is queued.
#[derive(Debug)]
pub struct Logging {
    handle: LogHandle,
    access: AccessLog,
    _flush: FlushOnDrop,
}

impl Logging {
    /// Installs the process's subscriber, writing to `sink` on a thread of its own.
    ///
    /// # Errors
    /// [`LogError::Filter`], [`LogError::Writer`], or [`LogError::Installed`] on a second call.
    pub fn start(
        config: &LogConfig,
        sink: impl io::Write + Send + 'static,
    ) -> Result<Self, LogError> {
        let filter = parse(&config.filter)?;
        let (writer, flush) =
            LineWriter::start(sink, config.queue_lines).map_err(LogError::Writer)?;
        let (filter, reload) = reload::Layer::new(filter);
        let events = fmt::layer().with_ansi(false).with_writer(writer.clone());
        let registry = tracing_subscriber::registry().with(filter);
        let installed = match config.format {
            LogFormat::Text => registry.with(events).try_init(),
            LogFormat::Json => {
                registry.with(events.json().flatten_event(true).with_current_span(true)).try_init()
            }
        };
        installed.map_err(LogError::Installed)?;
        let initial: Arc<str> = config.filter.as_str().into();
        Ok(Self {
            handle: LogHandle { reload, initial, writer: writer.clone() },
            access: AccessLog { writer, format: config.format },
            _flush: flush,
        })
    }

    /// For changing the filter at run time.
    #[must_use]
    pub fn handle(&self) -> LogHandle {
        self.handle.clone()
    }

    /// For writing access-log lines.
    #[must_use]
    pub fn access(&self) -> AccessLog {
        self.access.clone()
    }
}

/// Libraries of ours that log.
const LIBRARIES: [&str; 13] = [
    "aya",
    "h2",
    "hickory",
    "hyper",
    "kube",
    "mio",
    "notify",
    "rustls",
    "tokio",
    "tonic",
    "tower",
    "tungstenite",
    "want",
];

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    let invalid = |problem: String| LogError::Filter { filter: filter.to_owned(), problem };
    // Directives about spans have commas of their own, and are for those who know what they do.
    let plain = !filter.contains('[');
    let words = || filter.split(',').map(str::trim).filter(|word| !word.is_empty());
    for word in words().filter(|_| plain) {
        match word.split_once('=') {
            None if word.parse::<LevelFilter>().is_err() => {
                return Err(invalid(format!(
                    "{word} is no level: off, error, warn, info, debug or trace, or TARGET=LEVEL"
                )));
            }
            Some((target, _)) if !is_target(target) => {
                return Err(invalid(format!(
                    "nothing logs as {target}: access, policy, culvert_…, mesh_…, or one of {}",
                    LIBRARIES.join(", ")
                )));
            }
            None | Some(_) => {}
        }
    }
    let has_level = words().any(|word| word.parse::<LevelFilter>().is_ok());
    let level = if has_level { None } else { Some("info") };
    let directives = words().filter(|_| plain).chain((!plain).then_some(filter));
    let whole = level.into_iter().chain(directives).collect::<Vec<_>>().join(",");
    EnvFilter::builder().parse(whole).map_err(|error| invalid(error.to_string()))
}

fn is_target(target: &str) -> bool {
    let is_of = |name: &&str| target.strip_prefix(*name).is_some_and(is_rest_of_module);
    matches!(target, "access" | "policy")
        || target.starts_with("culvert_")
        || target.starts_with("mesh_")
        || LIBRARIES.iter().any(is_of)
}

/// As in `hyper_util` and `hyper::client` behind `hyper`.
fn is_rest_of_module(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with(['_', ':'])
}

/// Changes what is logged; cheap to clone.
#[derive(Clone, Debug)]
pub struct LogHandle {
    reload: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
    writer: LineWriter,
}

impl LogHandle {
    /// The filter in use.
    ///
    /// # Errors
    /// [`LogError::Gone`] once logging has ended.
    pub fn filter(&self) -> Result<String, LogError> {
        self.reload.with_current(ToString::to_string).map_err(LogError::Gone)
    }

    /// Replaces the filter.
    ///
    /// # Errors
    /// [`LogError::Filter`], then nothing has changed; [`LogError::Gone`].
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        self.reload.reload(parse(filter)?).map_err(LogError::Gone)
    }

    /// Goes back to the filter the process began with.
    ///
    /// # Errors
    /// As [`set_filter`](Self::set_filter).
    pub fn reset_filter(&self) -> Result<(), LogError> {
        self.set_filter(&self.initial)
    }

    /// Lines dropped so far because the sink was slow.
    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.writer.dropped_lines()
    }
}

/// Writes access-log lines, where the filter lets the target `access` through at the line's level; cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessLog {
    writer: LineWriter,
    format: LogFormat,
}

impl AccessLog {
    /// An access log on a writer of its own, in a file for example.
    #[must_use]
    pub const fn new(writer: LineWriter, format: LogFormat) -> Self {
        Self { writer, format }
    }

    /// Writes the line of a flow that has ended now.
    pub fn flow(&self, record: &FlowRecord) {
        let wanted = if is_failure(record.reason) {
            tracing::enabled!(target: "access", Level::ERROR)
        } else {
            tracing::enabled!(target: "access", Level::INFO)
        };
        if wanted {
            self.writer.line(flow_line(record, SystemTime::now(), self.format));
        }
    }

    /// Writes the line of a request whose answer has ended now.
    pub fn request(&self, record: &RequestRecord) {
        let wanted = if record.is_refused() {
            tracing::enabled!(target: "access", Level::WARN)
        } else {
            tracing::enabled!(target: "access", Level::INFO)
        };
        if wanted {
            self.writer.line(request_line(record, SystemTime::now(), self.format));
        }
    }

    /// Writes the line of a connection that did not become a flow.
    pub fn early_denial(&self, denial: &EarlyDenial) {
        if tracing::enabled!(target: "access", Level::WARN) {
            self.writer.line(early_denial_line(denial, SystemTime::now(), self.format));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    use mesh_telemetry::FlowBytes;

    use crate::flow_meter::tests::{facts, record};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The subscriber is one per process, so one test tells its whole story.
    #[test]
    fn the_filter_changes_while_the_process_runs() {
        let sink = Shared::default();
        let logging = Logging::start(&LogConfig::default(), sink.clone()).unwrap();
        let handle = logging.handle();
        tracing::debug!("hidden");
        tracing::info!(flow.id = 7, "shown");
        handle.set_filter("debug").unwrap();
        tracing::debug!("shown later");
        for wrong in ["a=b=c", "inof", "info,acess=off", "hyperion=debug", "mesh_net=loud"] {
            let refused = handle.set_filter(wrong);
            assert!(matches!(refused, Err(LogError::Filter { .. })), "{wrong}: {refused:?}");
        }
        for right in ["mesh_net=debug", "access=off", "WARN, hyper_util::client=trace", ""] {
            handle.set_filter(right).unwrap();
            let level = if right.starts_with("WARN") { "warn" } else { "info" };
            let words = handle.filter().unwrap();
            assert!(words.split(',').any(|word| word == level), "{right}: {words}");
        }
        handle.set_filter("debug").unwrap();
        assert_eq!(handle.filter().unwrap(), "debug");
        handle.set_filter("error").unwrap();
        let access = logging.access();
        for reason in ["client_reset", "policy_denied"] {
            access.flow(&record(&facts("web"), reason, FlowBytes::default()));
        }
        handle.reset_filter().unwrap();
        tracing::debug!("hidden again");
        assert_eq!(handle.dropped_lines(), 0);
        assert!(matches!(
            Logging::start(&LogConfig::default(), io::sink()),
            Err(LogError::Installed(_))
        ));
        drop(logging);
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains("shown flow.id=7") && text.contains("shown later"), "{text}");
        assert!(!text.contains("hidden"), "{text}");
        assert!(text.contains("reason=policy_denied"), "{text}");
        assert!(!text.contains("client_reset"), "a reset is no error: {text}");
    }
}
