//! Namespaces that join and leave: the label, and then a wait until their pods have followed.

use std::thread;
use std::time::{Duration, Instant};

use super::kubectl::Kubectl;
use super::overview::{self, Standing};
use crate::failure::{Ending, Failure};
use crate::show;

const LABEL: &str = "culvert.dev/dataplane-mode";
/// How long pods may take to follow. Live ones are looked for every two seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(1);

/// Labels a namespace and waits until its pods are captured.
pub(super) fn add(kubectl: &Kubectl, namespace: &str) -> Result<Ending, Failure> {
    kubectl.ask(&["label", "namespace", namespace, &format!("{LABEL}=ambient"), "--overwrite"])?;
    follow(kubectl, namespace, "captured", |standing| standing.is_captured() || !standing.wanted)
}

/// Takes the label away and waits until its pods are let go.
pub(super) fn remove(kubectl: &Kubectl, namespace: &str) -> Result<Ending, Failure> {
    kubectl.ask(&["label", "namespace", namespace, &format!("{LABEL}-")])?;
    follow(kubectl, namespace, "let go", |standing| !standing.is_captured() || standing.wanted)
}

fn follow(
    kubectl: &Kubectl,
    namespace: &str,
    word: &str,
    is_done: impl Fn(&Standing) -> bool,
) -> Result<Ending, Failure> {
    let deadline = Instant::now() + PATIENCE;
    let mut shown = None;
    loop {
        let pods = overview::pods(kubectl)?;
        let pods: Vec<_> =
            pods.into_iter().filter(|one| one.namespace == namespace && one.running).collect();
        let done = pods.iter().filter(|one| is_done(one)).count();
        let progress = format!("{done} of {} pods {word}\n", pods.len());
        if shown.as_ref() != Some(&progress) {
            show::text(&progress)?;
            shown = Some(progress);
        }
        if done == pods.len() {
            return Ok(Ending::Yes);
        }
        if Instant::now() > deadline {
            for pod in pods.iter().filter(|one| !is_done(one)) {
                show::text(&format!("  {}/{}: {}\n", pod.namespace, pod.name, pod.detail))?;
            }
            return Ok(Ending::No);
        }
        thread::sleep(INTERVAL);
    }
}
