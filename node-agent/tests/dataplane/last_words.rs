//! What was said before a reset, and around urgent data, is heard, on every path, as it is without a mesh.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use culvert_agent::dataplane::Changed;
use mesh_model::TunnelProtocol;
use mesh_resolve::IndexDelta;
use socket2::SockRef;

use crate::node::{Mesh, workload};
use crate::{pattern, reset};

/// Tries of each kind: most of what is wrong here is a race.
const TRIES: usize = 20;

/// The ways a connection may go through agents.
#[derive(Clone, Copy, Debug)]
enum Way {
    Tunnel,
    /// Plaintext to a captured pod.
    In,
    /// Plaintext from a captured pod.
    Out,
}

fn on_every_way(check: impl Fn(Way, &dyn Fn() -> TcpStream, &TcpListener)) {
    for way in [Way::Tunnel, Way::In, Way::Out] {
        let mesh = Mesh::new();
        let target = mesh.server.pod.v4(8080);
        let listener = mesh.server.pod.listen(target);
        match way {
            Way::Tunnel => {}
            Way::In => mesh.server.pod.steer_plaintext(8080),
            Way::Out => mesh.client.change(Changed::INDEX, |snapshot| {
                let mut server = workload("server", &mesh.server.pod.addresses);
                server.tunnel_protocol = TunnelProtocol::None;
                let workloads = vec![server];
                snapshot.index.apply(IndexDelta { workloads, ..IndexDelta::default() });
            }),
        }
        check(way, &|| dial(&mesh, way, target), &listener);
    }
}

fn dial(mesh: &Mesh, way: Way, target: SocketAddr) -> TcpStream {
    let stream = match way {
        Way::Tunnel | Way::Out => mesh.client.dial(target).unwrap(),
        Way::In => mesh.client.pod.connect_plain(target).unwrap(),
    };
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// What can be read before the reset that must come.
fn until_reset(stream: &mut TcpStream) -> Vec<u8> {
    let (mut heard, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut part) {
            Ok(0) => panic!("an orderly end after {} bytes", heard.len()),
            Ok(count) => heard.extend(&part[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "after {}", heard.len());
                return heard;
            }
        }
    }
}

/// Accepts one connection and serves it.
fn serve<T: Send + 'static>(
    listener: &TcpListener,
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> JoinHandle<T> {
    let listener = listener.try_clone().unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        serve(stream)
    })
}

#[test]
fn a_servers_answer_is_heard_before_its_reset() {
    on_every_way(|way, dial, listener| {
        for (length, unread) in [(200, true), (200, false), (60_000, false)] {
            for attempt in 0..TRIES {
                let answer = pattern(length);
                let server = serve(listener, move |mut stream| {
                    stream.read_exact(&mut [0; 8]).unwrap();
                    stream.write_all(&answer).unwrap();
                    if !unread {
                        reset(stream);
                    }
                });
                let mut client = dial();
                client.write_all(&[1; 1000]).unwrap();
                let heard = until_reset(&mut client);
                server.join().unwrap();
                let right = heard == pattern(length);
                assert!(right, "{way:?}, try {attempt}: {} of {length}", heard.len());
            }
        }
    });
}

#[test]
fn a_clients_words_are_heard_before_its_reset() {
    on_every_way(|way, dial, listener| {
        for attempt in 0..TRIES {
            let server = serve(listener, |mut stream| {
                stream.write_all(b"a banner that nobody reads").unwrap();
                until_reset(&mut stream)
            });
            let mut client = dial();
            client.peek(&mut [0]).unwrap();
            client.write_all(&pattern(1000)).unwrap();
            drop(client);
            let heard = server.join().unwrap();
            assert!(heard == pattern(1000), "{way:?}, try {attempt}: {}", heard.len());
        }
    });
}

#[test]
fn urgent_data_holds_nothing_up_and_is_not_lost() {
    on_every_way(|way, dial, listener| {
        for attempt in 0..TRIES {
            let server = serve(listener, |mut stream| {
                SockRef::from(&stream).set_out_of_band_inline(true).unwrap();
                let mut heard = [0; 10];
                stream.read_exact(&mut heard).map(|()| heard).map_err(|error| error.kind())
            });
            let mut client = dial();
            client.write_all(b"abc").unwrap();
            SockRef::from(&client).send_out_of_band(b"X").unwrap();
            client.write_all(b"defghi").unwrap();
            assert_eq!(server.join().unwrap().as_ref(), Ok(b"abcXdefghi"), "{way:?}, {attempt}");
        }
    });
}
