//! A process without descriptors. The limit is the process's, so this test has one of its own. Root is needed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(dead_code, reason = "the two nodes are another suite's, of which this one needs a part")]

#[path = "../dataplane/netlab.rs"]
mod netlab;
#[path = "../dataplane/node.rs"]
mod node;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use culvert_agent::dataplane::{DataPlaneConfig, Limits};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use node::Mesh;

fn say_hello(stream: &mut TcpStream) {
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
}

/// Takes every descriptor there is.
fn take_all() -> Vec<File> {
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    taken
}

#[test]
fn without_descriptors_new_connections_are_reset_and_open_ones_go_on() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 512, hard).unwrap();
    // The data plane's own count does not help: as if the rest of the agent had taken what is left to it, and more.
    let limits = Limits { descriptors: Some(1_000_000), ..Limits::default() };
    let mesh = Mesh::with(DataPlaneConfig { workers: 1, limits, ..DataPlaneConfig::default() });
    let target: SocketAddr = mesh.server.pod.v4(8080);
    let listener = mesh.server.pod.listen(target);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                std::io::copy(&mut reader, &mut stream).ok();
            });
        }
    });
    let mut live = mesh.client.dial(target).unwrap();
    say_hello(&mut live);
    // Connecting takes no descriptor, making a socket does.
    let sockets: Vec<_> = (0..20).map(|_| mesh.client.pod.client_socket(target)).collect();
    let taken = take_all();
    assert!(taken.len() > 50);
    let begun = Instant::now();
    // Kept open: a descriptor given back would serve the next one.
    let mut kept = Vec::with_capacity(sockets.len());
    for socket in sockets {
        let mut refused = mesh.client.dial_by(socket, target).unwrap();
        let error = refused.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        say_hello(&mut live);
        kept.push(refused);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(mesh.client.plane.stats().shed >= 20);
    drop((taken, kept));
    let mut again = mesh.client.dial(target).unwrap();
    say_hello(&mut again);
}
