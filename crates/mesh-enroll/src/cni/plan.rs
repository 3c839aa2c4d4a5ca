//! From an invocation to a question for the agent, and from its answer to the runtime's.

use std::path::PathBuf;
use std::time::Duration;

use mesh_model::error_chain;
use serde_json::{Value, json};

use super::SUPPORTED_VERSIONS;
use super::config::Config;
use super::environment::{Environment, Verb};
use super::error::{CniError, Code};
use super::previous;
use crate::frame::FrameError;
use crate::reply::{EnrollReply, Refusal};
use crate::request::{Enroll, EnrollRequest, PodSelector, patience_ms};

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Print this, if anything, and succeed.
    Answer(Option<Value>),
    /// Ask the agent, then [`conclude`].
    Ask(Box<Question>),
}

/// A question for the agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Where it listens.
    pub socket: PathBuf,
    /// How long to try to connect.
    pub connect_for: Duration,
    /// How long an answer may take.
    pub answer_within: Duration,
    /// What to ask.
    pub request: EnrollRequest,
    /// How to go on.
    pub ending: Ending,
}

/// What an answer of the agent means for the runtime.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// `ADD`: the result to pass on when the pod may start.
    Added(Value),
    /// `DEL`: nothing stops it.
    Deleted,
    /// `CHECK`.
    Checked,
    /// `STATUS`.
    Available,
    /// `GC`.
    Collected,
}

/// The agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nothing listens on its socket.
    #[error("the culvert agent of this node is not running")]
    Away(#[source] std::io::Error),
    /// It listens, but the conversation failed.
    #[error("the culvert agent of this node gave no answer")]
    NoAnswer(#[source] FrameError),
}

/// Decides what an invocation asks for.
///
/// # Errors
/// When the environment or the configuration is unusable; `DEL` too, by the specification.
pub fn plan(environment: &Environment, stdin: &[u8]) -> Result<Plan, CniError> {
    match environment.verb()? {
        Verb::Version => Ok(Plan::Answer(Some(versions(stdin)))),
        Verb::Add => plan_add(environment, Config::parse(stdin)?),
        Verb::Check => plan_check(environment, Config::parse(stdin)?),
        Verb::Status => Ok(ask(Config::parse(stdin)?, EnrollRequest::Status, Ending::Available)),
        Verb::Del => {
            let config = Config::parse(stdin)?;
            environment.check_interface()?;
            let pod = PodSelector::Container(environment.container()?);
            Ok(ask(config, EnrollRequest::Unenroll { pod, gone: true }, Ending::Deleted))
        }
        Verb::Gc => {
            let config = Config::parse(stdin)?;
            let valid = config.valid.clone().ok_or_else(|| {
                let what = "without it every pod would count as gone";
                CniError::new(Code::InvalidConfig, "cni.dev/valid-attachments is missing", what)
            })?;
            Ok(ask(config, EnrollRequest::Gc { valid }, Ending::Collected))
        }
    }
}

fn plan_add(environment: &Environment, config: Config) -> Result<Plan, CniError> {
    environment.check_interface()?;
    let container_id = environment.container()?;
    let netns = environment.namespace()?;
    let result = previous_result(&config)?;
    let pod = environment.pod(&container_id)?;
    if config.excluded.contains(pod.name.namespace()) {
        return Ok(Plan::Answer(Some(result)));
    }
    let previous = previous::read(&result)?;
    let enroll = Enroll {
        pod,
        netns,
        ips: previous.ips,
        container_id,
        nameservers: previous.nameservers,
        live: false,
        patience_ms: patience_ms(config.timeout),
    };
    Ok(ask(config, EnrollRequest::Enroll(enroll), Ending::Added(result)))
}

fn plan_check(environment: &Environment, config: Config) -> Result<Plan, CniError> {
    environment.check_interface()?;
    let container_id = environment.container()?;
    environment.namespace()?;
    let _passed_by_the_runtime = previous_result(&config)?;
    let pod = environment.pod(&container_id)?;
    if config.excluded.contains(pod.name.namespace()) {
        return Ok(Plan::Answer(None));
    }
    let pod = PodSelector::Container(container_id);
    Ok(ask(config, EnrollRequest::Check { pod }, Ending::Checked))
}

fn previous_result(config: &Config) -> Result<Value, CniError> {
    config.previous.clone().filter(Value::is_object).ok_or_else(|| {
        let what = "culvert-cni makes no interfaces: put it behind the plugin that does";
        CniError::new(Code::InvalidConfig, "prevResult is missing", what)
    })
}

fn ask(config: Config, request: EnrollRequest, ending: Ending) -> Plan {
    // Nobody starts a pod on the answer to anything but ADD, so only ADD waits for an agent that restarts.
    let connect_for = match ending {
        Ending::Added(_) => config.agent_wait,
        Ending::Deleted | Ending::Checked | Ending::Available | Ending::Collected => Duration::ZERO,
    };
    Plan::Ask(Box::new(Question {
        socket: config.agent_socket,
        connect_for,
        answer_within: config.timeout,
        request,
        ending,
    }))
}

/// Turns the agent's answer into what is printed, if anything.
///
/// # Errors
/// What the runtime is to be told.
pub fn conclude(
    ending: Ending,
    answer: Result<EnrollReply, AskError>,
) -> Result<Option<Value>, CniError> {
    match ending {
        Ending::Added(result) => settled(answer, Code::Refused).map(|()| Some(result)),
        // The runtime would keep the sandbox and try for ever, while all there is to lose is a record that the agent
        // drops by itself once the namespace is gone.
        Ending::Deleted => Ok(None),
        Ending::Checked => settled(answer, Code::NotAsExpected).map(|()| None),
        Ending::Available => match answer {
            Err(error) => Err(away(&error, Code::UnavailableLimited)),
            Ok(reply) => settled(Ok(reply), Code::Unavailable)
                .map_err(|error| CniError { code: Code::Unavailable, ..error })
                .map(|()| None),
        },
        Ending::Collected => settled(answer, Code::Refused).map(|()| None),
    }
}

fn settled(answer: Result<EnrollReply, AskError>, refused: Code) -> Result<(), CniError> {
    match answer.map_err(|error| away(&error, Code::TryAgainLater))? {
        EnrollReply::Ok | EnrollReply::Excluded { .. } => Ok(()),
        EnrollReply::Refused(Refusal { reason, remedy, retryable }) => {
            let code = if retryable { Code::TryAgainLater } else { refused };
            Err(CniError::new(code, reason, remedy))
        }
        EnrollReply::Pods { .. } => Err(CniError::new(
            Code::TryAgainLater,
            "the agent's answer does not fit the question",
            "plugin and agent may be of different versions",
        )),
    }
}

fn away(error: &AskError, code: Code) -> CniError {
    CniError::new(code, error.to_string(), error_chain(error))
}

fn versions(stdin: &[u8]) -> Value {
    json!({ "cniVersion": Config::version_of(stdin), "supportedVersions": SUPPORTED_VERSIONS })
}
