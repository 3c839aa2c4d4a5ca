//! Trials that share one lab: they run in order, and each leaves the lab as it found it.

use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Trial};

/// One trial, by its name.
pub type Named<M> = (&'static str, fn(&mut M) -> anyhow::Result<()>);

/// Runs the trials that the command line asks for, one after the other, on the lab that `start` makes; ends the program
/// with 0 when all of them passed. `logs` is what a failed trial shows beside its error.
///
/// # Errors
/// When the lab does not start.
pub fn run<M: Send + 'static>(
    start: impl FnOnce() -> anyhow::Result<M>,
    trials: &[Named<M>],
    logs: fn(&M) -> String,
) -> anyhow::Result<()> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let lab = if arguments.list { None } else { Some(Arc::new(Mutex::new(start()?))) };
    let trials = trials
        .iter()
        .map(|&(name, trial)| {
            let lab = lab.clone();
            Trial::test(name, move || {
                let lab = lab.ok_or("only listing")?;
                let mut lab = lab.lock().map_err(|_poisoned| "an earlier trial panicked")?;
                trial(&mut lab).map_err(|error| format!("{error:#}\n{}", logs(&lab)).into())
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `exit` runs no destructors, and the lab has to go.
    drop(lab);
    conclusion.exit();
}
