//! The shape of a connection: who speaks first, who ends it and how, which addresses its ends see.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

const BANNER: &[u8] = b"220 the server speaks first\n";
/// Said in front of a reset. No more than a new connection may send at once, or the sender's kernel drops some.
const LAST_WORDS: [u8; 10_000] = [b'l'; 10_000];
const LIMIT: Duration = Duration::from_secs(20);

/// Serves the connection shapes on their ports (see [`super::ports`]) in threads of their own.
///
/// # Errors
/// When a port cannot be listened on.
pub fn serve(listen: impl Fn(u16) -> anyhow::Result<TcpListener>) -> anyhow::Result<()> {
    use super::ports;
    let last_ending = Arc::new(Mutex::new("none".to_owned()));
    spawn(listen(ports::ECHO)?, |mut stream| {
        let mut count = 0;
        copy_until_end(&mut stream, true, &mut count)?;
        stream.write_all(format!("\nsaw {count}").as_bytes())?;
        Ok(())
    });
    spawn(listen(ports::SERVER_FIRST)?, |mut stream| {
        stream.write_all(BANNER)?;
        copy_until_end(&mut stream, true, &mut 0)
    });
    spawn(listen(ports::RESET)?, |mut stream| {
        stream.read_exact(&mut [0; 1])?;
        stream.write_all(&LAST_WORDS)?;
        reset(&stream)
    });
    spawn(listen(ports::WHO)?, |mut stream| {
        let text = format!("{} {}", stream.peer_addr()?, stream.local_addr()?);
        stream.write_all(text.as_bytes())?;
        Ok(())
    });
    let (watched, half_closed) = (Arc::clone(&last_ending), Arc::clone(&last_ending));
    spawn(listen(ports::WATCH)?, move |mut stream| {
        // The client may go on: the connection is there.
        stream.write_all(b"+")?;
        let mut count = 0;
        let ending = match copy_until_end(&mut stream, false, &mut count) {
            Ok(()) => format!("end {count}"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                format!("reset after {count}")
            }
            Err(error) => format!("error {error}"),
        };
        if let Ok(mut last) = watched.lock() {
            *last = ending;
        }
        Ok(())
    });
    spawn(listen(ports::ENDINGS)?, move |mut stream| {
        let last = last_ending.lock().map_or_else(|_| "poisoned".to_owned(), |last| last.clone());
        stream.write_all(last.as_bytes())?;
        Ok(())
    });
    spawn(listen(ports::SERVER_HALF_CLOSE)?, move |mut stream| {
        stream.write_all(b"goodbye")?;
        stream.shutdown(Shutdown::Write)?;
        let mut count = 0;
        copy_until_end(&mut stream, false, &mut count)?;
        if let Ok(mut last) = half_closed.lock() {
            *last = format!("end {count} after goodbye");
        }
        Ok(())
    });
    Ok(())
}

fn spawn(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
) {
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    let serve = Arc::clone(&serve);
                    std::thread::spawn(move || {
                        if let Err(error) = serve(stream) {
                            eprintln!("from {peer}: {error}");
                        }
                    });
                }
                Err(error) => eprintln!("accept: {error}"),
            }
        }
    });
}

/// Reads until the end, or an error, and counts the bytes that came before it.
fn copy_until_end(stream: &mut TcpStream, echo: bool, count: &mut u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        *count += length as u64;
        if echo {
            stream.write_all(&buffer[..length])?;
        }
    }
}

fn reset(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, LIMIT).context("connecting")?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// The client half-closes; the server's answer to that must still arrive, whole.
///
/// # Errors
/// When it does not.
pub fn check_client_half_close(target: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    let sent = vec![b'x'; 300_000];
    let mut writer = stream.try_clone()?;
    let to_send = sent.clone();
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        writer.write_all(&to_send)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("reading the echo")?;
    writing.join().map_err(|_panic| anyhow::anyhow!("the writer panicked"))??;
    let mut wanted = sent;
    wanted.extend_from_slice(b"\nsaw 300000");
    if answer != wanted {
        bail!("got {} bytes of {}", answer.len(), wanted.len());
    }
    Ok(())
}

