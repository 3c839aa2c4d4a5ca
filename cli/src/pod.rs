//! `culvert pod`: takes pods in and lets them go, over the agent's enrolment socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_enroll::names::pod_uid;
use mesh_enroll::request::patience_ms;
use mesh_enroll::{
    ContainerId, Enroll, EnrollReply, EnrollRequest, EnrolledPod, FrameError, NetnsPath, PodName,
    PodRef, PodSelector, call,
};

use crate::arguments::{Daemon, EnrollArgs, Output, PodCommand, Reach, UnenrollArgs};
use crate::failure::{Ending, Failure};
use crate::show::{self, Columns};

/// Does it, and prints what came of it.
///
/// # Errors
/// When a name is none, or the agent cannot be asked or refuses.
pub(crate) fn run(command: &PodCommand, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let (request, done) = match command {
        PodCommand::Enroll(args) => {
            let enroll = enrolment(args, reach)?;
            let done = format!("{} is in the mesh", enroll.pod.name);
            (EnrollRequest::Enroll(enroll), done)
        }
        PodCommand::Unenroll(args) => {
            let (pod, name) = selector(args)?;
            (EnrollRequest::Unenroll { pod, gone: false }, format!("{name} is out of the mesh"))
        }
        PodCommand::List => (EnrollRequest::List, String::new()),
    };
    let reply = ask(&request, reach)?;
    if let EnrollReply::Refused(refusal) = reply {
        let mesh_enroll::Refusal { reason, remedy, retryable } = refusal;
        return Err(Failure::Refused { reason, remedy, retryable });
    }
    match (&reply, output) {
        (EnrollReply::Pods { pods }, Output::Json) => show::json(pods)?,
        (_, Output::Json) => show::json(&reply)?,
        (EnrollReply::Pods { pods }, Output::Table) => show::text(&pods_table(pods))?,
        (EnrollReply::Excluded { reason }, Output::Table) => {
            show::text(&format!("stays outside the mesh: {reason}\n"))?;
        }
        (EnrollReply::Ok | EnrollReply::Refused(_), Output::Table) => {
            show::text(&format!("{done}\n"))?;
        }
    }
    Ok(if matches!(reply, EnrollReply::Excluded { .. }) { Ending::No } else { Ending::Yes })
}

/// The pods of a node, one a row.
pub(crate) fn pods_table(pods: &[EnrolledPod]) -> String {
    if pods.is_empty() {
        return "no pods\n".to_owned();
    }
    let mut columns =
        Columns::new(&["POD", "PHASE", "ADDRESSES", "SERVICE ACCOUNT", "UID", "DETAIL"]);
    for one in pods {
        let ips: Vec<String> = one.ips.iter().map(ToString::to_string).collect();
        columns.row([
            one.pod.name.to_string(),
            one.phase.as_str().to_owned(),
            ips.join(","),
            one.pod.service_account.clone(),
            one.pod.uid.as_str().to_owned(),
            one.detail.clone(),
        ]);
    }
    columns.render()
}

fn enrolment(args: &EnrollArgs, reach: &Reach) -> Result<Enroll, Failure> {
    let container_id = args.container_id.as_deref().unwrap_or(&args.uid);
    let request = Enroll {
        pod: PodRef::new(&args.uid, &args.namespace, &args.name, &args.service_account)
            .map_err(|error| usage(&error))?,
        netns: NetnsPath::new(&args.netns).map_err(|error| usage(&error))?,
        ips: mesh_enroll::request::pod_addresses(args.ips.iter().copied())
            .map_err(|error| usage(&error))?,
        container_id: ContainerId::new(container_id).map_err(|error| usage(&error))?,
        nameservers: args.nameservers.iter().copied().collect(),
        live: args.live,
        patience_ms: patience_ms(Duration::from_secs(reach.timeout_seconds)),
    };
    Ok(request)
}

fn selector(args: &UnenrollArgs) -> Result<(PodSelector, String), Failure> {
    match (&args.pod, &args.uid, &args.container_id) {
        (Some(pod), _, _) => {
            let name = pod_name(pod)?;
            Ok((PodSelector::Name(name), pod.clone()))
        }
        (None, Some(uid), _) => {
            Ok((PodSelector::Uid(pod_uid(uid).map_err(|error| usage(&error))?), uid.clone()))
        }
        (None, None, Some(id)) => {
            let container = ContainerId::new(id).map_err(|error| usage(&error))?;
            Ok((PodSelector::Container(container), id.clone()))
        }
        (None, None, None) => Err(Failure::Usage {
            problem: "no pod is named".to_owned(),
            remedy: "culvert pod unenroll NAMESPACE/NAME".to_owned(),
        }),
    }
}

/// `namespace/name` as it is typed.
pub(crate) fn pod_name(text: &str) -> Result<PodName, Failure> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| Failure::Usage {
        problem: format!("{text:?} is not of the form NAMESPACE/NAME"),
        remedy: "culvert pod list shows the names".to_owned(),
    })?;
    PodName::new(namespace, name).map_err(|error| usage(&error))
}

fn usage(error: &dyn std::error::Error) -> Failure {
    Failure::Usage {
        problem: error.to_string(),
        remedy: "see culvert pod enroll --help".to_owned(),
    }
}

fn ask(request: &EnrollRequest, reach: &Reach) -> Result<EnrollReply, Failure> {
    let socket: PathBuf = reach.run_dir.join("agent.sock");
    let patience = Some(Duration::from_secs(reach.timeout_seconds));
    // An agent that was started a moment ago is not ready yet; the others only ask what is.
    let connect_for = match request {
        EnrollRequest::Enroll(_) => AGENT_START.min(Duration::from_secs(reach.timeout_seconds)),
        EnrollRequest::Unenroll { .. }
        | EnrollRequest::Check { .. }
        | EnrollRequest::Status
        | EnrollRequest::Gc { .. }
        | EnrollRequest::List => Duration::ZERO,
    };
    let mut stream = connect(&socket, connect_for)
        .and_then(|stream| {
            stream.set_read_timeout(patience)?;
            stream.set_write_timeout(patience)?;
            Ok(stream)
        })
        .map_err(|error| Daemon::Agent.unreachable(&socket, error))?;
    call(&mut stream, request).map_err(|error| match error {
        FrameError::Malformed(source) => Failure::Unreadable { who: Daemon::Agent.name(), source },
        FrameError::TooLong { .. } => Failure::Answered {
            who: Daemon::Agent.name(),
            problem: error.to_string(),
            remedy: "use culvert and the agent of one version".to_owned(),
        },
        FrameError::Truncated => no_answer(socket, error.to_string()),
        FrameError::Late => no_answer(socket, format!("none in {} s", reach.timeout_seconds)),
        FrameError::Io(source) => no_answer(socket, source.to_string()),
    })
}

/// Connects, again and again for as long as `patience` lasts, and says so.
fn connect(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    let mut told = false;
    loop {
        let error = match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let may_come =
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if !may_come || Instant::now() + CONNECT_PAUSE > deadline {
            return Err(error);
        }
        if !told {
            let seconds = patience.as_secs();
            show::remark(&format!(
                "waiting up to {seconds} s for the agent at {}\n",
                socket.display()
            ));
            told = true;
        }
        std::thread::sleep(CONNECT_PAUSE);
    }
}

/// How long an agent may take from its start until it takes requests: it joins the mesh before.
const AGENT_START: Duration = Duration::from_secs(15);
/// Between two tries to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(100);

fn no_answer(socket: PathBuf, problem: String) -> Failure {
    Failure::NoAnswer { who: Daemon::Agent.name(), socket, problem }
}
