//! The built program: what it says of its state directory, and how it ends.

#![allow(clippy::unwrap_used, reason = "tests; the helpers too")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use mesh_controller::ca::authority::Authority;
use mesh_controller::ca::tokens::Tokens;
use mesh_controller::state_dir::StateDir;
use mesh_identity::{IssuedAnswer, csr};
use mesh_model::SpiffeId;

const PATIENCE: Duration = Duration::from_secs(60);

fn controller(arguments: &[&str], state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-controller"));
    command.args(arguments).arg("--state-dir").arg(state).env_clear().stdin(Stdio::null());
    command
}

fn run(folder: &Path, state: &Path) -> Command {
    let source = format!("directory:{}", folder.display());
    let arguments = ["run", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--source"];
    controller(&[&arguments[..], &[&source]].concat(), state)
}

/// A controller that has its state directory.
fn running(folder: &Path, state: &Path) -> Child {
    let mut child = run(folder, state).stderr(Stdio::null()).spawn().unwrap();
    let named = format!("{}\n", child.id());
    let deadline = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(state.join("controller.lock")).is_ok_and(|pid| pid == named) {
        assert!(Instant::now() < deadline, "the controller does not start");
        assert!(child.try_wait().unwrap().is_none(), "the controller ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// What a program that does not start says.
#[track_caller]
fn refused(mut command: Command) -> String {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it runs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

#[test]
fn a_second_controller_does_not_run_on_one_state_directory() {
    let place = tempfile::tempdir().unwrap();
    let (folder, state) = (place.path().join("manifests"), place.path().join("state"));
    std::fs::create_dir(&folder).unwrap();
    let mut first = running(&folder, &state);
    let told = refused(run(&folder, &state));
    assert!(told.contains(&format!("process id {};", first.id())), "{told}");
    assert!(told.contains(&state.display().to_string()) && told.contains("--state-dir"), "{told}");
    // Its own commands work beside it, and another directory is another controller's.
    let token = controller(&["token", "create", "--node", "n1"], &state).output().unwrap();
    assert!(token.status.success(), "{token:?}");
    let mut other = running(&folder, &place.path().join("other"));
    // However it ends.
    first.kill().unwrap();
    first.wait().unwrap();
    let mut next = running(&folder, &state);
    for child in [&mut other, &mut next] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_damaged_list_of_spent_tokens_is_named_at_the_start() {
    let place = tempfile::tempdir().unwrap();
    let (folder, state) = (place.path().join("manifests"), place.path().join("state"));
    std::fs::create_dir(&folder).unwrap();
    Tokens::open(StateDir::open(&state).unwrap()).unwrap();
    let file = state.join("tokens-spent.json");
    let files = StateDir::open(&state).unwrap();
    files.write("tokens-spent.json", "[[").unwrap();
    for command in [run(&folder, &state), controller(&["token", "create", "--node", "n1"], &state)]
    {
        let told = refused(command);
        assert!(told.contains(&format!("{} cannot be read", file.display())), "{told}");
        assert!(told.contains("restore it from a backup, or remove it together with"), "{told}");
    }
}

#[test]
fn revoking_what_was_never_issued_is_told_apart() {
    let place = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let state = place.path().join("state");
    let authority = Authority::open(StateDir::open(&state).unwrap(), "cluster.local", now).unwrap();
    let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
    let (key, request) = csr(&id).unwrap();
    let chain = authority.sign(&request, &id, Duration::from_secs(600), now).unwrap();
    let svid = IssuedAnswer::check(&chain, &id, key, now).unwrap().svid;
    let serial: String = svid.serial().iter().map(|byte| format!("{byte:02x}")).collect();
    let revoke =
        |serial: &str| controller(&["ca", "revoke", "--serial", serial], &state).output().unwrap();
    let done = revoke(&serial);
    assert_eq!((done.status.code(), done.stdout.as_slice()), (Some(0), &b"revoked\n"[..]));
    let unknown = revoke("0badcafe");
    let told = String::from_utf8(unknown.stderr).unwrap();
    assert_eq!((unknown.status.code(), unknown.stdout.as_slice()), (Some(5), &b""[..]), "{told}");
    assert!(
        told.contains(
            "\"0badcafe\" is on the revocation lists, but this authority never issued it"
        )
    );
    assert!(told.contains("remedy: "), "{told}");
    assert_eq!(revoke("no serial").status.code(), Some(1));
    assert!(authority.tick(now).unwrap() && !authority.crl_pem().is_empty());
}