/// The server half-closes; what the client sends after that must still arrive, all of it (asked at `endings`).
///
/// # Errors
/// When the server's FIN does not arrive, or not every byte after it.
pub fn check_server_half_close(target: SocketAddr, endings: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    let mut greeting = Vec::new();
    stream.read_to_end(&mut greeting).context("waiting for the server's half-close")?;
    if greeting != b"goodbye" {
        bail!("the server said {greeting:?}");
    }
    // Another number than the last client's.
    let sent = vec![b'y'; 200_000 + usize::try_from(std::process::id() % 10_000)?];
    stream.write_all(&sent).context("sending after the server's half-close")?;
    stream.shutdown(Shutdown::Write).context("half-closing after the server did")?;
    wait_for_ending(endings, &format!("end {} after goodbye", sent.len()))
}

/// The server must be heard before the client says anything.
///
/// # Errors
/// When it is not, or the echo after it is wrong.
pub fn check_server_first(target: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    let mut banner = vec![0; BANNER.len()];
    stream.read_exact(&mut banner).context("waiting for the banner")?;
    if banner != BANNER {
        bail!("the banner is {banner:?}");
    }
    stream.write_all(b"EHLO")?;
    let mut echo = [0; 4];
    stream.read_exact(&mut echo)?;
    if &echo != b"EHLO" {
        bail!("the echo is {echo:?}");
    }
    Ok(())
}

/// The server resets: the client must hear what came before, and see a reset, not an orderly end.
///
/// # Errors
/// When it sees anything else.
pub fn check_server_reset(target: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(b"x")?;
    let mut heard = [0; LAST_WORDS.len()];
    stream.read_exact(&mut heard).context("what the server said before its reset")?;
    match stream.read(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("instead of a reset: {other:?}"),
    }
}

/// The client resets: the server must hear what came before, and see a reset, not an orderly end.
///
/// # Errors
/// When the server says otherwise (asked at `endings`).
pub fn check_client_reset(target: SocketAddr, endings: SocketAddr) -> anyhow::Result<()> {
    // An orderly end first, so that an old "reset" cannot pass for the new one.
    let mut first = watched(target)?;
    first.write_all(b"abc")?;
    drop(first);
    wait_for_ending(endings, "end 3")?;
    let mut second = watched(target)?;
    second.write_all(&LAST_WORDS)?;
    reset(&second)?;
    drop(second);
    wait_for_ending(endings, &format!("reset after {}", LAST_WORDS.len()))
}

/// A connection that the server has.
fn watched(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = connect(target)?;
    stream.read_exact(&mut [0]).context("waiting for the server to have the connection")?;
    Ok(stream)
}

fn wait_for_ending(endings: SocketAddr, wanted: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        let mut text = String::new();
        connect(endings)?.read_to_string(&mut text)?;
        if text == wanted {
            return Ok(());
        }
        if started.elapsed() > LIMIT {
            bail!("the server saw {text:?}, not {wanted:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A port nobody listens on: refused or reset, within `limit`, never a hang and never silence. Gives which, and how soon.
///
/// # Errors
/// When the connection lives, or ends too late.
pub fn check_closed(
    target: SocketAddr,
    limit: Duration,
) -> anyhow::Result<(&'static str, Duration)> {
    let started = Instant::now();
    let how = match TcpStream::connect_timeout(&target, LIMIT) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => "refused",
        // An agent accepted, and reset before the call looked.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => "reset",
        Err(error) => bail!("instead of a refusal: {error}"),
        Ok(mut stream) => {
            stream.set_read_timeout(Some(LIMIT))?;
            match stream.read(&mut [0; 1]) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => "reset",
                other => bail!("instead of a reset: {other:?}"),
            }
        }
    };
    let took = started.elapsed();
    if took > limit {
        bail!("{how} only after {took:?}");
    }
    Ok((how, took))
}

/// The addresses both ends see: gives (`getpeername` here, our address there, its own address there).
///
/// # Errors
/// When the server does not answer.
pub fn who(target: SocketAddr) -> anyhow::Result<(SocketAddr, SocketAddr, SocketAddr)> {
    let mut stream = connect(target)?;
    let peer = stream.peer_addr()?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (client, server) =
        text.split_once(' ').with_context(|| format!("the server said {text:?}"))?;
    Ok((peer, client.parse()?, server.parse()?))
}
