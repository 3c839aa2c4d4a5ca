//! `culvert-waypoint`: the L7 proxy of a service, namespace or workload.

use std::process::ExitCode;

use clap::Parser as _;
use culvert_waypoint::config::Settings;
use culvert_waypoint::run::run;

/// glibc keeps what a burst of requests took; this one gives it back within seconds.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match run(Settings::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the last words of the process")]
            {
                eprintln!("culvert-waypoint: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
