//! Every target over its corpus, and over inputs near it.
//!
//! `CULVERT_FUZZ_EXECUTIONS` sets how many mutated inputs each target gets, `CULVERT_FUZZ_SEED` where they start.

use std::collections::VecDeque;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use mesh_fuzz::{Random, TARGETS, Target, mutate};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target.name);
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("every target has a corpus")
        .map(|file| file.expect("a folder that can be read"))
        .map(|file| {
            (
                file.file_name().to_string_lossy().into_owned(),
                fs::read(file.path()).expect("a file"),
            )
        })
        .collect();
    files.sort();
    files
}

/// What went wrong, if anything.
fn run(target: &Target, executions: u64, first_seed: u64) -> Option<String> {
    let survives = |input: &[u8]| catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_ok();
    let corpus = corpus(target);
    for (name, input) in &corpus {
        if !survives(input) {
            return Some(format!("{}: panics on its corpus file {name}", target.name));
        }
    }
    let inputs: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    for seed in first_seed..first_seed + executions {
        let input = mutate(&inputs, &mut Random(seed));
        if !survives(&input) {
            let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
            return Some(format!(
                "{}: panics at CULVERT_FUZZ_SEED={seed}, on these {} bytes (xxd -r -p):\n{hex}",
                target.name,
                input.len()
            ));
        }
    }
    None
}

#[test]
fn no_target_panics() {
    let executions = number("CULVERT_FUZZ_EXECUTIONS", 2_000);
    let seed = number("CULVERT_FUZZ_SEED", 1);
    let queue = Mutex::new(TARGETS.iter().collect::<VecDeque<_>>());
    let failures = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let Some(target) = queue.lock().unwrap().pop_front() else { break };
                    let started = std::time::Instant::now();
                    let failure = run(target, executions, seed);
                    println!("{}: {:.2} s", target.name, started.elapsed().as_secs_f64());
                    failures.lock().unwrap().extend(failure);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
